"""Kernel launches of a loss, and torch operators that would launch one: counted on meta tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..cases import BYTES, CASES, DOCTOR, Case
from ..core import backend
from ..core.launch import observe_launches
from .operators import meta_call, run_stages

# Forward: the loss, the merge of shared rows, the sum over programs. Backward: the gradient.
_KERNELS = (3, 1)

# Torch operators that belong to a loss's design, forward and backward, by loss and a part of the case's name.
_OPERATORS = {
    # Zeros everywhere but at the labels.
    ("nll_loss", ""): (0, 1),
    # Each gradient of an operand that was broadcast is summed once more.
    ("gaussian_kl", "learned prior"): (0, 2),
    # The distance from the capacity, on one number a sample.
    ("gaussian_kl", "capacity"): (3, 3),
    # Three products a chunk, the gradient of the bias beside them, and what the loss and its divisor are summed from.
    ("linear_cross_entropy", "chunks"): (25, 0),
    ("linear_cross_entropy", "per row"): (6, 7),
    ("linear_cross_entropy", ""): (11, 0),
    # The gradient of the variances is summed over what shares one.
    ("gaussian_nll_loss", "one variance a row"): (0, 1),
    # A number becomes a tensor.
    ("gaussian_nll_loss", "one variance"): (1, 0),
    # The sum of the weights, and dividing by it.
    ("mse_loss", "weighted"): (2, 1),
    ("l1_loss", "weighted"): (2, 1),
}


@dataclass
class StageLaunches:
    """One direction of a loss: launches by kernel, and by torch operator."""

    kernels: dict[str, int] = field(default_factory=dict)
    operators: dict[str, int] = field(default_factory=dict)


@dataclass
class LaunchReport:
    loss: str
    case: str
    dtype: str
    forward: StageLaunches
    backward: StageLaunches

    def violations(self) -> list[str]:
        found = []
        stages = (("forward", self.forward), ("backward", self.backward))
        operators_by_design = next(
            (limits for (loss, part), limits in _OPERATORS.items() if loss == self.loss and part in self.case), (0, 0)
        )
        for (name, stage), limit, operators in zip(stages, _KERNELS, operators_by_design, strict=True):
            where = f"{self.loss}, {self.case}, {self.dtype}, {name}"
            for what, counts, most in (("kernels", stage.kernels, limit), ("torch operators", stage.operators, operators)):
                if sum(counts.values()) > most:
                    listing = ", ".join(f"{count} x {name}" for name, count in counts.items())
                    found.append(f"{where}: {sum(counts.values())} {what}, over {most}: {listing}")
        return found


def count(case: Case, dtype: Any) -> LaunchReport:
    """Launches of one case, with every kernel dropped."""
    kernels: Counter[str] = Counter()
    stages = []

    def observe(kernel: Any, programs: int, args: Any, keywords: Any) -> bool:
        kernels[kernel.__name__] += 1
        return False

    def taken() -> None:
        stages.append(StageLaunches(dict(kernels)))
        kernels.clear()

    with backend.backend("triton"), observe_launches(observe):
        results = run_stages(case, meta_call(case.call("cpu", dtype)), taken)
        taken()
    for stage, result in zip(stages, results, strict=True):
        stage.operators = dict(Counter(operation.name for operation in result.operations))
    return LaunchReport(case.loss, case.name, str(dtype).removeprefix("torch."), *stages)


def reports() -> Iterator[LaunchReport]:
    """Launches of every case that doctor or the byte meter uses, in its first dtype."""
    for case in CASES:
        # Autocast knows no meta tensors, and changes no launch.
        if case.uses & {DOCTOR, BYTES} and not case.autocast:
            yield count(case, case.dtypes[0])
