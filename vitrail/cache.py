"""Decode once: uint8 arrays on disk, checked."""

import contextlib
import errno
import itertools
import json
import math
import re
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from vitrail.archives import UNFINISHED, Storage, cache_root
from vitrail.errors import BadInput
from vitrail.images import Source, Unreadable, locate, parse_image, read_file, read_source, to_pixels
from vitrail.layouts import hold_out
from vitrail.progress import say, track
from vitrail.workers import Queue, cores, work_through


@dataclass(frozen=True)
class Images:
    """One split, decoded. Images may differ in size, so their pixels lie one after another in one flat array.

    `pixels`: uint8, flat; image i is `pixels[offsets[i]:][: h * w * 3].reshape(h, w, 3)` with `h, w = sizes[i]`.
    `offsets`: int64 (N,). `sizes`: int32 (N, 2). `labels`: int64 (N,). `names`: each image's path in its source.
    """

    pixels: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int32]
    labels: NDArray[np.int64]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> NDArray[np.uint8]:
        """Pixels of one image, (height, width, 3)."""
        height, width = (int(side) for side in self.sizes[index])
        start = int(self.offsets[index])
        return self.pixels[start : start + height * width * 3].reshape(height, width, 3)

    @staticmethod
    def pack(images: Sequence[NDArray[np.uint8]], names: Sequence[str]) -> "Images":
        """Images (height, width, 3) that have no labels; -1 stands for them."""
        sizes = np.array([image.shape[:2] for image in images], np.int32).reshape(-1, 2)
        pixels = np.concatenate([image.ravel() for image in images]) if images else np.zeros(0, np.uint8)
        return Images(pixels, _offsets(sizes), sizes, np.full(len(images), -1, np.int64), tuple(names))

    def take(self, index: NDArray[np.int64]) -> "Images":
        """The images of `index`, in its order; the pixels are shared, not copied."""
        names = tuple(self.names[i] for i in index)
        return replace(
            self, offsets=self.offsets[index], sizes=self.sizes[index], labels=self.labels[index], names=names
        )


@dataclass(frozen=True)
class Dataset:
    """A data set, decoded: `splits` has `train` and what it is judged by (`evaluation` says which)."""

    name: str
    classes: tuple[str, ...]
    splits: dict[str, Images]

    @property
    def evaluation(self) -> str:
        """The split that figures are reported on: the held-out slice while tuning, else val, else test."""
        return next(split for split in ("holdout", "val", "test") if split in self.splits)


def _offsets(sizes: NDArray[np.int32]) -> NDArray[np.int64]:
    """Where each image begins, when images of these heights and widths, (N, 2), lie one after another."""
    lengths: NDArray[np.int64] = sizes.astype(np.int64).prod(axis=1) * 3
    return lengths.cumsum() - lengths


FORMAT = 1  # of the files below and of what `to_pixels` makes; a cache of another is not looked at
CHECKED = 3 << 29  # bytes checked at most when a cache is opened, spread evenly: what takes about a second
TASK = 1 << 22  # bytes of pixels, about, that a worker decodes at a time, and that one checksum is for


class _Damaged(Exception):
    """A cache that is not as it was written. The message says in what."""


def load(data: str, image_size: int, *, holdout: float = 0.0) -> Dataset:
    """The data set that `data` names, decoded: from the cache, where it is built first if need be.

    Args:
        data: `digits`, `tiny-imagenet`, a folder, or an archive.
        image_size: the side, in pixels, that models will see. Images are stored at 1 to 8/7 times it.
        holdout: above 0, that share of each class's training images becomes the split `holdout`, and there is no
            other beside `train`: what tuning looks at is never what is reported. The slice is the same in all runs.

    Raises:
        BadInput: there is no such data set, or it cannot be used; unreadable images are named.
        OSError: the cache cannot be written, for want of space for one. Nothing is left half-written.
    """
    name, storage = locate(data)
    entry = cache_root() / f"{_plain(name)}-{storage.fingerprint()}-{image_size}-v{FORMAT}"
    dataset = _open_or_none(entry)
    if dataset is None:
        _build(read_source(data, name, storage), image_size, entry)
        dataset = _open(entry)
    return replace(dataset, splits=_hold_out(dataset.splits["train"], holdout)) if holdout else dataset


def _plain(name: str) -> str:
    """A name that any file system takes."""
    return re.sub(r"[^\w.-]", "_", name)[:80]


def _hold_out(train: Images, share: float) -> dict[str, Images]:
    index = {name: i for i, name in enumerate(train.names)}
    held: list[int] = []
    for label in np.unique(train.labels):
        names = [train.names[i] for i in np.flatnonzero(train.labels == label)]
        held += [index[name] for name in hold_out(names, share, "holdout")[1]]
    chosen = np.zeros(len(train), bool)
    chosen[held] = True
    return {"train": train.take(np.flatnonzero(~chosen)), "holdout": train.take(np.flatnonzero(chosen))}


def _build(source: Source, image_size: int, entry: Path) -> None:
    """Decodes a data set into a folder beside `entry`, which takes its place when it is complete."""
    work = Path(tempfile.mkdtemp(dir=entry.parent, prefix=UNFINISHED))
    try:
        _write(source, image_size, work)
        # No fsync, which takes seconds: the checksums tell what a power failure took.
        _move(work, entry)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            where = f"{entry.parent}; make room there, or let VITRAIL_CACHE name a folder on another disk"
            raise OSError(error.errno, f"no space left for the decoded images in {where}") from None
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write(source: Source, image_size: int, folder: Path) -> None:
    """Writes `pixels.bin`, all splits one after another, `index.safetensors`, which image lies where in it, and
    `header.json`, the rest and the checksums."""
    entries = [entry for split in source.splits.values() for entry in split]
    at_once = max(1, min(256, TASK // (image_size * image_size * 3)))
    tasks = [
        (place, [source.prefix + entry.name for entry in entries[start : start + at_once]])
        for place, start in enumerate(range(0, len(entries), at_once))
    ]
    (folder / "pixels.bin").touch()
    decoder = _Decoder(source.storage, image_size, folder / "pixels.bin", Queue())
    sizes: list[tuple[int, int]] = []
    problems: list[tuple[str, str]] = []
    blocks: list[tuple[int, int]] = []
    with (
        track(len(entries), f"Decoding {source.name}", "images") as advance,
        contextlib.closing(work_through(_decode, decoder, tasks)) as all_done,
    ):
        for done in all_done:
            sizes += done.sizes
            problems += done.problems
            blocks.append((done.length, done.crc32))
            advance(len(done.sizes))
    if problems:
        raise BadInput(_unreadable_images(source, problems))
    header = _write_index(source, np.array(sizes, np.int32), folder / "index.safetensors")
    text = json.dumps(header | {"blocks": blocks}, sort_keys=True)
    (folder / "header.json").write_text(f'{{"crc32": {zlib.crc32(text.encode())}, "header": {text}}}')


def _write_index(source: Source, sizes: NDArray[np.int32], path: Path) -> dict[str, Any]:
    """Writes the index; returns what the header says of the splits."""
    splits: list[tuple[str, int, int]] = []
    index: dict[str, NDArray[Any]] = {}
    begin = 0
    for split, entries in source.splits.items():
        here, sizes = sizes[: len(entries)], sizes[len(entries) :]
        names = "\0".join(entry.name for entry in entries).encode("utf-8", "surrogateescape")
        index[f"{split}.sizes"] = here
        index[f"{split}.offsets"] = _offsets(here)
        index[f"{split}.labels"] = np.array([entry.label for entry in entries], np.int64)
        index[f"{split}.names"] = np.frombuffer(names, np.uint8)
        splits.append((split, begin, begin + 3 * int(here.astype(np.int64).prod(axis=1).sum())))
        begin = splits[-1][2]
    content = safetensors.numpy.save(index)
    path.write_bytes(content)
    return {"name": source.name, "classes": source.classes, "splits": splits, "index": zlib.crc32(content)}


def _move(work: Path, entry: Path) -> None:
    """Puts a complete cache in its place, in one step."""
    try:
        work.replace(entry)
    except OSError:
        if not entry.is_dir():
            raise
        # Another process was quicker: its cache is as good as this.


def _open_or_none(entry: Path) -> Dataset | None:
    """The cache, if it is there and sound. A damaged one is put away, with a line that says so."""
    if not entry.is_dir():
        return None
    try:
        return _open(entry)
    except _Damaged as error:
        say(f"The cache of decoded images {entry} is damaged ({error}); it is built anew.")
        doomed = Path(tempfile.mkdtemp(dir=entry.parent, prefix=UNFINISHED))
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            entry.replace(doomed / entry.name)
        shutil.rmtree(doomed, ignore_errors=True)
        return None


def _open(entry: Path) -> Dataset:
    """Maps the cache into memory.

    Raises:
        _Damaged: it is not as it was written.
    """
    try:
        written = json.loads((entry / "header.json").read_text())
        header = written["header"]
        if written["crc32"] != zlib.crc32(json.dumps(header, sort_keys=True).encode()):
            raise _Damaged("header.json: wrong checksum")
        pixels = _map(entry / "pixels.bin", header["blocks"])
        content = (entry / "index.safetensors").read_bytes()
        if header["index"] != zlib.crc32(content):
            raise _Damaged("index.safetensors: wrong checksum")
        index = safetensors.numpy.load(content)
        splits = {
            split: Images(
                pixels[begin:end], index[f"{split}.offsets"], index[f"{split}.sizes"], index[f"{split}.labels"],
                tuple(index[f"{split}.names"].tobytes().decode("utf-8", "surrogateescape").split("\0")),
            )
            for split, begin, end in header["splits"]
        }  # fmt: skip
        return Dataset(header["name"], tuple(header["classes"]), splits)
    except (OSError, ValueError, KeyError, TypeError) as error:  # ValueError: no JSON, or not UTF-8
        raise _Damaged(str(error)) from None


def _map(path: Path, blocks: list[tuple[int, int]]) -> NDArray[np.uint8]:
    """The pixels, mapped and compared with the blocks' lengths and checksums, on all cores (zlib lets go of Python's
    lock)."""
    ends = list(itertools.accumulate(length for length, _ in blocks))
    size = path.stat().st_size
    if size != ends[-1]:
        raise _Damaged(f"{path.name} has {size:,} bytes instead of {ends[-1]:,}")
    # Mapped so that writing to it changes memory only: torch.from_numpy warns of arrays that cannot be written to.
    pixels = np.memmap(path, np.uint8, mode="c")
    chosen = range(0, len(blocks), math.ceil(size / CHECKED))
    with ThreadPoolExecutor(cores()) as pool:
        found = pool.map(lambda block: zlib.crc32(pixels[ends[block] - blocks[block][0] : ends[block]].data), chosen)
        for block, crc in zip(chosen, found, strict=True):
            if crc != blocks[block][1]:
                raise _Damaged(f"{path.name}: wrong checksum before byte {ends[block]:,}")
    return pixels
