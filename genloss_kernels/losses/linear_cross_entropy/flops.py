"""What ``torch.utils.flop_counter`` counts for the operators, which hide their products from it."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula


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
    operators = torch.ops.genloss
    register_flop_formula(operators.linear_cross_entropy_reduced)(_reduced)
    register_flop_formula(operators.linear_cross_entropy_rows)(_rows)
    register_flop_formula(operators.linear_cross_entropy_rows_backward)(_rows_backward)
