"""Imports run one way through the package, and Triton only into the files that hold device code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import genloss_kernels

ROOT = Path(genloss_kernels.__file__).parent
PACKAGE = ROOT.name

# What each layer may import beside itself; what is not listed is a tool and may import any.
LAYERS = {
    "core": {"core"},
    "losses": {"core", "losses"},
    "functional": {"losses"},
    "nn": {"core", "functional"},
    "cases": {"cases", "core", "losses", "functional", "nn"},
    "testing": {"core"},
    "integrations": {"core", "functional", "integrations", "nn"},
}

# Families built from another's kernels, formulas or public functions.
BUILT_FROM = {
    "cross_entropy": {"vocab_parallel"},
    "linear_cross_entropy": {"cross_entropy", "vocab_parallel"},
    "vae": {"binary_cross_entropy", "gaussian_kl", "regression"},
    "vocab_parallel": {"cross_entropy", "linear_cross_entropy"},
}

DEVICE_CODE = {"core/softmax.py", "core/rows.py", "core/triton_math.py"}


def _files() -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


def _absolute(node: ast.ImportFrom, file: str) -> str:
    """The module named by ``from ... import``, absolute."""
    if not node.level:
        return node.module or ""
    parts = (PACKAGE, *Path(file).parts)
    base = parts[: len(parts) - node.level]
    return ".".join([*base, *([node.module] if node.module else [])])


def _imports(source: str, file: str, *, top_level: bool = False) -> Iterator[str]:
    """Every module that ``source`` imports; of ``from package import name`` also ``package.name``."""
    for node in _statements(ast.parse(source), top_level):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(node, file)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _statements(node: ast.AST, top_level: bool) -> Iterator[ast.AST]:
    """All nodes, or those that run when the module is imported (not the bodies of functions, nor type checking's)."""
    for child in ast.iter_child_nodes(node):
        if top_level and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if top_level and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _statements(child, top_level)


def _inside(source: str, file: str) -> set[tuple[str, ...]]:
    """Modules of this package that ``source`` imports, split and without the package's name."""
    split = (tuple(name.split(".")) for name in _imports(source, file))
    return {name[1:] for name in split if name[0] == PACKAGE and len(name) > 1}


def _layer(file: str) -> str:
    return Path(file).parts[0].removesuffix(".py")


def violations(source: str, file: str) -> list[str]:
    """What ``file`` imports and may not."""
    found = []
    modules = {path.stem if path.suffix else path.name for path in ROOT.iterdir()}
    layer, parts = _layer(file), Path(file).parts
    for name in sorted(_inside(source, file)):
        if name[0] not in modules:
            continue
        if layer in LAYERS and name[0] not in LAYERS[layer]:
            found.append(f"{file} imports {'.'.join(name)}: {layer} may import only {', '.join(sorted(LAYERS[layer]))}")
        if layer == "losses" and len(parts) > 2 and name[0] == "losses" and len(name) > 1:
            family = parts[1]
            if name[1] not in {family} | BUILT_FROM.get(family, set()) and (ROOT / "losses" / name[1]).is_dir():
                found.append(f"{file} imports {'.'.join(name)}: a family imports no sibling")
    device = parts[-1] == "kernels.py" or parts[-1].endswith("_kernel.py") or file in DEVICE_CODE
    triton = [n for n in _imports(source, file, top_level=True) if n.split(".")[0] == "triton"]
    if triton and not device:
        found.append(f"{file} imports {triton[0]} when it is imported: only files of device code may")
    return found


def test_the_whole_package_is_read() -> None:
    files = _files()
    assert {"__init__.py", "functional.py", "nn.py", "core/backend.py", "losses/cross_entropy/kernels.py"} <= set(files)
    assert not [file for file in files if _layer(file) not in {*LAYERS, *_TOOLS}], "a file belongs to no layer"


_TOOLS = {"__init__", "__main__", "bench", "distributed", "doctor", "info", "meters"}


@pytest.mark.parametrize("file", _files())
def test_imports_run_one_way(file: str) -> None:
    assert violations((ROOT / file).read_text(), file) == []


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("core/checks.py", "from ..losses.cross_entropy import op", "core may import only core"),
        ("core/checks.py", "from ..cases import select", "core may import only core"),
        ("core/checks.py", "def f():\n    from .. import functional", "core may import only core"),
        ("core/checks.py", f"import {PACKAGE}.nn", "core may import only core"),
        ("losses/nll_loss/op.py", "from ..cross_entropy.op import CrossEntropy", "no sibling"),
        ("losses/nll_loss/op.py", "from .. import cross_entropy", "no sibling"),
        ("losses/nll_loss/op.py", "from ...functional import nll_loss", "losses may import only core, losses"),
        ("functional.py", "from .nn import NLLLoss", "functional may import only losses"),
        ("functional.py", "from .core import backend", "functional may import only losses"),
        ("nn.py", "from .losses.nll_loss.api import nll_loss", "nn may import only core, functional"),
        ("core/launch.py", "import triton.language as tl", "only files of device code"),
        ("losses/nll_loss/op.py", "try:\n    from triton import jit\nexcept ImportError: ...", "only files of device code"),
    ],
)
def test_a_wrong_import_is_found(file: str, source: str, message: str) -> None:
    (found,) = {v.partition(": ")[2] for v in violations(source, file)}
    assert message in found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("core/launch.py", "def f():\n    import triton"),
        ("core/launch.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import triton"),
        ("losses/nll_loss/kernels.py", "import triton\nfrom ...core.rows import row_offset"),
        ("losses/nll_loss/op.py", "from . import reference\nfrom ...core import launch"),
        ("losses/linear_cross_entropy/op.py", "from ..cross_entropy import kernels"),
        ("losses/vae/api.py", "from ..regression.reference import MSE"),
        ("nn.py", "from . import functional as F"),
        ("bench/cli.py", "from ..cases import select"),
    ],
)
def test_a_right_import_passes(file: str, source: str) -> None:
    assert violations(source, file) == []
