"""Blocks and tiles so small that a drawn tensor has several, and a count of those that were walked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from genloss_kernels.core import elementwise, elementwise_op, formulas, launch, made, pair, reduction, scaling
from genloss_kernels.core.launch import Tile, observe_launches
from genloss_kernels.losses.adversarial import api as adversarial_api
from genloss_kernels.losses.adversarial import op as adversarial_op
from genloss_kernels.losses.binary_cross_entropy import api as binary_api
from genloss_kernels.losses.cosine import api as cosine_api
from genloss_kernels.losses.cosine import eager as cosine_eager
from genloss_kernels.losses.cross_entropy import api as cross_entropy_api
from genloss_kernels.losses.cross_entropy import eager as cross_entropy_eager
from genloss_kernels.losses.cross_entropy import op as cross_entropy_op
from genloss_kernels.losses.divergence import api as divergence_api
from genloss_kernels.losses.divergence import eager as divergence_eager
from genloss_kernels.losses.divergence import op as divergence_op
from genloss_kernels.losses.energy import api as energy_api
from genloss_kernels.losses.gaussian_kl import api as gaussian_kl_api
from genloss_kernels.losses.gaussian_nll import api as gaussian_nll_api
from genloss_kernels.losses.kl_div import api as kl_div_api
from genloss_kernels.losses.linear_cross_entropy import api as linear_api
from genloss_kernels.losses.linear_cross_entropy import chunks as linear_chunks
from genloss_kernels.losses.linear_cross_entropy import options as linear_options
from genloss_kernels.losses.regression import api as regression_api
from genloss_kernels.losses.vae import api as vae_api

# Elements of a block, and rows of a linear layer's chunk.
ELEMENTS = 32
ROWS = 4


@contextmanager
def operators_alone() -> Iterator[None]:
    """Our operators also where torch's own would be quicker, as they are for every small tensor."""
    with pytest.MonkeyPatch.context() as patch:
        _no_built_ins(patch)
        yield


@contextmanager
def small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        _no_built_ins(patch)
        share = max(1, ELEMENTS // torch.get_num_threads())
        for module in (formulas, cross_entropy_eager, divergence_eager):
            patch.setattr(module, "BLOCK_ELEMENTS", share)
        patch.setattr(cosine_eager, "_BLOCK_ELEMENTS", share)
        _short_chunks(patch)
        yield


@contextmanager
def small_tiles(shares: int) -> Iterator[None]:
    """Kernels' tiles of 8 to 64 elements; long rows are shared among as many programs as ``shares``."""
    with pytest.MonkeyPatch.context() as patch:
        for size in (2, 4, 8):
            patch.setitem(launch.ELEMENTWISE_TILES, size, Tile(16, 4))
            patch.setitem(launch.PAIR_ROW_TILES, size, Tile(64, 4))
        for module in (elementwise, reduction, pair, adversarial_op):
            patch.setattr(module, "REDUCTION_TILE", Tile(2, 4))
        patch.setattr(elementwise, "TILES_PER_PROGRAM", 2)
        patch.setattr(launch, "SHORT_ROW", 16)
        for module in (launch, cross_entropy_op, divergence_op):
            patch.setattr(module, "WHOLE_ROW", 8)
        for name in ("_SHORT_ELEMENTS", "_HEAVY_SHORT_ELEMENTS", "_WHOLE_ELEMENTS", "_HEAVY_WHOLE_ELEMENTS"):
            patch.setattr(launch, name, 64)
        patch.setattr(launch, "row_tile", lambda *_, **__: Tile(64, 4))
        patch.setattr(launch, "splits", lambda *_: shares)
        patch.setattr(divergence_op, "SCATTERED_PAIR_ROW_TILE", Tile(64, 4))
        if shares > 1:
            patch.setattr(divergence_op, "held_row_tile", lambda *_: None)
        patch.setattr(scaling, "_BLOCK", 64)
        _short_chunks(patch)
        yield


def _no_built_ins(patch: pytest.MonkeyPatch) -> None:
    for module in (cosine_api, cross_entropy_api, binary_api):
        patch.setattr(module, "BUILTIN_BELOW", 0)
    patch.setattr(binary_api, "PROBABILITIES_BUILTIN_BELOW", 0)
    patch.setattr(kl_div_api, "BUILTIN_BELOW", 0)
    patch.setattr(kl_div_api, "LOGARITHMS_BUILTIN_BELOW", 0)
    patch.setattr(linear_api, "LOGITS_BELOW", 0)
    patch.setattr(adversarial_api, "NORMS_BELOW", 0)
    patch.setattr(vae_api, "PARTS_BELOW", 0)
    for module in (divergence_api, energy_api, gaussian_kl_api, gaussian_nll_api, regression_api):
        patch.setattr(module, "PLAIN_BELOW", 0)
    # Which are no matter of size alone.
    patch.setattr(adversarial_api, "_plain_is_best", lambda *_: False)
    patch.setattr(regression_api, "_builtin_is_best", lambda *_: False)


def _short_chunks(patch: pytest.MonkeyPatch) -> None:
    for device in ("cpu", "cuda"):
        patch.setitem(linear_options.DEFAULT_ROWS, device, ROWS)
    patch.setattr(linear_options, "WHOLE_BATCH", ROWS)


@contextmanager
def watched() -> Iterator[list[int]]:
    """Yield a live list of how many blocks each walk over a tensor had, and each launch of a kernel programs."""
    seen: list[int] = []

    def counted(walk: Callable[..., Iterable[Any]]) -> Callable[..., list[Any]]:
        def call(*arguments: Any, **options: Any) -> list[Any]:
            blocks = list(walk(*arguments, **options))
            seen.append(len(blocks))
            return blocks

        return call

    def observe(kernel: Any, programs: int, *_: Any) -> bool:
        seen.append(programs)
        return True

    with pytest.MonkeyPatch.context() as patch, observe_launches(observe):
        for module in (elementwise_op, made):
            patch.setattr(module, "blocks", counted(module.blocks))
        for module in (cross_entropy_eager, cosine_eager):
            patch.setattr(module, "_blocks", counted(module._blocks))
        patch.setattr(divergence_eager, "row_blocks", counted(divergence_eager.row_blocks))
        patch.setattr(linear_chunks, "equal_chunks", counted(linear_chunks.equal_chunks))
        yield seen
