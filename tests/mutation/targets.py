"""Which files are mutated and which tests answer for each, read from the folders."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "genloss_kernels"
CORE = "core"
TEST_FOLDERS = ("losses", "distributed")
FAMILY_EXCLUDED = {"__init__.py", "api.py"}
CORE_EXCLUDED = {"__init__.py", "backend.py", "checks.py", "library.py"}


@dataclass(frozen=True)
class Family:
    files: tuple[str, ...]
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Target:
    """A file to mutate, the families whose tests may kill its mutants, and on which paths these tests run."""

    file: str
    suites: tuple[str, ...]
    modes: tuple[str, ...] = ("eager", "kernels")


def find_families(root: Path) -> dict[str, Family]:
    """The families by name, and under ``core`` the shared modules with the tests that are theirs alone."""
    folders = sorted(path for path in (root / PACKAGE / "losses").glob("[!_.]*") if path.is_dir())
    tests = _tests_by_family(root, [folder.name for folder in folders])
    families = {
        folder.name: Family(
            _existing(root, (path for path in folder.glob("*.py") if path.name not in FAMILY_EXCLUDED)), tests[folder.name]
        )
        for folder in folders
    }
    shared = (path for path in (root / PACKAGE / CORE).glob("*.py") if path.name not in CORE_EXCLUDED)
    families[CORE] = Family(_existing(root, shared), _existing(root, (root / "tests" / CORE).rglob("test_*.py")))
    return families


def find_targets(root: Path, families: dict[str, Family], selected: Iterable[str] = ()) -> list[Target]:
    """The selected families' files and the core modules they import; all of them where none is selected."""
    losses = [name for name in families if name != CORE]
    chosen = list(selected) or list(families)
    used = {name: _imported_files(root, _existing(root, (root / PACKAGE / "losses" / name).glob("*.py"))) for name in losses}
    targets = [Target(file, (name,), _modes(root, file)) for name in chosen if name != CORE for file in families[name].files]
    for file in families[CORE].files:
        users = [name for name in losses if file in used[name] and (CORE in chosen or name in chosen)]
        if CORE in chosen and not users:
            users = losses
        if users:
            targets.append(Target(file, (*([CORE] if families[CORE].tests else []), *users), _modes(root, file)))
    return targets


def _modes(root: Path, file: str) -> tuple[str, ...]:
    """Device code runs with the kernels alone, and an ``eager.py`` without them."""
    imported = [
        name
        for node in ast.parse((root / file).read_bytes()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    ]
    if any(name.split(".")[0] == "triton" for name in imported):
        return ("kernels",)
    return ("eager",) if Path(file).name == "eager.py" else ("eager", "kernels")


def _existing(root: Path, paths: Iterable[Path]) -> tuple[str, ...]:
    return tuple(sorted(path.relative_to(root).as_posix() for path in paths if path.is_file()))


def _tests_by_family(root: Path, names: list[str]) -> dict[str, tuple[str, ...]]:
    """A test file belongs to the longest family name it begins with, so that ``a`` does not claim ``a_b``'s tests."""
    tests: dict[str, list[Path]] = {name: [] for name in names}
    for folder in (root / "tests" / name for name in TEST_FOLDERS):
        for path in folder.rglob("test_*.py"):
            relative = path.relative_to(folder)
            label = relative.parts[0] if len(relative.parts) > 1 else relative.stem.removeprefix("test_")
            owners = [name for name in names if label == name or label.startswith(f"{name}_")]
            if owners:
                tests[max(owners, key=len)].append(path)
    return {name: _existing(root, paths) for name, paths in tests.items()}


def _imported_files(root: Path, files: Iterable[str]) -> set[str]:
    """Files of the package that ``files`` import, directly or not."""
    seen: set[str] = set()
    pending = list(files)
    while pending:
        file = pending.pop()
        if file not in seen:
            seen.add(file)
            pending += _direct_imports(root, file)
    return seen


def _direct_imports(root: Path, file: str) -> list[str]:
    package = Path(file).parent.parts
    modules: list[tuple[str, ...]] = []
    for node in ast.walk(ast.parse((root / file).read_bytes())):
        if isinstance(node, ast.Import):
            modules += [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            # A name may be a submodule or something that the module itself defines.
            inner = [(*base, alias.name) for alias in node.names]
            modules += [module if _module_file(root, module) else base for module in inner]
    return [found for module in modules if (found := _module_file(root, module))]


def _module_file(root: Path, module: tuple[str, ...]) -> str | None:
    if not module or module[0] != PACKAGE:
        return None
    path = Path(*module)
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if (root / candidate).is_file():
            return candidate.as_posix()
    return None
