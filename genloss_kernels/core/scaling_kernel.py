"""The kernel that multiplies what the forward has made by an upstream gradient that only the device knows."""

import triton
import triton.language as tl


@triton.jit
def _scale_kernel(tensors, sizes, ends, factor_ptr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Multiply each of ``tensors`` in place; where the factor is 1 they are not read. ``ends``: first program past each."""
    factor = tl.load(factor_ptr).to(DTYPE)
    if factor != 1.0:
        program = tl.program_id(0)
        for i in tl.static_range(len(tensors)):
            begin = ends[i] - tl.cdiv(sizes[i], BLOCK)
            if (program >= begin) & (program < ends[i]):
                index = (program - begin).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
                live = index < sizes[i]
                x = tl.load(tensors[i] + index, mask=live).to(DTYPE)
                tl.store(tensors[i] + index, x * factor, mask=live)
