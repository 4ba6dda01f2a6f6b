"""Time and memory of a vocabulary head with its loss, forward and backward: whole logits, torch's chunks and ours.

    python benchmarks/linear_head.py                                   # 2048 tokens, 256 features, 32000 classes
    python benchmarks/linear_head.py --tokens 8192 --features 4096 --vocabulary 128256 --dtype bfloat16 --device cuda

    logits           F.cross_entropy(F.linear(input, weight), target)
    torch chunked    F.linear_cross_entropy with torch's default options, where torch has it
    genloss_kernels  genloss_kernels.linear_cross_entropy

Times are taken in rounds that go through the candidates in turn. Peak memory is that of one call, above the inputs: the
largest resident set of a process of its own on a CPU, torch.cuda.max_memory_allocated on CUDA.

Then ours alone over 16 times as many tokens, classes and features: the exponent of a power law through the times (1 is
linear), and the workspace, which is the peak memory less the gradients of input and weight.

Written to --out: linear_head.json, and linear_head.png of the growth.
"""

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from curves import device_name
from matplotlib.figure import Figure
from runs import peak_memory
from torch import Tensor
from tqdm import tqdm

import genloss_kernels as gk
from genloss_kernels.bench.candidates import CHUNKED, OURS, torch_chunked
from genloss_kernels.bench.results import spread

LOGITS = "logits"
MIB = 2**20


class Shape(NamedTuple):
    tokens: int
    features: int
    vocabulary: int


def _whole_logits(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(input, weight), target)


CANDIDATES: dict[str, Callable[..., Tensor]] = {LOGITS: _whole_logits, OURS: gk.linear_cross_entropy}
if hasattr(F, "linear_cross_entropy"):
    CANDIDATES[CHUNKED] = torch_chunked


def draw(shape: Shape, dtype: str, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": device}
    # In place: a largest resident set would count what is no more needed.
    input = torch.randn(shape.tokens, shape.features, dtype=getattr(torch, dtype), **options)
    weight = torch.randn(shape.vocabulary, shape.features, dtype=input.dtype, **options).div_(shape.features**0.5)
    target = torch.randint(shape.vocabulary, (shape.tokens,), **options)
    return input.requires_grad_(), weight.requires_grad_(), target


def step_seconds(function: Callable[..., Tensor], tensors: tuple[Tensor, Tensor, Tensor]) -> float:
    input, weight, target = tensors
    input.grad = weight.grad = None
    start = time.perf_counter()
    function(input, weight, target).backward()
    if input.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(name: str, shape: Shape, dtype: str, device: str) -> int:
    """Memory of one call above its inputs; to be called in a process of its own."""
    tensors = draw(shape, dtype, device)
    # Libraries load and threads start with the first call, whatever its size.
    step_seconds(CANDIDATES[name], draw(Shape(8, shape.features, 64), dtype, device))
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    before = peak_memory(torch.device(device))
    step_seconds(CANDIDATES[name], tensors)
    return peak_memory(torch.device(device)) - before


def _apart(function: Callable[..., Any], *args: Any) -> Any:
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *args).result()


def compare(shape: Shape, dtype: str, device: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each candidate, round by round."""
    tensors = draw(shape, dtype, device)
    seconds: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    for function in CANDIDATES.values():
        step_seconds(function, tensors)
    for _ in tqdm(range(rounds), desc="rounds", leave=False, disable=None):
        for name, function in CANDIDATES.items():
            seconds[name].append(step_seconds(function, tensors))
    return seconds


def workspace_bytes(shape: Shape, dtype: str, device: str) -> int:
    """Peak memory of ours without the gradients of input and weight."""
    gradients = (shape.tokens + shape.vocabulary) * shape.features * getattr(torch, dtype).itemsize
    return _apart(peak_bytes, OURS, shape, dtype, device) - gradients


def growth(shapes: Sequence[Shape], axis: str, dtype: str, device: str, rounds: int) -> tuple[list[float], float]:
    """Our median time for each shape, in rounds that go through them in turn, and the exponent of the power law."""
    drawn = [draw(shape, dtype, device) for shape in shapes]
    seconds: list[list[float]] = [[] for _ in shapes]
    for _ in tqdm(range(1 + rounds), desc=axis, leave=False, disable=None):
        for tensors, samples in zip(drawn, seconds, strict=True):
            samples.append(step_seconds(CANDIDATES[OURS], tensors))
    medians = [statistics.median(samples[1:]) for samples in seconds]
    sizes = [math.log(getattr(shape, axis)) for shape in shapes]
    return medians, statistics.linear_regression(sizes, [math.log(median) for median in medians]).slope


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse_args(argv)
    shape = Shape(args.tokens, args.features, args.vocabulary)
    print(f"{device_name(args.device)}, {args.dtype}, {shape}")
    factors = (0.25, 0.5, 1, 2, 4)
    series = {
        "tokens": [shape._replace(tokens=int(shape.tokens * f)) for f in factors],
        "vocabulary": [shape._replace(tokens=shape.tokens // 4, vocabulary=int(shape.vocabulary * f)) for f in factors],
        "features": [shape._replace(tokens=shape.tokens // 4, features=int(shape.features * f)) for f in factors],
    }
    # Memory first: Linux lets a process begin with its parent's largest resident set.
    memory = {name: _apart(peak_bytes, name, shape, args.dtype, args.device) for name in CANDIDATES}
    workspaces = {
        axis: [workspace_bytes(shape, args.dtype, args.device) for shape in shapes] for axis, shapes in series.items()
    }
    times = compare(shape, args.dtype, args.device, args.rounds)
    candidates = {name: {"seconds": times[name], "peak_bytes": memory[name]} for name in CANDIDATES}
    reference = candidates[LOGITS]
    print(f"{'':<17}{'time':>12}{'/ logits':>10}{'memory':>13}{'/ logits':>10}")
    for name, found in candidates.items():
        quotient = spread([a / b for a, b in zip(found["seconds"], reference["seconds"], strict=True)]).median
        share = found["peak_bytes"] / reference["peak_bytes"]
        milliseconds = statistics.median(found["seconds"]) * 1e3
        print(f"{name:<17}{milliseconds:>9.1f} ms{quotient:>10.2f}{found['peak_bytes'] / MIB:>9.0f} MiB{share:>10.2f}")
    scaling = {}
    for axis, shapes in series.items():
        seconds, exponent = growth(shapes, axis, args.dtype, args.device, min(3, args.rounds))
        points = [
            {"shape": shape._asdict(), "seconds": second, "workspace_bytes": space}
            for shape, second, space in zip(shapes, seconds, workspaces[axis], strict=True)
        ]
        scaling[axis] = {"exponent": exponent, "points": points}
    for axis, found in scaling.items():
        print(f"\ntime grows as {axis} ** {found['exponent']:.2f}")
        for point in found["points"]:
            print(
                f"{point['shape'][axis]:>10}{point['seconds'] * 1e3:>12.1f} ms"
                f"{point['workspace_bytes'] / MIB:>9.0f} MiB of workspace"
            )
    args.out.mkdir(parents=True, exist_ok=True)
    report = {
        "device": device_name(args.device), "dtype": args.dtype, "shape": shape._asdict(),
        "versions": {"torch": torch.__version__, "genloss_kernels": gk.__version__},
        "candidates": candidates, "scaling": scaling,
    }  # fmt: skip
    (args.out / "linear_head.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(report, args.out / "linear_head.png")
    return 0


def plot(report: dict[str, Any], path: Path) -> None:
    """Time and workspace over each axis of size."""
    figure = Figure(figsize=(4 * len(report["scaling"]), 3.4), layout="constrained")
    panels = figure.subplots(1, len(report["scaling"]))
    for panel, (axis, found) in zip(panels, report["scaling"].items(), strict=True):
        sizes = [point["shape"][axis] for point in found["points"]]
        panel.loglog(sizes, [point["seconds"] * 1e3 for point in found["points"]], "o-", label="ms, forward and backward")
        panel.loglog(sizes, [point["workspace_bytes"] / MIB for point in found["points"]], "s--", label="MiB of workspace")
        panel.set_xticks(sizes, [str(size) for size in sizes], fontsize=8)
        panel.minorticks_off()
        panel.set_title(f"{axis} ** {found['exponent']:.2f}", fontsize=10)
        panel.set_xlabel(axis)
    panels[0].legend(fontsize=8)
    figure.suptitle(f"{report['device']}, torch {report['versions']['torch']}, {report['dtype']}", fontsize=10)
    figure.savefig(path, dpi=120)


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("build/linear_head"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
