"""Device functions that keep every digit where the obvious formula loses them."""

import triton
import triton.language as tl

_LOWEST_32 = tl.constexpr(-3.4028234663852886e38)
_LOWEST_64 = tl.constexpr(-1.7976931348623157e308)


@triton.jit
def lowest(DTYPE: tl.constexpr):
    """Most negative finite number: unlike -inf it can be subtracted from itself."""
    if tl.float64 == DTYPE:
        return _LOWEST_64
    else:
        return _LOWEST_32


@triton.jit
def narrowed(value, pointer):
    """``value`` as it can be stored at ``pointer``: there is no way from fp64 to bf16 but through fp32."""
    if pointer.dtype.element_ty == tl.bfloat16:
        value = value.to(tl.float32)
    return value


@triton.jit
def scalar(x, DTYPE: tl.constexpr):
    """A float argument, which arrives as fp64, in the dtype of arithmetic; ``tl.cast`` would go through fp32 on its way."""
    return tl.full((), x, DTYPE)


@triton.jit
def exp_flushed(x):
    """exp(x), in fp32 0 where that is below 2^-126: for what is added to a sum of at least 1, of which it is nothing.

    Two instructions where ``tl.exp``, which scales its way around subnormal results, takes five with the same error.
    """
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return tl.exp2(x * 1.4426950408889634)


@triton.jit
def atanh_excess(s):
    """atanh(s) - s for abs(s) up to 1/3, to the last digits at small s; fp32 only.

    By a weighted least-squares fit of atanh(s) / s in s^2 on [0, 1/9], relative error of s + it 4.5e-9 before rounding.
    """
    y = s * s
    p = 0.14005993499998856 * y + 0.1400090261581611
    p = p * y + 0.20010763621058555
    p = p * y + 0.33333208142797804
    return s * (y * p)


@triton.jit
def log1p_unit(z):
    """log(1 + z) for z in [-1/2, 1], to the last digits at small z, with one special function in fp32.

    There 2 atanh(s) at s = z / (2 + z).
    """
    if z.dtype == tl.float64:
        u = 1.0 + z
        d = u - 1.0
        return tl.where(d == 0.0, z, tl.log(u) * (z / tl.where(d == 0.0, 1.0, d)))
    else:
        s = z / (2.0 + z)
        return 2.0 * (s + atanh_excess(s))


@triton.jit
def log1p_share(z):
    """log(1 + z) for z in [0, 1], to the last digits at small z, without a special function in fp32.

    There by a weighted least-squares fit of (log(1 + z) - z) / z^2 in z, relative error of the whole 3.3e-8 before rounding.
    """
    if z.dtype == tl.float64:
        return log1p_unit(z)
    else:
        p = 0.005364818498492241 * z - 0.03006576932966709
        p = p * z + 0.0792044997215271
        p = p * z - 0.13753798604011536
        p = p * z + 0.1915365308523178
        p = p * z - 0.24857163429260254
        p = p * z + 0.3332132399082184
        p = p * z - 0.49999648332595825
        return z * z * p + z


@triton.jit
def log1p_deficit(u):
    """(u - log(1 + u)) / u^2 for u in [-1/2, 0]; fp32 only.

    By a weighted least-squares fit in u, relative error 4.4e-8 before rounding.
    """
    p = 1.2983603477478027 * u + 1.5105513334274292
    p = p * u + 1.1033456325531006
    p = p * u + 0.17575950920581818
    p = p * u + 0.22496362030506134
    p = p * u - 0.19422242045402527
    p = p * u + 0.2502734661102295
    p = p * u - 0.3333289325237274
    return p * u + 0.5


@triton.jit
def log1p_lower(u):
    """log(1 + u) for u in [-1/2, 0], to the last digits at small u, without a special function or a division in fp32."""
    if u.dtype == tl.float64:
        return log1p_unit(u)
    else:
        return u - u * u * log1p_deficit(u)


@triton.jit
def log_lower(x):
    """log(x) for x in (0, 1); not for NaN. In fp32 0 counts as 2^-159, and 17 instructions stand for the library's 25."""
    if x.dtype == tl.float64:
        return tl.log(x)
    else:
        # With 2^32 subnormal numbers become normal ones.
        bits = (x * 2.0**32).to(tl.int32, bitcast=True)
        octaves = (bits & 0x7F800000) - (0x3F000000 + (32 << 23))
        log = log1p_lower(((bits & 0x007FFFFF) | 0x3F000000).to(tl.float32, bitcast=True) - 1.0)
        return log + octaves.to(tl.float32) * (0.6931471805599453 * 2.0**-23)


@triton.jit
def log_share_excess(m, v):
    """log(m) and m log(m) - v for m = 1 + v in (0, 1], both to the last digits at small v, which is not m - 1 rounded.

    In fp32 without a special function or a division: the exponent's bits put m in [1/2, 1]. A subnormal m is as good as
    2^-126.
    """
    if m.dtype == tl.float64:
        u = 1.0 + v
        d = u - 1.0
        # Of 1 + v as rounded here, which the factor makes up for; near 0 that has lost the digits of m.
        u = tl.where(v > -0.5, u, m)
        direct = tl.log(u)
        log = tl.where(d == 0.0, v, direct * (v / tl.where(d == 0.0, 1.0, d)))
        return direct, u * log - v
    else:
        bits = m.to(tl.int32, bitcast=True)
        octaves = (tl.minimum(bits, 0x3F7FFFFF) & 0x7F800000) - 0x3F000000
        far = m < 0.5
        u = tl.where(far, (bits - octaves).to(tl.float32, bitcast=True) - 1.0, v)
        deficit = log1p_deficit(u)
        square = u * u
        log = (u - square * deficit) + octaves.to(tl.float32) * (0.6931471805599453 * 2.0**-23)
        return log, tl.where(far, m * log - v, square * (1.0 - (1.0 + u) * deficit))


@triton.jit
def expm1_excess(v):
    """exp(v) - 1 and exp(v) - 1 - v, both to the last digit at small v.

    For abs(v) < 0.5 in fp64 by the series to v^17/17!, below half a unit in the last place; in fp32 by a weighted
    least-squares fit of (exp(v) - 1 - v) / v^2 in v, relative error 8.1e-10 before rounding, with half the instructions.
    """
    if v.dtype == tl.float64:
        TERMS: tl.constexpr = 17
        series = 1.0 + v * (1.0 / TERMS)
        for k in tl.static_range(TERMS - 3):
            series = 1.0 + v * (1.0 / (TERMS - 1 - k)) * series
        excess = v * v * 0.5 * series
    else:
        p = 2.482357194821816e-05 * v + 1.9962979422416538e-04
        p = p * v + 1.3889095280319452e-03
        p = p * v + 8.333179168403149e-03
        p = p * v + 0.0416666641831398
        p = p * v + 0.1666666716337204
        p = p * v + 0.5
        excess = v * v * p
    small = tl.abs(v) < 0.5
    direct = tl.exp(v) - 1.0
    return tl.where(small, v + excess, direct), tl.where(small, excess, direct - v)


@triton.jit
def softplus_sigmoid(x):
    """softplus(x), softplus(-x), sigmoid(x) and sigmoid(-x), with one exponential of -abs(x)."""
    z = tl.exp(-tl.abs(x))
    log_term = log1p_share(z)
    r = 1.0 / (1.0 + z)
    positive = x >= 0.0
    return (
        tl.where(positive, x, 0.0) + log_term,
        tl.where(positive, 0.0, -x) + log_term,
        tl.where(positive, r, z * r),
        tl.where(positive, z * r, r),
    )


@triton.jit
def tanh(u):
    """Hyperbolic tangent with one special function.

    In fp32 a rational approximation, relative error 2.1e-8 before rounding: a weighted least-squares fit of tanh(u) / u in
    u^2 on [0, 9.02], beyond which tanh rounds to 1.
    """
    if u.dtype == tl.float64:
        e, _ = expm1_excess(-2.0 * tl.abs(u))
        t = -e / (e + 2.0)
        return tl.where(u < 0.0, -t, t)
    else:
        c = tl.minimum(tl.maximum(u, -9.02, propagate_nan=tl.PropagateNan.ALL), 9.02, propagate_nan=tl.PropagateNan.ALL)
        y = c * c
        p = 1.3318678113749242e-08 * y + 2.0583187056843105e-05
        p = p * y + 3.494016467984309e-03
        p = p * y + 0.13379702724490292
        p = p * y + 0.9999999790568662
        q = 7.761854979794427e-07 * y + 3.283063261351441e-04
        q = q * y + 0.025871004369587856
        q = q * y + 0.4671301797713561
        q = q * y + 1.0
        return c * (p / q)
