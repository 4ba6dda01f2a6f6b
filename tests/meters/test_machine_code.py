"""The machine code of the kernels, compiled without a GPU."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import sys
from typing import Any

import pytest
import torch

import genloss_kernels
from genloss_kernels.core import launch as tiles
from genloss_kernels.core import tuned
from genloss_kernels.core.backend import INTERPRETED
from genloss_kernels.meters import machine_code, streams, workers
from genloss_kernels.meters.configurations import Configuration
from genloss_kernels.meters.machine_code import compile_elsewhere, read
from genloss_kernels.meters.specialisations import (
    Specialisation,
    require_compiler,
    run_on_meta,
    specialisations,
    specialise,
)
from genloss_kernels.meters.streams import Streams

from . import exact

pytest.importorskip("triton", reason="machine code is compiled by Triton")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton compiles on Linux alone")


@pytest.mark.slow
def test_gates() -> None:
    """And that the figures of the main calls are the file's: one test, since compiling takes most of its time."""
    import triton

    expected = exact.load()
    shares = workers.run("machine code", known=expected["digests"])

    assert [violation for share in shares for row in share["rows"] for violation in row["violations"]] == []
    assert [failure for share in shares for failure in share["failures"]] == []
    if triton.__version__ != expected["triton"]:
        pytest.skip(f"the file's figures are of Triton {expected['triton']}, this is {triton.__version__}")
    assert exact.compare(exact.machine_code(shares), expected["machine code"]) == []


def _kernels() -> set[str]:
    """Every kernel of the package, by the name that ends so."""
    found = set()
    for module in pkgutil.walk_packages(genloss_kernels.__path__, "genloss_kernels."):
        if module.name.endswith("kernels") or module.name.endswith("_kernel"):
            names = vars(importlib.import_module(module.name)).items()
            found |= {name for name, value in names if name.endswith("_kernel") and hasattr(value, "arg_names")}
    return found


@pytest.fixture(scope="module")
def listing() -> list[Specialisation]:
    return list(specialisations((torch.bfloat16, torch.float32)))


def test_the_listing_reaches_every_kernel(listing: list[Specialisation]) -> None:
    assert {kernel.name for kernel in listing} == _kernels()


def test_the_listing_reaches_every_tile(listing: list[Specialisation]) -> None:
    rows = {(k.dtype, k["BLOCK"], k.num_warps) for k in listing if "rows" in k.name}
    for dtype, itemsize in (("bfloat16", 2), ("float32", 4)):
        for columns in (2**exponent for exponent in range(9, 20)):
            for heavy in (False, True):
                tile = tiles.row_tile(columns, itemsize, heavy=heavy)
                assert (dtype, tile.block, tile.num_warps) in rows
    found = {(k["BLOCK_ROWS"], k["BLOCK_COLS"]) for k in listing if "tiles" in k.name}
    for columns in (1, 16, 100, 256):
        assert tiles.rows_tile(columns, 1, True)[:2] in found
    for inner in (2, 9, 64, 5000):
        assert tiles.rows_tile(1000, inner, False)[:2] in found


def test_the_listing_reaches_what_is_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {
        "elementwise, 2 bytes": [256, 2], "long heavy row, 2 bytes": [128, 1], "long row read twice, 2 bytes": [512, 2],
        "long row, 2 bytes": [256, 1], "pair of rows, 2 bytes": [256, 4],
    }  # fmt: skip
    monkeypatch.setattr(tuned, "shipped", lambda: {"a GPU": entries})
    listing = specialisations((torch.bfloat16,))
    found = {(k["BLOCK"], k.num_warps) for k in listing if "tuned for a GPU" in k.label and "BLOCK" in k.kernel.arg_names}
    assert {tuple(tile) for tile in entries.values()} <= found
    assert tuned.entries(torch.device("cpu")) == {}


def test_the_listing_repeats_nothing(listing: list[Specialisation]) -> None:
    keys = [kernel.key() for kernel in listing]
    assert len(keys) == len(set(keys))


def _captured(**arguments: Any) -> list[Specialisation]:
    found = []

    def observe(kernel: Any, programs: int, args: Any, keywords: Any) -> bool:
        found.append(specialise(kernel, args, keywords, "bfloat16", "a test"))
        return False

    run_on_meta(Configuration("a test", "cross_entropy", arguments, ("input",)), observe)
    return found


def _cross_entropy(*shape: int, **options: Any) -> list[Specialisation]:
    logits = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    return _captured(input=logits, target=torch.empty(shape[0], dtype=torch.int64, device="meta"), **options)


def test_specialisations_follow_alignment_and_ones() -> None:
    forward, *_ = _cross_entropy(512, 32768)
    assert forward.attributes[0,] == [["tt.divisibility", 16]]
    assert forward["logits_stride_col"] == 1
    assert forward.signature["weight_ptr"] == "constexpr"
    assert forward.signature["smoothing"] == "fp64"

    base = torch.empty(512 * 32768 + 1, dtype=torch.bfloat16, device="meta")
    target = torch.empty(512, dtype=torch.int64, device="meta")
    unaligned, *_ = _captured(input=base[1:].view(512, 32768), target=target)
    assert not unaligned.attributes.get((0,))
    assert unaligned["VEC"] == 1


def test_one_exponential_an_element_by_loads_of_16_bytes() -> None:
    forward, _, backward = read(_cross_entropy(512, 32768))

    assert not forward.violations
    assert not backward.violations
    assert set(forward.loads) == set(backward.loads) == set(backward.stores) == {16}
    # The forward takes one more for each 16 bytes, by which a lane's sums decay.
    assert (forward.special, backward.special) == (1.0 + 1 / 8, 1.0)


def test_two_special_functions_an_element_under_a_softcap() -> None:
    """And nothing in double precision, in which the softcap arrives."""
    for kernel in read([k for k in _cross_entropy(512, 32768, softcap=30.0) if "reduction" not in k.name]):
        assert not kernel.violations
        assert kernel.special == 2.0 + (1 / 8 if "forward" in kernel.kernel else 0.0)


def test_spilling_is_found() -> None:
    forward = _cross_entropy(512, 32768, label_smoothing=0.1)[0]
    block = (forward.kernel.arg_names.index("BLOCK"),)

    (machine,) = read([dataclasses.replace(forward, constexprs={**forward.constexprs, block: 2**14}, num_warps=1)])

    assert machine.local_bytes > 0
    assert any("registers spill" in violation for violation in machine.violations)


def test_narrow_loads_are_found() -> None:
    forward = _cross_entropy(512, 50257)[0]

    (machine,) = read([dataclasses.replace(forward, attributes={})])

    assert set(machine.loads) == {2}
    assert any("0 loads of 16 bytes" in violation for violation in machine.violations)


def _toy(pointer: str, attributes: dict[tuple[int, ...], Any]) -> Specialisation:
    from .kernels import loop_kernel

    signature = {"source_ptr": pointer, "out_ptr": pointer, "n": "i32", "BLOCK": "constexpr"}
    return Specialisation(loop_kernel, signature, {(3,): 1024}, attributes, 4, "float32", "a toy")


@pytest.mark.parametrize(("aligned", "violated"), [(True, 0), (False, 2)])
def test_widths_of_a_toy(aligned: bool, violated: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(streams.STREAMS, "loop_kernel", lambda kernel: Streams((4,), (4,), (), (), 8))
    divisible = [["tt.divisibility", 16]]
    toy = _toy("*fp32", {(0,): divisible, (1,): divisible} if aligned else {})

    (machine,) = read([toy])

    assert machine.special == 1.0
    assert set(machine.loads) == set(machine.stores) == ({16} if aligned else {4})
    assert len(machine.violations) == violated


def test_special_functions_beyond_the_limit_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_code, "special_limit", lambda kernel: 0.5)

    assert any("special functions" in violation for violation in read(_cross_entropy(512, 32768)[:1]).__next__().violations)


def test_what_does_not_compile_is_found() -> None:
    forward = _cross_entropy(512, 32768)[0]
    broken = dataclasses.replace(forward, constexprs={**forward.constexprs, (35,): 1000})
    assert broken["BLOCK"] == 1000

    (machine,) = read([broken])

    assert any("does not compile for cuda 90" in violation for violation in machine.violations)
    assert len(list(compile_elsewhere([broken], [("cuda", 80, 32)]))) == 1


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETED, reason="what is refused is the interpreter")
def test_the_interpreter_is_refused() -> None:
    with pytest.raises(RuntimeError, match="unset it"):
        require_compiler()
