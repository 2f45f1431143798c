"""Damaged files, read by a process of their own: what it takes for them shows there alone, and much of it ends it."""

import multiprocessing
import random
import resource
import signal
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import vitrail
from vitrail.errors import BadInput

ROOM = 64 << 20  # bytes that reading thousands of files of 20 KB may add to a process: what it allocates has holes
SECONDS = 10  # for any one of them


def damaged(content: bytes, noise: random.Random) -> bytes:
    """Cut off, or with bits turned over, or both."""
    if noise.random() < 0.3:
        content = content[: noise.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(noise.choice([0, 1, 1, 2, 8, 64]) if changed else 0):
        # Headers are where harm is done: most of the time they are hit.
        near = min(len(changed), 4096) if noise.random() < 0.7 else len(changed)
        place = noise.randrange(near) if noise.random() < 0.7 else len(changed) - 1 - noise.randrange(near)
        changed[place] ^= 1 << noise.randrange(8)
    return bytes(changed)


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def read(source: Path, file: Path, count: int) -> tuple[list[str], int]:
    """In a process of its own: why each of `count` damaged versions of `file` was refused, if it was, and how many
    bytes they added to the most memory that the process has had."""
    whole, noise = file.read_bytes(), random.Random(0)
    vitrail.load(source)
    before, refusals = peak(), []
    for _ in range(count):
        file.write_bytes(damaged(whole, noise))
        signal.alarm(SECONDS)  # which ends the process
        try:
            vitrail.load(source)
        except BadInput as error:
            refusals.append(str(error))
        signal.alarm(0)
    return refusals, peak() - before


def assert_refused_or_read(source: Path, file: Path, count: int) -> None:
    """See that `vitrail.load(source)` refuses or reads each of `count` damaged versions of `file`, by a message that
    names where it lies, in little memory and time. The version that ended the process is what the file has then."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        refusals, taken = processes.submit(read, source, file, count).result()
    assert count / 4 < len(refusals) < count
    assert all(str(source) in refusal for refusal in refusals)
    assert taken < ROOM
