"""One source file, its syntax tree, and byte-exact positions in it."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

_COMMENT = re.compile(rb"#[^\n]*")
_BLOCK_STATEMENTS = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.If,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.With,
    ast.AsyncWith,
    ast.Try,
)


class Source:
    """``ast`` counts columns in UTF-8 bytes, so every position here is a byte offset."""

    def __init__(self, path: str, data: bytes) -> None:
        self.path = path
        self.data = data
        self.tree = ast.parse(data, filename=path)
        self._line_starts = [0]
        for line in data.split(b"\n"):
            self._line_starts.append(self._line_starts[-1] + len(line) + 1)

    def start(self, node: ast.AST) -> int:
        return self._line_starts[node.lineno - 1] + node.col_offset

    def end(self, node: ast.AST) -> int:
        return self._line_starts[node.end_lineno - 1] + node.end_col_offset

    def text(self, node: ast.AST) -> str:
        return self.data[self.start(node) : self.end(node)].decode()

    def position(self, offset: int) -> tuple[int, int]:
        """Line and column of an offset, both from 1."""
        line = self.data.count(b"\n", 0, offset) + 1
        return line, offset - self._line_starts[line - 1] + 1

    def find_token(self, pattern: str, start: int, end: int) -> tuple[int, int]:
        """Span of the operator between two operands; what lies there besides it is brackets, blanks and comments."""
        gap = _COMMENT.sub(lambda comment: b" " * len(comment.group()), self.data[start:end])
        match = re.search(pattern.encode(), gap)
        if match is None:
            raise ValueError(f"{self.path}: no {pattern!r} in {gap!r}")
        return start + match.start(), start + match.end()

    def statement_span(self, statement: ast.stmt) -> tuple[int, int]:
        """Span of a simple statement, or of the header of one that has a body."""
        if isinstance(statement, _BLOCK_STATEMENTS):
            return self.start(statement), self.start(statement.body[0])
        return self.start(statement), self.end(statement)


@dataclass(frozen=True)
class Edit:
    """A replacement of bytes ``start:end``; ``anchor`` is the offset that names it in the mutant's id."""

    operator: str
    variant: str
    anchor: int
    start: int
    end: int
    replacement: str

    def apply(self, data: bytes) -> bytes:
        return data[: self.start] + self.replacement.encode() + data[self.end :]


@dataclass(frozen=True)
class Mutant:
    source: Source
    function: str
    edit: Edit
    statement: tuple[int, int]

    @property
    def id(self) -> str:
        line, column = self.source.position(self.edit.anchor)
        return f"{self.source.path}:{line}:{column}:{self.edit.operator}:{self.edit.variant}"

    @property
    def mutated(self) -> bytes:
        return self.edit.apply(self.source.data)

    @property
    def key(self) -> dict[str, str]:
        """What the mutant changes, in terms that edits elsewhere in the file leave alone."""
        start, end = self.statement
        original = self.source.data[start:end]
        before = self.source.data[start : self.edit.start]
        after = self.source.data[self.edit.end : end]
        mutated = before + self.edit.replacement.encode() + after
        return {
            "file": self.source.path,
            "function": self.function,
            "operator": self.edit.operator,
            "original": " ".join(original.decode().split()),
            "mutated": " ".join(mutated.decode().split()),
        }
