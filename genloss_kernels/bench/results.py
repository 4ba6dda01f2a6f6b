"""What a run of the benchmark found, and its JSON file."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .candidates import BUILTIN, OURS
from .timing import Samples


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    low: float
    median: float
    high: float


def spread(samples: list[float]) -> Spread:
    return Spread(*statistics.quantiles(samples, n=4, method="inclusive"))


@dataclass
class Result:
    """One case in one dtype. A candidate that failed or gave a wrong result is in ``problems`` and has no samples."""

    loss: str
    case: str
    dtype: str
    shapes: dict[str, list[int]] = field(default_factory=dict)
    floor_bytes: int = 0
    calls: int = 0
    samples: dict[str, Samples] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return OURS not in self.problems

    def relative(self, name: str) -> Spread | None:
        """Time of a candidate over the built-in's, forward and backward, from round to round."""
        if name == BUILTIN or not {name, BUILTIN} <= self.samples.keys():
            return None
        pairs = zip(self.samples[name].both, self.samples[BUILTIN].both, strict=True)
        return spread([ours / theirs for ours, theirs in pairs])


@dataclass
class Report:
    """Everything that one run measured, and where."""

    device: str
    environment: dict[str, Any]
    config: dict[str, Any]
    copy_rate: float
    results: list[Result] = field(default_factory=list)

    def save(self, path: Path) -> None:
        summary = {"device": self.device, "commit": commit()} | asdict(self)
        path.write_text(json.dumps(summary, indent=1) + "\n")


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def commit() -> str | None:
    """The commit checked out in the working directory, if that is a git repository."""
    try:
        run = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()
