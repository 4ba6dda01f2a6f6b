"""When a kernel has to be compiled again."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from genloss_kernels.meters import machine_code
from genloss_kernels.meters.digests import digests
from genloss_kernels.meters.specialisations import Specialisation, specialise

pytest.importorskip("triton", reason="machine code is compiled by Triton")


def _toy(block: int, dtype: torch.dtype = torch.float32) -> Specialisation:
    from .kernels import loop_kernel

    arguments = [torch.empty(4096, dtype=dtype, device="meta") for _ in range(2)]
    return specialise(loop_kernel, (*arguments, 4096), {"BLOCK": block}, "float32", "a toy")


def test_a_digest_follows_the_specialisations_and_not_their_order_or_labels() -> None:
    small, large = _toy(1024), _toy(2048)

    assert digests([small, large]) == digests([large, dataclasses.replace(small, label="another")])
    assert digests([small]) != digests([small, large])
    assert digests([small]) != digests([dataclasses.replace(small, num_warps=8)])


def test_a_digest_follows_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = _toy(1024)
    before = digests([toy])

    monkeypatch.setattr(type(toy.kernel), "cache_key", "of another source")

    assert digests([toy]) != before


def test_a_known_kernel_is_compiled_in_its_main_calls_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    main, other = _toy(1024), _toy(2048)
    monkeypatch.setattr(machine_code, "specialisations", lambda *args, **keywords: [main, other])
    monkeypatch.setattr(machine_code, "main_specialisations", lambda *args: [main])
    monkeypatch.setattr(machine_code, "OTHER_TARGETS", ())

    every = machine_code.gate()
    known = machine_code.gate(known=every.digests)

    assert [len(every.main), len(every.others)] == [1, 1]
    assert [len(known.main), len(known.others)] == [1, 0]
    assert len(machine_code.gate(known={"loop_kernel": "of an older source"}).others) == 1
