"""The progress bar, on standard error."""

from __future__ import annotations

import importlib.util
import sys
from types import TracebackType


class Progress:
    """tqdm's bar on a terminal, if tqdm is installed; else a line for each case."""

    def __init__(self, cases: int) -> None:
        self._cases, self._started = cases, 0
        self._bar = None
        if sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None:
            from tqdm import tqdm

            self._bar = tqdm(total=cases, leave=False, bar_format="{percentage:3.0f}%|{bar:30}| {elapsed} {desc}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def case(self, title: str) -> None:
        """Say which case begins."""
        self._started += 1
        if self._bar is None:
            print(f"[{self._started}/{self._cases}] {title}", file=sys.stderr, flush=True)
        else:
            self._bar.set_description_str(title, refresh=False)
            self.within_case(0.0)

    def within_case(self, share: float) -> None:
        """Say how much of the case is done."""
        if self._bar is not None:
            self._bar.n = self._started - 1 + min(share, 1.0)
            self._bar.refresh()
