"""Comparison of loss curves, and the tables, plot and JSON that the training scripts write."""

import importlib.metadata
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from runs import Run

BAND_FACTOR = 3.0
FLOOR_ULPS = 8
_TABLE_ROWS = 12
_PACKAGES = ("genloss_kernels", "torch", "triton", "tokenizers", "scikit-learn", "numpy")


@dataclass(frozen=True)
class CurveCheck:
    """Largest distance of two loss curves from torch's, and the distance allowed to ours."""

    ours_gap: float
    control_gap: float
    floor: float
    allowed: float
    passed: bool


def check_curves(torch_losses: Sequence[float], ours: Sequence[float], control: Sequence[float]) -> CurveCheck:
    """Pass if max|ours - torch| <= max(3 * max|control - torch|, floor) and every loss on every curve is finite.

    The floor of 8 float32 ulps of torch's largest loss keeps the band open where the control run agrees exactly.
    """
    reference = np.asarray(torch_losses)
    ours_gap = float(np.abs(np.asarray(ours) - reference).max())
    control_gap = float(np.abs(np.asarray(control) - reference).max())
    floor = FLOOR_ULPS * float(np.spacing(np.float32(reference.max())))
    allowed = max(BAND_FACTOR * control_gap, floor)
    finite = all(math.isfinite(value) for value in (*torch_losses, *ours, *control))
    return CurveCheck(ours_gap, control_gap, floor, allowed, passed=finite and ours_gap <= allowed)


def speed_table(runs: dict[str, Run], device: str) -> str:
    memory = "peak CUDA memory" if device.startswith("cuda") else "peak RSS"
    titles = f"{'median step':>15}{'ratio':>8}{'10th percentile':>19}{'ratio':>8}{memory:>20}{'above baseline':>18}"
    unit = next(iter(runs.values())).unit
    lines = [f"{'run':<17}{f'{unit}/s':>10}{titles}"]
    ratios = step_time_ratios(runs)
    for name, run in runs.items():
        lines.append(
            f"{name:<17}{run.items_per_second:>10.0f}"
            f"{run.median_step_seconds * 1e3:>12.1f} ms{ratios[name]['median']:>8.2f}"
            f"{run.p10_step_seconds * 1e3:>16.1f} ms{ratios[name]['p10']:>8.2f}"
            f"{run.peak_memory / 2**20:>16.0f} MiB{(run.peak_memory - run.baseline_memory) / 2**20:>14.0f} MiB"
        )
    reference, *_, control = runs
    lines.append(f"ratio: to {reference}'s step time; {control}'s, of the same loss, shows the machine's noise")
    return "\n".join(lines)


def step_time_ratios(runs: dict[str, Run]) -> dict[str, dict[str, float]]:
    """Step times of every run relative to the first's."""
    reference = next(iter(runs.values()))
    return {
        name: {
            "median": run.median_step_seconds / reference.median_step_seconds,
            "p10": run.p10_step_seconds / reference.p10_step_seconds,
        }
        for name, run in runs.items()
    }


def loss_table(runs: dict[str, Run]) -> str:
    reference, *others = runs
    header = "".join(f"{name:>17}" for name in runs) + "".join(f"{f'|{n} - {reference}|':>26}" for n in others)
    lines = [f"{'step':>6}{header}"]
    steps = len(runs[reference].losses)
    stride = math.ceil(steps / _TABLE_ROWS)
    for step in sorted({*range(0, steps, stride), steps - 1}):
        losses = [run.losses[step] for run in runs.values()]
        gaps = "".join(f"{abs(loss - losses[0]):>26.2e}" for loss in losses[1:])
        lines.append(f"{step + 1:>6}" + "".join(f"{loss:>17.6f}" for loss in losses) + gaps)
    return "\n".join(lines)


def verdict(check: CurveCheck) -> str:
    return (
        f"{'PASS' if check.passed else 'FAIL'}: largest difference from torch's curve {check.ours_gap:.2e}, allowed "
        f"{check.allowed:.2e} (the larger of {BAND_FACTOR:g} x {check.control_gap:.2e}, the control's, and the floor "
        f"{check.floor:.2e})"
    )


def save_plot(path: Path, runs: dict[str, Run], check: CurveCheck, label: str) -> None:
    reference, *others = runs
    # Without pyplot no window system is ever asked for.
    figure = Figure(figsize=(8, 7), layout="constrained")
    loss_axis, gap_axis = figure.subplots(2, 1, sharex=True)
    steps = range(1, len(runs[reference].losses) + 1)
    for (name, run), style in zip(runs.items(), ("-", "--", "-.", ":"), strict=False):
        loss_axis.plot(steps, run.losses, style, label=name, linewidth=2)
    loss_axis.set_ylabel(label)
    loss_axis.legend()

    for position, name in enumerate(others, start=1):
        gaps = np.abs(np.asarray(runs[name].losses) - np.asarray(runs[reference].losses))
        # A log axis cannot show zero; steps on which the curves agree to the last bit are left out.
        drawn = np.where(gaps > 0, gaps, np.nan)
        gap_axis.plot(steps, drawn, ".-", color=f"C{position}", label=f"|{name} - {reference}|")
    band = f"allowed: max({BAND_FACTOR:g}x control's largest, {FLOOR_ULPS} ulp)"
    gap_axis.axhspan(0, check.allowed, color="gray", alpha=0.15)
    gap_axis.axhline(check.allowed, color="gray", label=band)
    gap_axis.set_yscale("log")
    gap_axis.set_ylabel("absolute difference")
    gap_axis.set_xlabel("step")
    gap_axis.legend()
    figure.savefig(path, dpi=120)


def save_json(path: Path, device: str, runs: dict[str, Run], check: CurveCheck, **rest: Any) -> None:
    report = {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "device": device_name(device),
        **rest,
        "check": asdict(check),
        "step_time_ratios": step_time_ratios(runs),
        "runs": {name: run.summary() for name, run in runs.items()},
    }
    path.write_text(json.dumps(report, indent=1) + "\n")


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
