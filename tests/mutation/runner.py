"""Runs tests against a copy of the repository with one file mutated."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from .targets import PACKAGE

_NOT_COPIED = {"__pycache__", "build", "dist", "node_modules", "venv"}
_NO_TESTS_COLLECTED = 5
_MODES: dict[str, dict[str, str]] = {"kernels": {"TRITON_INTERPRET": "1"}, "eager": {"TRITON_INTERPRET": "0"}, "as is": {}}
# What a mutant can do to its own process; any other signal comes from outside, as SIGKILL from a system out of memory.
_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
# Exit statuses of pytest where code of the repository raised, and what it prints then: others are not about mutants.
_RAISED = {1: "", 2: "during collection", 4: "while loading conftest"}
_FAILED_TEST = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


class Stopped(Exception):
    """The run was interrupted."""


class HarnessError(Exception):
    """The tests cannot say anything about mutants here."""


@dataclass(frozen=True)
class TestRun:
    __test__ = False

    seconds: float
    returncode: int | None  # None: it ran past its time
    output: str

    @property
    def status(self) -> str:
        """``error`` where the run says nothing about the mutant."""
        if self.returncode is None:
            return "timeout"
        if self.returncode in (0, _NO_TESTS_COLLECTED):
            return "survived"
        raised = self.returncode in _RAISED and _RAISED[self.returncode] in self.output
        return "killed" if raised or -self.returncode in _CRASHES else "error"

    @property
    def collected(self) -> bool:
        return self.returncode != _NO_TESTS_COLLECTED

    @property
    def passed(self) -> int:
        count = re.search(r"\b(\d+) passed", self.output)
        return int(count.group(1)) if count else 0

    @property
    def detail(self) -> str:
        """The test that failed, or how else the run ended."""
        if self.returncode is None or self.status == "survived":
            return ""
        if self.returncode < 0:
            return signal.Signals(-self.returncode).name
        failed = _FAILED_TEST.search(self.output)
        return failed.group(1) if failed else f"exit status {self.returncode}"


def copy_repository(root: Path, destination: Path) -> None:
    """Copies the files that git would see, so that later edits of the working tree cannot reach a run under way."""
    for name in _repository_files(root):
        target = destination / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, target, follow_symlinks=False)


def _repository_files(root: Path) -> list[str]:
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, capture_output=True, check=True, text=True).stdout
        names = sorted(set(listing.split("\0")) - {""})
    except (OSError, subprocess.CalledProcessError):
        names = []
    # An unpacked archive has no git folder, and one inside some other repository may be ignored there.
    if not any(name.startswith(f"{PACKAGE}/") for name in names):
        paths = (path.relative_to(root) for path in root.rglob("*"))
        names = [
            path.as_posix() for path in paths if not any(part.startswith(".") or part in _NOT_COPIED for part in path.parts)
        ]
    return [name for name in names if (root / name).is_file()]


class Runner:
    def __init__(self, snapshot: Path, scratch: Path) -> None:
        self._snapshot = snapshot
        self._scratch = scratch
        self._processes: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._stopping = False
        self._checked = threading.local()

    def run(
        self, tests: list[str], timeout: float | None, change: tuple[str, bytes] | None = None, mode: str = "as is"
    ) -> TestRun:
        """Runs ``tests`` in a fresh copy, in which the file that ``change`` names holds what it says."""
        copy = Path(tempfile.mkdtemp(prefix="copy-", dir=self._scratch))
        try:
            shutil.copytree(self._snapshot, copy, symlinks=True, dirs_exist_ok=True)
            self._check_import(copy)
            if change is not None:
                (copy / change[0]).write_bytes(change[1])
            # --verbosity=-1 is -q whatever the configured options add.
            options = ["-x", "--verbosity=-1", "-p", "no:cacheprovider", f"--rootdir={copy}"]
            return self._execute([sys.executable, "-m", "pytest", *options, *tests], copy, timeout, mode)
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def stop(self) -> None:
        with self._lock:
            self._stopping = True
            for process in self._processes:
                _kill_group(process)

    def _check_import(self, copy: Path) -> None:
        """Once per thread: an installed package must not stand in for the copy."""
        if getattr(self._checked, "done", False):
            return
        script = f"import {PACKAGE}; print({PACKAGE}.__file__)"
        result = self._execute([sys.executable, "-c", script], copy, timeout=300)
        printed = result.output.strip().splitlines()
        if result.returncode != 0 or not printed:
            raise HarnessError(f"{PACKAGE} cannot be imported from a copy of the repository:\n{result.output}")
        if copy.resolve() not in Path(printed[-1]).resolve().parents:
            raise HarnessError(f"tests would import {printed[-1]}, not the copy under {copy}")
        self._checked.done = True

    def _execute(self, command: list[str], copy: Path, timeout: float | None, mode: str = "as is") -> TestRun:
        started = time.monotonic()
        # A file, since a pipe would stay open for as long as any process the tests left behind.
        with tempfile.TemporaryFile(dir=self._scratch) as output:
            with self._lock:
                if self._stopping:
                    raise Stopped
                process = subprocess.Popen(
                    command,
                    cwd=copy,
                    env=_environment(copy, mode),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                self._processes.add(process)
            try:
                returncode: int | None = process.wait(timeout)
            except subprocess.TimeoutExpired:
                returncode = None
            finally:
                _kill_group(process)
                process.wait()
                with self._lock:
                    self._processes.discard(process)
            if self._stopping:
                raise Stopped
            output.seek(0)
            text = output.read().decode(errors="replace")
        return TestRun(time.monotonic() - started, returncode, text)


def _environment(copy: Path, mode: str) -> dict[str, str]:
    paths = [str(copy), *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    fixed = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1", **threads, **_MODES[mode]}
    return {"PYTHONHASHSEED": "0", **os.environ, **fixed}


def _kill_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
