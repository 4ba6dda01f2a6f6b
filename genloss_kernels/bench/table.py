"""The printed table: one block a case, one line a candidate."""

from __future__ import annotations

from .candidates import BUILTIN
from .results import Report, Result, spread
from .timing import Samples

_COLUMNS = "  {:<26}{:>11}{:>11}{:>11}   {:<20}{:>14}{:>10}{:>13}"
_HEADER = _COLUMNS.format(
    "", "forward", "backward", "both", f"time / {BUILTIN}", "rate", "of limit", "peak memory"
)  # fmt: skip


def text(report: Report) -> str:
    products = [f"{dtype} products at {rate / 1e12:.3g} TFLOP/s" for dtype, rate in report.matmul_rates.items()]
    lines = [
        "; ".join([report.device, f"copies at {report.copy_rate / 1e9:.1f} GB/s read and written", *products]),
        "Medians; the quotient of both passes with its quartiles. Rate: the bytes that must move, or the products that must",
        "be made, by the time of both passes; the limit is that of copies, or of products.",
        "",
        _HEADER,
    ]
    for result in report.results:
        lines += _block(result, report)
    return "\n".join(lines)


def _block(result: Result, report: Report) -> list[str]:
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape)) or 'scalar'}" for name, shape in result.shapes.items())
    lines = [f"{result.loss}: {result.case}, {result.dtype} ({shapes})"]
    lines += [_line(name, samples, result, report) for name, samples in result.samples.items()]
    return lines + [f"  {name:<26}no speed: {problem}" for name, problem in result.problems.items()]


def _line(name: str, samples: Samples, result: Result, report: Report) -> str:
    both = spread(samples.both).median
    _, work = report.limit_rate(result)
    rate = f"{work / both / 1e12:.3g} TFLOP/s" if work == result.floor_flops else f"{work / both / 1e9:.1f} GB/s"
    relative = result.relative(name)
    quotient = f"{relative.median:.2f} [{relative.low:.2f}, {relative.high:.2f}]" if relative is not None else "-"
    times = [duration(seconds) for seconds in (spread(samples.forward).median, spread(samples.backward).median, both)]
    peak = "-" if samples.peak_bytes is None else f"{samples.peak_bytes / 2**20:.0f} MiB"
    return _COLUMNS.format(name, *times, quotient, rate, f"{report.share_of_limit(result, both):.0%}", peak)


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"
