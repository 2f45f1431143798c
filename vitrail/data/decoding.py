"""Every image of a data set → one file of pixels, on all cores."""

import contextlib
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitrail.data.archives import Storage
from vitrail.data.images import Source, Unreadable, read_pixels
from vitrail.data.workers import Queue, work_through
from vitrail.errors import BadInput
from vitrail.progress import track

TASK = 1 << 22  # bytes of pixels, about, that a worker decodes at a time, and that one checksum is for


def decode(
    source: Source, image_size: int, path: Path, shorter_side: int | None = None
) -> tuple[NDArray[np.int32], list[tuple[int, int]]]:
    """Writes the pixels of all images, as `to_pixels` has them, one after another and split after split, to a new file.

    Returns:
        The images' heights and widths, (N, 2), and the length and CRC-32 of each stretch of the file.

    Raises:
        BadInput: some cannot be read; they are named.
        OSError: it cannot be written, or a process that decoded was ended from outside.
    """
    entries = [entry for split in source.splits.values() for entry in split]
    at_once = max(1, min(256, TASK // (image_size * image_size * 3)))
    tasks = [
        (place, [source.prefix + entry.name for entry in entries[start : start + at_once]])
        for place, start in enumerate(range(0, len(entries), at_once))
    ]
    path.touch()
    sizes: list[tuple[int, int]] = []
    problems: list[tuple[str, str]] = []
    blocks: list[tuple[int, int]] = []
    with (
        track(len(entries), f"Decoding {source.name}", "images") as advance,
        contextlib.closing(
            work_through(_decode, _Decoder(source.storage, image_size, shorter_side, path, Queue()), tasks)
        ) as all_done,
    ):
        for done in all_done:
            sizes += done.sizes
            problems += done.problems
            blocks.append((done.length, done.crc32))
            advance(len(done.sizes))
    if problems:
        raise BadInput(_unreadable_images(source, problems))
    return np.array(sizes, np.int32), blocks


@dataclass(frozen=True)
class _Decoder:
    """What every worker needs."""

    storage: Storage
    image_size: int
    shorter_side: int | None
    path: Path
    queue: Queue


@dataclass(frozen=True)
class _Decoded:
    """What a worker says of the images that it decoded: their heights and widths; which cannot be read, and why; how
    many bytes it wrote."""

    sizes: list[tuple[int, int]]
    problems: list[tuple[str, str]]
    length: int
    crc32: int


def _decode(decoder: _Decoder, task: tuple[int, list[str]]) -> _Decoded:
    """In a worker: decode some images, and write them to their place in the file."""
    place, names = task
    images: list[NDArray[np.uint8]] = []
    problems = []
    try:
        for name in names:
            try:
                images.append(read_pixels(decoder.storage, name, decoder.image_size, decoder.shorter_side))
            except Unreadable as error:
                problems.append((name, str(error)))
    finally:
        begin = decoder.queue.take(place, sum(image.nbytes for image in images))
    content = b"".join(image.data for image in images)
    with decoder.path.open("r+b") as file:
        file.seek(begin)
        file.write(content)
    return _Decoded([image.shape[:2] for image in images], problems, len(content), zlib.crc32(content))


def _unreadable_images(source: Source, problems: list[tuple[str, str]]) -> str:
    listed = "; ".join(f"{name.removeprefix(source.prefix)} ({why})" for name, why in problems[:5])
    count = f"{len(problems):,} images" if len(problems) > 1 else "an image"
    more = "; …" if len(problems) > 5 else ""
    return (
        f"{source.name} has {count} that cannot be read: {listed}{more}. "
        "Mend or remove what `vitrail data` lists, and start again."
    )
