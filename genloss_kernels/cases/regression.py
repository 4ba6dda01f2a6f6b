"""Cases of the regression losses and the cosine embedding loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from .case import BENCH, BYTES, DOCTOR, Call, Case, table, torchs
from .draws import FLOAT32, flat, logits


def _regression(*shape: int, weighted: bool = False, **options: Any) -> Callable[..., Call]:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        names = ("input", "target", "weight")[: 3 if weighted else 2]
        tensors = {name: torch.rand(shape, generator=generator, device=device).to(dtype) for name in names}
        return Call(tensors | options, ("input",))

    return make


def _embeddings(
    *shape: int, gap: int = 0, shared: bool = False, learned: bool = True, **options: Any
) -> Callable[..., Call]:
    """Pairs of rows, with a ``gap`` between them, or all with one ``shared``; of which one or both are learned."""

    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        n_rows, n_cols = shape
        first = logits(generator, device, dtype, n_rows, n_cols + gap)[:, :n_cols]
        second = logits(generator, device, dtype, 1 if shared else n_rows, n_cols)
        target = torch.randint(2, (n_rows,), generator=generator, device=device) * 2 - 1
        arguments = {"input1": first, "input2": second, "target": target, "margin": -0.5, **options}
        return Call(arguments, ("input1", "input2") if learned else ("input1",))

    return make


_case = table(
    mse_loss=torchs.mse_loss,
    l1_loss=torchs.l1_loss,
    smooth_l1_loss=torchs.smooth_l1_loss,
    huber_loss=torchs.huber_loss,
    cosine_embedding_loss=torchs.cosine_embedding_loss,
)


def regressions() -> Iterator[Case]:
    # Thresholds that part differences of uniform numbers about evenly.
    options: dict[str, dict[str, Any]] = {
        "mse_loss": {}, "l1_loss": {}, "smooth_l1_loss": {"beta": 0.25}, "huber_loss": {"delta": 0.25},
    }  # fmt: skip
    for loss, threshold in options.items():
        yield _case(loss, "elements 2**18", _regression(2**18, **threshold), BYTES)
        yield _case(loss, "elements 2**15", _regression(2**15, **threshold), DOCTOR)
        if loss != "smooth_l1_loss":
            yield _case(loss, "weighted", _regression(37, 1001, weighted=True, **threshold), DOCTOR)
        yield _case(loss, "per element", _regression(37, 53, reduction="none", **threshold), DOCTOR)
        yield _case(loss, "elements", flat(_regression, **threshold), BENCH, dtypes=FLOAT32)


def cosine_embedding_loss() -> Iterator[Case]:
    loss = "cosine_embedding_loss"
    yield _case(loss, "rows 256 x 768", _embeddings(256, 768), BYTES)
    yield _case(loss, "long rows 16 x 32768", _embeddings(16, 32768), BYTES)
    yield _case(loss, "rows 37 x 768", _embeddings(37, 768), DOCTOR)
    yield _case(loss, "long ragged rows 3 x 5003", _embeddings(3, 5003, margin=0.0), DOCTOR)
    yield _case(loss, "short rows 501 x 7", _embeddings(501, 7, reduction="sum"), DOCTOR)
    yield _case(loss, "rows apart, one learned", _embeddings(61, 128, gap=8, learned=False), DOCTOR)
    yield _case(loss, "one row for all, per pair", _embeddings(37, 64, shared=True, learned=False, reduction="none"), DOCTOR)
    for dtype in (torch.float32, torch.bfloat16):
        yield _case(loss, "rows of 1024", flat(_embeddings), BENCH, dtypes=(dtype,))
