"""Divergences by PyTorch operators over blocks that stay in the cache; nothing of the logits' size but the gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.layout import row_blocks
from ...core.scratch import Scratch
from . import reference
from .reference import Kind, Options, arithmetic

# Elements of a block for each thread: a few buffers of 256 KiB in fp32 in a core's second-level cache, and long enough to
# hide the cost of calling operators.
BLOCK_ELEMENTS = 2**16

# A divergence below this is computed once more in fp64, as fp32 is off by about 1e-7.
_CLOSE = 2.0**-10

# A divergence above this has met a logit so low that it counts as -inf, as the lowest number of a dtype does.
_FAR = {torch.float32: 1e20, torch.float64: 1e200}


def _blocks(input: Tensor) -> list[tuple[int | slice, ...]]:
    if input.dim() == 1:
        return [()]
    return list(row_blocks(input.shape, BLOCK_ELEMENTS * torch.get_num_threads()))


class _Block:
    """One block's logits over the temperature, in the dtype of arithmetic, and buffers of its shape."""

    def __init__(self, scratch: Scratch, options: Options, dtype: torch.dtype) -> None:
        self.scratch, self.options, self.dtype = scratch, options, dtype

    def take(self, name: str, like: Tensor) -> Tensor:
        return self.scratch.take(name, like.shape, self.dtype, like.device)

    def logits(self, name: str, block: Tensor) -> Tensor:
        y = self.scratch.cast(name, block, self.dtype)
        if self.options.temperature == 1.0:
            return y
        return torch.div(y, self.options.temperature, out=self.take(name, block))

    def probabilities(self, name: str, logits: Tensor) -> Tensor:
        return torch.softmax(logits, -1, out=self.take(name, logits))

    def exponentials(self, name: str, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits less their maximum, their exponentials, and the sum of these."""
        below = torch.sub(logits, logits.amax(-1, keepdim=True), out=self.take(f"{name} below", logits))
        e = torch.exp(below, out=self.take(f"{name} exp", logits))
        return below, e, e.sum(-1)


def _mean(weights: Tensor, values: Tensor, total: Tensor | None, scratch: Tensor) -> Tensor:
    """Mean of ``values``, which is overwritten where it meets a weight of 0, over the last dimension."""
    found = torch.mul(weights, values, out=scratch).sum(-1)
    if values.device.type != "cpu" or not bool(found.isfinite().all()):
        # 0 times an infinity is NaN.
        values.masked_fill_(weights == 0.0, 0.0)
        found = torch.mul(weights, values, out=scratch).sum(-1)
    return found if total is None else found / total


def forward(input: Tensor, target: Tensor | None, options: Options) -> Tensor:
    """Loss of each row, in the dtype of arithmetic."""
    dtype = arithmetic(input, target)
    loss = torch.empty(input.shape[:-1], dtype=dtype, device=input.device)
    block = _Block(Scratch(), options, dtype)
    for index in _blocks(input):
        student = block.logits("student", input[index])
        if target is None:
            below, e, total = block.exponentials("student", student)
            loss[index] = total.log() - _mean(e, below, total, block.take("product", below))
            continue
        teacher = block.logits("teacher", target[index])
        rows = _js(teacher, student, block)[0] if options.kind == Kind.JS else _kl(teacher, student, block)
        if dtype == torch.float32 and rows.device.type == "cpu" and (close := rows < _CLOSE).any():
            # The logits have been divided already.
            plain = options._replace(temperature=1.0)
            logits = (block.logits(name, t[index]) for name, t in (("student", input), ("teacher", target)))
            rows[close] = reference.rows(*(y[close] for y in logits), plain)
        loss[index] = rows
    return loss.mul_(options.temperature**2)


def _kl(teacher: Tensor, student: Tensor, block: _Block) -> Tensor:
    if block.options.kind == Kind.REVERSE_KL:
        teacher, student = student, teacher
    # Relative to the maxima throughout: of close distributions nothing large is subtracted.
    below, e, total = block.exponentials("teacher", teacher)
    other_below, _, other_total = block.exponentials("student", student)
    mean = _mean(e, below.sub_(other_below), total, other_below)
    value = torch.log1p((other_total - total) / total) + mean
    return value.masked_fill_(value > _FAR[block.dtype], float("inf"))


def _js(teacher: Tensor, student: Tensor, block: _Block) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """The divergence; for each distribution its probabilities, their log over the mixture's, and the mean of that."""
    beta, tiny = block.options.beta, torch.finfo(block.dtype).tiny
    p, q = block.probabilities("p", teacher), block.probabilities("q", student)
    mixture = torch.lerp(q, p, beta, out=block.take("mixture", p)).clamp_(min=tiny)
    parts = []
    for name, probabilities in (("p over mixture", p), ("q over mixture", q)):
        log = torch.div(probabilities, mixture, out=block.take(name, p)).clamp_(min=tiny).log_()
        mean = torch.mul(probabilities, log, out=block.take("product", p)).sum(-1)
        parts.append((probabilities, log, mean))
    return beta * parts[0][2] + (1.0 - beta) * parts[1][2], parts


def backward(
    input: Tensor,
    target: Tensor | None,
    grad_loss: Tensor,
    options: Options,
    grad_input: Tensor | None,
    grad_target: Tensor | None,
) -> None:
    """Write the gradients of the logits, block by block."""
    dtype = arithmetic(input, target)
    grad = grad_loss.to(dtype).expand(input.shape[:-1]).unsqueeze(-1) * (options.temperature / (options.divisor or 1))
    block = _Block(Scratch(), options, dtype)
    for index in _blocks(input):
        student, factor = block.logits("student", input[index]), grad[index]
        of_student = None if grad_input is None else grad_input[index]
        if target is None:
            assert of_student is not None
            _write_entropy(student, factor, of_student, block)
            continue
        teacher = block.logits("teacher", target[index])
        of_teacher = None if grad_target is None else grad_target[index]
        if options.kind == Kind.JS:
            _write_js(teacher, student, factor, of_teacher, of_student, block)
        elif options.kind == Kind.FORWARD_KL:
            _write_kl(teacher, student, factor, of_teacher, of_student, block)
        else:
            _write_kl(student, teacher, factor, of_student, of_teacher, block)


def _write_entropy(logits: Tensor, factor: Tensor, out: Tensor, block: _Block) -> None:
    log_p = torch.log_softmax(logits, -1, out=block.take("log_p", logits))
    p = torch.exp(log_p, out=block.take("p", logits))
    entropy = _mean(p, log_p, None, block.take("product", p)).neg_()
    torch.mul(log_p.add_(entropy.unsqueeze(-1)).mul_(p), -factor, out=_place(out, block, "gradient"))
    _deliver(out, block, "gradient")


def _write_kl(a: Tensor, b: Tensor, factor: Tensor, of_a: Tensor | None, of_b: Tensor | None, block: _Block) -> None:
    p = block.probabilities("p", a)
    if of_a is not None:
        difference = torch.sub(a, b, out=block.take("difference", a))
        mean = _mean(p, difference, None, block.take("product", a))
        torch.mul(difference.sub_(mean.unsqueeze(-1)).mul_(p), factor, out=_place(of_a, block, "gradient of a"))
        _deliver(of_a, block, "gradient of a")
    if of_b is not None:
        out = _place(of_b, block, "gradient of b")
        torch.softmax(b, -1, out=out).sub_(p).mul_(factor)
        _deliver(of_b, block, "gradient of b")


def _write_js(
    teacher: Tensor,
    student: Tensor,
    factor: Tensor,
    of_teacher: Tensor | None,
    of_student: Tensor | None,
    block: _Block,
) -> None:
    beta = block.options.beta
    _, parts = _js(teacher, student, block)
    for (p, log, mean), out, weight in zip(parts, (of_teacher, of_student), (beta, 1.0 - beta), strict=True):
        if out is not None:
            name = "gradient"
            torch.mul(log.sub_(mean.unsqueeze(-1)).mul_(p), factor * weight, out=_place(out, block, name))
            _deliver(out, block, name)


def _place(out: Tensor, block: _Block, name: str) -> Tensor:
    """Where to compute what goes into ``out``: itself, or a buffer if it is of another dtype or its rows are strided."""
    return out if out.dtype == block.dtype and out.stride(-1) == 1 else block.take(name, out)


def _deliver(out: Tensor, block: _Block, name: str) -> None:
    place = _place(out, block, name)
    if place is not out:
        out.copy_(place)
