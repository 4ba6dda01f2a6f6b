"""Losses in other processes, copies and files: data workers, forks, pickles."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import genloss_kernels as gk

_X = torch.linspace(-1.0, 1.0, 20).view(4, 5)
_P = torch.linspace(0.1, 0.9, 20).view(4, 5)
_LABELS = torch.tensor([0, 1, 2, 4])
_SIGNS = torch.tensor([1, -1, 1, -1])

# A module with options that are not the defaults, and what it takes.
MODULES: dict[str, tuple[Callable[[], Any], tuple[Tensor, ...]]] = {
    "CrossEntropyLoss": (lambda: gk.CrossEntropyLoss(torch.rand(5), label_smoothing=0.1, softcap=3.0), (_X, _LABELS)),
    "LinearCrossEntropyLoss": (lambda: gk.LinearCrossEntropyLoss(5, 7, softcap=3.0), (_X, _LABELS)),
    "FusedLMHead": (lambda: gk.FusedLMHead(5, 7, softcap=3.0), (_X, _LABELS)),
    "NLLLoss": (lambda: gk.NLLLoss(torch.rand(5)), (_X, _LABELS)),
    "BCELoss": (lambda: gk.BCELoss(torch.rand(5)), (_P, _P)),
    "BCEWithLogitsLoss": (lambda: gk.BCEWithLogitsLoss(pos_weight=torch.rand(5), label_smoothing=0.1), (_X, _P)),
    "GaussianKLLoss": (lambda: gk.GaussianKLLoss(free_bits=0.1), (_X, _P)),
    "KLDivLoss": (lambda: gk.KLDivLoss(reduction="batchmean", log_target=True), (_X, _X)),
    "KLDivWithLogitsLoss": (lambda: gk.KLDivWithLogitsLoss(temperature=2.0), (_X, _P)),
    "JSDivWithLogitsLoss": (lambda: gk.JSDivWithLogitsLoss(beta=0.3), (_X, _P)),
    "MSELoss": (lambda: gk.MSELoss(reduction="sum"), (_X, _P)),
    "L1Loss": (lambda: gk.L1Loss(reduction="sum"), (_X, _P)),
    "SmoothL1Loss": (lambda: gk.SmoothL1Loss(beta=0.5), (_X, _P)),
    "HuberLoss": (lambda: gk.HuberLoss(delta=0.5), (_X, _P)),
    "GaussianNLLLoss": (lambda: gk.GaussianNLLLoss(full=True), (_X, _P, _P)),
    "CosineEmbeddingLoss": (lambda: gk.CosineEmbeddingLoss(margin=0.2), (_X, _P, _SIGNS)),
    "VAELoss": (lambda: gk.VAELoss(recon_loss="l1", beta=2.0), (_X, _P, _X, _P)),
    "GANDiscriminatorLoss": (lambda: gk.GANDiscriminatorLoss("hinge"), (_X, _P)),
    "GANGeneratorLoss": (lambda: gk.GANGeneratorLoss("lsgan"), (_X,)),
    "GradientPenalty": (lambda: gk.GradientPenalty(target=0.5), (_X,)),
    "R1Penalty": (lambda: gk.R1Penalty(gamma=2.0), (_X,)),
    "ContrastiveDivergenceLoss": (lambda: gk.ContrastiveDivergenceLoss(l2=0.1), (_X, _P)),
}

_CLASSES = {"CrossEntropyStats", "LinearCrossEntropyOptions", "VAELossOutput"}


def _saved(module: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def _loaded(module: Any) -> Any:
    """Another module of the same options, with the saved parameters and buffers."""
    other = copy.deepcopy(module)
    for tensor in (*other.parameters(), *other.buffers()):
        tensor.detach().zero_()
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    return other


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "save": _saved, "state": _loaded}


def test_every_module_is_there() -> None:
    assert MODULES.keys() == {*gk.nn.__all__} - _CLASSES


def _loss(result: Any) -> Tensor:
    return result.loss if isinstance(result, tuple) else result


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", MODULES)
def test_copies_of_modules(name: str, how: str) -> None:
    make, arguments = MODULES[name]
    module = make().eval()
    other = COPIES[how](module)
    assert type(other) is type(module)
    assert repr(other) == repr(module)
    assert not other.training
    assert torch.equal(_loss(other(*arguments)), _loss(module(*arguments)))


class Losses(torch.utils.data.Dataset):
    """Losses and gradients as a worker computes them, after the parent has computed them too."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return _computed(index)


def _computed(seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 300, generator=generator).requires_grad_()
    target = torch.randint(300, (64,), generator=generator)
    weight = torch.randn(700, 300, generator=generator)
    losses = [
        gk.cross_entropy(x, target, label_smoothing=0.1),
        gk.linear_cross_entropy(x, weight, target, options=gk.LinearCrossEntropyOptions(batch_chunk_size=16)),
        gk.gaussian_kl(x, x * 0.1),
        gk.binary_cross_entropy_with_logits(x, x.detach().sigmoid()),
        gk.js_div_with_logits(x, x.flip(1)),
    ]
    (gradient,) = torch.autograd.grad(torch.stack(losses).sum(), x)
    return torch.stack(losses).detach(), gradient


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader(start: str) -> None:
    # A fork inherits no OpenMP threads, and waits for them if its parent has used some.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        own = [_computed(index) for index in range(4)]
        loader = DataLoader(Losses(), batch_size=None, num_workers=2, multiprocessing_context=start, timeout=120)
        for found, wanted in zip(loader, own, strict=True):
            assert all(map(torch.equal, found, wanted))
    finally:
        torch.set_num_threads(threads)
