"""Hold every property on as many examples as are asked for, and print what held.

python -m tests.properties --seed 1 > benchmarks/results/properties.md
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import defaultdict
from importlib import metadata
from pathlib import Path

from .tally import EXAMPLES, FAILED, INVARIANT, NARROW, TALLY, WHOLE, WIDE

# Figures of a loss: by which path they were found, and the number of examples of each kind.
Figures = dict[str, dict[str, dict[str, int]]]


def _run(path: str, examples: int, seed: int, workers: int, figures: Path) -> int:
    interpreted = {"TRITON_INTERPRET": "1"} if path == "triton" else {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **interpreted, EXAMPLES: str(examples), TALLY: str(figures)}
    marker = "interpreter" if path == "triton" else "not interpreter"
    command = [sys.executable, "-m", "pytest", str(Path(__file__).parent), "-q", "-m", marker, f"--hypothesis-seed={seed}"]
    command += ["-n", str(workers)]
    return subprocess.run(command, env=environment, stdout=sys.stderr, check=False).returncode


def _read(figures: Path) -> Figures:
    found: Figures = defaultdict(lambda: defaultdict(lambda: defaultdict(int)))
    for line in figures.read_text().splitlines():
        loss, path, kind, count = json.loads(line)
        found[loss][path][kind] += count
    return found


def _table(figures: Figures) -> list[str]:
    titles = ["loss"]
    for path in ("eager", "interpreted"):
        titles += [f"{path}: examples", "wider than a block", "of invariants", "tests failed"]
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1)]
    for loss, paths in sorted(figures.items()):
        row = [loss]
        for path in ("eager", "triton"):
            held = paths[path]
            wide = "-" if held[WHOLE] else held[WIDE]
            row += [str(n) for n in (held[NARROW] + held[WIDE], wide, held[INVARIANT], held[FAILED])]
        lines.append(row)
    return ["| " + " | ".join(line) + " |" for line in lines]


def _short(figures: Figures, asked: dict[str, int]) -> list[str]:
    """Losses that a path held on fewer examples than were asked for, half of them of each width."""
    held = {
        (loss, path): paths[path][NARROW] + paths[path][WIDE] for loss, paths in sorted(figures.items()) for path in asked
    }
    return [f"{loss}, {path}: {n} examples" for (loss, path), n in held.items() if n < 2 * max(1, asked[path] // 2)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.properties", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--examples", type=int, default=500, help="of each loss on the eager path")
    parser.add_argument("--kernel-examples", type=int, default=100, help="of each loss by interpreted kernels")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes at a time")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures"
        figures.touch()
        runs = {"eager": chosen.examples, "triton": chosen.kernel_examples}
        statuses = [_run(path, examples, chosen.seed, chosen.workers, figures) for path, examples in runs.items()]
        found = _read(figures)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "triton", "hypothesis"))
    print(f"Seed {chosen.seed}; {versions}, Python {platform.python_version()}. Made by")
    print(f"`python -m tests.properties --examples {chosen.examples} --kernel-examples {chosen.kernel_examples} ", end="")
    print(f"--seed {chosen.seed} > benchmarks/results/properties.md`, with the exit statuses {statuses} of pytest.\n")
    print("\n".join(_table(found)))
    print("\n-: plain operators take the whole tensor, in no blocks of ours.")
    short = _short(found, runs)
    for line in short:
        print(f"too few: {line}", file=sys.stderr)
    # A signal's status is negative.
    return int(any(statuses) or bool(short) or not found)


if __name__ == "__main__":
    raise SystemExit(main())
