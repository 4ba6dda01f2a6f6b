"""What mkdocs does for this site beside its plugins: formulas, figures, and differences from torch."""

from __future__ import annotations

import inspect
import re
from typing import Any

import figures
import latex2mathml.converter
from docstrings import DIFFERENCES, section, to_markdown
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

import genloss_kernels

_DIRECTIVE = re.compile(r"^::: genloss_kernels\.(\w+)$", re.MULTILINE)
_FETCHED = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=["'](?:https?:)?//[^"']*""")


def _formula(source: str, *_: Any, **__: Any) -> str:
    return f"<div>{latex2mathml.converter.convert(source, display='block')}</div>"


def _inline_formula(source: str, *_: Any, **__: Any) -> str:
    return latex2mathml.converter.convert(source)


def on_config(config: MkDocsConfig) -> None:
    """Formulas are MathML, which browsers lay out themselves, so that no script has to be fetched."""
    extensions = config.mdx_configs
    extensions.setdefault("pymdownx.superfences", {})["custom_fences"] = [
        {"name": "math", "class": "math", "format": _formula}
    ]
    extensions.setdefault("pymdownx.inlinehilite", {})["custom_inline"] = [
        {"name": "math", "class": "math", "format": _inline_formula}
    ]


def on_files(files: Files, config: MkDocsConfig) -> None:
    for name in figures.FIGURES:
        files.append(File.generated(config, f"figures/{name}.svg", content=figures.draw(name)))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page's functions beside torch's, where the page asks for it, as their docstrings put it."""
    found = []
    for name in _DIRECTIVE.findall(markdown):
        text = section(inspect.getdoc(getattr(genloss_kernels, name)) or "", DIFFERENCES)
        if text:
            found.append(f"- [`{name}`][genloss_kernels.{name}]: {' '.join(to_markdown(text).split())}")
    return markdown.replace("<!-- differences from torch -->", "\n".join(found))


def on_post_page(output: str, page: Any, **_: Any) -> None:
    if fetched := _FETCHED.search(output):
        raise PluginError(f"{page.file.src_uri} would fetch {fetched[0]}")
