"""Which shapes and dtypes of labels and class weights pass, and what is raised for the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from genloss_kernels.core.classes import check_class_weight, check_index_target


def _labels(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("shape", "target"),
    [
        ((5,), _labels()),
        ((5,), _labels(1)),
        ((3, 5), _labels(3)),
        ((3, 5), _labels(3, dtype=torch.uint8)),
        ((0, 5), _labels(0)),
        ((3, 5, 7), _labels(3, 7)),
        ((3, 5, 7, 2), _labels(3, 7, 2)),
    ],
)
def test_labels_that_fit(shape: tuple[int, ...], target: torch.Tensor) -> None:
    check_index_target("loss", torch.zeros(shape), target)


@pytest.mark.parametrize(
    ("shape", "target", "error", "message"),
    [
        ((3, 5), _labels(3, dtype=torch.int32), RuntimeError, "expected target dtype to be Long or Byte"),
        ((3, 5), _labels(3, dtype=torch.bool), RuntimeError, "expected target dtype"),
        ((3, 5), torch.zeros(3), RuntimeError, "expected target dtype"),
        ((5,), _labels(2), ValueError, "must be one index"),
        ((5,), _labels(1, 1), ValueError, "must be one index"),
        ((5,), _labels(0), ValueError, "must be one index"),
        ((3, 5), _labels(3, 1), RuntimeError, "0D or 1D target tensor expected"),
        ((3, 5), _labels(), ValueError, r"batch_size \(3\) to match target batch_size \(none\)"),
        ((3, 5), _labels(4), ValueError, r"batch_size \(3\) to match target batch_size \(4\)"),
        ((3, 5, 7), _labels(4, 7), ValueError, "to match target batch_size"),
        ((3, 5, 7), _labels(), ValueError, "to match target batch_size"),
        ((3, 5, 7), _labels(3, 5), RuntimeError, "size mismatch"),
        ((3, 5, 7), _labels(3), RuntimeError, "size mismatch"),
        ((3, 5, 7, 2), _labels(3, 7), RuntimeError, "size mismatch"),
    ],
)
def test_labels_that_do_not(shape: tuple[int, ...], target: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_index_target("loss", torch.zeros(shape), target)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (3, 5, 7)])
def test_class_weights_that_fit(shape: tuple[int, ...]) -> None:
    for same_dtype in (True, False):
        check_class_weight(None, torch.zeros(shape), same_dtype=same_dtype)
        check_class_weight(torch.ones(5), torch.zeros(shape), same_dtype=same_dtype)
    check_class_weight(torch.ones(5).double(), torch.zeros(shape), same_dtype=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_class_weight(torch.ones(5), torch.zeros(shape).bfloat16(), same_dtype=True)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        ([1.0] * 5, TypeError, "weight must be a Tensor"),
        (torch.ones(3), RuntimeError, "all 5 classes"),
        (torch.ones(1, 5), RuntimeError, "all 5 classes"),
        (torch.ones(7), RuntimeError, "all 5 classes"),
        (torch.ones(5, device="meta"), RuntimeError, "device"),
        (torch.ones(5).double(), RuntimeError, "must have the input's dtype"),
        (torch.ones(5).bfloat16(), RuntimeError, "must have the input's dtype"),
    ],
)
@pytest.mark.parametrize("shape", [(5,), (3, 5), (3, 5, 7)])
def test_class_weights_that_do_not(shape: tuple[int, ...], weight: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_class_weight(weight, torch.zeros(shape), same_dtype=True)


def test_class_weights_are_floating_point() -> None:
    with pytest.raises(NotImplementedError, match="weight must be a real floating point tensor"):
        check_class_weight(torch.ones(5, dtype=torch.int64), torch.zeros(3, 5), same_dtype=False)
