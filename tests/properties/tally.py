"""How many examples of each loss held, and how many of them were wider than a block."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

# Environment: examples of each loss, half of them on one block and half on several, and a quarter as many of each invariant;
# and the file to which a run appends its figures.
EXAMPLES, TALLY = "GENLOSS_EXAMPLES", "GENLOSS_TALLY"

# Kinds of examples, and tests that failed; and losses that this path takes whole, so that none is wider than a block.
NARROW, WIDE, INVARIANT, FAILED = "within a block", "wider than a block", "invariant", "failed"
WHOLE = "in no blocks"


class Tally:
    def __init__(self) -> None:
        self.held: Counter[tuple[str, str, str]] = Counter()

    def save(self) -> None:
        if TALLY in os.environ:
            with Path(os.environ[TALLY]).open("a") as file:
                file.writelines(f"{json.dumps([*what, count])}\n" for what, count in self.held.items())
