"""Options and course of a benchmark: gate, time, print, save, draw."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from .. import cases, info
from ..cases import Case, floor_bytes, floor_flops
from ..doctor import examine
from . import plot, table
from .candidates import BUILTIN, IN_FORWARD, IN_PLACE, OURS, Candidate, candidates
from .progress import Progress
from .results import Report, Result, slug
from .timing import Limit, Race, copy_rate, matmul_rate

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}

# Unless rounds are asked for: all cases together are timed for about so many seconds.
_ROUNDS, _SECONDS = 20, 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--loss", nargs="+", choices=info.losses(), default=[], metavar="NAME", help="only these losses")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name holds this text; see --list")
    parser.add_argument("--dtype", nargs="+", choices=_DTYPES, help="these dtypes in place of each case's own")
    parser.add_argument("--device", type=torch.device, default=info.default_device(), help="default: %(default)s")
    parser.add_argument(
        "--rounds",
        type=_rounds,
        metavar="N",
        help=f"default: {_ROUNDS}, fewer where that would take more than a minute",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help=f"also time torch.compile of the {BUILTIN} built-in; default: on a GPU",
    )
    parser.add_argument("--out", type=Path, help="folder for bench.json and bench.png; default: benchmarks/results/<device>")
    parser.add_argument("--part", type=float, metavar="SECONDS", help="begin no case after so long, and exit with 3")
    parser.add_argument("--resume", action="store_true", help="go on from the bench.json of a run that was stopped")
    parser.add_argument("--list", action="store_true", help="list the cases and time nothing")


def main(args: argparse.Namespace) -> int:
    selected = _selected(args)
    if not selected:
        print("no case fits these options; --list shows them all", file=sys.stderr)
        return 2
    if args.list:
        for case, dtype in selected:
            print(f"{case.loss}: {case.name}, {_name(dtype)}")
        return 0
    compiled = args.device.type == "cuda" if args.compile is None else args.compile
    limit = Limit(args.rounds) if args.rounds else Limit(_ROUNDS, _SECONDS / len(selected))
    config = {"rounds": limit.rounds, "seconds": limit.seconds, "compile": compiled, "threads": torch.get_num_threads()}
    report = Report(info.device_name(args.device), info.environment(), config)
    folder = args.out or Path("benchmarks", "results", slug(report.device))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "bench.json"
    if args.resume and file.exists():
        try:
            report.resume(file)
        except ValueError as error:
            print(f"cannot resume: {error}; leave --resume out to begin anew", file=sys.stderr)
            return 2
    report.copy_rate = report.copy_rate or copy_rate(args.device)
    for dtype in dict.fromkeys(dtype for _, dtype in selected):
        if _name(dtype) not in report.matmul_rates:
            report.matmul_rates[_name(dtype)] = matmul_rate(args.device, dtype)
    report.save(file)
    left = _measure_all(selected, report, file, args, limit, compiled)
    print(table.text(report))
    print(f"\nsaved {file}")
    _draw(report, folder / "bench.png")
    if left:
        print(f"{left} cases are left: the same command with --resume goes on", file=sys.stderr)
        return 3
    return 0 if all(result.passed for result in report.results) else 1


def _measure_all(
    selected: Sequence[tuple[Case, torch.dtype]], report: Report, file: Path, args: argparse.Namespace, limit: Limit,
    compiled: bool,
) -> int:  # fmt: skip
    """Measure and save what the report lacks, and return how many cases the part's time did not suffice for."""
    done = {result.key for result in report.results}
    start = time.perf_counter()
    with Progress(len(selected)) as progress:
        for k, (case, dtype) in enumerate(selected):
            progress.case(f"{case.loss}: {case.name}, {_name(dtype)}")
            if (case.loss, case.name, _name(dtype)) in done:
                continue
            if args.part is not None and time.perf_counter() - start > args.part:
                return len(selected) - k
            report.results.append(_measure(case, args.device, dtype, limit, compiled, progress))
            report.save(file)
    return 0


def _rounds(text: str) -> int:
    rounds = int(text)
    if rounds < 2:
        raise argparse.ArgumentTypeError("at least 2 rounds are needed for quartiles")
    return rounds


def _selected(args: argparse.Namespace) -> list[tuple[Case, torch.dtype]]:
    found = [c for c in cases.select(cases.BENCH, tuple(args.loss)) if args.case in c.name]
    if args.dtype:
        # The table lists a case once for each of its own dtypes.
        found = list({(c.loss, c.name): replace(c, dtypes=[_DTYPES[d] for d in args.dtype]) for c in found}.values())
    return [(case, dtype) for case in found for dtype in case.dtypes]


def _measure(
    case: Case, device: torch.device, dtype: torch.dtype, limit: Limit, compiled: bool, progress: Progress
) -> Result:
    result = Result(case.loss, case.name, _name(dtype))
    runners = []
    for candidate in candidates(case, device, dtype, compiled=compiled):
        problem = _problem(candidate, case, device, dtype)
        if problem is None:
            runners.append(candidate)
        else:
            result.problems[candidate.name] = problem
    if not result.passed:
        return result
    call = case.call(device, dtype)
    result.shapes = {name: list(tensor.shape) for name, tensor in call.tensors().items()}
    result.floor_bytes, result.floor_flops = floor_bytes(call, case.function(**call.arguments)), floor_flops(call)
    race = Race(runners, call, device)
    rounds, start = 0, time.perf_counter()
    while (share := limit.share(rounds, time.perf_counter() - start)) < 1.0:
        progress.within_case(share)
        race.run_round()
        rounds += 1
    result.calls, result.samples = race.calls, race.samples
    return result


def _problem(candidate: Candidate, case: Case, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a candidate must not be timed. The built-in sets the standard, so nothing is asked of it."""
    if candidate.name == BUILTIN:
        return None
    # Ours computes in float32 whatever the dtype, unless told otherwise; of others no more is asked than of torch in it.
    like = torch.float32 if candidate.name in (OURS, IN_PLACE, IN_FORWARD) else dtype
    return examine(case, device, dtype, function=candidate.function, like=like).problem


def _draw(report: Report, path: Path) -> None:
    if not any(result.samples for result in report.results):
        return
    try:
        plot.save(report, path)
    except ModuleNotFoundError:
        print("no plot: matplotlib is not installed (pip install 'genloss_kernels[bench]')", file=sys.stderr)
    else:
        print(f"saved {path}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
