"""Device code of the adversarial losses: formulas of one side's scores, and penalties on the norms of samples."""

import triton
import triton.language as tl

from ...core.elementwise_kernel import differentiate, evaluate, span
from ...core.triton_math import scalar, softplus_sigmoid

# Values of FLAGS, shared with reference.py: the game in the low bits, then which side's scores they are, one or both.
LOGISTIC = tl.constexpr(0)
SATURATING = tl.constexpr(1)
SQUARES = tl.constexpr(2)
HINGE = tl.constexpr(3)
LINEAR = tl.constexpr(4)
RELATIVISTIC = tl.constexpr(5)
GAMES = tl.constexpr(7)
FAKE = tl.constexpr(8)
BOTH = tl.constexpr(16)


@triton.jit
def _sign(x, FAKED: tl.constexpr):
    return x if FAKED else -x


@triton.jit
def _side(x, GAME: tl.constexpr, FAKED: tl.constexpr):
    if GAME == SATURATING:
        value, _, _, _ = softplus_sigmoid(x)
        value = -value
    elif GAME == SQUARES:
        distance = x if FAKED else x - 1.0
        value = 0.5 * distance * distance
    elif GAME == HINGE:
        margin = 1.0 + _sign(x, FAKED)
        value = tl.where(margin < 0.0, 0.0, margin)
    elif GAME == LINEAR:
        value = _sign(x, FAKED)
    else:
        value, _, _, _ = softplus_sigmoid(_sign(x, FAKED))
    return value


@triton.jit
def _side_gradient(x, GAME: tl.constexpr, FAKED: tl.constexpr):
    slope = tl.full(x.shape, 1.0, x.dtype)
    if GAME == SATURATING:
        _, _, slope, _ = softplus_sigmoid(x)
        slope = -slope
    elif GAME == SQUARES:
        slope = x if FAKED else x - 1.0
    elif GAME == HINGE:
        # 0 at the margin, and as torch's relu at NaN.
        slope = _sign(tl.where(1.0 + _sign(x, FAKED) <= 0.0, 0.0, slope), FAKED)
    elif GAME == LINEAR:
        slope = _sign(slope, FAKED)
    else:
        _, _, slope, _ = softplus_sigmoid(_sign(x, FAKED))
        slope = _sign(slope, FAKED)
    return slope


@triton.jit
def adversarial_value(a, b, c, d, s0, s1, s2, FLAGS: tl.constexpr):
    """Loss of the scores a; or of those of real (a) and fake samples (b)."""
    GAME: tl.constexpr = GAMES & FLAGS
    if GAME == RELATIVISTIC:
        value, _, _, _ = softplus_sigmoid(b - a)
    elif BOTH & FLAGS:
        value = _side(a, GAME, False) + _side(b, GAME, True)
    else:
        value = _side(a, GAME, FAKE & FLAGS)
    return value


@triton.jit
def adversarial_gradient(a, b, c, d, s0, s1, s2, FLAGS: tl.constexpr):
    GAME: tl.constexpr = GAMES & FLAGS
    if GAME == RELATIVISTIC:
        _, _, db, _ = softplus_sigmoid(b - a)
        da = -db
    elif BOTH & FLAGS:
        da = _side_gradient(a, GAME, False)
        db = _side_gradient(b, GAME, True)
    else:
        da = _side_gradient(a, GAME, FAKE & FLAGS)
        db = da
    return da, db, da, db


@triton.jit
def _square(x, b, c, d, s0, s1, s2, FLAGS: tl.constexpr):
    return x * x


@triton.jit
def _itself(x, b, c, d, s0, s1, s2, FLAGS: tl.constexpr):
    return x, x, x, x


@triton.jit
def _penalty_squares_kernel(
    operands, shape, magics, strides, partials_ptr, n_elements, sample_size, segments, chunk,
    KINDS: tl.constexpr, SMALL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of squares of what this program covers of a sample; in fp64, where no square of a narrower number is lost."""
    program = tl.program_id(0)
    _, low, high = span(program, n_elements, sample_size, segments, chunk, True)
    nothing = scalar(0.0, tl.float64)
    total, _ = evaluate(
        operands, low, high, shape, magics, strides, None, nothing, nothing, nothing,
        _square, 0, KINDS, SMALL, False, tl.float64, BLOCK,
    )  # fmt: skip
    tl.store(partials_ptr + program, tl.sum(total, axis=0))


@triton.jit
def _penalties(partials_ptr, norms_ptr, sample, live, segments, target, gamma, R1: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float64)
    for segment in range(segments):
        total += tl.load(partials_ptr + sample * segments + segment, mask=live, other=0.0)
    norm = tl.sqrt(total)
    tl.store(norms_ptr + sample, norm, mask=live)
    if R1:
        value = 0.5 * scalar(gamma, tl.float64) * total
    else:
        distance = norm - scalar(target, tl.float64)
        value = distance * distance
    return tl.where(live, value, 0.0)


@triton.jit
def _penalty_kernel(
    partials_ptr, norms_ptr, loss_ptr, n_samples, segments, target: tl.float64, gamma: tl.float64, divisor: tl.float64,
    R1: tl.constexpr, STORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Norm and penalty of each sample; the penalties stored, or added up by one program."""
    lane = tl.arange(0, BLOCK)
    if STORE:
        sample = tl.program_id(0).to(tl.int64) * BLOCK + lane
        live = sample < n_samples
        value = _penalties(partials_ptr, norms_ptr, sample, live, segments, target, gamma, R1, BLOCK)
        tl.store(loss_ptr + sample, value.to(tl.float32) if loss_ptr.dtype.element_ty != tl.float64 else value, mask=live)
    else:
        total = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, n_samples, BLOCK):
            sample = (start + lane).to(tl.int64)
            live = sample < n_samples
            total += _penalties(partials_ptr, norms_ptr, sample, live, segments, target, gamma, R1, BLOCK)
        value = tl.sum(total, axis=0) / scalar(divisor, tl.float64)
        tl.store(loss_ptr, value.to(tl.float32) if loss_ptr.dtype.element_ty != tl.float64 else value)


@triton.jit
def _penalty_backward_kernel(
    operands, grads, shape, magics, strides, norms_ptr, upstream_ptr, upstream_stride,
    n_elements, sample_size, segments, chunk, target: tl.float64, gamma: tl.float64, divisor: tl.float64,
    R1: tl.constexpr, KINDS: tl.constexpr, SMALL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sample times one number, in fp64, where the inverse of a subnormal norm is finite."""
    sample, low, high = span(tl.program_id(0), n_elements, sample_size, segments, chunk, True)
    factor = tl.load(upstream_ptr + sample * upstream_stride).to(tl.float64)
    if R1:
        factor = factor * scalar(gamma, tl.float64)
    else:
        norm = tl.load(norms_ptr + sample)
        # There is no direction at the norm 0.
        inverse = tl.where(norm == 0.0, 0.0, 1.0 / tl.where(norm == 0.0, 1.0, norm))
        factor = factor * 2.0 * (norm - scalar(target, tl.float64)) * inverse
    nothing = scalar(0.0, tl.float64)
    differentiate(
        operands, grads, factor, low, high, shape, magics, strides, scalar(divisor, tl.float64), nothing, nothing, nothing,
        _itself, 0, KINDS, SMALL, True, tl.float64, BLOCK,
    )  # fmt: skip
