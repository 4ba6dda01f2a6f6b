"""Which path runs, where, and what is said where it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

import genloss_kernels as gk
from genloss_kernels.core import backend
from genloss_kernels.core.backend import reads_values, transformed, use_triton

CPU = torch.zeros(2)


def test_choice_nests_and_ends() -> None:
    before = backend.current()
    with gk.backend("eager"):
        assert backend.current() == "eager"
        with gk.backend("triton"):
            assert backend.current() == "triton"
        assert backend.current() == "eager"
        with pytest.raises(RuntimeError, match="stop"), gk.backend("auto"):
            raise RuntimeError("stop")
        assert backend.current() == "eager"
    assert backend.current() == before


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'triton', 'eager', got 'cuda'"), gk.backend("cuda"):
        pass
    assert backend.current() == "auto"


def test_choice_is_the_threads_own() -> None:
    seen: list[str] = []
    with gk.backend("eager"):
        thread = threading.Thread(target=lambda: seen.append(backend.current()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_default_comes_from_the_environment() -> None:
    """And Triton is not imported with the package."""
    script = "import sys, genloss_kernels.core.backend as b; print(b.current(), 'triton' in sys.modules)"
    environment = {**os.environ, "GENLOSS_BACKEND": "eager"}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    assert result.stdout.split() == ["eager", "False"]
    for name in ("", "gpu", "Eager"):
        with pytest.raises(ValueError, match="must be one of"):
            backend._validated(name)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled, not interpreted, whatever this process does."""
    monkeypatch.setattr(backend, "INTERPRETED", False)


def test_cpu_tensors(compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("auto", "eager"):
        with gk.backend(name):
            assert not use_triton(CPU)
    with gk.backend("triton"):
        with pytest.raises(RuntimeError, match=r"cannot run on cpu tensors.*TRITON_INTERPRET=1"):
            use_triton(CPU)
        assert use_triton(CPU.to("meta"))
        monkeypatch.setattr(backend, "INTERPRETED", True)
        assert use_triton(CPU)
    assert not use_triton(CPU)


class _OnAGpu:
    """As much of a CUDA tensor as the choice looks at."""

    device = torch.device("cuda", 0)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point


def test_gpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "triton_installed", lambda: True)
    wide: Any = _OnAGpu(torch.float32)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64):
        other: Any = _OnAGpu(dtype)
        assert use_triton(wide, other, None)
    lacking: Any = _OnAGpu(torch.float8_e4m3fn)
    assert not use_triton(lacking)
    assert not use_triton(wide, lacking)
    with gk.backend("triton"), pytest.raises(RuntimeError, match=r"no kernels for torch\.float8_e4m3fn"):
        use_triton(wide, lacking)
    with gk.backend("eager"):
        assert not use_triton(wide)
    monkeypatch.setattr(backend, "triton_installed", lambda: False)
    assert not use_triton(wide)
    with gk.backend("triton"), pytest.raises(RuntimeError, match="pip install triton"):
        use_triton(wide)


def test_transforms_run_on_the_eager_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "INTERPRETED", True)
    seen: list[bool] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(transformed(x))
        return x.sum()

    look(CPU)
    torch.func.grad(look)(CPU)
    torch.func.vmap(look)(torch.zeros(3, 2))
    torch.func.grad(lambda x: torch.func.vmap(look)(x).sum())(torch.zeros(3, 2))
    torch.func.jvp(look, (CPU,), (CPU,))
    assert seen == [False, False, True, True, True]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(CPU, CPU)
        assert transformed(None, dual)
        assert not transformed(CPU)
        with gk.backend("triton"), pytest.raises(RuntimeError, match="vmap or forward-mode"):
            use_triton(CPU, dual)
    assert not transformed(dual)


def test_reading_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GENLOSS_DEBUG", raising=False)
    on_gpu: Any = _OnAGpu(torch.int64)
    assert reads_values(CPU)
    assert not reads_values(on_gpu)
    assert not reads_values(CPU.to("meta"))
    with gk.testing.device_semantics():
        assert not reads_values(CPU)
    assert reads_values(CPU)
    monkeypatch.setenv("GENLOSS_DEBUG", "1")
    assert reads_values(on_gpu)
    assert not reads_values(CPU.to("meta"))
    monkeypatch.setenv("GENLOSS_DEBUG", "0")
    assert not reads_values(on_gpu)


def test_multiprocessors() -> None:
    assert backend.multiprocessors(torch.device("cpu")) == backend.DEFAULT_MULTIPROCESSORS == 132


def test_backward_follows_the_forward(path: str) -> None:
    """Chosen in the forward, kept for a backward outside it and on another thread."""
    x = torch.randn(3, 400, dtype=torch.bfloat16).requires_grad_()
    loss = gk.cross_entropy(x, torch.tensor([1, 2, 3]))
    with gk.backend("eager" if path == "triton" else "auto"), gk.testing.count_launches() as launches:
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    assert launches.total() == (path == "triton")
    assert x.grad is not None
