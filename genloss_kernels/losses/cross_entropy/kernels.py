"""Kernels of cross entropy: forward and backward, by long rows and by tiles of many short or strided ones.

Both traversals share the same device functions: what happens to an element and to a row is written once.
"""

import triton
import triton.language as tl

from ...core.rows import aligned_row, edge_columns, first_aligned, row_offset
from ...core.softmax import collapse, first_state, initial_state, transform, update, update_by_vectors
from ...core.triton_math import expm1_excess, lowest, narrowed, scalar


@triton.jit
def _coefficients(
    target_pointers, weight_ptr, index, live, smoothing, uniform,
    PROBABILITIES: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Weighted, smoothed coefficient of each log-probability, the plain target, and the class weight."""
    if weight_ptr is None:
        weight = tl.full(index.shape, 1.0, DTYPE)
    elif MASKED:
        weight = tl.load(weight_ptr + index, mask=live, other=0.0).to(DTYPE)
    else:
        weight = tl.load(weight_ptr + index).to(DTYPE)
    if PROBABILITIES:
        if MASKED:
            t = tl.load(target_pointers, mask=live, other=0.0).to(DTYPE)
        else:
            t = tl.load(target_pointers).to(DTYPE)
        q = (t * (1.0 - smoothing) + uniform) * weight
    else:
        t = weight
        q = weight
    if MASKED:
        q = tl.where(live, q, 0.0)
    return q, t, weight


@triton.constexpr_function
def _mass_plane(PROBABILITIES, WHOLE):
    """Place among the saved planes of the coefficients' mass; before it, unless WHOLE, what the log-sum-exp needs."""
    return 0 if WHOLE else (2 if PROBABILITIES else 3)


@triton.jit
def _logits(
    pointers, live, logit_scale, softcap, inverse_softcap, SOFTCAP: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr
):
    """Logits after scale and softcap; -inf where not live."""
    if MASKED:
        y = transform(tl.load(pointers, mask=live, other=0.0).to(DTYPE), logit_scale, softcap, inverse_softcap, SOFTCAP)
        # After the softcap, which would turn -inf into -softcap and let the padding take part.
        y = tl.where(live, y, -float("inf"))
    else:
        y = transform(tl.load(pointers).to(DTYPE), logit_scale, softcap, inverse_softcap, SOFTCAP)
    return y


@triton.jit
def _take(
    state, y, target_pointers, weight_ptr, index, live, smoothing, uniform,
    PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr, STATS: tl.constexpr, MASKED: tl.constexpr, WHOLE: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    MOMENT: tl.constexpr = PROBABILITIES or SMOOTHING
    if MOMENT:
        q, t, _ = _coefficients(target_pointers, weight_ptr, index, live, smoothing, uniform, PROBABILITIES, MASKED, DTYPE)
    else:
        q = y
        t = y
    if WHOLE:
        state = first_state(y, q, t, index, live, MASKED, MOMENT, PROBABILITIES and STATS, STATS)
    elif len(y.shape) > len(state[0].shape):
        state = update_by_vectors(state, y, q, t, index, live, MASKED, MOMENT, PROBABILITIES and STATS, STATS)
    else:
        state = update(state, y, q, t, index, live, MASKED, MOMENT, PROBABILITIES and STATS, STATS)
    return state


@triton.jit
def _label_logit(
    row_ptr, label, stride_col, n_cols, ignore_index, logit_scale, softcap, inverse_softcap,
    PROBABILITIES: tl.constexpr, SOFTCAP: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The label's logit after scale and softcap, from memory; 0 where there is no such class."""
    if PROBABILITIES:
        y = tl.full((), 0.0, DTYPE)
    else:
        exists = (label != ignore_index) & (label >= 0) & (label < n_cols)
        x = tl.load(row_ptr + label * stride_col, mask=exists, other=0.0).to(DTYPE)
        y = transform(x, logit_scale, softcap, inverse_softcap, SOFTCAP)
    return y


@triton.jit
def _finish(
    state, row, row_live, label, label_y, weight_ptr, row_weight_ptr,
    loss_ptr, lse_ptr, log_prob_ptr, entropy_ptr, saved_ptr, n_rows, n_cols, ignore_index, smoothing, z_loss,
    PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr, STATS: tl.constexpr, REDUCE: tl.constexpr,
    WHOLE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Losses and statistics from merged row states: stores the rows' results.

    Returns what is summed over rows, and what the gradient needs, which is saved as well unless ``saved_ptr`` is None.
    ``label_y`` is the label's logit. Of a WHOLE row the backward finds the log-sum-exp anew.
    """
    MASS: tl.constexpr = _mass_plane(PROBABILITIES, WHOLE)
    SAVE: tl.constexpr = saved_ptr is not None
    maximum, total, mass, moment, spread, argument, target_mass, target_moment, _, target_argument = state
    n_rows = tl.cast(n_rows, tl.int64)
    log_total = tl.log(total)
    lse = maximum + log_total
    log_prob = lse
    if PROBABILITIES:
        valid = row_live
        normalizer = tl.where(valid, 1.0, 0.0).to(DTYPE)
        loss = mass * log_total - moment
        if SAVE:
            tl.store(saved_ptr + MASS * n_rows + row, mass, mask=row_live)
        if STATS:
            log_prob = target_moment - target_mass * log_total
            correct = argument == target_argument
            if SAVE:
                tl.store(saved_ptr + (MASS + 1) * n_rows + row, target_mass, mask=row_live)
    else:
        valid = row_live & (label != ignore_index)
        inside = (label >= 0) & (label < n_cols)
        log_prob = (label_y - maximum) - log_total
        if SAVE and not WHOLE:
            tl.store(saved_ptr + 2 * n_rows + row, log_prob, mask=row_live)
        # A label out of range must not pass for a loss: NaN in the saved maximum reaches the row's whole gradient too.
        maximum = tl.where(valid & (inside == 0), float("nan"), maximum)
        log_prob = tl.where(inside, log_prob, float("nan"))
        if weight_ptr is None:
            normalizer = tl.where(valid, 1.0, 0.0).to(DTYPE)
        else:
            normalizer = tl.load(weight_ptr + label, mask=valid & inside, other=0.0).to(DTYPE)
        loss = -(1.0 - smoothing) * normalizer * log_prob
        if SMOOTHING:
            loss += smoothing / n_cols * (mass * log_total - moment)
            if weight_ptr is not None:
                mass = (1.0 - smoothing) * normalizer + smoothing / n_cols * mass
                if SAVE:
                    tl.store(saved_ptr + MASS * n_rows + row, mass, mask=row_live)
        correct = argument.to(tl.int64) == label
    if SAVE and not WHOLE:
        tl.store(saved_ptr + row, maximum, mask=row_live)
        tl.store(saved_ptr + n_rows + row, log_total, mask=row_live)
    loss += z_loss * lse * lse
    if row_weight_ptr is not None:
        row_weight = tl.load(row_weight_ptr + row, mask=row_live, other=0.0).to(DTYPE)
        loss *= row_weight
        normalizer *= row_weight
    loss = tl.where(valid, loss, 0.0)
    normalizer = tl.where(valid, normalizer, 0.0)
    if not REDUCE:
        tl.store(loss_ptr + row, loss, mask=row_live)
    if STATS:
        entropy = log_total - spread / total
        tl.store(lse_ptr + row, tl.where(valid, lse, 0.0), mask=row_live)
        tl.store(log_prob_ptr + row, tl.where(valid, log_prob, 0.0), mask=row_live)
        tl.store(entropy_ptr + row, tl.where(valid, entropy, 0.0), mask=row_live)
        correct = correct & valid & (lse == lse)
    else:
        correct = valid
    sums = (loss, normalizer, tl.where(valid, 1, 0), tl.where(correct, 1, 0))
    return sums, (maximum, log_total, log_prob), mass


@triton.jit
def _store_split(state, split_ptr, split_index_ptr, row, row_live, split, n_rows, n_splits):
    maximum, total, mass, moment, spread, argument, target_mass, target_moment, target_maximum, target_argument = state
    place = row * n_splits + split
    plane = tl.cast(n_rows, tl.int64) * n_splits
    tl.store(split_ptr + place, maximum, mask=row_live)
    tl.store(split_ptr + plane + place, total, mask=row_live)
    tl.store(split_ptr + 2 * plane + place, mass, mask=row_live)
    tl.store(split_ptr + 3 * plane + place, moment, mask=row_live)
    tl.store(split_ptr + 4 * plane + place, spread, mask=row_live)
    tl.store(split_ptr + 5 * plane + place, target_mass, mask=row_live)
    tl.store(split_ptr + 6 * plane + place, target_moment, mask=row_live)
    tl.store(split_ptr + 7 * plane + place, target_maximum, mask=row_live)
    tl.store(split_index_ptr + place, argument, mask=row_live)
    tl.store(split_index_ptr + plane + place, target_argument, mask=row_live)


@triton.jit
def _store_partials(partials, position, sums, STATS: tl.constexpr, REDUCE: tl.constexpr):
    loss, normalizer, n_valid, n_correct = sums
    if REDUCE:
        tl.store(partials[0] + position, loss)
        if partials[1] is not None:
            tl.store(partials[1] + position, normalizer)
    if STATS:
        tl.store(partials[2] + position, n_valid)
        tl.store(partials[3] + position, n_correct)


@triton.jit
def _row_statistics(
    logits_ptr, target_ptr, weight_ptr, offset, target_offset, logits_stride_col, target_stride_col,
    n_cols, valid, split, split_cols, smoothing, uniform, logit_scale, softcap, inverse_softcap,
    PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, STATS: tl.constexpr, SPLIT: tl.constexpr,
    VEC: tl.constexpr, RAGGED: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """State of one row, or of one share of it when SPLIT; of nothing where the row is not valid."""
    head, first, body = aligned_row(offset, n_cols, VEC, RAGGED)
    target_first = first_aligned(target_offset, head, VEC, RAGGED)
    if SPLIT:
        begin = tl.multiple_of(split * split_cols, VEC)
        end = tl.minimum(body, begin + split_cols)
    else:
        begin = 0
        end = body
    # An ignored row may hold anything, and costs nothing.
    end = tl.multiple_of(tl.maximum(tl.where(valid, end, begin), begin), VEC)
    full = begin + (end - begin) // BLOCK * BLOCK
    lane = tl.arange(0, VEC)[:, None] + (tl.arange(0, BLOCK // VEC) * VEC)[None, :]
    state = initial_state((BLOCK // VEC,), DTYPE)
    for start in range(begin, full, BLOCK):
        cols = start + lane
        places = cols if VEC > 1 else cols.to(tl.int64) * logits_stride_col
        target_places = cols if VEC > 1 else cols.to(tl.int64) * target_stride_col
        y = _logits(logits_ptr + first + places, lane, logit_scale, softcap, inverse_softcap, SOFTCAP, False, DTYPE)
        state = _take(
            state, y, target_ptr + target_first + target_places, weight_ptr, head + cols, lane, smoothing, uniform,
            PROBABILITIES, SMOOTHING, STATS, False, False, DTYPE,
        )  # fmt: skip
    cols = full + lane
    places = cols if VEC > 1 else cols.to(tl.int64) * logits_stride_col
    target_places = cols if VEC > 1 else cols.to(tl.int64) * target_stride_col
    live = lane < tl.multiple_of(end - full, VEC)
    y = _logits(logits_ptr + first + places, live, logit_scale, softcap, inverse_softcap, SOFTCAP, True, DTYPE)
    state = _take(
        state, y, target_ptr + target_first + target_places, weight_ptr, head + cols, live, smoothing, uniform,
        PROBABILITIES, SMOOTHING, STATS, True, False, DTYPE,
    )  # fmt: skip
    if RAGGED:
        cols = edge_columns(lane, head, body)
        live = (cols < n_cols - head) & (valid & (split == 0))
        y = _logits(logits_ptr + first + cols, live, logit_scale, softcap, inverse_softcap, SOFTCAP, True, DTYPE)
        state = _take(
            state, y, target_ptr + target_first + cols, weight_ptr, head + cols, live, smoothing, uniform,
            PROBABILITIES, SMOOTHING, STATS, True, False, DTYPE,
        )  # fmt: skip
    return collapse(state, 0, PROBABILITIES or SMOOTHING, PROBABILITIES and STATS, STATS)


@triton.jit
def _cross_entropy_forward_rows_kernel(
    logits_ptr, target_ptr, weight_ptr, row_weight_ptr,
    loss_ptr, lse_ptr, log_prob_ptr, entropy_ptr, saved_ptr, partials, split_ptr, split_index_ptr,
    shape, logits_strides, target_strides, logits_stride_col, target_stride_col,
    n_rows, n_cols, n_splits, split_cols, ignore_index,
    smoothing: tl.float64, logit_scale: tl.float64, softcap: tl.float64, z_loss: tl.float64,
    PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, STATS: tl.constexpr,
    SPLIT: tl.constexpr, REDUCE: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program walks one row, or one share of it when SPLIT."""
    smoothing = scalar(smoothing, DTYPE)
    logit_scale = scalar(logit_scale, DTYPE)
    softcap = scalar(softcap, DTYPE)
    z_loss = scalar(z_loss, DTYPE)
    inverse_softcap = 1.0 / softcap
    uniform = smoothing / n_cols
    if SPLIT:
        row = tl.program_id(0) // n_splits
        split = tl.program_id(0) % n_splits
    else:
        row = tl.program_id(0)
        split = 0
    row = row.to(tl.int64)
    offset = row_offset(row, shape, logits_strides)
    target_offset = row_offset(row, shape, target_strides)
    if PROBABILITIES:
        label = row
        valid = row >= 0
    else:
        label = tl.load(target_ptr + target_offset).to(tl.int64)
        valid = label != ignore_index
    state = _row_statistics(
        logits_ptr, target_ptr, weight_ptr, offset, target_offset, logits_stride_col, target_stride_col,
        n_cols, valid, split, split_cols, smoothing, uniform, logit_scale, softcap, inverse_softcap,
        PROBABILITIES, SMOOTHING, SOFTCAP, STATS, SPLIT, VEC, RAGGED, DTYPE, BLOCK,
    )  # fmt: skip
    if SPLIT:
        _store_split(state, split_ptr, split_index_ptr, row, row >= 0, split, n_rows, n_splits)
    else:
        label_y = _label_logit(
            logits_ptr + offset, label, logits_stride_col, n_cols, ignore_index, logit_scale, softcap, inverse_softcap,
            PROBABILITIES, SOFTCAP, DTYPE,
        )  # fmt: skip
        sums, _, _ = _finish(
            state, row, row >= 0, label, label_y, weight_ptr, row_weight_ptr,
            loss_ptr, lse_ptr, log_prob_ptr, entropy_ptr, saved_ptr, n_rows, n_cols, ignore_index, smoothing, z_loss,
            PROBABILITIES, SMOOTHING, STATS, REDUCE, False, DTYPE,
        )  # fmt: skip
        _store_partials(partials, row, sums, STATS, REDUCE)


@triton.jit
def _cross_entropy_merge_kernel(
    logits_ptr, target_ptr, weight_ptr, row_weight_ptr,
    loss_ptr, lse_ptr, log_prob_ptr, entropy_ptr, saved_ptr, partials, split_ptr, split_index_ptr,
    shape, logits_strides, target_strides, logits_stride_col,
    n_rows, n_cols, n_splits, ignore_index,
    smoothing: tl.float64, logit_scale: tl.float64, softcap: tl.float64, z_loss: tl.float64,
    PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, STATS: tl.constexpr,
    REDUCE: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program merges the shares of one row, in the order of the columns."""
    smoothing = scalar(smoothing, DTYPE)
    logit_scale = scalar(logit_scale, DTYPE)
    softcap = scalar(softcap, DTYPE)
    z_loss = scalar(z_loss, DTYPE)
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    live = lane < n_splits
    place = row * n_splits + lane
    plane = tl.cast(n_rows, tl.int64) * n_splits
    start = initial_state((BLOCK,), DTYPE)
    maximum = tl.load(split_ptr + place, mask=live, other=float("-inf"))
    maximum = tl.where(live, maximum, start[0])
    total = tl.load(split_ptr + plane + place, mask=live, other=0.0)
    mass = tl.load(split_ptr + 2 * plane + place, mask=live, other=0.0)
    moment = tl.load(split_ptr + 3 * plane + place, mask=live, other=0.0)
    spread = tl.load(split_ptr + 4 * plane + place, mask=live, other=0.0)
    target_mass = tl.load(split_ptr + 5 * plane + place, mask=live, other=0.0)
    target_moment = tl.load(split_ptr + 6 * plane + place, mask=live, other=0.0)
    target_maximum = tl.load(split_ptr + 7 * plane + place, mask=live, other=float("-inf"))
    target_maximum = tl.where(live, target_maximum, start[0])
    argument = tl.load(split_index_ptr + place, mask=live, other=2147483647)
    target_argument = tl.load(split_index_ptr + plane + place, mask=live, other=2147483647)
    state = (
        maximum, total, mass, moment, spread, argument, target_mass, target_moment, target_maximum, target_argument,
    )  # fmt: skip
    state = collapse(state, 0, PROBABILITIES or SMOOTHING, PROBABILITIES and STATS, STATS)
    offset = row_offset(row, shape, logits_strides)
    if PROBABILITIES:
        label = row
    else:
        label = tl.load(target_ptr + row_offset(row, shape, target_strides)).to(tl.int64)
    label_y = _label_logit(
        logits_ptr + offset, label, logits_stride_col, n_cols, ignore_index, logit_scale, softcap, 1.0 / softcap,
        PROBABILITIES, SOFTCAP, DTYPE,
    )  # fmt: skip
    sums, _, _ = _finish(
        state, row, row >= 0, label, label_y, weight_ptr, row_weight_ptr,
        loss_ptr, lse_ptr, log_prob_ptr, entropy_ptr, saved_ptr, n_rows, n_cols, ignore_index, smoothing, z_loss,
        PROBABILITIES, SMOOTHING, STATS, REDUCE, False, DTYPE,
    )  # fmt: skip
    _store_partials(partials, row, sums, STATS, REDUCE)


@triton.jit
def _tile_rows(n_inner, inner_tiles, n_splits, BLOCK_ROWS: tl.constexpr):
    """Rows of this program's tile: the outer index, the inner indices, and which of these exist."""
    tile = tl.program_id(0) // n_splits
    outer = (tile // inner_tiles).to(tl.int64)
    inner = (tile % inner_tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    return outer, inner, inner < n_inner


@triton.jit
def _columns(n_cols, n_splits, split_cols, WHOLE: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Bounds of this program's loop, known to the compiler if WHOLE; its share of the columns, and where that ends."""
    split = tl.program_id(0) % n_splits
    end = tl.minimum(n_cols, (split + 1) * split_cols)
    if WHOLE:
        begin: tl.constexpr = 0
        stop: tl.constexpr = BLOCK_COLS
    else:
        begin = split * split_cols
        stop = end
    return begin, stop, split, end


@triton.jit
def _cross_entropy_forward_tiles_kernel(
    logits_ptr, target_ptr, weight_ptr, row_weight_ptr,
    loss_ptr, lse_ptr, log_prob_ptr, entropy_ptr, saved_ptr, partials, split_ptr, split_index_ptr,
    shape, logits_strides, target_strides, logits_stride_inner, target_stride_inner,
    logits_stride_col, target_stride_col, n_inner, inner_tiles, n_rows, n_cols, n_splits, split_cols, ignore_index,
    smoothing: tl.float64, logit_scale: tl.float64, softcap: tl.float64, z_loss: tl.float64,
    PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, STATS: tl.constexpr,
    SPLIT: tl.constexpr, REDUCE: tl.constexpr, WHOLE: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """One program walks the classes of neighbouring rows, so that neighbouring lanes read neighbouring addresses."""
    smoothing = scalar(smoothing, DTYPE)
    logit_scale = scalar(logit_scale, DTYPE)
    softcap = scalar(softcap, DTYPE)
    z_loss = scalar(z_loss, DTYPE)
    inverse_softcap = 1.0 / softcap
    uniform = smoothing / n_cols
    outer, inner, row_live = _tile_rows(n_inner, inner_tiles, n_splits, BLOCK_ROWS)
    begin, stop, split, end = _columns(n_cols, n_splits, split_cols, WHOLE, BLOCK_COLS)
    row = outer * n_inner + inner
    inner = inner.to(tl.int64)
    offset = row_offset(outer, shape, logits_strides) + inner * logits_stride_inner
    target_offset = row_offset(outer, shape, target_strides) + inner * target_stride_inner
    if PROBABILITIES:
        label = row
    else:
        label = tl.load(target_ptr + target_offset, mask=row_live, other=0).to(tl.int64)
    state = initial_state((BLOCK_ROWS, BLOCK_COLS), DTYPE)
    label_y = tl.zeros((BLOCK_ROWS, BLOCK_COLS), DTYPE)
    for start in range(begin, stop, BLOCK_COLS):
        cols = start + tl.arange(0, BLOCK_COLS)
        live = row_live[:, None] & (cols < end)[None, :]
        places = cols.to(tl.int64)[None, :] * logits_stride_col
        target_places = cols.to(tl.int64)[None, :] * target_stride_col
        index = tl.broadcast_to(cols[None, :], (BLOCK_ROWS, BLOCK_COLS))
        y = _logits(
            logits_ptr + (offset[:, None] + places), live, logit_scale, softcap, inverse_softcap, SOFTCAP, True, DTYPE
        )
        state = _take(
            state, y, target_ptr + (target_offset[:, None] + target_places), weight_ptr, index, live, smoothing, uniform,
            PROBABILITIES, SMOOTHING, STATS, True, WHOLE, DTYPE,
        )  # fmt: skip
        if not PROBABILITIES and not SPLIT:
            label_y = tl.where(index == label[:, None], y, label_y)
    state = collapse(state, 1, PROBABILITIES or SMOOTHING, PROBABILITIES and STATS, STATS)
    if SPLIT:
        _store_split(state, split_ptr, split_index_ptr, row, row_live, split, n_rows, n_splits)
    else:
        sums, _, _ = _finish(
            state, row, row_live, label, tl.sum(label_y, axis=1), weight_ptr, row_weight_ptr,
            loss_ptr, lse_ptr, log_prob_ptr, entropy_ptr, saved_ptr, n_rows, n_cols, ignore_index, smoothing, z_loss,
            PROBABILITIES, SMOOTHING, STATS, REDUCE, WHOLE, DTYPE,
        )  # fmt: skip
        loss, normalizer, n_valid, n_correct = sums
        sums = (tl.sum(loss, axis=0), tl.sum(normalizer, axis=0), tl.sum(n_valid, axis=0), tl.sum(n_correct, axis=0))
        _store_partials(partials, tl.program_id(0), sums, STATS, REDUCE)


@triton.jit
def _saved_lse(saved_ptr, row, row_live, n_rows, PROBABILITIES: tl.constexpr):
    """Maximum, log of the total relative to it, and the label's log-probability."""
    n_rows = tl.cast(n_rows, tl.int64)
    maximum = tl.load(saved_ptr + row, mask=row_live, other=0.0)
    log_total = tl.load(saved_ptr + n_rows + row, mask=row_live, other=0.0)
    log_prob = maximum
    if not PROBABILITIES:
        log_prob = tl.load(saved_ptr + 2 * n_rows + row, mask=row_live, other=0.0)
    return maximum, log_total, log_prob


@triton.jit
def _saved_mass(
    saved_ptr, weight_ptr, row, row_live, n_rows,
    PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr, WHOLE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Mass of the row's coefficients where it is not the label's weight."""
    mass = tl.zeros_like(row).to(DTYPE)
    if PROBABILITIES or (SMOOTHING and weight_ptr is not None):
        place = _mass_plane(PROBABILITIES, WHOLE) * tl.cast(n_rows, tl.int64) + row
        mass = tl.load(saved_ptr + place, mask=row_live, other=0.0)
    return mass


@triton.jit
def _found_lse(y, index, label, valid, n_cols, PROBABILITIES: tl.constexpr):
    """As saved by the forward, from whole rows of logits."""
    state = first_state(y, y, y, index, index, False, False, False, False)
    maximum, total, _, _, _, _, _, _, _, _ = collapse(state, 1, False, False, False)
    log_total = tl.log(total)
    log_prob = maximum
    if not PROBABILITIES:
        log_prob = (tl.sum(tl.where(index == label[:, None], y, 0.0), axis=1) - maximum) - log_total
        maximum = tl.where(valid & ((label < 0) | (label >= n_cols)), float("nan"), maximum)
    return maximum, log_total, log_prob


@triton.jit
def _row_gradient(
    lse, mass, row, row_live, label, weight_ptr, row_weight_ptr, saved_ptr, divisor_ptr,
    grad_loss_ptr, grad_lse_ptr, grad_log_prob_ptr, grad_entropy_ptr, entropy_ptr,
    grad_loss_stride, grad_lse_stride, grad_log_prob_stride, grad_entropy_stride,
    n_rows, n_cols, ignore_index, smoothing, z_loss, divisor,
    PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr, STATS: tl.constexpr, WHOLE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Coefficients of one row's gradient: of q, the probabilities, the plain target and the entropy; the label's own."""
    MASS: tl.constexpr = _mass_plane(PROBABILITIES, WHOLE)
    n_rows = tl.cast(n_rows, tl.int64)
    maximum, log_total, log_prob = lse
    zero = tl.zeros_like(maximum)
    valid = row_live
    if not PROBABILITIES:
        valid = row_live & (label != ignore_index)
    grad = zero
    if grad_loss_ptr is not None:
        grad += tl.load(grad_loss_ptr + row * grad_loss_stride, mask=row_live, other=0.0).to(DTYPE)
    if row_weight_ptr is not None:
        grad *= tl.load(row_weight_ptr + row, mask=row_live, other=0.0).to(DTYPE)
    if divisor_ptr is not None:
        grad /= tl.load(divisor_ptr).to(DTYPE)
    else:
        grad /= divisor
    label_weight = zero + 1.0
    if not PROBABILITIES:
        if weight_ptr is not None:
            inside = (label >= 0) & (label < n_cols)
            label_weight = tl.load(weight_ptr + label, mask=valid & inside, other=0.0).to(DTYPE)
        if weight_ptr is None or not SMOOTHING:
            mass = label_weight
    of_probability = grad * (mass + 2.0 * z_loss * (maximum + log_total))
    of_label = grad * (1.0 - smoothing) * label_weight
    of_target = zero
    of_entropy = zero
    entropy = zero
    if STATS:
        if grad_lse_ptr is not None:
            of_probability += tl.load(grad_lse_ptr + row * grad_lse_stride, mask=row_live, other=0.0)
        if grad_log_prob_ptr is not None:
            of_target += tl.load(grad_log_prob_ptr + row * grad_log_prob_stride, mask=row_live, other=0.0)
            if PROBABILITIES:
                of_probability -= of_target * tl.load(saved_ptr + (MASS + 1) * n_rows + row, mask=row_live, other=0.0)
            else:
                of_probability -= of_target
                of_label -= of_target
        if grad_entropy_ptr is not None:
            of_entropy += tl.load(grad_entropy_ptr + row * grad_entropy_stride, mask=row_live, other=0.0)
            entropy = tl.load(entropy_ptr + row, mask=row_live, other=0.0)
    at_label = zero
    if not PROBABILITIES:
        # of_probability * p - of_label, without the cancellation at p near 1.
        complement, _ = expm1_excess(log_prob)
        at_label = of_label * complement + (of_probability - of_label) * tl.exp(log_prob)
    return valid, maximum, log_total, grad, of_probability, at_label, of_target, of_entropy, entropy


@triton.jit
def _slope_by_label(of_probability, q, index, label, at_label, of_uniform, SMOOTHING: tl.constexpr):
    """Gradient of transformed logits, from the part that each one's probability has in it."""
    dy = tl.where(index == label, at_label, of_probability)
    if SMOOTHING:
        dy -= of_uniform * q
    return dy


@triton.jit
def _give(
    y, target_pointers, grad_pointers, grad_target_pointers, weight_ptr, index, live, label,
    row_state, smoothing, uniform, logit_scale, inverse_softcap,
    PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, STATS: tl.constexpr,
    GRAD_LOGITS: tl.constexpr, GRAD_TARGET: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile, from its logits and its rows' coefficients."""
    valid, maximum, log_total, grad, of_probability, at_label, of_target, of_entropy, entropy = row_state
    log_probability = (y - maximum) - log_total
    q = y
    if PROBABILITIES or SMOOTHING:
        q, t, weight = _coefficients(
            target_pointers, weight_ptr, index, live, smoothing, uniform, PROBABILITIES, MASKED, DTYPE
        )
    if GRAD_LOGITS:
        probability = tl.exp(log_probability)
        dy = of_probability * probability
        if PROBABILITIES:
            dy -= grad * q
            if STATS:
                dy += of_target * t
        else:
            dy = _slope_by_label(dy, q, index, label, at_label, grad * uniform, SMOOTHING)
        if STATS:
            surplus = tl.where(probability > 0.0, probability * (log_probability + entropy), 0.0)
            dy -= of_entropy * surplus
        if SOFTCAP:
            ratio = y * inverse_softcap
            dy *= 1.0 - ratio * ratio
        dx = narrowed(tl.where(valid, dy * logit_scale, 0.0), grad_pointers)
        if MASKED:
            tl.store(grad_pointers, dx, mask=live)
        else:
            tl.store(grad_pointers, dx)
    if GRAD_TARGET:
        dt = narrowed(log_probability * (of_target - grad * (1.0 - smoothing) * weight), grad_target_pointers)
        if MASKED:
            tl.store(grad_target_pointers, dt, mask=live)
        else:
            tl.store(grad_target_pointers, dt)


@triton.jit
def _give_row(
    logits_ptr, target_ptr, grad_logits_ptr, grad_target_ptr, weight_ptr,
    offset, target_offset, grad_offset, grad_target_offset,
    logits_stride_col, target_stride_col, grad_stride_col, grad_target_stride_col,
    n_cols, split, split_cols, label, row_state, smoothing, uniform, logit_scale, softcap, inverse_softcap,
    PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, STATS: tl.constexpr,
    GRAD_LOGITS: tl.constexpr, GRAD_TARGET: tl.constexpr,
    VEC: tl.constexpr, RAGGED: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of one row, or of one share of it. Each lane reads an element before it writes it, and no other lane's."""
    head, first, body = aligned_row(offset, n_cols, VEC, RAGGED)
    target_first = first_aligned(target_offset, head, VEC, RAGGED)
    grad_first = first_aligned(grad_offset, head, VEC, RAGGED)
    grad_target_first = first_aligned(grad_target_offset, head, VEC, RAGGED)
    begin = tl.multiple_of(split * split_cols, VEC)
    end = tl.multiple_of(tl.maximum(tl.minimum(body, begin + split_cols), begin), VEC)
    full = begin + (end - begin) // BLOCK * BLOCK
    lane = tl.arange(0, BLOCK)
    for start in range(begin, full, BLOCK):
        cols = start + lane
        y = _logits(
            logits_ptr + first + (cols if VEC > 1 else cols.to(tl.int64) * logits_stride_col), lane,
            logit_scale, softcap, inverse_softcap, SOFTCAP, False, DTYPE,
        )  # fmt: skip
        _give(
            y,
            target_ptr + target_first + (cols if VEC > 1 else cols.to(tl.int64) * target_stride_col),
            grad_logits_ptr + grad_first + (cols if VEC > 1 else cols.to(tl.int64) * grad_stride_col),
            grad_target_ptr + grad_target_first + (cols if VEC > 1 else cols.to(tl.int64) * grad_target_stride_col),
            weight_ptr, head + cols, lane, label, row_state, smoothing, uniform, logit_scale, inverse_softcap,
            PROBABILITIES, SMOOTHING, SOFTCAP, STATS, GRAD_LOGITS, GRAD_TARGET, False, DTYPE,
        )  # fmt: skip
    cols = full + lane
    live = lane < tl.multiple_of(end - full, VEC)
    y = _logits(
        logits_ptr + first + (cols if VEC > 1 else cols.to(tl.int64) * logits_stride_col), live,
        logit_scale, softcap, inverse_softcap, SOFTCAP, True, DTYPE,
    )  # fmt: skip
    _give(
        y,
        target_ptr + target_first + (cols if VEC > 1 else cols.to(tl.int64) * target_stride_col),
        grad_logits_ptr + grad_first + (cols if VEC > 1 else cols.to(tl.int64) * grad_stride_col),
        grad_target_ptr + grad_target_first + (cols if VEC > 1 else cols.to(tl.int64) * grad_target_stride_col),
        weight_ptr, head + cols, live, label, row_state, smoothing, uniform, logit_scale, inverse_softcap,
        PROBABILITIES, SMOOTHING, SOFTCAP, STATS, GRAD_LOGITS, GRAD_TARGET, True, DTYPE,
    )  # fmt: skip
    if RAGGED:
        cols = edge_columns(lane, head, body)
        live = (cols < n_cols - head) & (split == 0)
        y = _logits(logits_ptr + first + cols, live, logit_scale, softcap, inverse_softcap, SOFTCAP, True, DTYPE)
        _give(
            y, target_ptr + target_first + cols, grad_logits_ptr + grad_first + cols,
            grad_target_ptr + grad_target_first + cols,
            weight_ptr, head + cols, live, label, row_state, smoothing, uniform, logit_scale, inverse_softcap,
            PROBABILITIES, SMOOTHING, SOFTCAP, STATS, GRAD_LOGITS, GRAD_TARGET, True, DTYPE,
        )  # fmt: skip


@triton.jit
def _cross_entropy_backward_rows_kernel(
    logits_ptr, target_ptr, weight_ptr, row_weight_ptr, saved_ptr, divisor_ptr,
    grad_loss_ptr, grad_lse_ptr, grad_log_prob_ptr, grad_entropy_ptr, entropy_ptr, grad_logits_ptr, grad_target_ptr,
    grad_loss_stride, grad_lse_stride, grad_log_prob_stride, grad_entropy_stride,
    shape, logits_strides, target_strides, grad_strides, grad_target_strides,
    logits_stride_col, target_stride_col, grad_stride_col, grad_target_stride_col,
    n_rows, n_cols, n_splits, split_cols, ignore_index,
    smoothing: tl.float64, logit_scale: tl.float64, softcap: tl.float64, z_loss: tl.float64, divisor: tl.float64,
    PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, STATS: tl.constexpr,
    GRAD_LOGITS: tl.constexpr, GRAD_TARGET: tl.constexpr,
    VEC: tl.constexpr, RAGGED: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program writes one row's gradient, or one share of it."""
    smoothing = scalar(smoothing, DTYPE)
    logit_scale = scalar(logit_scale, DTYPE)
    softcap = scalar(softcap, DTYPE)
    z_loss = scalar(z_loss, DTYPE)
    inverse_softcap = 1.0 / softcap
    uniform = smoothing / n_cols
    row = (tl.program_id(0) // n_splits).to(tl.int64)
    split = tl.program_id(0) % n_splits
    offset = row_offset(row, shape, logits_strides)
    target_offset = row_offset(row, shape, target_strides)
    grad_offset = row_offset(row, shape, grad_strides)
    grad_target_offset = row_offset(row, shape, grad_target_strides)
    if PROBABILITIES:
        label = row
    else:
        label = tl.load(target_ptr + target_offset).to(tl.int64)
    row_state = _row_gradient(
        _saved_lse(saved_ptr, row, row >= 0, n_rows, PROBABILITIES),
        _saved_mass(saved_ptr, weight_ptr, row, row >= 0, n_rows, PROBABILITIES, SMOOTHING, False, DTYPE),
        row, row >= 0, label, weight_ptr, row_weight_ptr, saved_ptr, divisor_ptr,
        grad_loss_ptr, grad_lse_ptr, grad_log_prob_ptr, grad_entropy_ptr, entropy_ptr,
        grad_loss_stride, grad_lse_stride, grad_log_prob_stride, grad_entropy_stride,
        n_rows, n_cols, ignore_index, smoothing, z_loss, scalar(divisor, DTYPE),
        PROBABILITIES, SMOOTHING, STATS, False, DTYPE,
    )  # fmt: skip
    _give_row(
        logits_ptr, target_ptr, grad_logits_ptr, grad_target_ptr, weight_ptr,
        offset, target_offset, grad_offset, grad_target_offset,
        logits_stride_col, target_stride_col, grad_stride_col, grad_target_stride_col,
        n_cols, split, split_cols, label, row_state, smoothing, uniform, logit_scale, softcap, inverse_softcap,
        PROBABILITIES, SMOOTHING, SOFTCAP, STATS, GRAD_LOGITS, GRAD_TARGET, VEC, RAGGED, DTYPE, BLOCK,
    )  # fmt: skip


@triton.jit
def _cross_entropy_loss_and_gradient_kernel(
    logits_ptr, target_ptr, weight_ptr, row_weight_ptr, divisor_ptr, upstream_ptr, loss_ptr,
    grad_logits_ptr, grad_target_ptr,
    shape, logits_strides, target_strides, grad_strides, grad_target_strides,
    logits_stride_col, target_stride_col, grad_stride_col, grad_target_stride_col, n_rows, n_cols, ignore_index,
    smoothing: tl.float64, logit_scale: tl.float64, softcap: tl.float64, z_loss: tl.float64, divisor: tl.float64,
    PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, GRAD_TARGET: tl.constexpr,
    VEC: tl.constexpr, RAGGED: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program finds one row's loss and gradient, perhaps over its logits, which it reads again out of the cache."""
    smoothing = scalar(smoothing, DTYPE)
    logit_scale = scalar(logit_scale, DTYPE)
    softcap = scalar(softcap, DTYPE)
    z_loss = scalar(z_loss, DTYPE)
    inverse_softcap = 1.0 / softcap
    uniform = smoothing / n_cols
    row = tl.program_id(0).to(tl.int64)
    offset = row_offset(row, shape, logits_strides)
    target_offset = row_offset(row, shape, target_strides)
    if PROBABILITIES:
        label = row
        valid = row >= 0
    else:
        label = tl.load(target_ptr + target_offset).to(tl.int64)
        valid = label != ignore_index
    label_y = _label_logit(
        logits_ptr + offset, label, logits_stride_col, n_cols, ignore_index, logit_scale, softcap, inverse_softcap,
        PROBABILITIES, SOFTCAP, DTYPE,
    )  # fmt: skip
    state = _row_statistics(
        logits_ptr, target_ptr, weight_ptr, offset, target_offset, logits_stride_col, target_stride_col,
        n_cols, valid, 0, n_cols, smoothing, uniform, logit_scale, softcap, inverse_softcap,
        PROBABILITIES, SMOOTHING, SOFTCAP, False, False, VEC, RAGGED, DTYPE, BLOCK,
    )  # fmt: skip
    _, lse, mass = _finish(
        state, row, row >= 0, label, label_y, weight_ptr, row_weight_ptr,
        loss_ptr, None, None, None, None, n_rows, n_cols, ignore_index, smoothing, z_loss,
        PROBABILITIES, SMOOTHING, False, False, False, DTYPE,
    )  # fmt: skip
    row_state = _row_gradient(
        lse, mass, row, row >= 0, label, weight_ptr, row_weight_ptr, None, divisor_ptr,
        upstream_ptr, None, None, None, None, 0, 0, 0, 0,
        n_rows, n_cols, ignore_index, smoothing, z_loss, scalar(divisor, DTYPE),
        PROBABILITIES, SMOOTHING, False, False, DTYPE,
    )  # fmt: skip
    # Every lane has read the label's logit, which one of them may be about to overwrite.
    tl.debug_barrier()
    _give_row(
        logits_ptr, target_ptr, grad_logits_ptr, grad_target_ptr, weight_ptr,
        offset, target_offset, row_offset(row, shape, grad_strides), row_offset(row, shape, grad_target_strides),
        logits_stride_col, target_stride_col, grad_stride_col, grad_target_stride_col,
        n_cols, 0, n_cols, label, row_state, smoothing, uniform, logit_scale, softcap, inverse_softcap,
        PROBABILITIES, SMOOTHING, SOFTCAP, False, True, GRAD_TARGET, VEC, RAGGED, DTYPE, BLOCK,
    )  # fmt: skip


@triton.jit
def _held(row_pointers, live, logit_scale, DTYPE: tl.constexpr):
    """Logits of a part of a row, -inf where not live, and their largest, finite."""
    y = _logits(row_pointers, live, logit_scale, 1.0, 1.0, False, True, DTYPE)
    return y, tl.maximum(tl.max(y, 0), lowest(DTYPE))


@triton.jit
def _held_sums(y, live, top, SMOOTHING: tl.constexpr):
    """Exponentials relative to ``top``, their sum, and for label smoothing the number of logits and their sum."""
    difference = y - top
    exponential = tl.exp(difference)
    mass = top * 0.0
    moment = mass
    if SMOOTHING:
        mass += tl.sum(tl.where(live, 1, 0), 0)
        moment += tl.sum(tl.where(live, difference, 0.0), 0)
    return exponential, tl.sum(exponential, 0), mass, moment


@triton.jit
def _give_held(
    exponential, grad_pointers, cols, live, label, valid, of_probability, at_label, of_uniform, logit_scale,
    SMOOTHING: tl.constexpr,
):  # fmt: skip
    dy = _slope_by_label(exponential * of_probability, 1.0, cols, label, at_label, of_uniform, SMOOTHING)
    tl.store(grad_pointers, narrowed(tl.where(valid, dy * logit_scale, 0.0), grad_pointers), mask=live)


@triton.jit
def _cross_entropy_loss_and_gradient_held_kernel(
    logits_ptr, target_ptr, weight_ptr, row_weight_ptr, divisor_ptr, upstream_ptr, loss_ptr, grad_logits_ptr,
    shape, logits_strides, target_strides, grad_strides, n_rows, n_cols, ignore_index,
    smoothing: tl.float64, logit_scale: tl.float64, z_loss: tl.float64, divisor: tl.float64,
    SMOOTHING: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """One program finds one row's loss and gradient, perhaps over its logits, from labels; it holds the exponentials.

    Class weights beside them would spill where label smoothing needs them.
    """
    smoothing = scalar(smoothing, DTYPE)
    logit_scale = scalar(logit_scale, DTYPE)
    z_loss = scalar(z_loss, DTYPE)
    row = tl.program_id(0).to(tl.int64)
    offset = row_offset(row, shape, logits_strides)
    label = tl.load(target_ptr + row_offset(row, shape, target_strides)).to(tl.int64)
    valid = label != ignore_index
    label_y = _label_logit(logits_ptr + offset, label, 1, n_cols, ignore_index, logit_scale, 1.0, 1.0, False, False, DTYPE)
    head, first, body = aligned_row(offset, n_cols, VEC, RAGGED)
    cols = tl.arange(0, BLOCK)
    live = cols < tl.multiple_of(body, VEC)
    y, top = _held(logits_ptr + first + cols, live & valid, logit_scale, DTYPE)
    if RAGGED:
        edge = edge_columns(tl.arange(0, EDGE), head, body)
        at_edge = edge < n_cols - head
        edge_y, edge_top = _held(logits_ptr + first + edge, at_edge & valid, logit_scale, DTYPE)
        top = tl.maximum(top, edge_top)
    exponential, total, mass, moment = _held_sums(y, live & valid, top, SMOOTHING)
    if RAGGED:
        edge_exponential, edge_total, edge_mass, edge_moment = _held_sums(edge_y, at_edge & valid, top, SMOOTHING)
        total += edge_total
        mass += edge_mass
        moment += edge_moment
    zero = top * 0.0
    _, lse, mass = _finish(
        (top, total, mass, moment, zero, zero, zero, zero, zero, zero), row, row >= 0, label, label_y, weight_ptr,
        row_weight_ptr, loss_ptr, None, None, None, None, n_rows, n_cols, ignore_index, smoothing, z_loss,
        False, SMOOTHING, False, False, False, DTYPE,
    )  # fmt: skip
    _, _, _, grad, of_probability, at_label, _, _, _ = _row_gradient(
        lse, mass, row, row >= 0, label, weight_ptr, row_weight_ptr, None, divisor_ptr,
        upstream_ptr, None, None, None, None, 0, 0, 0, 0,
        n_rows, n_cols, ignore_index, smoothing, z_loss, scalar(divisor, DTYPE),
        False, SMOOTHING, False, False, DTYPE,
    )  # fmt: skip
    of_probability = of_probability / total
    of_uniform = grad * (smoothing / n_cols)
    # Every lane has read the label's logit, which one of them may be about to overwrite.
    tl.debug_barrier()
    grad_row = grad_logits_ptr + first_aligned(row_offset(row, shape, grad_strides), head, VEC, RAGGED)
    _give_held(
        exponential, grad_row + cols, head + cols, live, label, valid, of_probability, at_label, of_uniform, logit_scale,
        SMOOTHING,
    )  # fmt: skip
    if RAGGED:
        _give_held(
            edge_exponential, grad_row + edge, head + edge, at_edge, label, valid, of_probability, at_label, of_uniform,
            logit_scale, SMOOTHING,
        )  # fmt: skip


@triton.jit
def _cross_entropy_backward_tiles_kernel(
    logits_ptr, target_ptr, weight_ptr, row_weight_ptr, saved_ptr, divisor_ptr,
    grad_loss_ptr, grad_lse_ptr, grad_log_prob_ptr, grad_entropy_ptr, entropy_ptr, grad_logits_ptr, grad_target_ptr,
    grad_loss_stride, grad_lse_stride, grad_log_prob_stride, grad_entropy_stride,
    shape, logits_strides, target_strides, grad_strides, grad_target_strides,
    logits_stride_inner, target_stride_inner, grad_stride_inner, grad_target_stride_inner,
    logits_stride_col, target_stride_col, grad_stride_col, grad_target_stride_col,
    n_inner, inner_tiles, n_rows, n_cols, n_splits, split_cols, ignore_index,
    smoothing: tl.float64, logit_scale: tl.float64, softcap: tl.float64, z_loss: tl.float64, divisor: tl.float64,
    PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, STATS: tl.constexpr,
    GRAD_LOGITS: tl.constexpr, GRAD_TARGET: tl.constexpr, WHOLE: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """One program writes the gradient of neighbouring rows."""
    smoothing = scalar(smoothing, DTYPE)
    logit_scale = scalar(logit_scale, DTYPE)
    softcap = scalar(softcap, DTYPE)
    z_loss = scalar(z_loss, DTYPE)
    inverse_softcap = 1.0 / softcap
    uniform = smoothing / n_cols
    outer, inner, row_live = _tile_rows(n_inner, inner_tiles, n_splits, BLOCK_ROWS)
    begin, stop, _, end = _columns(n_cols, n_splits, split_cols, WHOLE, BLOCK_COLS)
    row = outer * n_inner + inner
    inner = inner.to(tl.int64)
    offset = row_offset(outer, shape, logits_strides) + inner * logits_stride_inner
    target_offset = row_offset(outer, shape, target_strides) + inner * target_stride_inner
    grad_offset = row_offset(outer, shape, grad_strides) + inner * grad_stride_inner
    grad_target_offset = row_offset(outer, shape, grad_target_strides) + inner * grad_target_stride_inner
    if PROBABILITIES:
        label = row
    else:
        label = tl.load(target_ptr + target_offset, mask=row_live, other=0).to(tl.int64)
    if WHOLE:
        cols = tl.arange(0, BLOCK_COLS)
        index = tl.broadcast_to(cols[None, :], (BLOCK_ROWS, BLOCK_COLS))
        whole = _logits(
            logits_ptr + (offset[:, None] + cols.to(tl.int64)[None, :] * logits_stride_col),
            row_live[:, None] & (cols < n_cols)[None, :], logit_scale, softcap, inverse_softcap, SOFTCAP, True, DTYPE,
        )  # fmt: skip
        lse = _found_lse(whole, index, label, row_live & (label != ignore_index), n_cols, PROBABILITIES)
    else:
        lse = _saved_lse(saved_ptr, row, row_live, n_rows, PROBABILITIES)
    valid, maximum, log_total, grad, of_probability, at_label, of_target, of_entropy, entropy = _row_gradient(
        lse, _saved_mass(saved_ptr, weight_ptr, row, row_live, n_rows, PROBABILITIES, SMOOTHING, WHOLE, DTYPE),
        row, row_live, label, weight_ptr, row_weight_ptr, saved_ptr, divisor_ptr,
        grad_loss_ptr, grad_lse_ptr, grad_log_prob_ptr, grad_entropy_ptr, entropy_ptr,
        grad_loss_stride, grad_lse_stride, grad_log_prob_stride, grad_entropy_stride,
        n_rows, n_cols, ignore_index, smoothing, z_loss, scalar(divisor, DTYPE),
        PROBABILITIES, SMOOTHING, STATS, WHOLE, DTYPE,
    )  # fmt: skip
    row_state = (
        valid[:, None], maximum[:, None], log_total[:, None], grad[:, None], of_probability[:, None],
        at_label[:, None], of_target[:, None], of_entropy[:, None], entropy[:, None],
    )  # fmt: skip
    for start in range(begin, stop, BLOCK_COLS):
        cols = start + tl.arange(0, BLOCK_COLS)
        wide = cols.to(tl.int64)[None, :]
        live = row_live[:, None] & (cols < end)[None, :]
        if WHOLE:
            y = whole
        else:
            y = _logits(
                logits_ptr + (offset[:, None] + wide * logits_stride_col), live,
                logit_scale, softcap, inverse_softcap, SOFTCAP, True, DTYPE,
            )  # fmt: skip
        _give(
            y,
            target_ptr + (target_offset[:, None] + wide * target_stride_col),
            grad_logits_ptr + (grad_offset[:, None] + wide * grad_stride_col),
            grad_target_ptr + (grad_target_offset[:, None] + wide * grad_target_stride_col),
            weight_ptr, tl.broadcast_to(cols[None, :], (BLOCK_ROWS, BLOCK_COLS)), live, label[:, None],
            row_state, smoothing, uniform, logit_scale, inverse_softcap,
            PROBABILITIES, SMOOTHING, SOFTCAP, STATS, GRAD_LOGITS, GRAD_TARGET, True, DTYPE,
        )  # fmt: skip
