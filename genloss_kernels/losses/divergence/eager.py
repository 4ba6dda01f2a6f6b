"""Divergences by PyTorch operators over blocks that stay in the cache.

Gradients are made with the loss, less the upstream gradient and the temperature: finding the probabilities a second time
would cost more than all that follows from them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...core.layout import row_blocks
from ...core.scratch import Scratch
from . import reference
from .reference import FAR, Kind, Options, arithmetic

# Elements of a block for each thread: buffers of 1 MiB in fp32, which caches hold, and long enough to hide what calling
# operators costs. Halves and quarters of it measured up to 1.2 and 1.5 times slower, twice as much no faster.
BLOCK_ELEMENTS = 2**18

# A divergence below this is computed once more from terms of the second order, as fp32 is off by about 1e-7.
_CLOSE = 2.0**-10


class _Block:
    """Buffers of the blocks' shape, in the dtype of arithmetic."""

    def __init__(self, options: Options, dtype: torch.dtype) -> None:
        self.scratch, self.options, self.dtype = Scratch(), options, dtype

    def take(self, name: str, like: Tensor) -> Tensor:
        return self.scratch.take(name, like.shape, self.dtype, like.device)

    def place(self, grad: Tensor | None, name: str, like: Tensor) -> Tensor:
        """Where to compute what becomes a gradient if one is wanted: fresh memory costs as much as two passes over it."""
        return self.take(name, like) if grad is None else grad

    def logits(self, name: str, block: Tensor) -> Tensor:
        """Logits over the temperature."""
        y = self.scratch.cast(name, block, self.dtype)
        if self.options.temperature == 1.0:
            return y
        return torch.div(y, self.options.temperature, out=self.take(name, block))

    def probabilities(self, name: str, logits: Tensor) -> Tensor:
        # A fraction of what torch.exp takes.
        return torch.softmax(logits, -1, out=self.take(name, logits))


def forward(
    input: Tensor, target: Tensor | None, options: Options, of_input: Tensor | None, of_target: Tensor | None
) -> Tensor:
    """Loss of each row of a batch, in the dtype of arithmetic.

    Writes the derivatives of the rows' divergences with respect to the logits over the temperature.
    """
    dtype = arithmetic(input, target)
    loss = torch.empty(input.shape[:-1], dtype=dtype, device=input.device)
    block = _Block(options, dtype)
    for index in row_blocks(input.shape, BLOCK_ELEMENTS * torch.get_num_threads()):
        student = block.logits("student", input[index])
        into = [None if grad is None else grad[index] for grad in (of_target, of_input)]
        if target is None:
            loss[index] = _entropy(student, into[1], block)
            continue
        teacher = block.logits("teacher", target[index])
        if options.kind == Kind.JS:
            rows = _js(teacher, student, into, block)
        elif options.kind == Kind.FORWARD_KL:
            rows = _kl(teacher, student, into, block)
        else:
            rows = _kl(student, teacher, into[::-1], block)
        if rows.device.type == "cpu" and (close := rows < _CLOSE).any():
            rows[close] = reference.rows(student[close], teacher[close], options._replace(temperature=1.0))
        loss[index] = rows
    return loss.mul_(options.temperature**2)


def _mean(p: Tensor, values: Tensor) -> Tensor:
    """Mean of ``values`` under p; where p is 0 they are overwritten if they are not finite."""
    found = torch.linalg.vecdot(p, values)
    if p.device.type != "cpu" or not bool(found.isfinite().all()):
        # 0 times an infinity is NaN.
        values.masked_fill_(p == 0.0, 0.0)
        found = torch.linalg.vecdot(p, values)
    return found


def _surplus(p: Tensor, values: Tensor, mean: Tensor, weight: float) -> None:
    """Turn logarithms into the derivative of their mean, weight * p * (values - mean)."""
    values.sub_(mean.unsqueeze(-1)).mul_(p)
    if weight != 1.0:
        values.mul_(weight)


def _entropy(logits: Tensor, of_logits: Tensor | None, block: _Block) -> Tensor:
    p = block.probabilities("p", logits)
    below = torch.sub(logits, logits.amax(-1, keepdim=True), out=block.place(of_logits, "below", logits))
    mean = _mean(p, below)
    if of_logits is not None:
        _surplus(p, below, mean, -1.0)
    # The largest probability is 1 over the sum of exponentials below the maximum.
    return 0.0 - p.amax(-1).log() - mean


def _kl(a: Tensor, b: Tensor, into: list[Tensor | None], block: _Block) -> Tensor:
    """KL(a || b)."""
    of_a, of_b = into
    # Relative to the maxima throughout: of close distributions nothing large is subtracted.
    below = torch.sub(a, a.amax(-1, keepdim=True), out=block.place(of_a, "below", a))
    q = block.place(of_b, "q", b)
    torch.sub(b, b.amax(-1, keepdim=True), out=q)
    if q.device.type != "cpu" or float(q.amin()) < -FAR:
        q.masked_fill_(q < -FAR, -math.inf)
    below.sub_(q)
    p = block.probabilities("p", a)
    torch.softmax(b, -1, out=q)
    mean = _mean(p, below)
    top, other_top = p.amax(-1), q.amax(-1)
    if of_a is not None:
        _surplus(p, below, mean, 1.0)
    if of_b is not None:
        q.sub_(p)
    return torch.log1p((top - other_top) / other_top) + mean


def _js(teacher: Tensor, student: Tensor, into: list[Tensor | None], block: _Block) -> Tensor:
    beta, tiny = block.options.beta, torch.finfo(block.dtype).tiny
    p, q = block.probabilities("p", teacher), block.probabilities("q", student)
    mixture = torch.lerp(q, p, beta, out=block.take("mixture", p)).clamp_(min=tiny)
    value = torch.zeros_like(p[..., 0])
    for probabilities, grad, weight in zip((p, q), into, (beta, 1.0 - beta), strict=True):
        # Finite, since a 0 may be its factor.
        log = torch.div(probabilities, mixture, out=block.place(grad, "log", p)).clamp_(min=tiny).log_()
        mean = torch.linalg.vecdot(probabilities, log)
        if grad is not None:
            _surplus(probabilities, log, mean, weight)
        value.add_(mean, alpha=weight)
    return value


def backward(stored: Tensor, grad_loss: Tensor, options: Options, out: Tensor) -> None:
    """Write the gradient: what the forward stored, times the upstream gradient."""
    factor = grad_loss.to(stored.dtype) * (options.temperature / (options.divisor or 1))
    torch.mul(stored, factor.expand(stored.shape[:-1]).unsqueeze(-1), out=out)
