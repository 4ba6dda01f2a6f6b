"""What ``torch.utils.flop_counter`` counts for the operators, which hide their products from it."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def _products(input: Any, linear_weight: Any, needed: int) -> int:
    """2 N V D for the logits, and as many for the gradients of input and linear weight, the lowest bits of ``needed``."""
    n_rows, width = input
    return 2 * n_rows * linear_weight[0] * width * (1 + (needed & 1) + (needed >> 1 & 1))


def _reduced(input: Any, linear_weight: Any, *rest: Any, **_: Any) -> int:
    return _products(input, linear_weight, rest[-3])


def _rows(input: Any, linear_weight: Any, *_: Any, **__: Any) -> int:
    return _products(input, linear_weight, 0)


def _rows_backward(input: Any, linear_weight: Any, *rest: Any, **_: Any) -> int:
    return _products(input, linear_weight, rest[-2])


def register_formulas() -> None:
    """For a counter that has been imported, and for those that count already; importing it would import Triton."""
    counter = sys.modules.get("torch.utils.flop_counter")
    operators = torch.ops.genloss
    if counter is None or operators.linear_cross_entropy_reduced in counter.flop_registry:
        return
    formulas = {
        operators.linear_cross_entropy_reduced: _reduced,
        operators.linear_cross_entropy_rows: _rows,
        operators.linear_cross_entropy_rows_backward: _rows_backward,
    }
    for operator, formula in formulas.items():
        counter.register_flop_formula(operator)(formula)
    found = {operator: counter.flop_registry[operator] for operator in formulas}
    for mode in _get_current_dispatch_mode_stack():
        getattr(getattr(mode, "counter", mode), "flop_registry", {}).update(found)
