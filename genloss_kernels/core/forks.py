"""Locks under which a process may fork."""

from __future__ import annotations

import os
import threading


def lock() -> threading.RLock:
    """A lock that a fork waits for: a child has no copy of the thread that would release it."""
    made = threading.RLock()
    # Windows does not fork. Of hooks before a fork the last runs first, and importing modules take their locks first too.
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=made.acquire, after_in_parent=made.release, after_in_child=made.release)
    return made
