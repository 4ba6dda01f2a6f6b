"""A seeded sample of mutants, spread over the files."""

from __future__ import annotations

import random

from .source import Mutant


def shares(counts: dict[str, int], size: int) -> dict[str, int]:
    """``size`` split over the files in proportion to their candidates, at least one each where that is possible."""
    total = sum(counts.values())
    if size <= 0 or size >= total:
        return dict(counts)
    exact = {file: size * count / total for file, count in counts.items()}
    split = {file: min(counts[file], int(share)) for file, share in exact.items()}
    if size >= sum(1 for count in counts.values() if count):
        split = {file: max(share, min(1, counts[file])) for file, share in split.items()}
    while sum(split.values()) != size:
        # Largest remainder: move the file whose share is furthest from the exact one.
        step = 1 if sum(split.values()) < size else -1
        movable = [file for file in split if (split[file] < counts[file] if step > 0 else split[file] > 1)]
        split[max(movable, key=lambda file: (step * (exact[file] - split[file]), file))] += step
    return split


def draw(candidates: dict[str, list[Mutant]], size: int, seed: int) -> list[Mutant]:
    """Each file has a generator of its own, so that an edit in one file leaves the draw from the others alone."""
    split = shares({file: len(found) for file, found in candidates.items()}, size)
    sample: list[Mutant] = []
    for file, found in sorted(candidates.items()):
        picked = set(random.Random(f"{seed}:{file}").sample(range(len(found)), split[file]))
        sample += [mutant for index, mutant in enumerate(found) if index in picked]
    return sample
