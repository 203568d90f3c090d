"""The ground truth agrees with Python's own parsers, and labels sensibly what they cannot parse."""

import ast
import io
import time
import token as token_types
import tokenize

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gated_sae.demo import corpus
from hf_gated_sae.demo.lexer import lex
from hf_gated_sae.demo.token_concepts import CONCEPTS, Concepts, concept_share, token_labels
from hf_gated_sae.errors import InputError, UnknownNameError

pytestmark = pytest.mark.slow

EXAMPLE = '''\
"""Module text."""
import os.path
from json import (
    dumps,  # out
    loads,
)


@decorated(1)
class Thing(Base):
    """Class text."""

    async def method(self, x: int = 0x1F) -> str:
        # a comment
        if x >= 2.5e3:
            return f"{self.name!r:>{x}} {'a'}" + os.sep
        raise __doc__
'''

KINDS = {
    token_types.NAME: "name",
    token_types.NUMBER: "number",
    token_types.STRING: "string",
    token_types.OP: "operator",
    token_types.COMMENT: "comment",
}


def marked(text, name):
    """Return the parts of a text that have a concept."""
    row = Concepts(text, [name]).characters[0].tolist()
    marks = "".join(c if on else "\0" for c, on in zip(text, row, strict=True))
    return [piece for piece in marks.split("\0") if piece]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("docstring", ['"""Module text."""', '"""Class text."""']),
        ("string", ['"""Module text."""', '"""Class text."""', "f\"{self.name!r:>{x}} {'a'}\""]),
        ("comment", ["# out", "# a comment"]),
        ("function_name", ["method"]),
        ("class_name", ["Thing"]),
        ("call_name", ["decorated"]),
        ("number", ["1", "0x1F", "2.5e3"]),
        ("dunder_name", ["__doc__"]),
        ("decorator", ["@decorated(1)"]),
        ("import_line", ["import os.path", "from json import (\n    dumps,  # out\n    loads,\n)"]),
        ("keyword", ["import", "from", "import", "class", "async", "def", "if", "return", "raise"]),
        ("operator", ["@", "=", "->", ">=", "+"]),
        ("raise_line", ["raise __doc__"]),
        ("indent_2", ["        # a comment", "        if x >= 2.5e3:", "        raise __doc__"]),
    ],
)
def test_each_concept_on_an_example(name, expected):
    assert marked(EXAMPLE, name) == expected


def test_self_attribute_is_the_name_after_self():
    assert marked("self.size = self.make(other.size)\n", "self_attribute") == ["size", "make"]


def test_every_character_of_a_statement_has_exactly_one_depth():
    names = ["indent_0", "indent_1", "indent_2", "indent_3_plus"]
    depths = Concepts(EXAMPLE, names).characters.sum(dim=0)
    assert depths.max() == 1
    assert all(depths[i] == 1 for i, character in enumerate(EXAMPLE) if not character.isspace())


def reference_tokens(text):
    """Return kind and offsets of every token, and start and depth of every logical line, from `tokenize`."""
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    tokens, lines, depth, opens_line, formatted, begin = [], [], 0, True, 0, 0
    for item in tokenize.generate_tokens(io.StringIO(text).readline):
        name = token_types.tok_name[item.type]
        start, end = (starts[row - 1] + column for row, column in (item.start, item.end))
        if name in ("FSTRING_START", "TSTRING_START"):
            begin, formatted = (begin if formatted else start), formatted + 1
        elif name in ("FSTRING_END", "TSTRING_END"):
            formatted -= 1
            if not formatted:
                tokens.append(("string", begin, end))
                if opens_line:
                    lines.append((begin, depth))
                    opens_line = False
        elif formatted:
            continue
        elif item.type in (token_types.INDENT, token_types.DEDENT):
            depth += 1 if item.type == token_types.INDENT else -1
        elif item.type == token_types.NEWLINE:
            opens_line = True
        elif item.type in KINDS:
            tokens.append((KINDS[item.type], start, end))
            if opens_line and item.type != token_types.COMMENT:
                lines.append((start, depth))
                opens_line = False
    return tokens, lines


def ast_spans(text):
    """Return spans of docstrings and of import statements, from `ast`."""
    encoded, starts = text.encode(), [0]
    for line in encoded.split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)

    def span(node):
        ends = ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))
        return tuple(len(encoded[: starts[row - 1] + column].decode()) for row, column in ends)

    docstrings, imports = set(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imports.add(span(node))
        elif isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                docstrings.add(span(node.body[0].value))
    return docstrings, imports


def test_the_lexer_agrees_with_tokenize_on_held_out_files():
    for path in corpus.held_out_files():
        text = corpus.read(path)
        source = lex(text)
        tokens, lines = reference_tokens(text)
        assert [(token.kind, token.start, token.end) for token in source.tokens] == tokens, path
        assert [(line.tokens[0].start, line.depth) for line in source.lines if line.tokens] == lines, path


def test_docstrings_and_imports_agree_with_ast_on_held_out_files():
    for path in corpus.held_out_files():
        text = corpus.read(path)
        docstrings, imports = ast_spans(text)
        source = lex(text)
        assert set(CONCEPTS["docstring"].find(source)) == docstrings, path
        # A statement after a semicolon or a colon does not begin a line.
        found = set(CONCEPTS["import_line"].find(source))
        assert found <= imports and len(found) >= 0.98 * len(imports), path


@pytest.mark.parametrize(
    ("text", "name", "tail"),
    [
        ('x = 1\ny = """open\nfor ever', "string", '"""open\nfor ever'),
        ('def f():\n    """Text that\n    stops', "docstring", '"""Text that\n    stops'),
        ("x = 'open", "string", "'open"),
        ("x = 1  # sto", "comment", "# sto"),
        ('x = f"{a} {b', "string", 'f"{a} {b'),
        ("from os import (path,\n    se", "import_line", "from os import (path,\n    se"),
        ("def na", "function_name", "na"),
        ("@property.set", "decorator", "@property.set"),
        ("if x:\n        y\n    z = 1", "indent_1", "    z = 1"),
    ],
)
def test_the_tail_of_cut_source_is_labelled(text, name, tail):
    assert marked(text, name)[-1] == tail


def test_a_single_quote_left_open_ends_with_its_line():
    assert marked("x = 'open\ny = 1\n", "string") == ["'open"]


def test_a_forgotten_bracket_does_not_swallow_the_next_definition():
    text = "def f():\n    call(a,\n    b\n\ndef g():\n    return 1\n"
    assert marked(text, "function_name") == ["f", "g"]
    assert marked(text, "return_line") == ["return 1"]
    assert marked(text, "indent_0")[-1] == "def g():"


def test_an_extra_closing_bracket_is_tolerated():
    assert marked("x = 1))\ndef g(): pass\n", "function_name") == ["g"]


WHOLE = next(text for text in corpus.texts("held_out", 40_000) if len(text) > 3_000)[:12_000]


@settings(max_examples=150, deadline=None)
@given(cut=st.integers(0, len(WHOLE)))
def test_source_cut_anywhere_is_labelled_and_settled_lines_keep_their_labels(cut):
    text = WHOLE[:cut]
    labels = Concepts(text).characters
    assert labels.shape == (len(CONCEPTS), len(text))
    # Labels before the logical line with the cut are those of the whole file.
    settled = max((line.end for line in lex(text).lines if line.complete), default=0)
    assert torch.equal(labels[:, :settled], Concepts(WHOLE).characters[:, :settled])


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="ab_1.0 \n\t\f\r\\'\"#@(){}[]:;=f$é\0", max_size=60))
def test_any_text_is_labelled(text):
    concepts = Concepts(text)
    assert concepts.characters.shape == (len(CONCEPTS), len(text))
    tokens = lex(text).tokens
    assert all(left.end <= right.start for left, right in zip(tokens, tokens[1:], strict=False))
    offsets = [(i, i + 1) for i in range(len(text))]
    assert torch.equal(concepts.token_labels(offsets), concepts.characters.T)


@settings(max_examples=100, deadline=None)
@given(start=st.integers(0, len(WHOLE)), cut=st.integers(0, len(WHOLE)))
def test_any_piece_of_source_is_labelled(start, cut):
    piece = WHOLE[start:cut]
    assert Concepts(piece).characters.shape == (len(CONCEPTS), len(piece))


def test_a_token_has_a_concept_when_more_than_half_of_its_visible_characters_have_it():
    text = "x = 'abc'\n"
    labels = token_labels(text, [(0, 1), (3, 6), (3, 5), (2, 5), (8, 10), (0, 0)], ["string"])[:, 0]
    assert labels.tolist() == [False, True, True, False, True, False]


def test_blanks_count_for_indentation_and_for_blank_tokens_only():
    text = "if x:\n    'a   b'\n"
    labels = token_labels(text, [(5, 10), (12, 15), (10, 14)], ["indent_1", "string"])
    assert labels.tolist() == [[True, False], [True, True], [True, True]]


def test_share_counts_from_the_end_of_the_prompt():
    text = "x = 1\n# all of it\n"
    assert concept_share(text, 6, "comment") == 1.0
    assert concept_share(text, 0, "comment") == pytest.approx(len("#allofit") / len("x=1#allofit"))
    assert concept_share(text, len(text), "comment") == 0.0


def test_mistakes_are_explained():
    with pytest.raises(UnknownNameError, match="Did you mean 'docstring'"):
        Concepts("x", ["docstrings"])
    with pytest.raises(InputError, match="the text has 1 characters"):
        token_labels("x", [(0, 2)])
    with pytest.raises(InputError, match="expected \\[n_tokens, 2\\]"):
        token_labels("x", torch.zeros(2, 3))
    with pytest.raises(InputError, match="start_char is 9"):
        concept_share("x", 9, "string")


def test_the_empty_text_has_empty_labels():
    assert Concepts("").characters.shape == (len(CONCEPTS), 0)
    assert token_labels("", []).shape == (0, len(CONCEPTS))


def test_a_megabyte_takes_seconds():
    text = "".join(corpus.texts("training", 1_000_000))
    begin = time.perf_counter()
    Concepts(text)
    # About one second on an idle core; the bound only catches quadratic behaviour.
    assert time.perf_counter() - begin < 20
