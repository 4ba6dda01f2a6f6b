"""``python -m genloss_kernels info``: versions, device, and which path each loss takes here."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from typing import Any

import torch

from . import __version__, functional
from .core import backend, tuned, widening


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def main(args: argparse.Namespace) -> int:
    report = environment() | {"losses": {name: path(name) for name in losses()}}
    print(json.dumps(report, indent=1) if args.json else _text(report))
    return 0


def environment() -> dict[str, Any]:
    """What a bug report or a result has to say about the machine: versions, devices and settings."""
    return {
        "versions": versions(),
        "devices": devices(),
        "launch_table": launch_table(),
        "backend": backend.current(),
        "interpreter": interpreter(),
    }


def versions() -> dict[str, str | None]:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {
        "genloss_kernels": __version__,
        "torch": str(torch.__version__),
        "triton": triton,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
    }


def devices() -> list[str]:
    """Every GPU that torch sees, and the CPU."""
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [device_name(device) for device in (*gpus, torch.device("cpu"))]


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def launch_table() -> str:
    """Where the default device's tiles and warps come from."""
    count = len(tuned.entries(default_device()))
    return f"tuned for this device, {count} entries" if count else "defaults"


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def interpreter() -> bool:
    """Whether kernels called on CPU tensors would be interpreted."""
    return backend.INTERPRETED and backend.triton_installed()


def losses() -> list[str]:
    return [name for name in functional.__all__ if not isinstance(getattr(functional, name), type)]


def path(loss: str) -> str:
    """What runs when ``loss`` is called here on the default device with the current backend."""
    device, choice = default_device(), backend.current()
    if choice != "eager" and device.type == "cuda" and backend.triton_installed():
        return "Triton kernels at every size"
    if choice == "triton":
        if interpreter():
            return "Triton kernels at every size, interpreted"
        missing = "TRITON_INTERPRET=1" if backend.triton_installed() else "the package triton"
        return f"none: backend 'triton' needs {missing}"
    if device.type != "cpu":
        return _BLOCKS
    constants = vars(sys.modules[getattr(functional, loss).__module__]) | {"WIDE_BELOW": widening.WIDE_BELOW}
    return ", ".join([*(text.format(**constants) for text in _SMALL[loss]), f"else {_BLOCKS}"])


_BLOCKS = "PyTorch operators block by block"
_HALF = "of half precision below {WIDE_BELOW}"
_BUILTIN = f"torch's built-in below {{BUILTIN_BELOW}} elements, {_HALF}"
_PLAIN = "operators with autograd below {PLAIN_BELOW} elements"
_NORMS = "norms with autograd below {NORMS_BELOW} elements"
_REGRESSION = f"torch's built-in without a weight, {_HALF} elements"
_MADE = f"torch's built-in without a weight below {{MADE_FROM[%s]}} elements, {_HALF}"

# What a CPU runs where elements are few, by the constants beside each public function: calling a function of ours costs some
# tens of microseconds, and a block pays for it once it no longer fits into the cache.
_SMALL = {
    "cross_entropy": (_BUILTIN, "or else of {BUILTIN_CLASSES} classes"),
    "nll_loss": (f"torch's built-in, {_HALF} elements",),
    "linear_cross_entropy": ("cross entropy of the whole logits below {LOGITS_BELOW} of them",),
    "binary_cross_entropy": (_BUILTIN.replace("BUILTIN", "PROBABILITIES_BUILTIN"),),
    "binary_cross_entropy_with_logits": (_BUILTIN,),
    "gaussian_kl": (_PLAIN,),
    "gaussian_nll_loss": (_PLAIN,),
    "kl_div": (_BUILTIN, "of log-probabilities at every size but of half precision"),
    "kl_div_with_logits": (_PLAIN,),
    "js_div_with_logits": (_PLAIN,),
    "categorical_entropy": (_PLAIN,),
    "cosine_embedding_loss": (_BUILTIN,),
    "mse_loss": (_MADE % "mse_loss", _PLAIN + " with a weight"),
    "l1_loss": (_MADE % "l1_loss", _PLAIN + " with a weight"),
    "smooth_l1_loss": (_REGRESSION, _PLAIN + " with a weight"),
    "huber_loss": (_REGRESSION, _PLAIN + " with a weight"),
    "vae_loss": (f"torch's built-in and operators with autograd below {{PARTS_BELOW}} elements in float32, {_HALF}",),
    "gan_discriminator_loss": (_PLAIN,),
    "gan_generator_loss": (_PLAIN,),
    "gradient_penalty": (_NORMS,),
    "r1_penalty": (_NORMS,),
    "contrastive_divergence_loss": (_PLAIN,),
}


def _text(report: dict[str, Any]) -> str:
    lines = [f"{name:<16} {version or '-'}" for name, version in report["versions"].items()]
    lines += [f"{'device':<16} {device}" for device in report["devices"]]
    lines += [f"{'launch table':<16} {report['launch_table']}"]
    lines += [f"{'backend':<16} {report['backend']}"]
    lines += [f"{'interpreter':<16} {'on' if report['interpreter'] else 'off'}", ""]
    lines += [f"path of each loss on {device_name(default_device())}:"]
    width = max(map(len, report["losses"]))
    lines += [f"  {name:<{width}}  {taken}" for name, taken in report["losses"].items()]
    return "\n".join(lines)
