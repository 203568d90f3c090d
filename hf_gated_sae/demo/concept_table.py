"""The concepts of the demo: properties of Python source that can be determined exactly, to compare with latents.

A concept is one decorated function below. All of them read the tokens of `hf_gated_sae.demo.lexer`, so they apply to
whole files, to pieces of files and to generated text.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from keyword import iskeyword
from typing import TypeAlias

from .lexer import Kind, LogicalLine, Source, Token

Span: TypeAlias = tuple[int, int]
"""Offsets of the first character and after the last one."""

Finder: TypeAlias = Callable[[Source], Iterable[Span]]


@dataclass(frozen=True)
class Concept:
    """One named property of characters.

    Args:
        name: for users and tables.
        description: one phrase.
        find: yields the spans of characters that have it.
        counts_whitespace: whether blanks count like other characters in a token or in a share.
    """

    name: str
    description: str
    find: Finder
    counts_whitespace: bool = False


CONCEPTS: dict[str, Concept] = {}
"""Every concept by name, in the order of definition; filled by `concept`."""


def concept(*, counts_whitespace: bool = False) -> Callable[[Finder], Finder]:
    """Register a function as the concept of its name, described by its docstring.

    Args:
        counts_whitespace: see `Concept`.

    Returns:
        A decorator that returns the function unchanged.
    """

    def register(find: Finder) -> Finder:
        name = find.__name__
        CONCEPTS[name] = Concept(name, (find.__doc__ or name).strip(), find, counts_whitespace)
        return find

    return register


@concept()
def string(source: Source) -> Iterable[Span]:
    """Any string literal with its prefix and quotes; an f-string as a whole."""
    return _of_kind(source, "string")


@concept()
def docstring(source: Source) -> Iterable[Span]:
    """A string that documents a module, a class or a function."""
    body_depth: int | None = 0
    for line in source.lines:
        if not line.tokens:
            continue
        literals = _leading_strings(line.tokens) if line.depth == body_depth else []
        body_depth = None
        if _defines(line):
            body = _after_header(line.tokens)
            literals = _leading_strings(body or [])
            body_depth = line.depth + 1 if body == [] else None
        if literals:
            yield literals[0].start, literals[-1].end


@concept()
def comment(source: Source) -> Iterable[Span]:
    """From `#` to the end of the line."""
    return _of_kind(source, "comment")


@concept()
def function_name(source: Source) -> Iterable[Span]:
    """The name that follows `def`."""
    return _name_after(source, "def")


@concept()
def class_name(source: Source) -> Iterable[Span]:
    """The name that follows `class`."""
    return _name_after(source, "class")


@concept()
def call_name(source: Source) -> Iterable[Span]:
    """A name directly before `(`, other than in a definition."""
    for before, name, after in _windows(source):
        if _is_name(name) and after.text == "(" and before.text not in ("def", "class"):
            yield name.start, name.end


@concept()
def self_attribute(source: Source) -> Iterable[Span]:
    """The name that follows `self.`."""
    for owner, dot, name in _windows(source):
        if owner.text == "self" and dot.text == "." and _is_name(name):
            yield name.start, name.end


@concept()
def dunder_name(source: Source) -> Iterable[Span]:
    """A name between double underscores."""
    return ((t.start, t.end) for t in source.tokens if _is_name(t) and t.text[:2] == "__" == t.text[-2:])


@concept()
def number(source: Source) -> Iterable[Span]:
    """A numeric literal."""
    return _of_kind(source, "number")


@concept()
def keyword(source: Source) -> Iterable[Span]:
    """A reserved word, `None`, `True` and `False` included."""
    return ((t.start, t.end) for t in source.tokens if t.kind == "name" and iskeyword(t.text))


@concept()
def constant(source: Source) -> Iterable[Span]:
    """`None`, `True` or `False`."""
    return ((t.start, t.end) for t in source.tokens if t.kind == "name" and t.text in ("None", "True", "False"))


@concept()
def operator(source: Source) -> Iterable[Span]:
    """An operator: arithmetic, comparison, assignment, unpacking, `->`, `@`."""
    return ((t.start, t.end) for t in source.tokens if t.kind == "operator" and t.text not in _PUNCTUATION)


@concept()
def punctuation(source: Source) -> Iterable[Span]:
    """A bracket, comma, colon, semicolon, dot or ellipsis."""
    return ((t.start, t.end) for t in source.tokens if t.kind == "operator" and t.text in _PUNCTUATION)


@concept()
def import_line(source: Source) -> Iterable[Span]:
    """A statement that begins with `import` or `from`, to its last character."""
    return _lines_that_begin_with(source, "import", "from")


@concept()
def decorator(source: Source) -> Iterable[Span]:
    """A decorator, from `@` to its last character."""
    return _lines_that_begin_with(source, "@")


@concept()
def raise_line(source: Source) -> Iterable[Span]:
    """A statement that begins with `raise`."""
    return _lines_that_begin_with(source, "raise")


@concept()
def return_line(source: Source) -> Iterable[Span]:
    """A statement that begins with `return`."""
    return _lines_that_begin_with(source, "return")


@concept(counts_whitespace=True)
def indent_0(source: Source) -> Iterable[Span]:
    """A statement outside every block."""
    return ((line.start, line.end) for line in source.lines if line.depth == 0)


@concept(counts_whitespace=True)
def indent_1(source: Source) -> Iterable[Span]:
    """A statement one block deep, its indentation included."""
    return ((line.start, line.end) for line in source.lines if line.depth == 1)


@concept(counts_whitespace=True)
def indent_2(source: Source) -> Iterable[Span]:
    """A statement two blocks deep, its indentation included."""
    return ((line.start, line.end) for line in source.lines if line.depth == 2)


@concept(counts_whitespace=True)
def indent_3_plus(source: Source) -> Iterable[Span]:
    """A statement at least three blocks deep, its indentation included."""
    return ((line.start, line.end) for line in source.lines if line.depth >= 3)


_PUNCTUATION = frozenset([*"()[]{},:;.", "..."])

_FORMATTED_OR_BYTES = frozenset("fFtTbB")


def _of_kind(source: Source, kind: Kind) -> Iterator[Span]:
    """Yield the spans of the tokens of one kind."""
    return ((token.start, token.end) for token in source.tokens if token.kind == kind)


def _is_name(token: Token) -> bool:
    """Whether a token is an identifier, and not a reserved word."""
    return token.kind == "name" and not iskeyword(token.text)


def _windows(source: Source) -> Iterator[tuple[Token, Token, Token]]:
    """Yield every three consecutive tokens of every logical line, with an empty token before the first."""
    for line in source.lines:
        padded = [Token("unknown", "", line.start), *line.tokens]
        yield from zip(padded, padded[1:], padded[2:], strict=False)


def _name_after(source: Source, word: str) -> Iterator[Span]:
    """Yield the spans of the names that directly follow a reserved word on its logical line."""
    for line in source.lines:
        for before, name in zip(line.tokens, line.tokens[1:], strict=False):
            if before.text == word and _is_name(name):
                yield name.start, name.end


def _lines_that_begin_with(source: Source, *words: str) -> Iterator[Span]:
    """Yield the spans of the logical lines whose first token is one of `words`, without trailing comments."""
    for line in source.lines:
        if line.tokens and line.tokens[0].text in words:
            yield line.tokens[0].start, line.tokens[-1].end


def _defines(line: LogicalLine) -> bool:
    """Whether a line with tokens is the header of a function or a class."""
    words = [token.text for token in line.tokens[:2]]
    return words[0] in ("def", "class") or words == ["async", "def"]


def _after_header(tokens: Sequence[Token]) -> list[Token] | None:
    """Return the tokens after the colon of a definition's header, or None if the header has no colon yet."""
    brackets = 0
    for index, token in enumerate(tokens):
        if token.kind == "operator":
            brackets += (token.text in "([{") - (token.text in ")]}")
            if token.text == ":" and brackets == 0:
                return list(tokens[index + 1 :])
    return None


def _leading_strings(tokens: Sequence[Token]) -> list[Token]:
    """Return the literals of the first statement if it consists of text strings only; else none."""
    literals: list[Token] = []
    for token in tokens:
        if token.text == ";":
            break
        prefix = token.text[: len(token.text) - len(token.text.lstrip("rRuUbBfFtT"))]
        if token.kind != "string" or not _FORMATTED_OR_BYTES.isdisjoint(prefix):
            return []
        literals.append(token)
    return literals
