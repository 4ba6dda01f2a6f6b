"""Write the figures section of README.md from the result files, the only place where its figures come from.

    python benchmarks/readme_tables.py [--check]

Reads bench.json, sizes.json, linear_head.json, vocab_parallel.json and train_*.json in each folder of benchmarks/results,
and benchmarks/results/meters.json. With --check nothing is written, and the exit status is 1 if README.md does not say what
the files say.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sizes import difference, quotient

from genloss_kernels.bench.candidates import OURS
from genloss_kernels.bench.results import Report, spread

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def both(samples: dict[str, list[float]]) -> list[float]:
    return [forward + backward for forward, backward in zip(samples["forward"], samples["backward"], strict=True)]


def bench_section(report: dict[str, Any], folder: Path) -> str:
    whole, rows = Report.of(report), []
    for result, found in zip(report["results"], whole.results, strict=True):
        samples, name = result["samples"], f"{result['case']}, {result['dtype']}"
        if OURS not in samples:
            raise ValueError(f"{folder}: {result['loss']}, {name} failed its correctness gate: {result['problems']}")
        ours = both(samples[OURS])
        for other in (name for name in samples if name != OURS):
            theirs = both(samples[other])
            quotient = spread([a / b for a, b in zip(ours, theirs, strict=True)])
            times = [f"{statistics.median(seconds) * 1e3:.3g} ms" for seconds in (theirs, ours)]
            relative = f"{quotient.median:.2f} ({quotient.low:.2f} to {quotient.high:.2f})"
            share = f"{whole.share_of_limit(found, statistics.median(ours)):.0%}"
            rows.append([result["loss"], name, other, *times, relative, share])
    path, copies = folder.relative_to(ROOT), f"{report['copy_rate'] / 1e9:.1f} GB/s"
    titles = ["loss", "case", "beside", "its time", "ours", "ours / its", "limit / ours"]
    return (
        f"**{report['device']}**, torch "
        f"{report['environment']['versions']['torch']}; forward and backward, alternating in one process, medians, and the "
        f"quotient of the times with its quartiles. Below 1.00 ours is faster. Beside losses that torch has not stands the "
        f"usual formula under autograd. The limit is the time in which this machine copies ({copies}) "
        f"the bytes that must move, or multiplies what must be multiplied. [Samples]({path}/bench.json), "
        f"[plot]({path}/bench.png).\n\n" + markdown_table(titles, rows)
    )


def training_section(report: dict[str, Any], folder: Path, name: str) -> str:
    rows, unit = [], report["runs"]["torch"]["unit"]
    for run_name, run in report["runs"].items():
        above = (run["peak_memory_bytes"] - run["baseline_memory_bytes"]) / 2**20
        speed = f"{report['step_time_ratios'][run_name]['median']:.2f}"
        rows.append([run_name, f"{run['items_per_second']:.0f}", speed, f"{above:.0f} MiB", f"{run['losses'][-1]:.4f}"])
    check = report["check"]
    path = folder.relative_to(ROOT)
    pictures = f", [pictures]({path}/{name}_pictures.png)" if (folder / f"{name}_pictures.png").exists() else ""
    return (
        f"**Training** {_TRAINED[name]} (`benchmarks/{name}.py`, {len(report['runs']['torch']['losses'])} steps). The "
        f"curves part by {check['ours_gap']:.1e} where {check['allowed']:.1e} is allowed and the control run shows "
        f"{check['control_gap']:.1e}. [Curves]({path}/{name}.json), [plot]({path}/{name}.png){pictures}.\n\n"
        + markdown_table(["run", f"{unit}/s", "step time / torch's", "memory above baseline", "last loss"], rows)
    )


def head_section(report: dict[str, Any], folder: Path) -> str:
    reference, rows = report["candidates"]["logits"], []
    for name, found in report["candidates"].items():
        quotient = spread([a / b for a, b in zip(found["seconds"], reference["seconds"], strict=True)])
        relative = f"{quotient.median:.2f} ({quotient.low:.2f} to {quotient.high:.2f})"
        memory = f"{found['peak_bytes'] / 2**20:.0f} MiB"
        rows.append([name, relative, memory, f"{found['peak_bytes'] / reference['peak_bytes']:.2f}"])
    shape, path = report["shape"], folder.relative_to(ROOT)
    fits = " and ".join(f"{axis} ** {found['exponent']:.2f}" for axis, found in report["scaling"].items())
    spaces = [point["workspace_bytes"] / 2**20 for point in report["scaling"]["tokens"]["points"]]
    return (
        f"**A vocabulary head with its loss** (`benchmarks/linear_head.py`: {shape['tokens']} tokens, {shape['features']} "
        f"features, {shape['vocabulary']} classes, {report['dtype']}), forward and backward, beside "
        f"`F.cross_entropy(F.linear(...))`. Over 16 times the size our time grows as {fits}, and the workspace is "
        f"{min(spaces):.0f} to {max(spaces):.0f} MiB whatever the number of tokens. [Samples]({path}/linear_head.json), "
        f"[plot]({path}/linear_head.png).\n\n"
        + markdown_table(["candidate", "time / logits", "peak memory above inputs", "/ logits"], rows)
    )


def sizes_section(report: dict[str, Any], folder: Path) -> str:
    path = folder.relative_to(ROOT)
    few = [row for row in report["rows"] if row["exponent"] <= 14 and row["dtype"] == "float32"]
    many = [row for row in report["rows"] if row["exponent"] >= 16]
    lost = {loss: max(difference(row) for row in rows) for loss, rows in _by("loss", few).items()}
    rows = [
        [loss, f"{lost[loss]:+.0f} us", *[f"{quotient(row):.2f}" for row in _largest(found)]]
        for loss, found in _by("loss", many).items()
    ]
    dtypes, exponent = sorted({row["dtype"] for row in many}), max(row["exponent"] for row in many)
    threads = max(row["threads"] for row in many)
    titles = [f"time / torch's, 2**{exponent}, {dtype}" for dtype in sorted(dtypes, reverse=True)]
    return (
        f"**Every loss by size** (`benchmarks/sizes.py`), forward and backward beside torch's operators, {threads} threads: "
        f"the most that a call on up to 2**14 elements in fp32 loses, and the quotient of the times on the largest. [All "
        f"sizes]({path}/sizes.md), [plot]({path}/sizes.png), [samples]({path}/sizes.json).\n\n"
        + markdown_table(["loss", "most lost on few elements", *titles], rows)
    )


def _by(name: str, rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row[name], []).append(row)
    return found


def _largest(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of one loss: the largest size on most threads, float32 first."""
    most = max((row["exponent"], row["threads"]) for row in rows)
    chosen = [row for row in rows if (row["exponent"], row["threads"]) == most]
    return sorted(chosen, key=lambda row: row["dtype"], reverse=True)


def ranks_section(report: dict[str, Any], folder: Path) -> str:
    shape, path = report["shape"], folder.relative_to(ROOT)
    one = statistics.median(report["rows"][0]["seconds"])
    rows = [
        [
            str(row["ranks"]),
            f"{statistics.median(row['seconds']) / one:.2f}",
            f"{row['peak_bytes'] / 2**20:.0f} MiB",
            f"{sum(size for _, size in row['collectives']) / shape['tokens']:.0f}",
        ]
        for row in report["rows"]
    ]
    return (
        f"**A vocabulary shared by ranks** (`benchmarks/vocab_parallel.py`: {shape['tokens']} tokens, {shape['features']} "
        f"features, {shape['vocabulary']} classes), forward and backward; ranks beyond the cores share them. [With an "
        f"estimate for 8 to 1024 GPUs]({path}/vocab_parallel.md), [samples]({path}/vocab_parallel.json).\n\n"
        + markdown_table(["ranks", "time / one rank's", "peak memory above inputs, rank 0", "bytes a token sent"], rows)
    )


def meters_section(report: dict[str, Any]) -> str:
    rows = [
        [
            row["loss"],
            row["case"],
            row["dtype"],
            f"{row['element_ratio']:.3f}",
            f"{row['sector_ratio']:.3f}",
            " + ".join(map(str, row["launches"])),
        ]
        for row in report["bytes"]["rows"]
    ]
    return (
        "**Bytes moved by the kernels**, counted by the interpreter, forward and backward with a scalar loss, torch's "
        "operators included, over what must move: every operand read once each way, and each gradient written once. By "
        "elements, and by the 32-byte sectors that a GPU fetches. [All rows](benchmarks/results/meters.json).\n\n"
        + markdown_table(["loss", "case", "dtype", "by elements", "by sectors", "launches, forward + backward"], rows)
    )


# What each training script trains.
_TRAINED = {
    "train_lm": "a small language model",
    "train_vae": "a variational autoencoder on handwritten digits, beta growing",
    "train_gan": "a DCGAN on handwritten digits, with a penalty on gradients",
    "train_energy": "an energy-based model on handwritten digits",
}
SECTIONS = {
    "bench.json": bench_section,
    "sizes.json": sizes_section,
    "linear_head.json": head_section,
    "vocab_parallel.json": ranks_section,
    **{f"{name}.json": partial(training_section, name=name) for name in _TRAINED},
}


def figures() -> str:
    parts = []
    for folder in sorted(path for path in RESULTS.glob("*") if path.is_dir()):
        for name, section in SECTIONS.items():
            file = folder / name
            if file.exists():
                parts.append(section(json.loads(file.read_text()), folder))
    meters = RESULTS / "meters.json"
    if meters.exists():
        parts.append(meters_section(json.loads(meters.read_text())))
    return "\n\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    wanted = f"{before}{BEGIN}\n{figures()}\n{END}{after}"
    if args.check:
        return int(text != wanted)
    readme.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
