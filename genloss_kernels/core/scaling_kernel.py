"""The kernel that multiplies what the forward has made by an upstream gradient that only the device knows."""

import triton
import triton.language as tl


@triton.jit
def _scale_kernel(tensors, sizes, n_programs, factor_ptr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Multiply each of ``tensors`` in place, program by program in turn; where the factor is 1 they are not read."""
    factor = tl.load(factor_ptr).to(DTYPE)
    if factor != 1.0:
        for i in tl.static_range(len(tensors)):
            size = tl.cast(sizes[i], tl.int64)
            for block in range(tl.program_id(0), tl.cdiv(size, BLOCK).to(tl.int32), n_programs):
                index = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
                live = index < size
                x = tl.load(tensors[i] + index, mask=live).to(DTYPE)
                # An ignored row's gradient is 0 whatever the factor.
                tl.store(tensors[i] + index, tl.where(x == 0.0, x, x * factor), mask=live)
