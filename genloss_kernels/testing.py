"""What tests of these losses need: the tolerance table, comparison with float64, and counting launches."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .core.backend import device_semantics
from .core.launch import count_launches

__all__ = ["Comparison", "Tolerance", "assert_close", "compare", "count_launches", "device_semantics", "tolerance"]


class Tolerance(NamedTuple):
    """What a result of one dtype may be off by, relative to its size, beside ``factor`` times torch's own error.

    ``storage`` is the dtype's unit in the last place: half of it is what rounding to the dtype costs, all of it what
    truncating costs, as Triton's interpreter does in bfloat16. ``arithmetic`` is the unit of the dtype in which the
    losses compute.
    """

    factor: float
    storage: float
    arithmetic: float


_TOLERANCES = {
    # Once more for the oracle, which errs as much.
    torch.float64: Tolerance(3.0, 2.0**-52, 2.0**-52),
    torch.float32: Tolerance(2.0, 2.0**-23, 2.0**-23),
    torch.float16: Tolerance(2.0, 2.0**-10, 2.0**-23),
    torch.bfloat16: Tolerance(2.0, 2.0**-7, 2.0**-23),
}

# Elements compared at once, so that the float64 temporaries stay small beside a large loss's own tensors.
_CHUNK = 2**22

# Rows into which these are dealt: a GPU would queue all of a power of two's elements for one address.
_LANES = 2**10

# Powers of two below the largest element that are told apart: a float32 result has no digits left 64 of them down.
_BINADES = 64

# Exponent, power, sum and difference: each rounds at the size of its terms, from which cancellation may leave little.
_ROUNDINGS = 4

# Powers of two in which errors count in proportion: the largest elements are too few to show what torch's error can be.
_NEIGHBOURS = 3

# Below float64's least, -1073.
_EXPONENT_OF_ZERO = -2000


def tolerance(dtype: torch.dtype) -> Tolerance:
    """The row of the tolerance table for results of ``dtype``."""
    return _TOLERANCES[dtype]


class Comparison(NamedTuple):
    """The element of a result that comes closest to its allowance, or exceeds it the most."""

    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed

    @property
    def share(self) -> float:
        """The error as a multiple of what is allowed."""
        return self.error / self.allowed if self.allowed else self.error


def compare(actual: Tensor, expected: Tensor, like: Tensor | None = None, *, products: bool = False) -> Comparison:
    """Compare a result with float64 and return its worst element; see :func:`assert_close` for what is allowed."""
    if expected.dtype != torch.float64:
        raise TypeError(f"expected must be computed in float64, got {expected.dtype}")
    for name, tensor in (("expected", expected), ("like", like)):
        if tensor is not None and tensor.shape != actual.shape:
            raise ValueError(f"{name} must have the shape {list(actual.shape)} of actual, got {list(tensor.shape)}")
    row, info = tolerance(actual.dtype), torch.finfo(actual.dtype)
    result, exact = actual.detach().reshape(-1), expected.detach().reshape(-1)
    rounded = exact.to(actual.dtype)
    representable = rounded.isfinite()
    if not ((result == rounded) | (result.isnan() & rounded.isnan()) | representable).all():
        return Comparison(math.inf, 0.0)
    worst = Comparison(0.0, 0.0)
    if not result.numel():
        return worst
    exact = torch.where(representable, exact, 0.0)
    top = math.frexp(exact.abs().max().item())[1]
    floor = _ROUNDINGS * row.arithmetic * exact.square().mean().sqrt().item()
    own = None if like is None else row.factor * _own_errors(like.detach().reshape(-1), exact, top, actual.dtype)
    if own is not None and products:
        own = own.max().expand_as(own)
    for start in range(0, exact.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        exponent = _exponent(exact[part])
        error = torch.where(representable[part], (result[part].double() - exact[part]).abs(), 0.0)
        # The last place of a subnormal number is that of the smallest normal one.
        allowed = torch.exp2(exponent.double() - 1.0).clamp_(min=info.smallest_normal).mul_(row.storage).add_(floor)
        if own is not None:
            allowed += own[_binade(top, exponent)]
        at = (error / allowed).nan_to_num_(nan=math.inf, posinf=math.inf).argmax()
        found = Comparison(error[at].nan_to_num(nan=math.inf, posinf=math.inf).item(), allowed[at].item())
        worst = found if start == 0 else max(worst, found, key=lambda comparison: comparison.share)
    return worst


def _exponent(value: Tensor) -> Tensor:
    return torch.frexp(value).exponent.masked_fill_(value == 0.0, _EXPONENT_OF_ZERO)


def _binade(top: int, exponent: Tensor) -> Tensor:
    """How many powers of two below the largest element, as an index."""
    return (top - exponent).clamp_(0, _BINADES - 1).long()


def _own_errors(like: Tensor, exact: Tensor, top: int, dtype: torch.dtype) -> Tensor:
    """The error that torch's result excuses at each power of two, counted down from the largest."""
    peaks = exact.new_zeros(_LANES, _BINADES)
    for start in range(0, exact.numel(), _CHUNK):
        value = exact[start : start + _CHUNK]
        error = (like[start : start + _CHUNK].double() - value).abs()
        # Where torch overflows it sets no standard.
        error.masked_fill_(~error.isfinite(), 0.0)
        padding = (0, -value.numel() % _LANES)
        binade, error = (F.pad(t, padding).view(_LANES, -1) for t in (_binade(top, _exponent(value)), error))
        peaks.scatter_reduce_(1, binade, error, "amax")
    found = peaks.amax(0)
    excused = found.clone()
    for step in range(1, _NEIGHBOURS + 1):
        torch.maximum(excused[:-step], found[step:] * 2.0**step, out=excused[:-step])
    scale = min(1.0, tolerance(dtype).arithmetic / tolerance(like.dtype).arithmetic)
    return scale * excused.flip(0).cummax(0).values.flip(0)


def assert_close(
    actual: Tensor, expected: Tensor, like: Tensor | None = None, name: str = "result", *, products: bool = False
) -> None:
    """Fail unless ``actual`` is as close to the float64 ``expected`` as torch's own result ``like`` lets one ask.

    An element x of the expected result may be off by the sum of

    - twice the error that ``like`` shows around x: the largest relative to their size among elements between x / 8 and
      x, and the largest at all among those below. One element's own error says little, as it may be 0 by chance, and
      the largest error of all would excuse anything in the small elements. An element that loses digits by
      cancellation does so in torch's result as well.
    - one unit in the last place of the dtype at x, for the rounding of x itself (of the smallest normal number below
      that).
    - four units in the last place of the arithmetic, float32 for the halves, at the root mean square of the result.
      This is what lets a sum differ in its order, and a difference of near equals in its rounding, where torch's
      happens to be exact.

    ``like`` may be of another dtype than ``actual``. In float32 it is a stricter judge of half precision, whose
    arithmetic is in float32 too. It is the only one of float64, since nothing more precise is at hand to measure
    torch's float64 errors: there float32's stand in, scaled by the ratio of the units.

    ``products`` says that the result is a sum of products, whose error is that of its terms however small it is itself:
    then the largest error that ``like`` shows counts for every element.

    NaN, infinities and values beyond the dtype's range must be the same.
    """
    found = compare(actual, expected, like, products=products)
    if not found.passed:
        raise AssertionError(
            f"{name} ({actual.dtype}, shape {list(actual.shape)}) is off by {found.error:.3g} "
            f"where {found.allowed:.3g} is allowed"
        )
