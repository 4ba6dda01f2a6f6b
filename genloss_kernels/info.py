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
from .core import backend


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def main(args: argparse.Namespace) -> int:
    report = environment() | {"losses": {name: path(name) for name in losses()}}
    print(json.dumps(report, indent=1) if args.json else _text(report))
    return 0


def environment() -> dict[str, Any]:
    """What a bug report or a result has to say about the machine: versions, devices and settings."""
    return {"versions": versions(), "devices": devices(), "backend": backend.current(), "interpreter": interpreter()}


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
    module = sys.modules[getattr(functional, loss).__module__]
    if device.type == "cpu" and hasattr(module, "LOGITS_BELOW"):
        return f"whole logits below {module.LOGITS_BELOW} of them; else PyTorch operators chunk by chunk"
    # The sizes from which a loss has a path of its own on a CPU are constants beside its public function.
    limits = [("elements", "BUILTIN_BELOW"), ("classes", "BUILTIN_CLASSES")]
    below = [f"{getattr(module, constant)} {unit}" for unit, constant in limits if hasattr(module, constant)]
    if not below or device.type != "cpu":
        return "PyTorch operators at every size"
    return f"torch's built-in below {' or '.join(below)}, in float32 and float64; else PyTorch operators block by block"


def _text(report: dict[str, Any]) -> str:
    lines = [f"{name:<16} {version or '-'}" for name, version in report["versions"].items()]
    lines += [f"{'device':<16} {device}" for device in report["devices"]]
    lines += [f"{'backend':<16} {report['backend']}"]
    lines += [f"{'interpreter':<16} {'on' if report['interpreter'] else 'off'}", ""]
    lines += [f"path of each loss on {device_name(default_device())}:"]
    width = max(map(len, report["losses"]))
    lines += [f"  {name:<{width}}  {taken}" for name, taken in report["losses"].items()]
    return "\n".join(lines)
