"""``patch_torch`` and the handle that it returns."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch

from ...core import forks
from . import slots
from .routing import WRAPPERS, counts, state, torchs_own

_lock = forks.lock()
_patches: set[TorchPatch] = set()


def patch_torch(modules: Iterable[ModuleType | str] | None = None) -> TorchPatch:
    """Let torch's losses run this library's, in the whole process, until the handle that it returns is reverted.

    ``torch.nn.functional``'s losses are replaced, and so are ``torch.nn``'s modules, old and new ones and your subclasses,
    which look those functions up when they are called. A call runs ours where that is known to give torch's numbers, dtype
    and shape on finite inputs, and torch's own code everywhere else: sparse, nested, quantised, complex and integer tensors,
    subclasses such as DTensor, transforms of ``torch.func``, forward mode, ``torch.jit`` and ``torch.export``, modes that
    intercept torch's functions or operators, deprecated arguments, gradients for weights, and shapes, dtypes and options
    that torch refuses. Which it is follows from the arguments, before anything runs; :meth:`TorchPatch.report` counts both
    and says why.

    Patches nest, in any order and over threads, and the last one to be reverted puts back torch's very objects. What another
    library has put in a function's place, before or since, stays there, and the report says so; if it wraps ours, that
    passes its calls to torch once nothing is patched.

    Args:
        modules: modules, or names of imported ones, in which names that were bound to torch's losses earlier, as by
            ``from torch.nn.functional import cross_entropy``, are patched too. Without it such names keep torch's functions,
            and the report lists them.

    Returns:
        A context manager that reverts the patch when it is left, and a handle whose ``revert()`` does so elsewhere.

    Raises:
        TypeError: an entry of ``modules`` is neither a module nor a string.
        ValueError: a name in ``modules`` is that of no imported module. Nothing is patched then.

    Under torch.compile:
        Patching and reverting compile anew what they concern. Calls from compiled code are not counted.

    Differs from torch:
        On inputs that are not finite, as the functions' documentation says. A class index out of range on a GPU gives its
        row NaN in place of an assertion on the device; on a CPU it, as any other value that is refused, raises torch's type
        of error with a message that may say more. Overrides, modes and graphs of ``torch.fx`` get torch's functions, which
        are not what ``torch.nn.functional`` holds under the patch: code that compares the two then finds them different.

    Example:
        >>> import torch, genloss_kernels as gk
        >>> logits, labels = torch.zeros(2, 4), torch.tensor([0, 3])
        >>> with gk.patch_torch() as patch:
        ...     loss = torch.nn.CrossEntropyLoss()(logits, labels)
        >>> patch.report()["calls"]
        {'cross_entropy': {'ours': 1, 'torch': {}}}
    """
    patch = TorchPatch(modules)
    patch._apply()
    return patch


class TorchPatch:
    """What :func:`patch_torch` returns: a context manager that may be entered again, within itself or later.

    Attributes:
        active: whether this patch is in force.
    """

    def __init__(self, modules: Iterable[ModuleType | str] | None = None) -> None:
        if isinstance(modules, (str, ModuleType)):
            raise TypeError(f"modules must be a list of modules or of their names, not {type(modules).__name__}")
        self._modules = [_module(m) for m in modules or ()]
        self.active = False
        self._depth = 0
        self._slots: list[slots.Slot] = []
        self._missed: list[str] = []
        self._calls: Counter[tuple[str, str | None]] = Counter()
        self._start: Counter[tuple[str, str | None]] = Counter()

    def _apply(self) -> None:
        # Both file torch's functions for good, on import or when first asked, and must not take the wrappers for them.
        importlib.import_module("torch._dynamo")
        torch.overrides.get_overridable_functions()
        torch.overrides.get_testing_overrides()

        with _lock:
            if not _patches:
                state.torchs = torchs_own()
            names = [(torch.nn.functional, name, name) for name in WRAPPERS]
            for module in self._modules:
                names += [(module, attribute, loss) for attribute, loss in slots.bound(module)]
            try:
                # One by one, as a module may refuse.
                for name in names:
                    self._slots.append(slots.hold(*name))
                self._missed = slots.missed()
            except BaseException:
                self._release()
                raise
            self._start = counts()
            self.active = True
            _patches.add(self)
            state.active = True

    def _release(self) -> None:
        held, self._slots = self._slots, []
        for slot in held:
            slots.release(slot)

    def revert(self) -> None:
        """Undo the patch; does nothing the second time. A wrapper that somebody still holds passes calls to torch."""
        with _lock:
            if not self.active:
                return
            self._calls += counts() - self._start
            self.active, self._depth = False, 0
            _patches.remove(self)
            state.active = bool(_patches)
            self._release()

    def __enter__(self) -> TorchPatch:
        with _lock:
            if not self.active:
                self._apply()
            self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        with _lock:
            self._depth = max(0, self._depth - 1)
            if not self._depth:
                self.revert()

    def report(self) -> dict[str, Any]:
        """What ran while this patch was in force, outside compiled code, and what escaped it.

        Returns:
            ``calls``: for each function that was called, by how many calls ran ours, and how many torch's by reason;
            ``missed``: ``module.name`` of what was bound to torch's functions before the patch and is not in ``modules``,
            and, in modules that import torch, what their classes, tables, partial functions and defaults hold, by
            ``module.Class.name``, ``module.table['key']``, ``module.name.func`` and ``module.function(parameter=)``;
            ``replaced``: names of ``torch.nn.functional`` in which another library's function stands, which is called.
        """
        with _lock:
            calls = self._calls + (counts() - self._start if self.active else Counter())
            replaced = [slot.attribute for slot in self._slots if not slot.has(slot.wrapper)]
        found: dict[str, dict[str, Any]] = {}
        for (name, reason), number in sorted(calls.items(), key=lambda item: (item[0][0], item[0][1] or "")):
            row = found.setdefault(name, {"ours": 0, "torch": {}})
            if reason is None:
                row["ours"] = number
            else:
                row["torch"][reason] = number
        return {"calls": found, "missed": list(self._missed), "replaced": replaced}

    def __str__(self) -> str:
        report = self.report()
        lines = [f"patch_torch: {'active' if self.active else 'reverted'}", f"{'function':<36}{'ours':>10}{'torch':>10}"]
        for name, row in report["calls"].items():
            reasons = "; ".join(f"{number} {reason}" for reason, number in row["torch"].items())
            lines.append(f"{name:<36}{row['ours']:>10}{sum(row['torch'].values()):>10}  {reasons}".rstrip())
        for title, key in (("bound earlier, not patched", "missed"), ("replaced by others", "replaced")):
            if report[key]:
                lines.append(f"{title}: {', '.join(report[key])}")
        return "\n".join(lines)


def _module(module: Any) -> ModuleType:
    if isinstance(module, ModuleType):
        return module
    if not isinstance(module, str):
        raise TypeError(f"modules must hold modules or their names, got {type(module).__name__}")
    found = sys.modules.get(module)
    if found is None:
        raise ValueError(
            f"modules names {module!r}, which is not imported: what it imports under the patch is patched already"
        )
    return found
