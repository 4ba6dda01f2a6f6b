"""How many examples of each loss held, and how many of them were wider than a block."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

# Where a run leaves its figures, for the report.
TALLY = "GENLOSS_TALLY"

# Examples of each property; a loss's values and gradients have as many, half of them wider than a block.
EXAMPLES = int(os.environ.get("GENLOSS_EXAMPLES", "0"))


class Tally:
    def __init__(self) -> None:
        self.held: Counter[str] = Counter()

    def add(self, *what: str) -> None:
        self.held[json.dumps(what)] += 1

    def save(self) -> None:
        if TALLY in os.environ:
            lines = [json.dumps([*json.loads(what), count]) for what, count in self.held.items()]
            with Path(os.environ[TALLY]).open("a") as file:
                file.writelines(f"{line}\n" for line in lines)
