"""The docstrings' markup as Markdown, for mkdocstrings.

They hold sections in Google's style, and formulas, references and tables in reStructuredText.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import Any

import griffe

import genloss_kernels

# That griffe reads itself. Any other is prose under its title.
_STRUCTURED = {"Args", "Raises", "Attributes", "Example"}
# Collected at the end of each page.
DIFFERENCES = "Differs from torch"

_SECTION = re.compile(r"^(?P<title>[A-Z][\w -]+):\n(?P<body>(?:(?: {4}.*)?\n)+)", re.MULTILINE)
_FORMULA = re.compile(r"^\.\. math::\n(?P<tex>(?:    .+\n)+)", re.MULTILINE)
_TABLE = re.compile(r"^=+(?: =+)+\n(?P<head>.+)\n(?P<columns>=+(?: =+)+)\n(?P<rows>(?:.+\n)+?)=+(?: =+)+\n", re.MULTILINE)
_ROLE = re.compile(r":(?P<role>\w+):`(?P<text>[^`]+)`")


def section(docstring: str, title: str) -> str | None:
    """What a docstring, free of its indentation, says under a title."""
    bodies = {found["title"]: found["body"] for found in _SECTION.finditer(docstring + "\n")}
    return textwrap.dedent(bodies[title]).strip() if title in bodies else None


def to_markdown(docstring: str) -> str:
    text = _SECTION.sub(_section, docstring + "\n")
    text = _FORMULA.sub(lambda found: f"```math\n{textwrap.dedent(found['tex'])}```\n", text)
    text = _TABLE.sub(_table, text)
    return _ROLE.sub(_role, text)


def _section(found: re.Match[str]) -> str:
    title, body = found["title"], found["body"]
    if title == DIFFERENCES:
        return ""
    if title == "Example":
        return f"Examples:\n{body}"
    if title in _STRUCTURED:
        return found[0]
    return f'<p><span class="doc-section-title">{title}:</span></p>\n\n{textwrap.dedent(body)}'


def _table(found: re.Match[str]) -> str:
    starts = [column.start() for column in re.finditer("=+", found["columns"])]
    ends = [*starts[1:], None]
    lines = [found["head"], *found["rows"].splitlines()]
    head, *rows = ["| " + " | ".join(line[a:b].strip() for a, b in zip(starts, ends, strict=True)) + " |" for line in lines]
    return "\n".join([head, "| --- " * len(starts) + "|", *rows]) + "\n"


def _role(found: re.Match[str]) -> str:
    role, text = found["role"], found["text"]
    if role == "math":
        return f"`#!math {text}`"
    return f"[`{text.removeprefix('genloss_kernels.')}`][{text}]"


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Give a class the constructor that it has from torch, or as a named tuple: griffe knows neither."""
        value = getattr(genloss_kernels, cls.name, None)
        if value is None or value.__module__ != cls.module.path or "__init__" in vars(value):
            return
        parameters = [
            griffe.Parameter(p.name, kind=griffe.ParameterKind[p.kind.name.lower()], default=_default(p))
            for p in inspect.signature(value).parameters.values()
        ]
        cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(*parameters)))


def _default(parameter: inspect.Parameter) -> str | None:
    return None if parameter.default is inspect.Parameter.empty else repr(parameter.default)
