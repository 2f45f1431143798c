"""Damaged and hostile files, read by a process of their own: what it takes for them shows there alone, and much of it
ends it."""

import json
import multiprocessing
import os
import random
import resource
import signal
import struct
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from checkpoints import Arrays

import vitrail
from vitrail.errors import BadInput

ROOM = 64 << 20  # bytes that reading thousands of files of 20 KB may add to a process: what it allocates has holes
SECONDS = 10  # for any one of them
TYPES = ("f2", "f8", ">f4", "g", "u1", "i8", "?", "c8", "V2", "U3", "O")  # as NumPy writes them


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


@contextmanager
def within_seconds(seconds: int) -> Iterator[None]:
    """Give up on what takes longer, also where it only waits."""

    def give_up(*_: object) -> None:
        pytest.fail(f"it took more than {seconds} s")  # which nothing catches as the failure of a file

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def mutated(arrays: Arrays, noise: random.Random) -> Arrays:
    """Arrays of which some are gone, new, under other names, or of another shape, order, type or value."""
    changed = dict(arrays)
    for _ in range(noise.choice([1, 1, 2, 4])):
        name, other = noise.choice(list(changed)), noise.choice(list(changed))
        array = changed[name]
        axis = noise.randrange(max(array.ndim, 1))
        if (kind := noise.randrange(11)) == 0:
            del changed[name]
        elif kind == 1:
            changed[noise.choice([f"{name}x", f"params/{name}", f"opt/state/{name}", name.swapcase()])] = array
        elif kind == 2:
            changed[name], changed[other] = changed[other], array
        elif kind == 3:
            changed[name] = noise.choice([array.ravel(), array[None], array.T, np.asfortranarray(array)])
        elif kind == 4 and array.ndim:
            keep = noise.randrange(array.shape[axis] + 1)
            changed[name] = array.swapaxes(0, axis)[:keep].swapaxes(0, axis)
        elif kind == 5 and array.ndim:
            changed[name] = np.concatenate([array, array], axis)
        elif kind == 6:
            changed[name] = np.zeros(array.shape, noise.choice(TYPES))
        elif kind == 7:
            changed[name] = np.full(array.shape, noise.choice([np.nan, np.inf, 1e300, -1e30]))
        elif kind == 8:
            changed[name] = np.zeros([noise.randrange(9) for _ in range(noise.randrange(6))], "f4")
        elif kind == 9:
            old, new = noise.choice(["_0/", "_1/"]), noise.choice(["_00/", "_2/", f"_{10**20}/"])
            changed = {each.replace(f"block{old}", f"block{new}"): value for each, value in changed.items()}
        elif kind == 10:
            changed = {each: value for each, value in changed.items() if noise.random() < 0.9}
    return changed


def refused(good: Path, bad: Path) -> tuple[str, int]:
    """In a process of its own: why `bad` was refused, and how many bytes more than `good` that took."""
    vitrail.load(good)
    before = peak()
    try:
        vitrail.load(bad)
    except BadInput as error:
        return str(error), peak() - before
    raise AssertionError(f"{bad} was read")


def assert_refused_unread(good: Path, bad: Path, message: str) -> None:
    """See that a file that is far larger than memory is worth is refused before it is read."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        refusal, taken = processes.submit(refused, good, bad).result()
    assert str(bad) in refusal
    assert message in refusal
    assert taken < ROOM


def with_more(path: Path, name: str, size: int) -> None:
    """Add a tensor of that many bytes to a file of safetensors, which takes no room on the disk."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, end = json.loads(content[8 : 8 + length]), len(content) - 8 - length
    header[name] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [end, end + size]}
    said = json.dumps(header).encode()
    said = said.ljust(-(-len(said) // 8) * 8)  # so that what follows is aligned
    path.write_bytes(struct.pack("<Q", len(said)) + said + content[8 + length :])
    os.truncate(path, 8 + len(said) + end + size)
