"""Vocabulary-parallel loss on 1, 2, 4... processes: what is sent, held and spent; and an estimate for many GPUs on paper.

    python benchmarks/vocab_parallel.py                       # gloo on this machine: 512 tokens, 256 features, 32000 classes
    python benchmarks/vocab_parallel.py --backend nccl --ranks 1 2 4 8 --tokens 8192 --features 4096 --vocabulary 128256

Every rank holds its share of the vocabulary and one thread. Counted on rank 0: collectives and bytes that it hands to them,
and the largest resident set above its inputs (torch.cuda.max_memory_allocated with nccl). Times are of one call, forward and
backward, the median over the rounds; ranks beyond the machine's cores or GPUs share them.

The estimate takes no time from here. It is what the collectives of a call move over the links named in the table, a ring's
share of it, beside what the products of a rank take at the rate named there.

Written to --out: vocab_parallel.json and vocab_parallel.md.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from curves import device_name
from runs import peak_memory
from torch import Tensor

import genloss_kernels as gk
from genloss_kernels.bench.results import commit
from genloss_kernels.losses.vocab_parallel import collectives

MIB = 2**20

# Rates of the estimate: bf16 products of an H200, measured elsewhere; NVLink 4 within a node of 8 GPUs and a 400 Gb/s
# adapter for each GPU beyond it, one way, by their makers' data sheets.
PRODUCTS, NVLINK, NETWORK, NODE = 780e12, 450e9, 50e9, 8


class Shape(NamedTuple):
    tokens: int
    features: int
    vocabulary: int


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """Collectives of the losses and the bytes that this rank gives to each."""
    seen: list[tuple[str, int]] = []
    originals = {name: getattr(collectives, name) for name in ("all_gather", "all_reduce")}

    def counting(name: str) -> Any:
        def call(tensor: Tensor, *rest: Any) -> Tensor:
            seen.append((name, tensor.nbytes))
            return originals[name](tensor, *rest)

        return call

    for name in originals:
        setattr(collectives, name, counting(name))
    try:
        yield seen
    finally:
        for name, original in originals.items():
            setattr(collectives, name, original)


def _rank(rank: int, ranks: int, shape: Shape, args: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if args.backend == "nccl" else torch.device("cpu")
    dist.init_process_group(args.backend, init_method=f"file://{folder}/rendezvous-{ranks}", rank=rank, world_size=ranks)
    dtype = getattr(torch, args.dtype)
    generator = torch.Generator().manual_seed(0)
    start, end = (shape.vocabulary * r // ranks for r in (rank, rank + 1))
    weight = (torch.randn(end - start, shape.features, generator=generator) / shape.features**0.5).to(device, dtype)
    hidden = torch.randn(shape.tokens, shape.features, generator=generator).to(device, dtype)
    target = torch.randint(shape.vocabulary, (shape.tokens,), generator=generator).to(device)
    shard = gk.distributed.VocabShard(start, dist.group.WORLD)
    weight.requires_grad_()
    hidden.requires_grad_()

    def step(rows: int = shape.tokens) -> float:
        dist.barrier()
        begin = time.perf_counter()
        loss = gk.linear_cross_entropy(hidden[:rows], weight, target[:rows], vocab_shard=shard)
        torch.autograd.grad(loss, (hidden, weight))
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    step(8)
    before = peak_memory(device)
    with counted() as seen:
        step()
    memory = peak_memory(device) - before
    seconds = [step() for _ in range(args.rounds)]
    if rank == 0:
        found = {"ranks": ranks, "collectives": seen, "peak_bytes": memory, "seconds": seconds}
        Path(folder, f"{ranks}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measure(shape: Shape, args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in args.ranks:
            mp.spawn(_rank, (ranks, shape, args, folder), nprocs=ranks)
            rows.append(json.loads(Path(folder, f"{ranks}.json").read_text()))
    return rows


def estimate(shape: Shape, ranks: int, itemsize: int = 2) -> dict[str, float]:
    """Bytes a rank sends for each token, and microseconds of products and of collectives.

    The forward gathers 8 bytes a token from each rank (log-sum-exp and the label's logit); the backward adds up the gradient
    of the input in fp32 over a ring, which sends it about twice.
    """
    link = NVLINK if ranks <= NODE else NETWORK
    gathered = 8.0 * (ranks - 1)
    reduced = 2.0 * 4.0 * shape.features * (ranks - 1) / ranks
    products = 6.0 * shape.tokens * shape.features * shape.vocabulary / ranks / PRODUCTS
    return {
        "ranks": ranks,
        "bytes_per_token": gathered + reduced,
        "products_us": products * 1e6,
        "collectives_us": (gathered + reduced) * shape.tokens / link * 1e6,
        "logits_bytes_per_token": shape.vocabulary * itemsize * (ranks - 1) / ranks,
    }


def table(shape: Shape, rows: Sequence[dict[str, Any]], large: Shape, device: str) -> str:
    one = statistics.median(rows[0]["seconds"])
    lines = [
        f"**Measured** on {device}, {shape.tokens} tokens, {shape.features} features, {shape.vocabulary} classes: "
        "`linear_cross_entropy(..., vocab_shard=...)`, forward and backward. Ranks beyond the cores share them.",
        "",
        "| ranks | time / one rank's | peak memory above inputs, rank 0 | collectives | bytes a token handed to them |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        names = " + ".join(name for name, _ in row["collectives"]) or "none"
        handed = sum(size for _, size in row["collectives"]) / shape.tokens
        time_ratio = statistics.median(row["seconds"]) / one
        lines.append(f"| {row['ranks']} | {time_ratio:.2f} | {row['peak_bytes'] / MIB:.0f} MiB | {names} | {handed:.0f} |")
    lines += [
        "",
        f"**On paper**, for {large.tokens} tokens, {large.features} features, {large.vocabulary} classes in bf16: "
        f"{PRODUCTS / 1e12:.0f} TFLOP/s a GPU, {NVLINK / 1e9:.0f} GB/s up to {NODE} GPUs, {NETWORK / 1e9:.0f} GB/s beyond; "
        "nothing overlaps, no latency. Nothing of this was measured. Beside it what gathering the logits would send.",
        "",
        "| GPUs | products | collectives | bytes sent a token | of logits gathered |",
        "| --- | --- | --- | --- | --- |",
    ]
    for ranks in (8, 16, 32, 64, 128, 256, 512, 1024):
        e = estimate(large, ranks)
        lines.append(
            f"| {ranks} | {e['products_us']:.0f} us | {e['collectives_us']:.0f} us | {e['bytes_per_token']:.0f} | "
            f"{e['logits_bytes_per_token']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse_args(argv)
    shape = Shape(args.tokens, args.features, args.vocabulary)
    device = device_name("cuda" if args.backend == "nccl" else "cpu")
    rows = measure(shape, args)
    page = table(shape, rows, Shape(8192, 4096, 128256), device)
    args.out.mkdir(parents=True, exist_ok=True)
    report = {
        "device": device, "commit": commit(), "dtype": args.dtype, "shape": shape._asdict(), "rows": rows,
        "versions": {"torch": torch.__version__, "genloss_kernels": gk.__version__},
    }  # fmt: skip
    (args.out / "vocab_parallel.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "vocab_parallel.md").write_text(page)
    print(page)
    return 0


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--backend", choices=("gloo", "nccl"), default="gloo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("build/vocab_parallel"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
