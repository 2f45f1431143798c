"""The same work on many files, on all cores."""

import multiprocessing
import os
import signal
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Generic, TypeVar

Shared = TypeVar("Shared")
Task = TypeVar("Task")
Done = TypeVar("Done")

PATIENCE = 0.5  # seconds of work after which it is worth starting processes, which takes about as long

_processes = multiprocessing.get_context("spawn")  # a fork of a process in which torch's threads run can deadlock
_shared: Any  # in a worker process


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Queue:
    """Gives each of the tasks 0, 1, 2 … that are done at the same time its room in one file, in their order."""

    def __init__(self) -> None:
        self._moved = _processes.Condition()
        self._next = _processes.RawValue("q", 0)
        self._end = _processes.RawValue("q", 0)

    def take(self, task: int, length: int) -> int:
        """Where the room of a task begins. It waits until all tasks before it, which must have been begun before
        it, have taken theirs, so each task takes its room once, whatever happens to it."""
        with self._moved:
            self._moved.wait_for(lambda: self._next.value == task)
            begin: int = self._end.value
            self._end.value += length
            self._next.value += 1
            self._moved.notify_all()
            return begin


def work_through(
    work: Callable[[Shared, Task], Done], shared: Shared, tasks: Sequence[Task]
) -> Generator[Done, None, None]:
    """Yields `work(shared, task)` of each task, in their order. It begins in this process, and goes over to one
    process a core where it proves long. Tasks are begun in order, and only a few more than have been yielded.

    `work` is a function at the top of a module; `shared` goes to each process once, a task when its turn comes.

    Raises:
        ChildProcessError: a process was ended from outside. What `work` raises comes through.
    """
    begun = time.monotonic()
    for done, task in enumerate(tasks):
        if time.monotonic() - begun > PATIENCE and len(tasks) - done > 1:
            yield from _on_all_cores(work, shared, tasks[done:])
            return
        yield work(shared, task)


class Workers(Generic[Shared]):
    """Processes that do work on something that they share with none but one another: each has a copy of `shared`. They
    are started with the first work, and end when they are closed, or no one has them any more."""

    def __init__(self, shared: Shared, count: int) -> None:
        self.count = count
        self._pool = ProcessPoolExecutor(count, _processes, _begin, (shared,))
        self.close = weakref.finalize(self, self._pool.shutdown, cancel_futures=True)

    def submit(self, work: Callable[[Shared, Task], Done], task: Task) -> "Future[Done]":
        """Hand over a task, for which a process may be started. That would first run the user's main script again, to
        have what is defined there: nothing of it is wanted here, it can take seconds (importing torch), and a script
        without `if __name__ == "__main__"` would start over. So for this moment there is no script."""
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            return self._pool.submit(_apply, work, task)
        finally:
            sys.modules["__main__"] = main


@contextmanager
def ended_from_outside() -> Iterator[None]:
    """Turns what a pool raises where it has lost a process into a ChildProcessError that says why that may be."""
    try:
        yield
    except BrokenProcessPool:
        raise ChildProcessError(
            "a process that was reading images was ended from outside. The system does that where memory is short: "
            "make some free, then try again."
        ) from None


def _on_all_cores(
    work: Callable[[Shared, Task], Done], shared: Shared, tasks: Sequence[Task]
) -> Generator[Done, None, None]:
    workers = Workers(shared, min(cores(), len(tasks)))
    waiting: deque[Future[Done]] = deque()
    try:
        with ended_from_outside():
            for task in tasks:
                if len(waiting) >= 3 * workers.count:
                    yield waiting.popleft().result()
                waiting.append(workers.submit(work, task))
            while waiting:
                yield waiting.popleft().result()
    finally:
        workers.close()


def _begin(shared: Any) -> None:
    """What a worker process does first."""
    global _shared
    _shared = shared
    # Ctrl-C, and what batch systems send, reaches all processes of a group; the main one ends the others when it has
    # done with them, and may need them until then.
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)  # otherwise it would wait for tasks for ever, where the main process was killed

    threading.Thread(target=follow, daemon=True).start()


def _apply(work: Callable[[Any, Task], Done], task: Task) -> Done:
    return work(_shared, task)
