"""The plot: how many times as fast as torch's built-in each candidate is."""

from __future__ import annotations

from pathlib import Path

from .candidates import BUILTIN
from .results import Report, Result, Spread


def save(report: Report, path: Path) -> None:
    """Draw the speed-ups; raises ModuleNotFoundError without matplotlib."""
    # Without pyplot no window system is ever asked for.
    from matplotlib.figure import Figure

    bars: dict[str, list[tuple[int, Spread]]] = {}
    ticks: list[str] = []
    for result in report.results:
        for name, faster in _speedups(result):
            bars.setdefault(name, []).append((len(ticks), faster))
            ticks.append(f"{result.loss}\n{result.case}, {result.dtype}")
    figure = Figure(figsize=(10, 1.4 + 0.42 * len(ticks)), layout="constrained")
    axis = figure.subplots()
    for name, placed in bars.items():
        lengths = [[s.median - s.low for _, s in placed], [s.high - s.median for _, s in placed]]
        axis.barh([at for at, _ in placed], [s.median for _, s in placed], xerr=lengths, capsize=3, label=name)
        for at, s in placed:
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
            axis.annotate(f"{s.median:.2f}", (s.high, at), (6, 0), textcoords="offset points", va="center", bbox=box)
    axis.set_yticks(range(len(ticks)), ticks, fontsize=8)
    axis.invert_yaxis()
    axis.axvline(1.0, color="black", linewidth=1)
    axis.margins(x=0.08)
    axis.set_xlabel(f"times as fast as {BUILTIN}, forward and backward (median, with quartiles)")
    axis.set_title(f"{report.device}, torch {report.environment['versions']['torch']}", fontsize=10)
    if len(bars) > 1:
        axis.legend()
    figure.savefig(path, dpi=120)


def _speedups(result: Result) -> list[tuple[str, Spread]]:
    found = {name: result.relative(name) for name in result.samples if name != BUILTIN}
    return [(name, Spread(1 / r.high, 1 / r.median, 1 / r.low)) for name, r in found.items() if r is not None]
