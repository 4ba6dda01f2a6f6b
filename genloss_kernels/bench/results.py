"""What a run of the benchmark found, and its JSON file."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
from dataclasses import asdict, dataclass, field, fields
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
    floor_flops: int = 0
    calls: int = 0
    samples: dict[str, Samples] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return OURS not in self.problems

    @property
    def key(self) -> tuple[str, str, str]:
        return self.loss, self.case, self.dtype

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
    copy_rate: float = 0.0
    matmul_rates: dict[str, float] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Report:
        """The report of a saved file's contents."""
        report = cls(**{f.name: saved[f.name] for f in fields(cls) if f.name != "results"})
        for result in saved["results"]:
            samples = {name: Samples(**found) for name, found in result["samples"].items()}
            report.results.append(Result(**result | {"samples": samples}))
        return report

    def limit_rate(self, result: Result) -> tuple[float, float]:
        """What a second moves or computes at the machine's own rate, and what the case must: of whichever takes longer."""
        limits = [(self.copy_rate, float(result.floor_bytes))]
        if result.floor_flops:
            limits.append((self.matmul_rates[result.dtype], float(result.floor_flops)))
        return max(limits, key=lambda limit: limit[1] / limit[0])

    def share_of_limit(self, result: Result, seconds: float) -> float:
        """The least time that the machine's own rates allow, over ``seconds``."""
        rate, work = self.limit_rate(result)
        return work / rate / seconds

    def save(self, path: Path) -> None:
        """Write the file whole or not at all, so that a run that is stopped can go on from it."""
        summary = {"device": self.device, "commit": commit()} | asdict(self)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(summary, indent=1) + "\n")
        part.replace(path)

    def resume(self, path: Path) -> None:
        """Take rates and results from the file of a run that was stopped; raises ValueError where that was another's."""
        saved = json.loads(path.read_text())
        try:
            before = Report.of(saved)
        except KeyError as error:
            raise ValueError(f"{path} is of another version, which did not write {error}") from error
        here = {"device": self.device, "commit": commit(), "environment": self.environment, "config": self.config}
        other = [name for name, value in here.items() if saved[name] != value]
        if other:
            raise ValueError(f"{path} is of another {' and '.join(other)}")
        self.copy_rate, self.matmul_rates, self.results = before.copy_rate, before.matmul_rates, before.results


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def commit() -> str | None:
    """The commit checked out in the working directory, if that is a git repository."""
    try:
        run = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()
