"""What Triton's interpreter replaces while a kernel runs, with the memory of its listings in place."""

import pytest
import triton
import triton.language as tl
from triton.runtime import interpreter

from .interpreter import LISTED, builtins_of

pytestmark = pytest.mark.interpreter

LEFT: list[tuple[str, ...]] = []


def _look_inside() -> None:
    LEFT.append(tuple(name for listed in LISTED if listed is not tl.core for name in builtins_of(listed)))


@triton.jit
def _kernel():
    tl.static_assert(True)
    _look_inside()


def test_every_builtin_is_replaced_while_a_kernel_runs_and_put_back_after():
    assert interpreter._patch_builtin.__module__ == "tests.interpreter"
    before = {listed: builtins_of(listed) for listed in LISTED}
    LEFT.clear()
    _kernel[(1,)]()
    assert LEFT == [()]
    assert {"load", "store", "program_id", "where"} <= set(before[tl])
    assert {listed: builtins_of(listed) for listed in LISTED} == before
