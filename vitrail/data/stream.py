"""Images decoded when they are needed, for more of them than there is room for decoded.

Processes decode what is expected to be asked for next into memory that they share with this one, a bounded number of
images ahead; this one only takes the images from there, in the order in which it said that they would come. They are
those that the cache would have, byte for byte, so that a run's bits do not depend on which of the two it reads.

Where an image cannot be read, that shows when its turn comes, not before: looking at all of them is what `vitrail data`
does.
"""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from functools import cached_property
from multiprocessing.heap import Arena

import numpy as np
from numpy.typing import NDArray

from vitrail.data.archives import Storage
from vitrail.data.images import LONGEST, MARGIN, Unreadable, read_pixels
from vitrail.data.workers import Workers, cores, ended_from_outside

ROOM = 1 << 28  # bytes that decoded images may take before they are asked for, were all as long as they may be
MOST = 2048  # images decoded ahead
TASK = 1 << 21  # bytes of pixels, about, that a worker decodes at a time


@dataclass
class _Task:
    """Images that a worker decodes one after another, each into the slot of its place."""

    names: list[str]
    slots: list[int]
    decoded: "Future[list[tuple[int, int] | str]]"
    taken: int = 0

    @cached_property
    def sizes(self) -> list[tuple[int, int] | str]:
        """Heights and widths, or why an image cannot be read; waited for.

        Raises:
            ChildProcessError: the worker was ended from outside.
        """
        with ended_from_outside():
            return self.decoded.result()


@dataclass(frozen=True)
class _Decoder:
    """What every worker needs."""

    storage: Storage
    image_size: int
    shorter_side: int | None
    memory: Arena
    slot: int


class Decoders:
    """The processes that decode the images of one data set, as many as there are cores for each of those that torchrun
    may have started on this machine.

    Args:
        storage: has the images.
        prefix: stands before their names there.
        image_size, shorter_side: what `to_pixels` makes them for.
    """

    def __init__(self, storage: Storage, prefix: str, image_size: int, shorter_side: int | None = None) -> None:
        self.storage, self.prefix, self.image_size, self.shorter_side = storage, prefix, image_size, shorter_side
        count = max(cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
        shorter = shorter_side or round(image_size * MARGIN)
        self.slot = 3 * shorter * (LONGEST * shorter + 1)  # bytes of the longest image that there can be
        room = min(ROOM // self.slot, MOST)
        self.at_once = max(1, min(64, TASK // (3 * image_size**2), room // (3 * count)))
        self.slots = max(room, 3 * count)
        self._count = count
        self._tasks: deque[_Task] = deque()
        self._coming: deque[str] = deque()
        self._free = list(range(self.slots))

    @cached_property
    def _memory(self) -> Arena:
        return Arena(self.slots * self.slot)  # of which only what has been written to takes memory

    @cached_property
    def _workers(self) -> Workers[_Decoder]:
        decoder = _Decoder(self.storage, self.image_size, self.shorter_side, self._memory, self.slot)
        return Workers(decoder, self._count)

    def decode(self, name: str) -> NDArray[np.uint8]:
        """One image (height, width, 3), decoded here and now.

        Raises:
            Unreadable: it cannot be read. The message names it.
        """
        try:
            return read_pixels(self.storage, self.prefix + name, self.image_size, self.shorter_side)
        except Unreadable as error:
            raise _cannot_be_read(name, str(error)) from None

    def expect(self, names: Sequence[str]) -> None:
        """Have these decoded, which will be read next and in this order. Other expectations are given up."""
        ahead = [name for task in self._tasks for name in task.names[task.taken :]]
        both = min(len(ahead), len(names))
        if ahead[:both] != list(names[:both]):
            self._drop()
            ahead = []
        self._coming = deque(names[len(ahead) :])
        self._submit()

    def read(self, names: Sequence[str]) -> Iterator[NDArray[np.uint8]]:
        """Images (height, width, 3), in this order. Each may be used until the next is asked for.

        Raises:
            Unreadable: one cannot be read. The message names it.
            ChildProcessError: a worker was ended from outside.
        """
        for place, name in enumerate(names):
            if not self._tasks or self._tasks[0].names[self._tasks[0].taken] != name:
                self.expect(names[place:])
            task = self._tasks[0]
            size, slot = task.sizes[task.taken], task.slots[task.taken]
            if isinstance(size, str):
                self._drop()
                raise _cannot_be_read(name, size)
            yield self._slot(slot)[: 3 * size[0] * size[1]].reshape(*size, 3)
            self._free.append(slot)
            task.taken += 1
            if task.taken == len(task.names):
                self._tasks.popleft()
                self._submit()  # not behind each image: there is hardly ever room sooner, and asking takes time

    def close(self) -> None:
        """End the processes, and what they are doing; to read again starts them again."""
        if "_workers" in vars(self):
            self._drop()
            self._workers.close()
            del self._workers

    def _slot(self, slot: int) -> NDArray[np.uint8]:
        return np.frombuffer(self._memory.buffer, np.uint8, self.slot, slot * self.slot)

    def _submit(self) -> None:
        workers = self._workers
        while self._coming and len(self._free) >= (count := min(self.at_once, len(self._coming))):
            names = [self._coming.popleft() for _ in range(count)]
            slots = [self._free.pop() for _ in range(count)]
            task = [(self.prefix + name, slot) for name, slot in zip(names, slots, strict=True)]
            with ended_from_outside():
                self._tasks.append(_Task(names, slots, workers.submit(_decode, task)))

    def _drop(self) -> None:
        """Give up what is being decoded: what a worker has begun it ends, for it writes into its slots."""
        wait([task.decoded for task in self._tasks if not task.decoded.cancel()])
        for task in self._tasks:
            self._free += task.slots[task.taken :]
        self._tasks.clear()
        self._coming.clear()


def _decode(decoder: _Decoder, task: list[tuple[str, int]]) -> list[tuple[int, int] | str]:
    """In a worker."""
    found: list[tuple[int, int] | str] = []
    for name, slot in task:
        try:
            image = read_pixels(decoder.storage, name, decoder.image_size, decoder.shorter_side)
        except Unreadable as error:
            found.append(str(error))
            continue
        room = np.frombuffer(decoder.memory.buffer, np.uint8, image.size, slot * decoder.slot)
        room[:] = image.ravel()
        found.append(image.shape[:2])
    return found


def _cannot_be_read(name: str, why: str) -> Unreadable:
    return Unreadable(
        f"{name} cannot be read ({why}). Mend it, under the same name; `vitrail data` lists all such images. A run "
        "goes on from its last checkpoint with --resume."
    )


@dataclass(frozen=True)
class Streamed:
    """One split, decoded as it is needed. `labels`: int64 (N,). `names`: each image's path in its source."""

    labels: NDArray[np.int64]
    names: tuple[str, ...]
    decoders: Decoders = field(repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def ahead(self) -> int:
        """How many images are decoded before they are asked for, if it is known which."""
        return min(self.decoders.slots, len(self))

    def image(self, index: int) -> NDArray[np.uint8]:
        """Pixels of one image, (height, width, 3)."""
        return self.decoders.decode(self.names[index])

    def take(self, index: NDArray[np.int64]) -> "Streamed":
        """The images of `index`, in its order."""
        return replace(self, labels=self.labels[index], names=tuple(self.names[i] for i in index))

    def expect(self, index: Sequence[int]) -> None:
        """Have the images of `index` decoded, which will be read next, in its order."""
        self.decoders.expect([self.names[i] for i in index])

    def read(self, index: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """The images of `index`, in its order. Each may be used until the next is asked for."""
        return self.decoders.read([self.names[i] for i in index])
