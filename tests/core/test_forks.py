"""Forks while another thread holds a lock of ours."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

LOCKS = {
    "launches": "genloss_kernels.core.launch._lock",
    "calls": "genloss_kernels.integrations.torch_patch.routing._counting",
    "patches": "genloss_kernels.integrations.torch_patch.handle._lock",
}

# In a process of its own, of which none but the child may wait for what the parent's thread holds.
SOURCE = """
import os, pkgutil, signal, threading
import torch, torch.nn.functional as F, genloss_kernels as gk
lock, x, y = pkgutil.resolve_name({name!r}), torch.zeros(2, 3), torch.tensor([0, 1])
gk.patch_torch()
inside, forking = threading.Event(), threading.Event()

def hold():
    with lock:
        inside.set()
        forking.wait()

def let_go():
    threading.Timer(0.2, forking.set).start()

os.register_at_fork(before=let_go)
threading.Thread(target=hold).start()
inside.wait()
child = os.fork()
if not child:
    signal.alarm(20)
    # Another thread of the child's, which takes part in no reentrance.
    other = threading.Thread(target=lambda: lock.acquire() and lock.release())
    other.start()
    other.join()
    with gk.testing.count_launches(), gk.patch_torch() as patch:
        F.cross_entropy(x, y)
    os._exit(patch.report()["calls"]["cross_entropy"]["ours"] != 1)
assert os.waitpid(child, 0)[1] == 0
with lock:
    pass
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")
@pytest.mark.parametrize("name", LOCKS)
def test_a_child_finds_every_lock_free(name: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", SOURCE.format(name=LOCKS[name])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
