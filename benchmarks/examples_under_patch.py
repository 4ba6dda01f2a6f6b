"""Run the scripts in benchmarks/examples, which know torch alone, with and without gk.patch_torch(); compare their losses.

    python benchmarks/examples_under_patch.py
    python benchmarks/examples_under_patch.py --steps 20 dcgan

Each script runs unchanged, three times from one seed: as it is, under the patch, and as a control, as it is but from weights
that are moved by one unit in the last place before the first update, which shows how far rounding alone drives two runs
apart; see train_lm.py for the check. It fails too if a call of a loss did not run ours.

Written to --out: examples_under_patch.json.
"""

import argparse
import contextlib
import json
import runpy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from curves import CurveCheck, check_curves, device_name, verdict
from runs import call_here, call_in_new_process, perturb_by_one_ulp
from torch.optim.optimizer import register_optimizer_step_pre_hook

import genloss_kernels as gk

FOLDER = Path(__file__).with_name("examples")
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))


def losses(script: str, argv: Sequence[str], variant: str) -> tuple[list[float], dict[str, Any]]:
    """The script's loss at each step, and the calls that its patch counted."""
    # Without the name __main__ a script only defines its functions.
    main = runpy.run_path(str(FOLDER / f"{script}.py"))["main"]
    if variant != "patched":
        with _perturbed() if variant == "control" else contextlib.nullcontext():
            return main(argv), {}
    with gk.patch_torch() as patch:
        found = main(argv)
    print(patch)
    return found, patch.report()["calls"]


@contextlib.contextmanager
def _perturbed() -> Iterator[None]:
    """Move every optimizer's parameters by one unit in the last place before its first step."""
    seen: list[torch.optim.Optimizer] = []

    def perturb(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not any(optimizer is known for known in seen):
            seen.append(optimizer)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            perturb_by_one_ulp(torch.nn.ParameterList(parameters), seed=len(seen))

    hook = register_optimizer_step_pre_hook(perturb)
    try:
        yield
    finally:
        hook.remove()


def compare(script: str, argv: Sequence[str], isolate: bool) -> tuple[bool, dict[str, Any]]:
    call = call_in_new_process if isolate else call_here
    curves = {variant: call(losses, script, argv, variant) for variant in ("torch", "patched", "control")}
    calls = curves["patched"][1]
    check: CurveCheck = check_curves(*(curve for curve, _ in curves.values()))
    every = bool(calls) and all(row["ours"] and not row["torch"] for row in calls.values())
    print(f"{script}: {verdict(check)}; {'every' if every else 'NOT EVERY'} call of a loss ran ours\n", flush=True)
    report = {"check": asdict(check), "calls": calls, "losses": {name: curve for name, (curve, _) in curves.items()}}
    return check.passed and every, report


def main(argv: Sequence[str] | None = None, isolate: bool = True) -> int:
    """Run the comparisons and return the exit status; without ``isolate`` all runs share this process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("scripts", nargs="*", help=f"of {', '.join(SCRIPTS)}; all if none is named")
    parser.add_argument("--steps", type=int, help="optimizer steps of each run; the script's own number if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build") / "examples_under_patch", help="folder for results")
    args = parser.parse_args(argv)
    for script in args.scripts:
        if script not in SCRIPTS:
            parser.error(f"no script {script!r} in {FOLDER.name}: {', '.join(SCRIPTS)}")
    passed, reports = True, {}
    for script in args.scripts or SCRIPTS:
        options = ["--seed", str(args.seed), *(() if args.steps is None else ("--steps", str(args.steps)))]
        good, reports[script] = compare(script, options, isolate)
        passed &= good
    args.out.mkdir(parents=True, exist_ok=True)
    device = device_name("cuda" if torch.cuda.is_available() else "cpu")
    report = {"torch": torch.__version__, "device": device, "seed": args.seed, "scripts": reports}
    (args.out / "examples_under_patch.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
