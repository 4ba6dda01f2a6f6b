"""Small kernels whose traffic is known by hand."""

import triton
import triton.language as tl


@triton.jit
def copy_kernel(source_ptr, out_ptr, n, stride, BLOCK: tl.constexpr):
    """Copy n elements; a program's lanes lie ``stride`` apart, and programs side by side where that is not 1."""
    if stride == 1:
        place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    else:
        place = tl.program_id(0) + tl.arange(0, BLOCK) * stride
    tl.store(out_ptr + place, tl.load(source_ptr + place, mask=place < n), mask=place < n)


@triton.jit
def add_row_kernel(rows_ptr, row_ptr, out_ptr, BLOCK: tl.constexpr):
    """Add one row to each; nothing is masked."""
    lane = tl.arange(0, BLOCK)
    place = tl.program_id(0) * BLOCK + lane
    tl.store(out_ptr + place, tl.load(rows_ptr + place) + tl.load(row_ptr + lane))


@triton.jit
def atomic_kernel(out_ptr):
    tl.atomic_add(out_ptr, 1.0)


@triton.jit
def loop_kernel(source_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Scale by BLOCK at a time, with an exponential an element."""
    lane = tl.arange(0, BLOCK)
    for start in range(0, n // BLOCK * BLOCK, BLOCK):
        value = tl.load(source_ptr + start + lane).to(tl.float32)
        tl.store(out_ptr + start + lane, tl.exp(value))
