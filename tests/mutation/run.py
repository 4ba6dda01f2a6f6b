"""Mutation testing: breaks the code on purpose, one small edit at a time, and asks whether the tests notice.

    python -m tests.mutation.run --family NAME --sample 60 --seed 0

Each mutant runs in a copy of the repository, against the suite that can notice it: the kernels under Triton's
interpreter, the eager path, or one after the other. If TRITON_INTERPRET is set, all tests run once as it says.
PYTEST_ADDOPTS reaches the tests, for example to leave slow ones out. Exit status: 0 the score reaches the minimum,
1 it does not, 2 nothing could be measured, or of some mutants not, 130 interrupted.

A mutant is killed by a test that fails, by an import that does, by a crash of its process, or by its time running out,
which the results call ``timeout``. A run that ends otherwise, as by SIGKILL, is repeated once and is an error then.

A survivor that no test can tell from the original goes into equivalents.json: the ``key`` line of the report, with
its ``why`` filled in. Such mutants still run, and one that gets killed is reported.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

if not __package__:
    # Started as a file: make the folder importable under the name that pytest gives it.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "mutation"

from . import report
from .candidates import mutants
from .runner import HarnessError, Runner, copy_repository
from .sampling import draw
from .source import Mutant, Source
from .targets import CORE, TEST_FOLDERS, Family, Target, find_families, find_targets

ROOT = Path(__file__).resolve().parents[2]

# family -> (files mutated, tests); read from the folders, so that a new family needs no entry
FAMILIES = find_families(ROOT)
# a family and the mode in which its tests run
Pair = tuple[str, str]

EQUIVALENTS = Path(__file__).with_name("equivalents.json")


def main(
    arguments: list[str] | None = None,
    root: Path = ROOT,
    families: dict[str, Family] = FAMILIES,
    equivalents_file: Path = EQUIVALENTS,
) -> int:
    options = _parse(arguments, families)
    equivalents = report.Equivalents(equivalents_file)
    with tempfile.TemporaryDirectory(prefix="mutation-") as scratch:
        snapshot = Path(scratch, "snapshot")
        copy_repository(root, snapshot)
        targets = find_targets(snapshot, families, options.family)
        candidates = {target.file: mutants(Source(target.file, (snapshot / target.file).read_bytes())) for target in targets}
        everything = [mutant for found in candidates.values() for mutant in found]
        for entry in equivalents.stale(everything):
            print(f"equivalents: no such mutant any more: {entry}")
        if options.list:
            _list(candidates)
            return 0
        try:
            earlier = report.Earlier(options.again) if options.again else None
            sample = earlier.survivors(everything, equivalents) if earlier else _pick(options, candidates, everything)
            return _measure(options, Runner(snapshot, Path(scratch)), targets, families, sample, equivalents, earlier)
        except HarnessError as error:
            print(f"mutation: {error}", file=sys.stderr)
            return 2


def _parse(arguments: list[str] | None, families: dict[str, Family]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=60, metavar="N", help="mutants to draw, 0 for all (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (default 0)")
    parser.add_argument(
        "--family",
        action="append",
        default=[],
        choices=sorted(families),
        metavar="NAME",
        help=f"only this family and the core it imports, repeatable: {', '.join(families)} (default all)",
    )
    parser.add_argument("--jobs", type=int, default=2, help="mutants tested at once (default 2)")
    parser.add_argument("--timeout", type=float, help="seconds for one mutant (default 4 baselines, at least 120)")
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="of a shared module's families, one mutant meets the quickest, whose tests take no longer than this in each "
        "mode; the others could only kill more (default: all)",
    )
    parser.add_argument("--minimum", type=float, default=0.9, help="lowest score that passes (default 0.9)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument(
        "--again",
        type=Path,
        metavar="FILE",
        help="only the survivors and errors of an earlier run, by its JSON: what becomes of them replaces what it says of "
        "them, and later_passes says how many there were",
    )
    parser.add_argument("--list", action="store_true", help="list every mutant, run none")
    parser.add_argument("--only", action="append", default=[], metavar="ID", help="run just this mutant, repeatable")
    return parser.parse_args(arguments)


def _list(candidates: dict[str, list[Mutant]]) -> None:
    for found in candidates.values():
        for mutant in found:
            original = mutant.source.data[mutant.edit.start : mutant.edit.end].decode()
            print(f"{mutant.id}  {' '.join(original.split())!r} -> {' '.join(mutant.edit.replacement.split())!r}")
    for file, found in candidates.items():
        operators = Counter(mutant.edit.operator for mutant in found)
        print(f"{len(found):5} {file} ({', '.join(f'{name} {count}' for name, count in operators.most_common())})")
    print(f"{sum(map(len, candidates.values())):5} in all")


def _pick(options: argparse.Namespace, candidates: dict[str, list[Mutant]], everything: list[Mutant]) -> list[Mutant]:
    if options.only:
        known = {mutant.id: mutant for mutant in everything}
        unknown = [identifier for identifier in options.only if identifier not in known]
        if unknown:
            raise HarnessError(f"no such mutant: {', '.join(unknown)}")
        sample = [known[identifier] for identifier in options.only]
    else:
        sample = draw(candidates, options.sample, options.seed)
    if not sample:
        raise HarnessError("nothing to mutate")
    for mutant in sample:
        compile(mutant.mutated, mutant.source.path, "exec")
    return sample


def _measure(
    options: argparse.Namespace,
    runner: Runner,
    targets: list[Target],
    families: dict[str, Family],
    sample: list[Mutant],
    equivalents: report.Equivalents,
    earlier: report.Earlier | None = None,
) -> int:
    chosen = {target.file: target for target in targets}
    needed = sorted({pair for mutant in sample for pair in _pairs(chosen[mutant.source.path])})
    baseline: dict[Pair, float] = earlier.baseline if earlier else {}
    results: list[report.Result] = []
    interrupted = False

    def measure_baseline(pair: Pair) -> None:
        suite, mode = pair
        if not families[suite].tests:
            raise HarnessError(f"{suite} has no tests: none at tests/{{{','.join(TEST_FOLDERS)}}}/test_{suite}*.py")
        outcome = runner.run(list(families[suite].tests), timeout=None, mode=mode)
        if not outcome.collected:
            return
        if outcome.returncode != 0:
            raise HarnessError(f"the unmutated tests of {suite} must pass, and some must run:\n{outcome.output}")
        baseline[pair] = outcome.seconds
        print(f"baseline {suite}, {mode}: {outcome.passed} passed in {outcome.seconds:.1f}s", flush=True)

    def measure_mutant(mutant: Mutant) -> None:
        pairs = [pair for pair in _pairs(chosen[mutant.source.path]) if pair in baseline]
        outcomes = []
        for mode in sorted({mode for _, mode in pairs}, key=lambda mode: sum(baseline[p] for p in pairs if p[1] == mode)):
            # Its own tests and then the quickest: the run ends at the first failure.
            of_mode = [pair for pair in pairs if pair[1] == mode]
            ordered = _within(options.budget, sorted(of_mode, key=lambda p: (p[0] != CORE, baseline[p])), baseline)
            tests = [test for suite, _ in ordered for test in families[suite].tests]
            timeout = options.timeout or max(120.0, 4 * sum(baseline[pair] for pair in ordered))
            for _ in range(2):
                outcomes.append(runner.run(tests, timeout, (mutant.source.path, mutant.mutated), mode))
                if outcomes[-1].status != "error":
                    break
            if outcomes[-1].status != "survived":
                break
        outcome, seconds = outcomes[-1], sum(outcome.seconds for outcome in outcomes)
        argued = outcome.status == "survived" and equivalents.why(mutant) is not None
        status = "equivalent" if argued else outcome.status
        results.append(report.Result(mutant, status, seconds, outcome.detail))
        place = f"[{len(results):{len(str(len(sample)))}}/{len(sample)}]"
        print(f"{place} {status:10} {seconds:6.1f}s {mutant.id}  {outcome.detail}".rstrip(), flush=True)

    try:
        _run_all(runner, options.jobs, measure_baseline, [pair for pair in needed if pair not in baseline])
        for suite in sorted({suite for suite, _ in needed}):
            if not any(pair[0] == suite for pair in baseline):
                raise HarnessError(f"the unmutated tests of {suite} must pass, and some must run: none did")
        _run_all(runner, options.jobs, measure_mutant, sample)
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted", file=sys.stderr)

    order = {mutant.id: index for index, mutant in enumerate(sample)}
    results.sort(key=lambda result: order[result.mutant.id])
    if options.json:
        seconds = {f"{suite}, {mode}": value for (suite, mode), value in baseline.items()}
        settings = {"seed": options.seed, "minimum": options.minimum, "drawn": len(sample), "budget": options.budget}
        document = report.document(results, equivalents, settings, seconds)
        options.json.write_text(report.as_json(earlier.with_(document) if earlier else document), encoding="utf-8")
    print(report.summary(results, equivalents))
    if interrupted:
        return 130
    if any(result.status == "error" for result in results):
        raise HarnessError("some mutants could not be measured: see --again")
    score = report.score(results)
    if score is None:
        raise HarnessError("every mutant drawn is equivalent")
    return 0 if score >= options.minimum else 1


def _within(budget: float | None, ordered: list[Pair], baseline: dict[Pair, float]) -> list[Pair]:
    """The first families whose tests, unmutated, take no longer than that together; one at least."""
    sums = itertools.accumulate(baseline[pair] for pair in ordered)
    return [
        pair
        for place, (pair, total) in enumerate(zip(ordered, sums, strict=True))
        if budget is None or not place or total <= budget
    ]


def _pairs(target: Target) -> list[Pair]:
    modes = ("as is",) if "TRITON_INTERPRET" in os.environ else target.modes
    return [(suite, mode) for suite in target.suites for mode in modes]


def _run_all(runner: Runner, jobs: int, work: Callable[[Any], None], items: Iterable[Any]) -> None:
    """Runs ``work`` on each item; the first error or an interrupt ends the runs under way and leaves none behind."""
    pool = ThreadPoolExecutor(max(1, jobs))
    try:
        pending = {pool.submit(work, item) for item in items}
        while pending:
            # A wait without a limit cannot be interrupted on every platform.
            done, pending = wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
    except BaseException:
        runner.stop()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _as_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _as_interrupt)
    sys.exit(main())
