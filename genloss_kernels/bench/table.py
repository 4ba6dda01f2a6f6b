"""The printed table: one block a case, one line a candidate."""

from __future__ import annotations

from .candidates import BUILTIN
from .results import Report, Result, spread
from .timing import Samples

_COLUMNS = "  {:<18}{:>11}{:>11}{:>11}   {:<20}{:>9}{:>9}{:>13}"
_HEADER = _COLUMNS.format(
    "", "forward", "backward", "both", f"time / {BUILTIN}", "GB/s", "of copy", "peak memory"
)  # fmt: skip


def text(report: Report) -> str:
    lines = [
        f"{report.device}; copies at {report.copy_rate / 1e9:.1f} GB/s read and written",
        "Medians; the quotient of both passes with its quartiles; bytes that must move by the time of both passes.",
        "",
        _HEADER,
    ]
    for result in report.results:
        lines += _block(result, report.copy_rate)
    return "\n".join(lines)


def _block(result: Result, copy_rate: float) -> list[str]:
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape)) or 'scalar'}" for name, shape in result.shapes.items())
    lines = [f"{result.loss}: {result.case}, {result.dtype} ({shapes})"]
    lines += [_line(name, samples, result, copy_rate) for name, samples in result.samples.items()]
    return lines + [f"  {name:<18}no speed: {problem}" for name, problem in result.problems.items()]


def _line(name: str, samples: Samples, result: Result, copy_rate: float) -> str:
    both = spread(samples.both).median
    rate = result.floor_bytes / both
    relative = result.relative(name)
    quotient = f"{relative.median:.2f} [{relative.low:.2f}, {relative.high:.2f}]" if relative is not None else "-"
    times = [duration(seconds) for seconds in (spread(samples.forward).median, spread(samples.backward).median, both)]
    peak = "-" if samples.peak_bytes is None else f"{samples.peak_bytes / 2**20:.0f} MiB"
    return _COLUMNS.format(name, *times, quotient, f"{rate / 1e9:.1f}", f"{rate / copy_rate:.0%}", peak)


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"
