"""Tune the launch table on this machine's GPU: tiles, warps, tiles a program and rows of a chunk that beat its defaults.

    python benchmarks/tune.py                              # every shape class, for 480 seconds at most; again to go on
    python benchmarks/tune.py --loss cross_entropy --seconds 120

A shape class is an entry of the table, such as "long row, 2 bytes", and its calls are all benchmark cases that look it up.
Each of its candidates has to give doctor's results on a call and to spill no more registers than what holds so far, and is
then timed in turns with that. One is chosen where the quotient of the two times, over all calls of the class, has a median
below 0.98 and an upper quartile below 1, and where no call becomes slower by 2%. It holds while later classes are tuned.

Written to --out: tune.json with every sample, from which the next run goes on unless device, versions or commit are others.
Written to --table, by default the package's own: what was chosen.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genloss_kernels import cases, info
from genloss_kernels.bench.candidates import Candidate
from genloss_kernels.bench.progress import Progress
from genloss_kernels.bench.results import commit, slug, spread
from genloss_kernels.bench.timing import Limit, Race
from genloss_kernels.cases import Case
from genloss_kernels.core import backend, tuned
from genloss_kernels.core.launch import Tile, observe_launches
from genloss_kernels.doctor import examine
from genloss_kernels.meters.configurations import Configuration
from genloss_kernels.meters.main_configurations import SMALL
from genloss_kernels.meters.specialisations import run_on_meta

HOLDS = "what holds"

_LIMIT = Limit(20, seconds=4.0)

# Quotients of times: a gain below the first is no more than noise, and a call above the second is slower.
_GAIN, _LOSS = 0.98, 1.02

# No more than the default, so that no step needs more memory than untuned.
_CHUNKS = (512, 1024, 2048)
_TILES_PER_PROGRAM = (1, 2, 8, 16)


class Timed(NamedTuple):
    """A benchmark's call, and what it looks up in the launch table, with the defaults."""

    case: Case
    dtype: torch.dtype
    reached: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.case.loss}: {self.case.name}, {str(self.dtype).removeprefix('torch.')}"


class OutOfTime(Exception):
    """The next step might not end in time."""


class Clock:
    """Raises before a step if one as long as the longest so far would not end in time."""

    def __init__(self, seconds: float) -> None:
        self._last = time.monotonic()
        self._end, self._longest = self._last + seconds, 0.0

    def step(self) -> None:
        now = time.monotonic()
        self._longest, self._last = max(self._longest, now - self._last), now
        if now + self._longest >= self._end:
            raise OutOfTime


class _Reached(dict[str, Any]):
    def get(self, key: str, default: Any = None) -> Any:
        self[key] = default
        return default


def calls_of(selected: Sequence[Case]) -> list[Timed]:
    """Every call of these cases, found out on meta tensors."""
    found = []
    for case in selected:
        for dtype in case.dtypes:
            call = case.make(torch.Generator(), torch.device("meta"), dtype).fresh()
            reached = _Reached()
            with tuned.in_force(reached):
                run_on_meta(Configuration(case.name, case.loss, call.arguments, call.differentiable), lambda *_: False)
            found.append(Timed(case, dtype, dict(reached)))
    return found


def candidates(shape_class: str, default: Any) -> Iterator[Any]:
    """What might be better than the default: half, as many and twice the elements, in a program and in a thread."""
    if not isinstance(default, Tile):
        yield from (n for n in (_CHUNKS if "chunk" in shape_class else _TILES_PER_PROGRAM) if n != default)
        return
    block, warps = default
    for elements in (block // 2, block, 2 * block):
        for several in (warps // 2, warps, 2 * warps):
            in_a_thread = elements * warps / (several * block)
            if (elements, several) != default and 0.5 <= in_a_thread <= 2.0 and 1 <= several <= 32:
                yield [elements, several]


class Contest:
    """Entries that take turns at one call: what holds so far, and the candidates of one class in its place."""

    def __init__(self, timed: Timed, device: torch.device, entries: Mapping[str, Any], shape_class: str) -> None:
        self._timed, self._device = timed, device
        values = candidates(shape_class, timed.reached[shape_class])
        self._entries = {HOLDS: entries} | {json.dumps(v): {**entries, shape_class: v} for v in values}
        self._current: dict[str, Any] = {}
        self._spilt = 0
        self.refused: dict[str, str] = {}

    def run(self, clock: Clock) -> dict[str, Any]:
        """Gate, then time; returns seconds and bytes by candidate, and why others were refused."""
        with backend.backend("triton"), tuned.in_force(self._current):
            runners = []
            for name in self._entries:
                clock.step()
                if self._passes(name):
                    runners.append(Candidate(name, self.function(name)))
                elif name == HOLDS:
                    break
            samples = self._samples(runners, clock) if len(runners) > 1 else {}
        return {"refused": self.refused, "samples": samples}

    def function(self, name: str) -> Callable[..., Tensor]:
        """The loss by the entries of a candidate, which stay in force for its backward, until another's is called."""

        def loss(**arguments: Any) -> Tensor:
            self._current.clear()
            self._current.update(self._entries[name])
            return self._timed.case.function(**arguments)

        return loss

    def _passes(self, name: str) -> bool:
        case, _, _ = self._timed
        spilt: list[int] = []
        with observe_launches(lambda *launched: bool(spilt.append(spills(*launched)) or True)):
            finding = examine(case, self._device, self._timed.dtype, function=self.function(name))
        if name == HOLDS:
            self._spilt = sum(spilt)
        problem = finding.problem
        if problem is None and sum(spilt) > self._spilt:
            problem = f"{sum(spilt)} registers spilt, {self._spilt} by {HOLDS}"
        if problem is not None:
            self.refused[name] = problem
        return problem is None

    def _samples(self, runners: list[Candidate], clock: Clock) -> dict[str, Any]:
        clock.step()
        race = Race(runners, self._timed.case.call(self._device, self._timed.dtype), self._device)
        rounds, start = 0, time.perf_counter()
        while _LIMIT.share(rounds, time.perf_counter() - start) < 1.0:
            clock.step()
            race.run_round()
            rounds += 1
        return {name: asdict(samples) for name, samples in race.samples.items()}


def spills(kernel: Any, programs: int, args: tuple[Any, ...], keywords: dict[str, Any]) -> int:
    """Registers that the compiled kernel spills; the interpreter has none."""
    if backend.INTERPRETED:
        return 0
    compiled = kernel.warmup(*args, grid=(programs,), **keywords)
    compiled._init_handles()  # which loads it, and reads how many there are
    return compiled.n_spills


def quotients(name: str, contests: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """A candidate's time over that of what holds: for each call, round by round."""
    both = [
        [
            [f + b for f, b in zip(s["forward"], s["backward"], strict=True)]
            for s in (c["samples"][name], c["samples"][HOLDS])
        ]
        for c in contests
    ]
    return [[ours / theirs for ours, theirs in zip(*pair, strict=True)] for pair in both]


def best(contests: Sequence[Mapping[str, Any]]) -> tuple[Any, dict[str, Any]]:
    """The candidate to choose or None, and the spread of each one's quotients over the calls."""
    raced = [c for c in contests if c["samples"]]
    refused = {name for c in contests for name in c["refused"]}
    found, chosen, least = {}, None, _GAIN
    for name in sorted({name for c in raced for name in c["samples"]} - refused - {HOLDS}):
        by_call = quotients(name, raced)
        overall = spread([statistics.geometric_mean(r) for r in zip(*by_call, strict=False)])
        slowest = max(map(statistics.median, by_call))
        found[name] = asdict(overall) | {"slowest call": slowest}
        if overall.median < least and overall.high < 1.0 and slowest <= _LOSS:
            chosen, least = json.loads(name), overall.median
    return chosen, found


def tune(calls: Sequence[Timed], classes: Sequence[str], device: torch.device, state: dict[str, Any], clock: Clock,
         save: Callable[[], None]) -> None:  # fmt: skip
    """Tune ``classes``, one after another, into ``state``, where what an earlier run has done is left as it is."""
    work = [(c, [t for t in calls if c in t.reached]) for c in classes]
    with Progress(sum(len(users) for _, users in work)) as progress:
        for shape_class, users in work:
            row = state["classes"].setdefault(shape_class, {"calls": {}})
            for timed in users:
                progress.case(f"{shape_class}; {timed}")
                if str(timed) not in row["calls"]:
                    contest = Contest(timed, device, state["entries"], shape_class)
                    row["calls"][str(timed)] = contest.run(clock)
                    save()
            default = users[0].reached[shape_class]
            row["default"] = list(default) if isinstance(default, Tile) else default
            row["chosen"], row["quotients"] = best([*row["calls"].values()])
            if row["chosen"] is not None:
                state["entries"][shape_class] = row["chosen"]
            save()


def select(device: torch.device) -> bool:
    """Make this GPU the current one; False where it is none."""
    if device.type != "cuda" or not torch.cuda.is_available() or backend.INTERPRETED:
        return False
    torch.cuda.set_device(device.index or 0)
    return True


def begin(path: Path, device: torch.device) -> dict[str, Any]:
    """The state of the last run if that was here and of the same code, else a new one."""
    here = {"device": info.device_name(device), "versions": info.versions(), "commit": commit()}
    if path.exists():
        state = json.loads(path.read_text(encoding="utf-8"))
        if all(state[name] == value for name, value in here.items()):
            return state
    return here | {"entries": {}, "classes": {}}


def write(state: Mapping[str, Any], path: Path, table: Path) -> None:
    """Samples to ``path``, and what was chosen into ``table`` beside other devices' entries."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, json.dumps(state) + "\n")
    others = json.loads(table.read_text(encoding="utf-8")) if table.exists() else {}
    others.pop(state["device"], None)
    mine = {state["device"]: state["entries"]} if state["entries"] else {}
    _replace(table, json.dumps(others | mine, indent=1, sort_keys=True) + "\n")


def _replace(path: Path, text: str) -> None:
    """Whole or not at all, whenever this process is stopped."""
    whole = path.with_suffix(".new")
    whole.write_text(text, encoding="utf-8")
    whole.replace(path)


def report(state: Mapping[str, Any], classes: Sequence[str]) -> str:
    lines = []
    for shape_class in classes:
        row = state["classes"].get(shape_class, {})
        if "chosen" not in row:
            lines.append(f"{shape_class:<32} not finished")
        elif row["chosen"] is None:
            lines.append(f"{shape_class:<32} {row['default']} stays")
        else:
            found = row["quotients"][json.dumps(row["chosen"])]
            lines.append(
                f"{shape_class:<32} {row['default']} -> {row['chosen']}, time {found['median']:.3f} of the default's"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse_args(argv)
    if not select(args.device):
        print(f"no GPU to tune on (device {args.device}): the CPU and the interpreter run the defaults", file=sys.stderr)
        return 2
    clock = Clock(args.seconds)
    path = args.out or Path("benchmarks", "results", slug(info.device_name(args.device)), "tune.json")
    state = begin(path, args.device)
    calls = calls_of([c for c in cases.select(cases.BENCH) if not c.name.startswith(SMALL)])
    # A class is tuned over all calls that look it up, whichever losses it was chosen for.
    classes = list(dict.fromkeys(c for t in calls if not args.loss or t.case.loss in args.loss for c in t.reached))
    try:
        tune(calls, classes, args.device, state, clock, lambda: write(state, path, args.table))
    except OutOfTime:
        print(f"stopped within {args.seconds:g} s: run it again to go on", file=sys.stderr)
    print(report(state, classes))
    print(f"{len(state['entries'])} entries for {state['device']} in {args.table}; samples in {path}")
    return 0


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--loss", nargs="+", choices=info.losses(), default=[], metavar="NAME", help="only these losses' classes"
    )
    parser.add_argument("--seconds", type=float, default=480.0, help="stop before (default: %(default)g)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>/tune.json")
    parser.add_argument("--table", type=Path, default=tuned.FILE, help="default: the package's")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
