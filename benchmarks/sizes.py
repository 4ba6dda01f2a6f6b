"""Every loss at every size: our time less that of torch's operators, and over it, forward and backward.

    python benchmarks/sizes.py                                  # 2**6 to 2**20 elements in fp32, on all threads
    python benchmarks/sizes.py --threads 1 2 --dtype float32 bfloat16 --largest 22
    python benchmarks/sizes.py --device cuda --largest 28

A size is the number of elements of the first operand (for linear_cross_entropy of the logits). Candidates take turns in one
process; a figure is the median over the rounds of the difference, or of the quotient, of the two times in one round.

Written to --out: sizes.json with all samples, sizes.md and sizes.png.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from curves import device_name
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import genloss_kernels as gk
from genloss_kernels import cases
from genloss_kernels.bench.candidates import BUILTIN, OURS, Candidate, builtin
from genloss_kernels.bench.results import commit
from genloss_kernels.bench.timing import Race
from genloss_kernels.cases import Call, Case

Draw = Callable[..., Tensor]


def _rows(n: int) -> tuple[int, int]:
    """About as many rows as columns, both powers of two."""
    columns = 2 ** (n.bit_length() // 2)
    return n // columns, columns


def _calls(n: int, normal: Draw, uniform: Draw, index: Draw) -> dict[str, dict[str, Any]]:
    """Arguments of each loss on ``n`` elements; those drawn by ``normal`` get a gradient."""
    rows, columns = _rows(n)
    matrix = (rows, columns)
    signs = index(2, rows) * 2 - 1
    latent = (rows, max(1, columns // 16))
    return {
        "cross_entropy": {"input": normal(*matrix), "target": index(columns, rows)},
        "nll_loss": {"input": normal(*matrix), "target": index(columns, rows)},
        "linear_cross_entropy": {
            "input": normal(rows, 64), "linear_weight": normal(columns, 64), "target": index(columns, rows),
        },
        "binary_cross_entropy_with_logits": {"input": normal(n), "target": uniform(n)},
        "binary_cross_entropy": {"input": uniform(n, learns=True), "target": uniform(n)},
        "gaussian_kl": {"mu_q": normal(*matrix), "logvar_q": normal(*matrix)},
        "gaussian_nll_loss": {"input": normal(*matrix), "target": uniform(*matrix), "var": uniform(*matrix)},
        "kl_div": {"input": normal(*matrix), "target": uniform(*matrix), "reduction": "batchmean"},
        "kl_div_with_logits": {"input": normal(*matrix), "target": uniform(*matrix)},
        "js_div_with_logits": {"input": normal(*matrix), "target": uniform(*matrix)},
        "categorical_entropy": {"logits": normal(*matrix), "reduction": "mean"},
        "cosine_embedding_loss": {"input1": normal(*matrix), "input2": normal(*matrix), "target": signs},
        "mse_loss": {"input": normal(n), "target": uniform(n)},
        "l1_loss": {"input": normal(n), "target": uniform(n)},
        "smooth_l1_loss": {"input": normal(n), "target": uniform(n)},
        "huber_loss": {"input": normal(n), "target": uniform(n)},
        "vae_loss": {
            "recon": normal(*matrix), "target": uniform(*matrix), "mu": normal(*latent), "logvar": normal(*latent),
            "recon_loss": "bce_with_logits",
        },
        "gan_discriminator_loss": {"real": normal(n), "fake": normal(n)},
        "gan_generator_loss": {"fake": normal(n)},
        "gradient_penalty": {"grad": normal(*matrix)},
        "r1_penalty": {"grad": normal(*matrix)},
        "contrastive_divergence_loss": {"positive_energy": normal(n), "negative_energy": normal(n), "l2": 0.1},
    }  # fmt: skip


def draw(n: int, device: torch.device, dtype: torch.dtype) -> dict[str, Call]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()

    def uniform(*shape: int, learns: bool = False) -> Tensor:
        made = torch.rand(shape, generator=generator, device=device) * 0.98 + 0.01
        return made.to(dtype).requires_grad_(learns)

    def index(classes: int, *shape: int) -> Tensor:
        return torch.randint(classes, shape, generator=generator, device=device)

    return {
        loss: Call(arguments, tuple(k for k, v in arguments.items() if isinstance(v, Tensor) and v.requires_grad))
        for loss, arguments in _calls(n, normal, uniform, index).items()
    }


def _case(loss: str) -> Case:
    """The benchmark's, which knows what a user would write with torch."""
    chosen = cases.select(cases.BENCH, (loss,)) or cases.select(cases.DOCTOR, (loss,))
    return next(iter(chosen))


def measure(call: Call, loss: str, device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of ours and of torch's, forward and backward, round by round."""
    case = _case(loss)
    race = Race([Candidate(OURS, case.function), Candidate(BUILTIN, builtin(case))], call, device)
    for _ in range(rounds):
        race.run_round()
    return {name: samples.both for name, samples in race.samples.items()}


def sweep(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    device = torch.device(args.device)
    exponents = range(args.smallest, args.largest + 1, args.step)
    work = [(t, d, e) for t in args.threads for d in args.dtype for e in exponents]
    for threads, dtype, exponent in tqdm(work, disable=None):
        torch.set_num_threads(threads)
        for loss, call in draw(2**exponent, device, getattr(torch, dtype)).items():
            if args.loss and loss not in args.loss:
                continue
            seconds = measure(call, loss, device, args.rounds)
            yield {"loss": loss, "threads": threads, "dtype": dtype, "exponent": exponent, "seconds": seconds}


def difference(row: dict[str, Any]) -> float:
    """Microseconds that ours takes longer."""
    return statistics.median(a - b for a, b in zip(row["seconds"][OURS], row["seconds"][BUILTIN], strict=True)) * 1e6


def quotient(row: dict[str, Any]) -> float:
    return statistics.median(a / b for a, b in zip(row["seconds"][OURS], row["seconds"][BUILTIN], strict=True))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each loss, dtype and number of threads: microseconds lost up to 2**14 elements, the quotient beyond."""
    exponents = sorted({row["exponent"] for row in rows})
    lines = [
        "Ours beside torch's operators, forward and backward: microseconds more (+) or less (-) up to 2**14 elements, and",
        "the quotient of the times beyond, where below 1.00 ours is faster.",
        "",
        "| loss | dtype | threads | " + " | ".join(f"2**{e}" for e in exponents) + " |",
        "| --- | --- | --- | " + " | ".join("---" for _ in exponents) + " |",
    ]
    found = {(r["loss"], r["dtype"], r["threads"], r["exponent"]): r for r in rows}
    for loss, dtype, threads in dict.fromkeys(key[:3] for key in found):
        cells = []
        for exponent in exponents:
            row = found[loss, dtype, threads, exponent]
            cells.append(f"{difference(row):+.0f} us" if exponent <= 14 else f"{quotient(row):.2f}")
        lines.append(f"| {loss} | {dtype} | {threads} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    """The quotient of the times by loss and size, as colours."""
    rows = report["rows"]
    exponents = sorted({row["exponent"] for row in rows})
    kinds = list(dict.fromkeys((row["loss"], row["dtype"], row["threads"]) for row in rows))
    found = {(row["loss"], row["dtype"], row["threads"], row["exponent"]): quotient(row) for row in rows}
    grid = [[math.log2(found[(*kind, exponent)]) for exponent in exponents] for kind in kinds]
    figure = Figure(figsize=(4.5 + 0.5 * len(exponents), 1.2 + 0.22 * len(kinds)), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(grid, cmap="RdBu_r", vmin=-2, vmax=2, aspect="auto")
    for y, line in enumerate(grid):
        for x, value in enumerate(line):
            axis.text(x, y, f"{2**value:.2g}", ha="center", va="center", fontsize=6)
    axis.set_xticks(range(len(exponents)), [f"$2^{{{e}}}$" for e in exponents], fontsize=8)
    axis.set_yticks(range(len(kinds)), [f"{loss}, {dtype}, {threads} threads" for loss, dtype, threads in kinds], fontsize=6)
    axis.set_title(f"{report['device']}: our time over torch's by elements, forward and backward", fontsize=9)
    bar = figure.colorbar(image, ticks=range(-2, 3), extend="both")
    bar.ax.set_yticklabels(["1/4", "1/2", "1", "2", "4"])
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse_args(argv)
    rows = list(sweep(args))
    args.out.mkdir(parents=True, exist_ok=True)
    report = {
        "device": device_name(args.device), "commit": commit(), "rounds": args.rounds, "rows": rows,
        "versions": {"torch": torch.__version__, "genloss_kernels": gk.__version__},
    }  # fmt: skip
    (args.out / "sizes.json").write_text(json.dumps(report) + "\n")
    (args.out / "sizes.md").write_text(table(rows))
    plot(report, args.out / "sizes.png")
    print(table(rows))
    return 0


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--smallest", type=int, default=6, help="exponent of the fewest elements")
    parser.add_argument("--largest", type=int, default=20, help="exponent of the most elements")
    parser.add_argument("--step", type=int, default=2, help="from one exponent to the next")
    parser.add_argument("--loss", nargs="+", default=[], help="only these")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=("float32", "bfloat16", "float16", "float64"))
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("build/sizes"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
