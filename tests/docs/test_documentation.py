"""The pages under docs/: what they show is all that is public, runs, and gives the numbers that they claim.

That the site builds without a warning is a step of ``./run test``.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import genloss_kernels as gk
from genloss_kernels.testing import assert_close

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {page.relative_to(DOCS).as_posix(): page.read_text() for page in sorted(DOCS.rglob("*.md"))}


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- pages -----------------------------------------------------------------------------------------------------------


def public_names(module: ModuleType) -> Iterator[str]:
    for name in module.__all__:
        value = getattr(module, name)
        if isinstance(value, ModuleType):
            if value not in (gk.functional, gk.nn):  # all of whose names the package has too
                yield from public_names(value)
        elif name != "__version__" and (module is gk or name not in gk.__all__):
            yield f"{module.__name__}.{name}"


def test_every_public_name_is_on_one_page() -> None:
    shown = Counter(re.findall(r"^::: (\S+)$", "\n".join(PAGES.values()), re.MULTILINE))
    assert shown == Counter(public_names(gk))


def test_every_family_says_how_it_differs_from_torch() -> None:
    for name, text in PAGES.items():
        if name.startswith("losses/"):
            assert text.endswith("## Differences from torch\n\n<!-- differences from torch -->\n"), name


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if "```python\n" in text])
def test_code_runs(page: str) -> None:
    """The blocks of a page, one after another in one namespace."""
    namespace: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGES[page], re.DOTALL | re.MULTILINE):
        exec(compile(block, page, "exec"), namespace)


def test_every_figure_is_on_a_page() -> None:
    pytest.importorskip("matplotlib")
    used = re.findall(r"\(\.\./figures/(\w+)\.svg\)", "\n".join(PAGES.values()))
    assert Counter(used) == Counter(script("figures").FIGURES.keys())


# --- docstrings ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def docstrings() -> ModuleType:
    pytest.importorskip("griffe")
    return script("docstrings")


DOCSTRING = """Summary with :math:`x_1` and :func:`genloss_kernels.cross_entropy`.

.. math::
    a + b, \\qquad
    c

===== ====
A     B
===== ====
``1`` beyond
===== ====

Args:
    x: stays.

Numerics:
    One line,
    another.

Differs from torch:
    In this,
    and that.

Example:
    >>> 1
    1
"""

MARKDOWN = """Summary with `#!math x_1` and [`cross_entropy`][genloss_kernels.cross_entropy].

```math
a + b, \\qquad
c
```

| A | B |
| --- | --- |
| ``1`` | beyond |

Args:
    x: stays.

<p><span class="doc-section-title">Numerics:</span></p>

One line,
another.

Examples:
    >>> 1
    1
"""


def test_docstring_becomes_markdown(docstrings: ModuleType) -> None:
    assert docstrings.to_markdown(DOCSTRING).rstrip() == MARKDOWN.rstrip()
    assert docstrings.section(DOCSTRING, "Differs from torch") == "In this,\nand that."
    assert docstrings.section(DOCSTRING, "Source") is None


@pytest.mark.parametrize("name", sorted(public_names(gk)))
def test_docstrings_have_no_other_markup(name: str, docstrings: ModuleType) -> None:
    value: Any = gk
    for part in name.split(".")[1:]:
        value = getattr(value, part)
    assert not re.search(r"^\.\. |:\w+:`|====", docstrings.to_markdown(inspect.getdoc(value) or ""), re.MULTILINE)


@pytest.mark.parametrize("name", [n for n in gk.functional.__all__ if inspect.isfunction(getattr(gk, n))])
def test_every_function_says_how_it_differs_from_torch(name: str, docstrings: ModuleType) -> None:
    assert docstrings.section(inspect.getdoc(getattr(gk, name)), docstrings.DIFFERENCES)


# --- migration -------------------------------------------------------------------------------------------------------

MIGRATION = PAGES["guides/migration.md"]
OURS = re.findall(r"`(gk\.[^`]+)`", MIGRATION)
TORCH_ROWS = re.findall(r"^\| `([^`]+)` \| `(gk\.[^`]+)` \|$", MIGRATION.partition("\n## Liger")[0], re.MULTILINE)


def operands(dtype: torch.dtype) -> dict[str, Any]:
    """What the guide's expressions name."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "gk": gk, "torch": torch, "F": F, "count": torch.tensor(5.0),
        "logits": normal(6, 40) * 5, "teacher": normal(6, 40), "labels": torch.arange(6),
        "log_probability": normal(6, 40).log_softmax(-1), "probability": normal(6, 40).softmax(-1),
        "hidden": normal(6, 8), "weight": normal(40, 8), "bias": normal(40), "class_weight": normal(40).exp(),
        "sequence": normal(2, 5, 40), "states": normal(2, 5, 8), "tokens": torch.arange(10).reshape(2, 5),
        "score": normal(6, 3), "target": normal(6, 3).sigmoid(), "mask": torch.arange(18).reshape(6, 3) % 3 > 0,
        "mu": normal(4, 3), "logvar": normal(4, 3), "recon": normal(4, 7), "image": normal(4, 7),
        "real": normal(9), "fake": normal(9), "grad": normal(4, 3, 5),
    }  # fmt: skip


def attribute(node: ast.AST) -> Any:
    """The object that a dotted name below ``gk`` names; None for any other expression."""
    if isinstance(node, ast.Name):
        return gk if node.id == "gk" else None
    owner = attribute(node.value) if isinstance(node, ast.Attribute) else None
    return None if owner is None else getattr(owner, node.attr)


@pytest.mark.parametrize("expression", sorted(set(OURS)))
def test_migration_names_exist_and_take_these_arguments(expression: str) -> None:
    calls = [node for node in ast.walk(ast.parse(expression, mode="eval")) if isinstance(node, ast.Call)]
    ours = [(call, function) for call in calls if (function := attribute(call.func)) is not None]
    assert ours
    for call, function in ours:
        inspect.signature(function).bind(*call.args, **{keyword.arg: None for keyword in call.keywords if keyword.arg})


@pytest.mark.parametrize("expression", sorted(e for e in set(OURS) if not re.search(r"\b(model|group)\b", e)))
def test_migration_expression_runs(expression: str) -> None:
    eval(expression, operands(torch.float32))


@pytest.mark.parametrize(("torchs", "ours"), TORCH_ROWS, ids=[ours for _, ours in TORCH_ROWS])
def test_migration_gives_torchs_numbers(torchs: str, ours: str) -> None:
    found, like, exact = (
        eval(ours, operands(torch.float32)),
        *(eval(torchs, operands(d)) for d in (torch.float32, torch.float64)),
    )
    if found.is_floating_point():
        assert_close(found, exact.double(), like=like)
    else:
        assert found == exact


def test_every_row_beside_torch_is_compared() -> None:
    table = MIGRATION.partition("| in torch |")[2].partition("\n\n")[0]
    assert len(TORCH_ROWS) == len(table.splitlines()) - 2 > 10
