"""Decoded images as files: written whole or not at all, checked when they are opened, and mapped into memory.

A folder has `pixels.bin`, all splits one after another; `index.safetensors`, which image lies where in it; and
`header.json`, the rest and the checksums.
"""

import contextlib
import errno
import itertools
import json
import math
import shutil
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from vitrail.data.archives import UNFINISHED
from vitrail.data.decoding import decode
from vitrail.data.images import Source
from vitrail.data.workers import cores
from vitrail.progress import say

FORMAT = 2  # of the files below and of what `to_pixels` makes; a cache of another is not looked at
CHECKED = 3 << 29  # bytes checked at most when a cache is opened, spread evenly: what takes about a second


class Damaged(Exception):
    """A cache that is not as it was written. The message says in what."""


@dataclass(frozen=True)
class Stored:
    """What a folder holds. `folders`, `divided` and `flaw` are as in `Source`; `splits` has of each its pixels,
    offsets, sizes, labels and names, as `cache.Images` has them; `pixels` are those of all splits, one after another.
    """

    name: str
    classes: tuple[str, ...]
    folders: tuple[str, ...]
    divided: bool
    flaw: str
    splits: dict[str, tuple[Any, ...]]
    pixels: NDArray[np.uint8]

    def judged_have(self, shorter_side: int) -> bool:
        """Whether that is the shorter side of every image that a model can be judged by: those that are to train on are
        only where the data set came undivided."""
        judged = [parts for name, parts in self.splits.items() if self.divided or name != "train"]
        return all((sizes.min(axis=1) == shorter_side).all() for _, _, sizes, _, _ in judged)


def offsets(sizes: NDArray[np.int32]) -> NDArray[np.int64]:
    """Where each image begins, when images of these heights and widths, (N, 2), lie one after another."""
    lengths: NDArray[np.int64] = sizes.astype(np.int64).prod(axis=1) * 3
    return lengths.cumsum() - lengths


def build(source: Source, image_size: int, entry: Path, shorter_side: int | None = None) -> None:
    """Decodes a data set, each image as `to_pixels` has it, into a folder beside `entry`, which takes its place when it
    is complete."""
    work = Path(tempfile.mkdtemp(dir=entry.parent, prefix=UNFINISHED))
    try:
        _write(source, image_size, work, shorter_side)
        # No fsync, which takes seconds: the checksums tell what a power failure took.
        _move(work, entry)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            where = f"{entry.parent}; make room there, or let VITRAIL_CACHE name a folder on another disk"
            raise OSError(error.errno, f"no space left for the decoded images in {where}") from None
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write(source: Source, image_size: int, folder: Path, shorter_side: int | None) -> None:
    """Writes the three files."""
    sizes, blocks = decode(source, image_size, folder / "pixels.bin", shorter_side)
    header = _write_index(source, sizes, folder / "index.safetensors")
    text = json.dumps(header | {"blocks": blocks}, sort_keys=True)
    (folder / "header.json").write_text(f'{{"crc32": {zlib.crc32(text.encode())}, "header": {text}}}')


def _write_index(source: Source, sizes: NDArray[np.int32], path: Path) -> dict[str, Any]:
    """Writes the index; returns what the header says of it and of the data set."""
    splits: list[tuple[str, int, int]] = []
    index: dict[str, NDArray[Any]] = {}
    begin = 0
    for split, entries in source.splits.items():
        here, sizes = sizes[: len(entries)], sizes[len(entries) :]
        names = "\0".join(entry.name for entry in entries).encode("utf-8", "surrogateescape")
        index[f"{split}.sizes"] = here
        index[f"{split}.offsets"] = offsets(here)
        index[f"{split}.labels"] = np.array([entry.label for entry in entries], np.int64)
        index[f"{split}.names"] = np.frombuffer(names, np.uint8)
        splits.append((split, begin, begin + 3 * int(here.astype(np.int64).prod(axis=1).sum())))
        begin = splits[-1][2]
    content = safetensors.numpy.save(index)
    path.write_bytes(content)
    return {
        "name": source.name, "classes": source.classes, "folders": source.folders, "divided": source.divided,
        "flaw": source.flaw, "splits": splits, "index": zlib.crc32(content),
    }  # fmt: skip


def _move(work: Path, entry: Path) -> None:
    """Puts a complete cache in its place, in one step."""
    try:
        work.replace(entry)
    except OSError:
        if not entry.is_dir():
            raise
        # Another process was quicker: its cache is as good as this.


def open_or_none(entry: Path) -> Stored | None:
    """The cache, if it is there and sound. A damaged one is put away, with a line that says so."""
    if not entry.is_dir():
        return None
    try:
        return open_stored(entry)
    except Damaged as error:
        say(f"The cache of decoded images {entry} is damaged ({error}); it is built anew.")
        doomed = Path(tempfile.mkdtemp(dir=entry.parent, prefix=UNFINISHED))
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            entry.replace(doomed / entry.name)
        shutil.rmtree(doomed, ignore_errors=True)
        return None


def open_stored(entry: Path) -> Stored:
    """Maps the cache into memory.

    Raises:
        Damaged: it is not as it was written.
    """
    try:
        written = json.loads((entry / "header.json").read_text())
        header = written["header"]
        if written["crc32"] != zlib.crc32(json.dumps(header, sort_keys=True).encode()):
            raise Damaged("header.json: wrong checksum")
        pixels = _map(entry / "pixels.bin", header["blocks"])
        content = (entry / "index.safetensors").read_bytes()
        if header["index"] != zlib.crc32(content):
            raise Damaged("index.safetensors: wrong checksum")
        index = safetensors.numpy.load(content)
        splits = {
            split: (
                pixels[begin:end], index[f"{split}.offsets"], index[f"{split}.sizes"], index[f"{split}.labels"],
                tuple(index[f"{split}.names"].tobytes().decode("utf-8", "surrogateescape").split("\0")),
            )
            for split, begin, end in header["splits"]
        }  # fmt: skip
        classes, folders = tuple(header["classes"]), tuple(header["folders"])
        return Stored(header["name"], classes, folders, header["divided"], header["flaw"], splits, pixels)
    except (OSError, ValueError, KeyError, TypeError) as error:  # ValueError: no JSON, or not UTF-8
        raise Damaged(str(error)) from None


def _map(path: Path, blocks: list[tuple[int, int]]) -> NDArray[np.uint8]:
    """The pixels, mapped and compared with the blocks' lengths and checksums, on all cores (zlib lets go of Python's
    lock)."""
    ends = list(itertools.accumulate(length for length, _ in blocks))
    size = path.stat().st_size
    if size != ends[-1]:
        raise Damaged(f"{path.name} has {size:,} bytes instead of {ends[-1]:,}")
    # Mapped so that writing to it changes memory only: torch.from_numpy warns of arrays that cannot be written to.
    pixels = np.memmap(path, np.uint8, mode="c")
    chosen = range(0, len(blocks), math.ceil(size / CHECKED))
    with ThreadPoolExecutor(cores()) as pool:
        found = pool.map(lambda block: zlib.crc32(pixels[ends[block] - blocks[block][0] : ends[block]].data), chosen)
        for block, crc in zip(chosen, found, strict=True):
            if crc != blocks[block][1]:
                raise Damaged(f"{path.name}: wrong checksum before byte {ends[block]:,}")
    return pixels
