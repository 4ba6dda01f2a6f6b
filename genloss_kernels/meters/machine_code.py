"""Machine code of every kernel specialisation, compiled without a GPU: registers, spills, load widths."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from .digests import digests
from .main_configurations import main_specialisations
from .sass import Body, disassemble, main_body, resources
from .specialisations import OPTIONS, Specialisation, specialisations
from .streams import ENTROPY, KL, Streams, streams

Target = tuple[str, int | str, int]

# What machine code is read for, and what else every kernel must compile for.
READ_TARGET: Target = ("cuda", 90, 32)
OTHER_TARGETS: tuple[Target, ...] = (("cuda", 80, 32), ("cuda", 100, 32), ("cuda", 120, 32), ("hip", "gfx942", 64))

# Kernels that are disassembled together.
_BATCH = 64

# Bytes of local memory that the assembler may use around its calls of fp64 division, where nothing spills otherwise.
_PARKED = 16

# Special functions that a tile may need once: dividing by the divisor, and integers by two sizes for a strided operand.
_ONCE = 3

# Special functions an element that a formula needs, without and with its first flag: exponentials, and reciprocals where
# it divides. A logarithm needs none.
_FORMULAS = {
    "gaussian_kl_value": (1.0, 2.0),
    "gaussian_kl_gradient": (1.0, 2.0),
    "gaussian_nll_value": (1.0, 1.0),
    "gaussian_nll_gradient": (1.0, 1.0),
    "probability_value": (1.0, 1.0),
    "probability_gradient": (2.0, 2.0),
    "kl_div_value": (0.0, 1.0),
    "kl_div_gradient": (1.0, 1.0),
    "binary_cross_entropy_value": (2.0, 2.0),
    "binary_cross_entropy_gradient": (3.0, 3.0),
}


# One exponential an element in each of their passes, and with a softcap one for its hyperbolic tangent.
_ROW_KERNELS = (
    "_cross_entropy_forward_rows_kernel",
    "_cross_entropy_backward_rows_kernel",
    "_cross_entropy_loss_and_gradient_kernel",
)

_DIVERGENCE_KERNELS = ("_divergence_forward_rows_kernel", "_divergence_backward_rows_kernel")


@dataclass
class Machine:
    """One compiled specialisation on sm_90; loads and stores are the bytes of each in a turn of its main loop."""

    kernel: str
    formula: str
    dtype: str
    label: str
    registers: int = 0
    local_bytes: int = 0
    shared_bytes: int = 0
    loads: list[int] = field(default_factory=list)
    stores: list[int] = field(default_factory=list)
    instructions: float | None = None
    special: float | None = None
    violations: list[str] = field(default_factory=list)


@contextmanager
def temporary_cache() -> Iterator[None]:
    """Keep what is compiled within out of Triton's cache."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        yield


def compile_for(kernel: Specialisation, target: Target = READ_TARGET) -> Any:
    """Compile a specialisation; needs no GPU. Returns the compiled kernel, or the message of a failure."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(kernel.kernel, kernel.signature, kernel.constexprs, kernel.attributes)
    try:
        return triton.compile(source, target=GPUTarget(*target), options={"num_warps": kernel.num_warps, **OPTIONS})
    except Exception as error:
        # Whatever Triton's front end, its passes or an assembler raise; the innermost says what is wrong.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        return f"does not compile for {target[0]} {target[1]}: {str(cause).strip().splitlines()[-1]}"


def read(kernels: Iterable[Specialisation]) -> Iterator[Machine]:
    """Compile specialisations for sm_90 and read their machine code."""
    batch: list[Specialisation] = []
    for kernel in kernels:
        batch.append(kernel)
        if len(batch) == _BATCH:
            yield from _read(batch)
            batch = []
    yield from _read(batch)


def _read(kernels: Sequence[Specialisation]) -> Iterator[Machine]:
    with temporary_cache():
        results = [compile_for(kernel) for kernel in kernels]
    cubins = [None if isinstance(result, str) else result.asm["cubin"] for result in results]
    code = iter(disassemble([cubin for cubin in cubins if cubin is not None]))
    for kernel, result, cubin in zip(kernels, results, cubins, strict=True):
        machine = Machine(kernel.name, kernel.formula, kernel.dtype, kernel.label)
        if cubin is None:
            violations = [result]
        else:
            # The launch asks for it: the cubin knows nothing of it.
            machine.shared_bytes = result.metadata.shared
            violations = list(_examine(kernel, machine, cubin, main_body(next(code))))
        machine.violations = [f"{kernel}: {violation}" for violation in violations]
        yield machine


def _examine(kernel: Specialisation, machine: Machine, cubin: bytes, body: Body) -> Iterator[str]:
    """Fill in ``machine``; yields what is wrong with it."""
    used = resources(cubin)
    machine.registers, machine.local_bytes = used.registers, used.local_bytes
    machine.loads, machine.stores = body.widths("LDG"), body.widths("STG")
    if used.local_bytes > (_PARKED if kernel.dtype == "float64" else 0):
        yield f"{used.local_bytes} bytes of local memory a thread: registers spill"
    moved = streams(kernel)
    if moved is None:
        return
    if moved.wide:
        yield from _narrow("load", machine.loads, moved.loads, moved.elements)
        yield from _narrow("store", machine.stores, moved.stores, moved.elements)
    elements = moved.elements * _tiles(body, moved)
    machine.instructions = len(body.instructions) / elements
    machine.special = body.special() / elements
    limit = special_limit(kernel)
    if limit is not None and machine.special > limit + _ONCE / moved.elements:
        yield f"{machine.special:.2f} special functions an element, over {limit:g}"


def _tiles(body: Body, moved: Streams) -> int:
    """Tiles that one turn of the loop covers, where the compiler unrolled it."""
    kind, sizes, once = ("LDG", moved.loads + moved.others, moved.singles) if moved.loads else ("STG", moved.stores, ())
    return max(1, round(sum(body.widths(kind)) / (moved.elements * sum(sizes) + sum(once))))


def _narrow(what: str, widths: list[int], sizes: tuple[int, ...], elements: int) -> list[str]:
    """A thread's elements of each operand should move by 16 bytes, or in one access where they are less."""
    expected = sum(elements * size // 16 for size in sizes)
    found = widths.count(16)
    if found >= expected:
        return []
    return [f"{found} {what}s of 16 bytes in a turn of the main loop where {expected} are due: widths {sorted(widths)}"]


def special_limit(kernel: Specialisation) -> float | None:
    """Special functions an element that a kernel is held to; none in fp64, which computes its own."""
    if kernel.dtype == "float64":
        return None
    if kernel.name == "_cross_entropy_loss_and_gradient_held_kernel":
        # Beside its elements a thread takes the row's four, of which most rows have too few for these to vanish.
        return 1.0 + 4.0 * 32 * kernel.num_warps / kernel["BLOCK"]
    if kernel.name in _ROW_KERNELS:
        # In the forward one more for each vector, by which a lane's sums decay.
        return (2.0 if kernel.has("SOFTCAP") else 1.0) + (1.0 / kernel["VEC"] if "forward" in kernel.name else 0.0)
    if kernel.name in _DIVERGENCE_KERNELS:
        return _divergence_limit(kernel)
    if kernel.formula in _FORMULAS and "FLAGS" in kernel.kernel.arg_names:
        plain, flagged = _FORMULAS[kernel.formula]
        return flagged if kernel["FLAGS"] & 1 else plain
    return None


def _divergence_limit(kernel: Specialisation) -> float:
    """One exponential for each distribution in a pass, in the forward one a vector too; held rows take both in one body."""
    if "forward" in kernel.name and kernel["WHOLE"]:
        return 6.0
    once = kernel["KIND"] == ENTROPY or (kernel["KIND"] == KL and "backward" in kernel.name and not kernel["GRAD_B"])
    by_vector = 1.0 / kernel["VEC"] if "forward" in kernel.name else 0.0
    return (1.0 if once else 2.0) * (1.0 + by_vector)


def compile_elsewhere(kernels: Sequence[Specialisation], targets: Sequence[Target] = OTHER_TARGETS) -> Iterator[str]:
    """Compile for the other targets; yields what fails."""
    for kernel in kernels:
        for target in targets:
            with temporary_cache():
                result = compile_for(kernel, target)
            if isinstance(result, str):
                yield f"{kernel}: {result}"


def representatives(kernels: Iterable[Specialisation], *, thorough: bool = False) -> list[Specialisation]:
    """For each kernel, formula and dtype that on the most tensors; ``thorough``: and on the fewest."""
    groups: dict[tuple[str, str, str], list[Specialisation]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.name, kernel.formula, kernel.dtype), []).append(kernel)
    chosen = []
    for group in groups.values():
        if thorough or group[0].dtype in ("bfloat16", "float64"):
            chosen.append(max(group, key=Specialisation.pointers))
        if thorough:
            chosen.append(min(group, key=Specialisation.pointers))
    return chosen


def sample(kernels: Sequence[Specialisation]) -> list[Specialisation]:
    """All of bfloat16; of the other dtypes, which differ in types and tiles, those on the most and the fewest tensors."""
    groups: dict[tuple[Any, ...], list[Specialisation]] = {}
    for kernel in kernels:
        if kernel.dtype != "bfloat16":
            tile = tuple(str(kernel[name]) for name in kernel.kernel.arg_names if name.startswith("BLOCK"))
            groups.setdefault((kernel.name, kernel.formula, kernel.dtype, tile, kernel.num_warps), []).append(kernel)
    kept = {id(choose(group, key=Specialisation.pointers)) for group in groups.values() for choose in (max, min)}
    return [kernel for kernel in kernels if kernel.dtype == "bfloat16" or id(kernel) in kept]


@dataclass
class Verdict:
    """What a share of the gate found.

    ``main``: the kernels in the calls that they are tuned for; ``others``: all other specialisations. ``failures``: what
    does not compile for the other targets. ``digests``: what the verdict on each kernel follows from.
    """

    main: list[Machine]
    others: list[Machine]
    failures: list[str]
    digests: dict[str, str]


def gate(
    share: int = 0,
    shares: int = 1,
    *,
    thorough: bool = False,
    dtypes: tuple[torch.dtype, ...] | None = None,
    known: Mapping[str, str] = MappingProxyType({}),
) -> Verdict:
    """Read each specialisation of a share, and compile representatives for other targets.

    Of a kernel whose digest is ``known``, from a run in which it passed, only the main calls are compiled.
    """
    every = list(specialisations(thorough=thorough) if dtypes is None else specialisations(dtypes, thorough=thorough))
    elsewhere = representatives(every, thorough=thorough)
    if not thorough and dtypes is None:
        every = sample(every)
    found = digests([*every, *elsewhere])
    main = main_specialisations() if dtypes is None else main_specialisations(dtypes)
    read_already = {kernel.key() for kernel in main}
    others = [k for k in every if known.get(k.name) != found[k.name] and k.key() not in read_already]
    elsewhere = [k for k in elsewhere if known.get(k.name) != found[k.name]]
    return Verdict(
        list(read(main[share::shares])),
        list(read(others[share::shares])),
        list(compile_elsewhere(elsewhere[share::shares])),
        found,
    )
