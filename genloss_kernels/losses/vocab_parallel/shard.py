"""Which classes a rank holds, and with whom it shares the rest."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ...core import checks
from . import collectives


class Layout(NamedTuple):
    """First class and number of classes of every rank of a group; plain numbers, which operators and compilers accept."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    rank: int
    group: str

    @property
    def start(self) -> int:
        return self.starts[self.rank]

    @property
    def size(self) -> int:
        return self.sizes[self.rank]

    @property
    def vocab_size(self) -> int:
        return sum(self.sizes)

    @property
    def ranks(self) -> int:
        return len(self.starts)


class VocabShard:
    """The classes that this rank holds of a vocabulary spread over the ranks of a process group.

    Passed as ``vocab_shard`` to :func:`genloss_kernels.cross_entropy` and :func:`genloss_kernels.linear_cross_entropy`,
    which then take this rank's logits, or this rank's rows of the linear layer, and return on every rank the loss over all
    classes. Shards may be uneven and empty, and ranks may hold them in any order, as long as each class is held once.

    The first use of a shard given by its start asks every rank of the group for its start and size, and waits for them;
    later uses, :meth:`even` and :meth:`from_dtensor` know them. A module that holds a shard may be pickled, and loaded where
    the same process groups exist.

    As for every collective, all ranks must make the same calls, with as many rows and the same options: others hang, or
    abort. Under ``GENLOSS_DEBUG=1`` each call first compares them, and raises ValueError on every rank.

    Args:
        start: index of this rank's first class, at least 0.
        group: process group over which the vocabulary is spread; None is the default group. Any backend that has
            ``all_gather_into_tensor`` and ``all_reduce`` on the tensors' device, such as gloo and NCCL.
        reduce_input_grad: whether ``linear_cross_entropy`` sums the gradient of its input over the group. False where a
            wrapper, such as a column-parallel layer, sums it already. May be assigned later.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a negative start, or a group that this rank is not part of.
        RuntimeError: ``torch.distributed`` has not been initialised.

    Source:
        Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism", 2019,
        section 3, for cross entropy of logits that stay on their ranks.

    Example:
        >>> import torch, torch.distributed as dist, genloss_kernels as gk
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> shard = gk.distributed.VocabShard.even(4, dist.group.WORLD)
        >>> loss = gk.cross_entropy(torch.zeros(2, shard.size), torch.tensor([0, 3]), vocab_shard=shard)
        >>> round(loss.item(), 4)
        1.3863
        >>> dist.destroy_process_group()
    """

    def __init__(self, start: int, group: Any, reduce_input_grad: bool = True) -> None:
        checks.integer("start", start)
        checks.flag("reduce_input_grad", reduce_input_grad)
        if start < 0:
            raise ValueError(f"start must be the index of this rank's first class, got {start}")
        group = _process_group(group)
        self.start = start
        self.group = group
        self.reduce_input_grad = reduce_input_grad
        self._rank, self._ranks, self._name = dist.get_rank(group), dist.get_world_size(group), group.group_name
        self._layout: Layout | None = None

    @classmethod
    def even(cls, vocab_size: int, group: Any) -> VocabShard:
        """This rank's part of ``vocab_size`` classes, cut as ``torch.chunk`` and DTensor cut.

        Every rank holds ``ceil(vocab_size / ranks)`` classes, the last ones fewer or none: see :attr:`size`.
        """
        checks.integer("vocab_size", vocab_size)
        if vocab_size < 1:
            raise ValueError(f"vocab_size must be positive, got {vocab_size}")
        group = _process_group(group)
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        step = -(-vocab_size // ranks)
        starts = tuple(min(r * step, vocab_size) for r in range(ranks))
        sizes = tuple(min(step, vocab_size - start) for start in starts)
        shard = cls(starts[rank], group)
        shard._layout = Layout(starts, sizes, rank, shard._name)
        return shard

    @classmethod
    def from_dtensor(cls, t: Any) -> VocabShard:
        """The shard of a DTensor that is sharded over the vocabulary: a weight by ``Shard(0)``, logits by ``Shard(1)``.

        Of its mesh one dimension shards the tensor, and the group is that dimension's; the others must replicate it.
        """
        if not checks.is_dtensor(t):
            raise TypeError(f"t must be a DTensor, not {type(t).__name__}: use VocabShard(start, group) or VocabShard.even")
        sharded = [d for d, placement in enumerate(t.placements) if not placement.is_replicate()]
        if len(sharded) != 1 or not t.placements[sharded[0]].is_shard():
            raise ValueError(
                f"t must be sharded over one dimension of its mesh and replicated over the others, got {t.placements}: "
                "call t.redistribute(placements=...), or use it inside the module that gathers it"
            )
        placement = t.placements[sharded[0]]
        shard = cls.even(t.size(placement.dim), t.device_mesh.get_group(sharded[0]))
        if t.to_local().size(placement.dim) != shard.size:
            raise ValueError(
                f"t must be cut into {shard.size} classes on this rank, as by Shard({placement.dim}), but {placement} holds "
                f"{t.to_local().size(placement.dim)}"
            )
        return shard

    @property
    def size(self) -> int | None:
        """Classes that this rank holds; None where :class:`VocabShard` was given a start and has not been used yet."""
        return None if self._layout is None else self._layout.size

    def _fitting(self, name: str, size: int, device: torch.device) -> Layout:
        """Where every rank's classes lie; ``size`` is how many the argument called ``name`` has here.

        Raises:
            ValueError: the argument does not have this rank's classes, or the ranks' shards do not make up a vocabulary.
        """
        layout = self._exchange(size, device) if self._layout is None else self._layout
        if size != layout.size:
            raise ValueError(
                f"{name} must hold the {layout.size} classes of vocab_shard on rank {layout.rank} of {layout.ranks}, which "
                f"begin at {layout.start} of {layout.vocab_size}, but it holds {size}: pass this rank's part of it"
            )
        self._layout = layout
        return layout

    def _exchange(self, size: int, device: torch.device) -> Layout:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "vocab_shard has not been used yet and does not know the other ranks' sizes, which a compiled function "
                "cannot ask for: call the loss once outside torch.compile, or use VocabShard.even or VocabShard.from_dtensor"
            )
        own = torch.tensor([self.start, size], dtype=torch.int64, device=device)
        everyone = collectives.all_gather(own, self._ranks, self._name).tolist()
        layout = Layout(tuple(s for s, _ in everyone), tuple(n for _, n in everyone), self._rank, self._name)
        reached = 0
        for start, n in sorted(everyone):
            if start != reached and n:
                raise ValueError(
                    "vocab_shard: the ranks' shards must hold every class once, but in the order of the ranks (start, size) "
                    f"are {', '.join(str((s, n)) for s, n in everyone)}: no shard begins at {reached}. Is start the first "
                    "class of the weight or the logits passed on each rank?"
                )
            reached += n
        if not reached:
            raise ValueError("vocab_shard: no rank holds a class")
        return layout

    def __deepcopy__(self, memo: dict[int, Any]) -> VocabShard:
        # A module that holds one is copied, and its process group cannot be.
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __getstate__(self) -> dict[str, Any]:
        # The group itself cannot be pickled; its name finds it again where the same groups were made.
        return self.__dict__ | {"group": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _process_group(None)
        try:
            group = dist.distributed_c10d._resolve_process_group(self._name)
        except (RuntimeError, KeyError, ValueError):
            group = None
        if group is None or (dist.get_rank(group), dist.get_world_size(group)) != (self._rank, self._ranks):
            raise RuntimeError(
                f"vocab_shard was rank {self._rank} of {self._ranks} in the process group {self._name!r}, which is not "
                "here: make its groups as they were before loading, or give the module a new VocabShard"
            )
        self.group = group

    def __repr__(self) -> str:
        return f"VocabShard(start={self.start}, size={self.size}, rank={self._rank} of {self._ranks})"


def _process_group(group: Any) -> Any:
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("vocabulary-parallel losses need torch.distributed: call torch.distributed.init_process_group")
    if group is None:
        return dist.distributed_c10d._get_default_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group must be one that this rank is part of")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, not {type(group).__name__}")
    return group
