"""What training and its measurement ask of the process they run in: signals, determinism, memory."""

import ctypes
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from vitrail.errors import of_many
from vitrail.progress import say

# cuBLAS is deterministic only with a workspace of fixed size, and reads this once, before its first product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """While the block runs, SIGINT and SIGTERM put their number into the yielded list; a second one ends at once. Not
    where there are several processes: a batch system signals them, and torchrun, which then signals them again."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if not of_many():
            signal.signal(number, signal.SIG_DFL)
            say("stopping as soon as the state is saved; once more to stop at once")
        elif len(received) == 1:
            say("stopping as soon as the state is saved")

    if threading.current_thread() is not threading.main_thread():  # Python lets only the main thread have handlers
        yield received
        return
    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Have CUDA add up in a fixed order while the block runs, as bit-for-bit resuming needs. A CPU does so anyway, for
    a given number of threads; MPS makes no such promise."""
    if device.type != "cuda":
        yield
        return
    settings: Any = torch.utils.deterministic  # a module that is a class, which type checkers do not see
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # Else it also fills each new tensor, lest somebody reads it before it is written, as nobody does here.
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]


def keep_freed_memory(keep: bool = True) -> None:
    """Have glibc keep freed memory instead of handing it back to the system, from where the next step would have to
    fetch it again page by page (docs/log.md has what that costs). What is kept has holes between blocks, which take up
    to a third more memory, and where activations are computed again nearly four times as much: without `keep`, blocks
    of a megabyte and more go back."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-4, 0 if keep else 1 << 16)  # M_MMAP_MAX: large blocks come from the heap too
            libc.mallopt(-1, 2**31 - 1 if keep else 1 << 20)  # M_TRIM_THRESHOLD: the heap does not shrink
            if not keep:
                libc.mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: which blocks are large


@contextmanager
def kept_memory_as_it_is(kept: bool) -> Iterator[None]:
    """While the block runs, what freed memory that was `kept` has no room for comes from the system and goes back to
    it. Evaluation leaves small results between large blocks, which then do not fit where they did before: of images of
    224 pixels, the process would grow from 0.5 GB to 2."""
    libc = ctypes.CDLL(None) if kept and sys.platform == "linux" else None
    there = hasattr(libc, "mallopt")
    if libc is not None and there:
        libc.mallopt(-4, 1 << 16)  # M_MMAP_MAX, as glibc has it
    try:
        yield
    finally:
        if libc is not None and there:
            libc.mallopt(-4, 0)  # as `keep_freed_memory` has it


def peak_memory(device: torch.device) -> int:
    """The most memory that this process has had so far, in bytes: of the GPU where it trains on one, else of the
    machine."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident()[1]


def resident() -> tuple[int, int]:
    """Bytes of memory that this process has, and has had at most; the second twice where the system tells no more."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would begin, in a new process, with what its parent had
        kilobytes = dict(line.split(":", 1) for line in status.read_text().splitlines() if line.startswith("Vm"))
        now, most = (1024 * int(kilobytes[name].split()[0]) for name in ("VmRSS", "VmHWM"))
        return now, most
    unit = 1 if sys.platform == "darwin" else 1024  # what the system counts in
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return peak, peak
