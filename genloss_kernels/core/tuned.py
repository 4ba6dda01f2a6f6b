"""Entries of the launch table that were measured on one device, and hold there in place of the defaults.

``tuned.json`` maps a device, by the name that ``torch.cuda.get_device_name`` gives it, to shape classes and what was best
for them: [elements, warps] of a tile, or a number. ``python benchmarks/tune.py`` writes it. Nothing enters it that was not
measured, so that it is empty so far. The CPU, and so the interpreter, always runs the defaults.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).with_name("tuned.json")

_forced: Mapping[str, Any] | None = None


@functools.cache
def shipped() -> Mapping[str, Mapping[str, Any]]:
    """The whole table: entries by shape class, by device."""
    return json.loads(FILE.read_text(encoding="utf-8"))


@functools.cache
def _measured(device: torch.device) -> Mapping[str, Any]:
    return shipped().get(torch.cuda.get_device_name(device), {}) if device.type == "cuda" else {}


def entries(device: torch.device) -> Mapping[str, Any]:
    """What holds on ``device`` in place of the defaults, by shape class."""
    return _measured(device) if _forced is None else _forced


def entry(device: torch.device | None, kind: str, itemsize: int, default: Any) -> Any:
    """The entry of ``device`` for elements of ``itemsize`` bytes; the default where it has none, or no device is given."""
    return default if device is None else entries(device).get(f"{kind}, {itemsize} bytes", default)


@contextmanager
def in_force(chosen: Mapping[str, Any]) -> Iterator[None]:
    """Let these entries hold on every device and thread, since a backward runs on threads of autograd's own."""
    global _forced  # noqa: PLW0603
    previous, _forced = _forced, chosen
    try:
        yield
    finally:
        _forced = previous
