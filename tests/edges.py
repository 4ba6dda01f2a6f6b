"""Every loss on small operands, the layouts they may have, and the table of what runs of tests/test_edges.py have seen.

    export PYTEST_ADDOPTS="--edges-table benchmarks/results/edges.md"
    pytest tests/test_edges.py && TRITON_INTERPRET=1 pytest tests/test_edges.py

Each adds to the rows of a table that is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import genloss_kernels as gk

from . import limits
from .properties import oracles
from .properties.operands import Layout, Values

INF, NAN = math.inf, math.nan

IGNORED = -100

_NORMAL, _POSITIVE, _DOUBT = Values(scale=2.0), Values("positive"), Values("doubt")


def _labels(n_classes: int) -> Values:
    """Class indices, all of them ignored where there is no class."""
    return Values("labels", classes=n_classes) if n_classes else Values("ignored")


class Operand(NamedTuple):
    shape: tuple[int, ...]
    values: Values

    def make(self, generator: torch.Generator) -> Tensor:
        if self.values.kind == "ignored":
            return torch.full(self.shape, IGNORED)
        content = self.values.draw(self.shape, generator)
        return content.float() if content.is_floating_point() else content


@dataclass(frozen=True)
class Loss:
    """A public function and its definition, by torch's own function wherever torch has it.

    ``operands`` are those for a size: (N, C) for most. A row of each of ``rows`` belongs to one row of the result.
    ``ignored`` replaces arguments so that nothing counts, or says why there is no such call. ``image`` is a size whose
    operands have four dimensions, ``single`` and ``empty`` are sizes of one element and of none, of which those ``refused``
    raise. ``products``: results are sums of products, see ``testing.assert_close``. ``torchs``: what torch has where the
    definition is more than that; what is NaN there may be. ``finite``: operands in which an infinity means nothing.
    """

    function: Callable[..., Any]
    oracle: Callable[..., Any]
    operands: Callable[..., dict[str, Operand]]
    differentiable: tuple[str, ...]
    rows: tuple[str, ...]
    reductions: tuple[str, ...] = ("none", "mean", "sum")
    options: dict[str, Any] = field(default_factory=dict)
    ignored: dict[str, Any] | str = "no mask and no class index to ignore"
    size: tuple[int, ...] = (4, 5)
    image: tuple[int, ...] | str = (2, 3, 2, 2)
    single: tuple[tuple[int, ...], ...] = ((1, 1),)
    empty: tuple[tuple[int, ...], ...] = ((0, 5), (4, 0))
    refused: tuple[tuple[int, ...], ...] = ()
    products: bool = False
    finite: tuple[str, ...] = ()
    torchs: Callable[..., Any] | None = None

    def arguments(self, size: tuple[int, ...], reduction: str, device: torch.device) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        made = {name: operand.make(generator).to(device) for name, operand in self.operands(*size).items()}
        return made | self.options | {"reduction": reduction}


def _elementwise(**values: Values) -> Callable[..., dict[str, Operand]]:
    return lambda *size: {name: Operand(size, kind) for name, kind in values.items()}


def _classes(*size: int) -> tuple[int, tuple[int, ...]]:
    """How many classes, and the rows' shape."""
    return size[1], (size[0], *size[2:])


def _of_labels(*size: int) -> dict[str, Operand]:
    n_classes, rows = _classes(*size)
    return {
        "input": Operand(size, _NORMAL),
        "target": Operand(rows, _labels(n_classes)),
        "weight": Operand((n_classes,), _POSITIVE),
        "row_weight": Operand(rows, _POSITIVE),
    }


def _of_probabilities(*size: int) -> dict[str, Operand]:
    n_classes, rows = _classes(*size)
    return {
        "input": Operand(size, _NORMAL),
        "target": Operand(size, Values("distribution", dim=1)),
        "weight": Operand((n_classes,), _POSITIVE),
        "row_weight": Operand(rows, _POSITIVE),
    }


def _of_log_probabilities(*size: int) -> dict[str, Operand]:
    n_classes, rows = _classes(*size)
    return {
        "input": Operand(size, Values("logarithms", dim=1)),
        "target": Operand(rows, _labels(n_classes)),
        "weight": Operand((n_classes,), _POSITIVE),
    }


def _linear(*size: int) -> dict[str, Operand]:
    """Of rows, features and classes."""
    *rows, width, n_classes = size
    return {
        "input": Operand((*rows, width), Values()),
        "linear_weight": Operand((n_classes, width), Values()),
        "linear_bias": Operand((n_classes,), Values()),
        "target": Operand(tuple(rows), _labels(n_classes)),
        "weight": Operand((n_classes,), _POSITIVE),
    }


def _of_binary_logits(*size: int) -> dict[str, Operand]:
    found = {"input": Operand(size, _NORMAL), "target": Operand(size, _DOUBT)}
    return found | {"pos_weight": Operand(size[-1:], _POSITIVE), "mask": Operand(size, Values("bits"))}


def _pairs(*size: int) -> dict[str, Operand]:
    vectors = {name: Operand(size, Values()) for name in ("input1", "input2")}
    return vectors | {"target": Operand(size[:1], Values("signs"))}


def _autoencoder(*size: int) -> dict[str, Operand]:
    """Pixels of a size, and three latents a sample."""
    pixels = {"recon": Operand(size, _NORMAL), "target": Operand(size, _DOUBT)}
    return pixels | {name: Operand((size[0], 3), Values()) for name in ("mu", "logvar")}


def _nll(input: Tensor, target: Tensor, **rest: Any) -> Tensor:
    return F.nll_loss(input, target.long(), **rest)


_VECTORS: dict[str, Any] = {"single": ((1, 1), (1,)), "empty": ((0, 5), (4, 0), (0,))}
_ELEMENTS: dict[str, Any] = _VECTORS | {"single": ((1, 1), (1,), ())}
_BATCHES: dict[str, Any] = {"reductions": ("none", "batchmean", "mean", "sum")}
_BOTH = ("input", "target")
_NO_LABEL = "probabilities: no class index to ignore, and no mask"


def _losses() -> Iterator[tuple[str, Loss]]:
    all_ignored: dict[str, Any] = {"ignored": {"target": IGNORED}}
    ce, weighted = gk.cross_entropy, ("input", "row_weight")
    yield "cross_entropy of labels", Loss(ce, limits.cross_entropy, _of_labels, weighted, weighted, **all_ignored)
    learned = ("input", "target", "row_weight")
    yield "cross_entropy of probabilities", Loss(
        ce, limits.cross_entropy, _of_probabilities, learned, learned, ignored=_NO_LABEL, finite=("target",)
    )  # fmt: skip
    yield "nll_loss", Loss(gk.nll_loss, _nll, _of_log_probabilities, ("input",), ("input",), **all_ignored)
    yield "linear_cross_entropy", Loss(
        gk.linear_cross_entropy, oracles.linear_cross_entropy, _linear, ("input", "linear_weight", "linear_bias"),
        ("input",), **all_ignored, size=(4, 3, 5), image=(2, 2, 2, 3, 5), single=((1, 1, 1),),
        empty=((0, 3, 5),), refused=((4, 0, 5), (4, 3, 0)), products=True,
    )  # fmt: skip
    yield "binary_cross_entropy_with_logits", Loss(
        gk.binary_cross_entropy_with_logits, limits.binary_cross_entropy_with_logits, _of_binary_logits, _BOTH, _BOTH,
        ignored={"mask": False}, torchs=oracles.binary_cross_entropy_with_logits, **_VECTORS,
    )  # fmt: skip
    yield "binary_cross_entropy", Loss(
        gk.binary_cross_entropy, F.binary_cross_entropy, _elementwise(input=_DOUBT, target=_DOUBT, weight=_POSITIVE),
        _BOTH, _BOTH, **_ELEMENTS,
    )  # fmt: skip
    posterior, prior = ("mu_q", "logvar_q"), ("mu_p", "logvar_p")
    for name, names in (("standard", posterior), ("general", posterior + prior)):
        yield f"gaussian_kl, {name}", Loss(
            gk.gaussian_kl, oracles.gaussian_kl, _elementwise(**dict.fromkeys(names, Values())), names, names,
            **_BATCHES, **_VECTORS,
        )  # fmt: skip
    likelihood = _elementwise(input=_NORMAL, target=_NORMAL, var=_POSITIVE)
    names = ("input", "target", "var")
    yield "gaussian_nll_loss", Loss(gk.gaussian_nll_loss, F.gaussian_nll_loss, likelihood, names, names, **_ELEMENTS)
    errors = {"input": _NORMAL, "target": _NORMAL}
    for name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"):
        drawn = errors if name == "smooth_l1_loss" else errors | {"weight": _POSITIVE}
        yield name, Loss(
            getattr(gk, name), getattr(F, name), _elementwise(**drawn), tuple(drawn), tuple(drawn), **_ELEMENTS
        )  # fmt: skip
    odds, log_odds = Values("distribution", dim=-1), Values("logarithms", dim=-1)
    for name, target in (("kl_div", odds), ("kl_div, log_target", log_odds)):
        yield name, Loss(
            gk.kl_div, F.kl_div, _elementwise(input=log_odds, target=target), _BOTH, _BOTH,
            options={"log_target": target is log_odds}, **_BATCHES, **_VECTORS,
        )  # fmt: skip
    logits = _elementwise(input=_NORMAL, target=_NORMAL)
    for direction in ("forward", "reverse"):
        yield f"kl_div_with_logits, {direction}", Loss(
            gk.kl_div_with_logits, limits.kl_div_with_logits, logits, _BOTH, _BOTH,
            options={"direction": direction, "temperature": 2.0}, **_BATCHES,
        )  # fmt: skip
    yield "js_div_with_logits", Loss(gk.js_div_with_logits, limits.js_div_with_logits, logits, _BOTH, _BOTH, **_BATCHES)
    yield "categorical_entropy", Loss(
        gk.categorical_entropy, limits.categorical_entropy, _elementwise(logits=_NORMAL), ("logits",), ("logits",),
        **_BATCHES,
    )  # fmt: skip
    names = ("input1", "input2")
    yield "cosine_embedding_loss", Loss(
        gk.cosine_embedding_loss, F.cosine_embedding_loss, _pairs, names, names, options={"margin": -0.5},
        image="vectors in two dimensions at most",
    )  # fmt: skip
    for kind in ("mse", "bce_with_logits"):
        names = ("recon", "target", "mu", "logvar")
        yield f"vae_loss, {kind}", Loss(
            gk.vae_loss, limits.vae_loss, _autoencoder, names, names, options={"recon_loss": kind, "beta": 0.5},
            **_BATCHES, single=((1, 1), (1,)), empty=((0, 5), (4, 0)),
        )  # fmt: skip
    sides = _elementwise(real=_NORMAL, fake=Values(scale=2.0, offset=2.0))
    for kind in ("non_saturating", "relativistic"):
        kinds: dict[str, Any] = {"options": {"kind": kind}}
        yield f"gan_discriminator_loss, {kind}", Loss(
            gk.gan_discriminator_loss, oracles.gan_discriminator_loss, sides, ("real", "fake"), ("real", "fake"),
            **kinds, **_ELEMENTS,
        )  # fmt: skip
        names = ("real", "fake") if kind == "relativistic" else ("fake",)
        yield f"gan_generator_loss, {kind}", Loss(
            gk.gan_generator_loss, oracles.gan_generator_loss, _elementwise(**dict.fromkeys(names, _NORMAL)), names, names,
            **kinds, **_ELEMENTS,
        )  # fmt: skip
    for name in ("gradient_penalty", "r1_penalty"):
        yield name, Loss(
            getattr(gk, name), getattr(oracles, name), _elementwise(grad=Values()), ("grad",), ("grad",),
            **_VECTORS,
        )  # fmt: skip
    names = ("positive_energy", "negative_energy")
    yield "contrastive_divergence_loss", Loss(
        gk.contrastive_divergence_loss, oracles.contrastive_divergence_loss, _elementwise(**dict.fromkeys(names, _NORMAL)),
        names, names, options={"l2": 0.125}, **_ELEMENTS,
    )  # fmt: skip


LOSSES = dict(_losses())


def _dense(content: Tensor, **changed: Any) -> Layout:
    dims = range(content.dim())
    plain: dict[str, Any] = {"order": tuple(dims), "steps": (1,) * len(dims), "expanded": (False,) * len(dims), "offset": 0}
    return Layout(**plain | changed)


def _transposed(content: Tensor) -> Tensor:
    return _dense(content, order=tuple(reversed(range(content.dim())))).place(content)


def _stepped(content: Tensor) -> Tensor:
    return _dense(content, steps=tuple(2 + d % 2 for d in range(content.dim()))).place(content)


def _misaligned(content: Tensor) -> Tensor:
    return _dense(content, offset=1).place(content)


def _expanded(dim: int) -> Callable[[Tensor], Tensor]:
    return lambda content: content.narrow(dim, 0, 1).contiguous().expand_as(content) if content.dim() else content


def _channels_last(content: Tensor) -> Tensor:
    return content.contiguous(memory_format=torch.channels_last) if content.dim() == 4 else content


def _overlapping(content: Tensor) -> Tensor:
    """Windows of one piece of memory, each an element on from the last."""
    extent = 1 + sum(n - 1 for n in content.shape)
    return content.flatten()[:extent].clone().as_strided(content.shape, (1,) * content.dim())


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": _transposed,
    "every second and third element": _stepped,
    "an odd offset in memory": _misaligned,
    "rows expanded, stride 0": _expanded(0),
    "columns expanded, stride 0": _expanded(-1),
    "channels last": _channels_last,
    "rows that overlap": _overlapping,
}


class Seen(NamedTuple):
    loss: str
    edge: str
    path: str
    checked: str
    outcome: str


SEEN: set[Seen] = set()


def read(text: str) -> set[Seen]:
    """The rows of a table, one for each path."""
    rows = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {Seen(loss, edge, path, *rest) for loss, edge, paths, *rest in rows[2:] for path in paths.split(", ")}


def merged(before: set[Seen], seen: set[Seen]) -> set[Seen]:
    """What was seen last of each."""
    return set({row[:3]: row for row in (*before, *seen)}.values())


def table(seen: set[Seen]) -> str:
    """Rows that differ only in their path are one row."""
    paths: dict[tuple[str, ...], list[str]] = {}
    for loss, edge, path, *rest in sorted(seen):
        paths.setdefault((loss, edge, *rest), []).append(path)
    rows = [(loss, edge, ", ".join(on), *rest) for (loss, edge, *rest), on in paths.items()]
    passed = sum(row.outcome == "passed" for row in seen)
    counts = f"{passed} passed, {len(seen) - passed} not applicable"
    head = f"{len(seen)} edges, each of a loss on a path, as the tests have seen them: {counts}."
    none = "Torch has no negative strides: `as_strided` refuses them, and `flip` copies."
    lines = [head, none, "", "| loss | edge | path | what was checked | outcome |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n"
