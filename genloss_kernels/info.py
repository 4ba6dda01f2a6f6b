"""``python -m genloss_kernels info``: versions, device, and which path each loss takes here."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
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
    *small, rest = _CPU[loss]
    if device.type != "cpu":
        return rest
    constants = vars(sys.modules[getattr(functional, loss).__module__])
    few = {name: _below(value) for name, value in constants.items() if name.endswith("BELOW")}
    made = {name: _below(value) for name, value in constants.get("MADE_FROM", {}).items()}
    values = constants | {"few": few, "made": made, "WIDE_BELOW": widening.WIDE_BELOW}
    return "; ".join([*(text.format(**values) for text in small), f"else {rest}"])


def _below(limit: float) -> str:
    """The sizes of which ``widening.few`` holds."""
    text = "at every size" if limit == math.inf else f"below {limit} elements"
    return text if limit <= widening.WIDE_BELOW else f"{text}, in half precision below {widening.WIDE_BELOW}"


_FEW = "(few calls cost less)"
_ONCE = "(it reads each operand once)"
_BLOCKS = "PyTorch operators block by block (a block stays in the cache)"
_SAMPLES = "PyTorch operators on all samples (the gradient is a product with one number a sample)"
_BUILTIN = f"torch's built-in {{few[BUILTIN_BELOW]}} {_FEW}"
_PLAIN = f"operators with autograd below {{PLAIN_BELOW}} elements {_FEW}"
_LINEAR = "if linear, operators with autograd at every size (its gradient is a constant)"
_WEIGHTED = f"with a weight, operators with autograd below {{PLAIN_BELOW}} elements {_FEW}"
_MADE = (
    f"without a weight, torch's built-in {{made[%s]}} {_FEW}",
    f"with reduction 'none' the same at every size in fp32 and fp64 {_ONCE}",
    _WEIGHTED,
    "PyTorch operators block by block (the gradient is made while a block is in the cache)",
)
_REGRESSION = (
    f"without a weight, torch's built-in at every size, in half precision below {{WIDE_BELOW}} elements {_ONCE}",
    _WEIGHTED,
    _BLOCKS,
)

# What a CPU runs by sizes, which the constants beside each public function set, and why; the last is all the rest.
_CPU = {
    "cross_entropy": (
        f"with torch's options alone, the built-in {{few[BUILTIN_BELOW]}} {_FEW}",
        "in fp32 and fp64 the same at every size for fewer than {BUILTIN_CLASSES} classes or for some not contiguous "
        "(gathering rows costs more than it saves)",
        _BLOCKS,
    ),
    "nll_loss": (
        "torch's built-in in fp32 and fp64, and in half precision below {WIDE_BELOW} elements or without class weights (it "
        "gathers one element a row)",
        "PyTorch operators on what the built-in gathers (they weight and sum in fp32)",
    ),
    "linear_cross_entropy": (
        f"cross entropy of the whole logits below {{LOGITS_BELOW}} of them {_FEW}",
        "PyTorch operators on chunks of rows (whose logits are never there all at once)",
    ),
    "binary_cross_entropy": (f"torch's built-in {{few[PROBABILITIES_BUILTIN_BELOW]}} {_FEW}", _BLOCKS),
    "binary_cross_entropy_with_logits": (_BUILTIN, _BLOCKS),
    "gaussian_kl": (_PLAIN, _BLOCKS),
    "gaussian_nll_loss": (_PLAIN, _BLOCKS),
    "kl_div": (
        _BUILTIN,
        "with log_target, the built-in {few[LOGARITHMS_BUILTIN_BELOW]} (it keeps the exponentials for its backward)",
        _BLOCKS,
    ),
    "kl_div_with_logits": (_PLAIN, _BLOCKS),
    "js_div_with_logits": (_PLAIN, _BLOCKS),
    "categorical_entropy": (_PLAIN, _BLOCKS),
    "cosine_embedding_loss": (
        "of contiguous inputs, torch's built-in below {BUILTIN_BELOW} elements, a quarter of that if both are learned, in "
        f"half precision below {{WIDE_BELOW}} {_FEW}",
        _BLOCKS,
    ),
    "mse_loss": tuple(text.replace("%s", "mse_loss") for text in _MADE),
    "l1_loss": tuple(text.replace("%s", "l1_loss") for text in _MADE),
    "smooth_l1_loss": _REGRESSION,
    "huber_loss": _REGRESSION,
    "vae_loss": (
        "reduced, without free bits, without capacity and not in fp64, torch's built-in and operators with autograd "
        f"{{few[PARTS_BELOW]}} {_FEW}",
        _BLOCKS,
    ),
    "gan_discriminator_loss": (_PLAIN, _LINEAR, _BLOCKS),
    "gan_generator_loss": (_PLAIN, _LINEAR, _BLOCKS),
    "gradient_penalty": (f"norms with autograd below {{NORMS_BELOW}} elements {_FEW}", _SAMPLES),
    "r1_penalty": (f"norms with autograd below {{NORMS_BELOW}} elements {_FEW}", _SAMPLES),
    "contrastive_divergence_loss": (_PLAIN, _BLOCKS),
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
