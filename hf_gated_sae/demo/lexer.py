"""A lexer for Python that never raises, so that generated text can be labelled like real source.

`tokenize` is not suitable: it stops at the first error, in a way that depends on the version of Python (3.12 moved to
the C tokenizer), and it splits f-strings on some versions only. On well-formed source this lexer finds the same
strings, comments, names, numbers, operators, logical lines and block depths as `tokenize`; tests check that on the
standard library. On broken source it continues:

* an unterminated string in triple quotes extends to the end of the text, in single quotes to the end of its line;
* an unclosed bracket ends at the next line that begins with a word that only begins statements;
* a dedent to a column of no open block closes every deeper block and opens a new one.
"""

import re
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, cast

Kind = Literal["name", "number", "string", "comment", "operator", "unknown"]

_LEXEME = re.compile(
    r"""
      (?P<space> [\ \t\f]+ | \\(?:\r\n?|\n) )
    | (?P<newline> \r\n? | \n )
    | (?P<comment> \#[^\r\n]* )
    | (?P<string> (?:[rR][bBfFtT]?|[bBfFtT][rR]?|[uU])?(?P<quote>\"{3}|'{3}|["']) )
    | (?P<name> [^\W\d]\w* )
    | (?P<number> 0[xX](?:_?[0-9a-fA-F])+ | 0[bB](?:_?[01])+ | 0[oO](?:_?[0-7])+
        | (?: [0-9](?:_?[0-9])*(?:\.(?:[0-9](?:_?[0-9])*)?)? | \.[0-9](?:_?[0-9])* )
          (?: [eE][+-]?[0-9](?:_?[0-9])* )? [jJ]? )
    | (?P<operator> \.\.\. | -> | := | (?:\*\*|//|<<|>>)=? | [-+*/%@&|^=<>!]=
        | [-+*/%@&|^=<>~.,:;()\[\]{}] )
    | (?P<unknown> . )
    """,
    re.VERBOSE | re.DOTALL,
)

# The contents of a string before its closing quote. Every alternative also matches at the end of the text, so the body
# is always found in linear time.
_BODIES = {
    **{q: re.compile(rf"[^{q}\\\r\n]*(?:\\(?:\r\n|.|\Z)[^{q}\\\r\n]*)*", re.DOTALL) for q in ('"', "'")},
    **{q * 3: re.compile(rf"[^{q}\\]*(?:(?:\\(?:.|\Z)|{q}(?!{q}{q}))[^{q}\\]*)*", re.DOTALL) for q in ('"', "'")},
}

_STATEMENT_WORDS = frozenset(
    {
        *("assert", "break", "class", "continue", "def", "del", "elif", "except", "finally", "global", "import"),
        *("nonlocal", "pass", "raise", "return", "try", "while", "with"),
    }
)
"""Keywords that no expression contains: at the beginning of a line they show that a bracket was not closed."""


class Token(NamedTuple):
    """One piece of source; whitespace and line breaks are not tokens.

    Args:
        kind: of the token.
        text: its characters.
        start: offset of its first character.
        closed: False for a string whose closing quote is missing.
    """

    kind: Kind
    text: str
    start: int
    closed: bool = True

    @property
    def end(self) -> int:
        """Offset after the last character."""
        return self.start + len(self.text)


@dataclass
class LogicalLine:
    """A logical line of Python's grammar: brackets and backslashes join physical lines.

    Args:
        start: offset of its first character, indentation included.
        depth: number of enclosing blocks.
        tokens: its tokens without comments; empty for a line that is only a comment.
        end: offset after its last token or comment.
        complete: whether it ends with a line break, with all brackets closed.
    """

    start: int
    depth: int
    tokens: list[Token] = field(default_factory=list)
    end: int = 0
    complete: bool = False


@dataclass
class Source:
    """A lexed text.

    Args:
        text: the characters.
        tokens: all tokens, comments included, in order.
        lines: the logical lines in order; blank lines belong to none.
    """

    text: str
    tokens: list[Token]
    lines: list[LogicalLine]


def lex(text: str) -> Source:
    """Lex a text that may be incomplete or broken anywhere.

    Args:
        text: Python source, possibly incomplete or invalid.

    Returns:
        Its tokens and logical lines.
    """
    lexer = _Lexer()
    position = 0
    while position < len(text):
        match = _match(_LEXEME, text, position)
        kind = match.lastgroup
        if kind == "string":
            position, closed = _string_end(text, match)
            lexer.token(Token("string", text[match.start() : position], match.start(), closed))
            continue
        position = match.end()
        if kind == "newline":
            lexer.line_break(position)
        elif kind != "space":
            lexer.token(Token(cast(Kind, kind), match.group(), match.start()))
        elif lexer.at_line_start and not match.group().startswith("\\"):
            lexer.column = _column(match.group())
    return Source(text, lexer.tokens, lexer.lines)


def _match(pattern: re.Pattern[str], text: str, position: int) -> re.Match[str]:
    """Match one of this module's patterns, all of which match at any offset."""
    match = pattern.match(text, position)
    if match is None:
        raise AssertionError(f"{pattern.pattern!r} does not match at offset {position}; it must match anywhere")
    return match


def _column(blanks: str) -> int:
    """Return the width of an indentation as in Python: a tab to the next multiple of eight, a form feed to zero."""
    return len(blanks.rpartition("\f")[2].expandtabs(8))


def _string_end(text: str, opening: re.Match[str]) -> tuple[int, bool]:
    """Return the end of a string, given its prefix and opening quote, and whether its closing quote exists."""
    quote = opening["quote"]
    prefix = opening["string"][: -len(quote)].lower()
    if "f" in prefix or "t" in prefix:
        body_end = _formatted_body_end(text, opening.end(), quote)
    else:
        body_end = _match(_BODIES[quote], text, opening.end()).end()
    closed = text.startswith(quote, body_end)
    return body_end + len(quote) * closed, closed


def _formatted_body_end(text: str, position: int, quote: str) -> int:
    """Return the end of the body of an f- or t-string; replacement fields may hold strings in the same quotes."""
    # One entry per open replacement field: number of brackets open in its expression, or -1 inside its format spec.
    fields: list[int] = []
    while position < len(text):
        character = text[position]
        if character in "\r\n" and len(quote) == 1:
            return position
        in_expression = bool(fields) and fields[-1] >= 0
        if text.startswith(quote, position) and not (in_expression and len(quote) == 1):
            return position
        position += 1
        if not in_expression:
            if character == "\\" and not text.startswith("{", position):
                position += 2 if text.startswith("\r\n", position) else 1
            elif character == "{":
                if not fields and text.startswith("{", position):
                    position += 1
                else:
                    fields.append(0)
            elif character == "}" and fields:
                fields.pop()
        elif character in "\"'":
            inner = character * 3 if text.startswith(character * 2, position) and len(quote) == 1 else character
            position += len(inner) - 1
            position = _match(_BODIES[inner], text, position).end()
            position += len(inner) if text.startswith(inner, position) else 0
        elif character == "}" and fields[-1] == 0:
            fields.pop()
        elif character == ":" and fields[-1] == 0:
            fields[-1] = -1
        elif character in "([{":
            fields[-1] += 1
        elif character in ")]}":
            fields[-1] = max(0, fields[-1] - 1)
    return min(position, len(text))


class _Lexer:
    """Groups tokens into logical lines, and tracks open brackets and blocks."""

    def __init__(self) -> None:
        self.tokens: list[Token] = []
        self.lines: list[LogicalLine] = []
        self.at_line_start = True
        self.column = 0
        self._line: LogicalLine | None = None
        self._line_start = 0
        self._brackets = 0
        self._indents = [0]

    def token(self, token: Token) -> None:
        """Add the next token."""
        self.tokens.append(token)
        if self.at_line_start and self._brackets and token.kind == "name" and token.text in _STATEMENT_WORDS:
            self._brackets, self._line = 0, None
        self.at_line_start = False
        if self._line is None:
            depth = self._depth(opens_block=token.kind != "comment")
            self._line = LogicalLine(self._line_start, depth)
            self.lines.append(self._line)
        self._line.end = token.end
        if token.kind == "comment":
            return
        self._line.tokens.append(token)
        if token.kind == "operator":
            if token.text in "([{":
                self._brackets += 1
            elif token.text in ")]}":
                self._brackets = max(0, self._brackets - 1)

    def line_break(self, end: int) -> None:
        """Add a line break outside strings that ends at an offset."""
        self.at_line_start, self.column = True, 0
        if self._line is not None and not self._brackets:
            self._line.complete = True
            self._line = None
        self._line_start = end

    def _depth(self, opens_block: bool) -> int:
        """Return the number of blocks around a line, by its column; a comment neither opens nor closes blocks."""
        indents = [level for level in self._indents if level <= self.column]
        if self.column > indents[-1]:
            indents.append(self.column)
        if opens_block:
            self._indents = indents
        return len(indents) - 1
