"""Ranks as processes: a world runs many cases, and says of each on which rank it failed and how."""

from __future__ import annotations

import json
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# A rank that fails leaves the others waiting in a collective.
TIMEOUT = timedelta(seconds=20)


# Older names of the same collective.
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


class Ranks:
    """What a case is run with: this process's place among the ranks, and a group of its own."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.group: Any = dist.new_group(timeout=TIMEOUT)

    def everyone(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def whole(self, part: torch.Tensor, start: int, dim: int = 0) -> torch.Tensor:
        """The ranks' parts of a tensor, put together in the order of the classes at which they begin."""
        # Ties are empty parts.
        found = sorted(self.everyone((start, part.detach())), key=lambda pair: (pair[0], pair[1].size(dim)))
        return torch.cat([tensor for _, tensor in found], dim)

    def same_bits(self, *tensors: torch.Tensor) -> None:
        """Fail unless all ranks hold the same bits."""
        found = self.everyone([t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors])
        assert all(f == found[0] for f in found), "the ranks' results differ"


Case = Callable[[Ranks], None]


def run(cases: dict[str, Case], ranks: int, folder: Path) -> dict[str, list[str]]:
    """Traceback of each case on each rank, empty where it passed."""
    mp.spawn(_rank, (cases, ranks, str(folder)), nprocs=ranks)
    results = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    return {name: [of_rank[name] for of_rank in results] for name in cases}


def _rank(rank: int, cases: dict[str, Case], ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    results = {}
    for name, case in cases.items():
        torch.manual_seed(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                # Out of dependencies: Triton's interpreter, and dynamo tracing an autograd.Function.
                for message in ("Conversion of an array with ndim > 0", ".*should not be instantiated"):
                    warnings.filterwarnings("ignore", message, DeprecationWarning)
                case(Ranks())
            results[name] = ""
        except BaseException:
            results[name] = f"rank {rank}:\n{traceback.format_exc()}"
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


class Traffic:
    """Collectives that this rank took part in, by name, and the bytes that it sent."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.bytes = 0


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Count the collectives of torch.distributed."""
    seen = Traffic()
    names = [n for n in dir(dist) if n.startswith(("all_", "broadcast", "gather", "reduce", "scatter", "barrier"))]
    originals = {n: getattr(dist, n) for n in names if callable(getattr(dist, n))}

    def counted(name: str, place: int) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            seen.calls.append(name)
            if len(args) > place and isinstance(args[place], torch.Tensor):
                seen.bytes += args[place].numel() * args[place].element_size()
            return originals[name](*args, **keywords)

        return call

    for name in originals:
        setattr(dist, name, counted(name, 1 if name == GATHER else 0))
    try:
        yield seen
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
