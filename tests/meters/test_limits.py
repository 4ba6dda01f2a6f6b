"""The arithmetic of what bounds a kernel."""

from __future__ import annotations

import sys

import pytest

from genloss_kernels.meters.hardware import H200, occupancy, resident_programs
from genloss_kernels.meters.limits import times


@pytest.mark.parametrize(
    ("num_warps", "registers", "shared_bytes", "expected"),
    [
        (8, 32, 0, 1.0),
        (8, 33, 0, 0.75),
        (8, 64, 0, 0.5),
        (8, 128, 0, 0.25),
        (8, 255, 0, 0.125),
        (4, 40, 0, 0.75),
        (4, 32, 0, 1.0),
        (1, 32, 0, 0.5),
        (32, 64, 0, 0.5),
        (32, 65, 0, 0.0),
        (8, 32, 227 * 1024, 0.125),
        (8, 32, 48 * 1024, 0.5),
        (8, 32, 1024, 1.0),
    ],
)
def test_occupancy_is_that_of_the_vendors_calculator(
    num_warps: int, registers: int, shared_bytes: int, expected: float
) -> None:
    assert occupancy(H200, num_warps, registers, shared_bytes) == expected


def test_small_programs_are_limited_by_their_number() -> None:
    assert resident_programs(H200, 1, 16, 0) == 32
    assert resident_programs(H200, 4, 16, 0) == 16


def test_the_longest_time_is_the_bound() -> None:
    streaming, computing, special = times(4, 5, 0), times(2, 27.6, 1), times(2, 10, 4)

    assert (streaming.bound, computing.bound, special.bound) == ("memory", "issue", "special")
    assert streaming.memory_share == 1.0
    assert computing.memory_share == pytest.approx(0.5, abs=0.005)


def test_a_bf16_element_affords_about_14_instructions_and_2_special_ones() -> None:
    """At full memory speed, one read: the budget that the tuning of every kernel starts from."""
    read = times(2, 1, 1)

    assert read.memory / read.issue == pytest.approx(13.79, abs=0.01)
    assert read.memory / read.special == pytest.approx(1.72, abs=0.01)
    assert H200.bytes_in_flight() == pytest.approx(22_800, abs=10)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton compiles on Linux alone")
def test_a_plain_forward_in_fp32_is_bound_by_memory() -> None:
    pytest.importorskip("triton", reason="machine code is compiled by Triton")
    from genloss_kernels.meters.limits import limit, limits
    from genloss_kernels.meters.machine_code import Machine
    from genloss_kernels.meters.main_configurations import main_specialisations

    kernels = main_specialisations()
    label = "cross_entropy, training step"
    chosen = [k for k in kernels if k.label == label and "forward" in k.name and k.dtype == "float32"]
    (found,) = limits(chosen)
    reduction = next(k for k in kernels if k.name == "_reduction_kernel")

    assert found.bytes == 4
    # An exponential for each logit, and one for each 16 bytes of them.
    assert found.special == 1.25
    assert found.bound == "memory"
    assert limit(reduction, Machine(reduction.name, "", "float32", "")) is None
