"""Decode once: uint8 arrays on disk, checked."""

import contextlib
import errno
import json
import math
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrail.archives import UNFINISHED, Storage, cache_root
from vitrail.errors import BadInput
from vitrail.images import Entry, Source, Unreadable, locate, open_image, open_source, to_pixels
from vitrail.layouts import hold_out
from vitrail.progress import Advance, say, track
from vitrail.workers import cores, work_through


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


FORMAT = 1  # of the files below; a cache of another is built anew
BLOCK = 1 << 22  # bytes under one checksum
CHECKED = 3 << 29  # bytes checked at most when a cache is opened, spread evenly: what takes about a second
TASK = 1 << 22  # bytes of pixels that a worker decodes at a time, about


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
    root = cache_root()
    entry = root / f"{_plain(name)}-{storage.fingerprint()}-{image_size}"
    dataset = _open_or_none(entry)
    if dataset is None:
        _build(open_source(data), image_size, entry)
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
        header: dict[str, Any] = {"name": source.name, "classes": source.classes, "format": FORMAT, "splits": {}}
        problems: list[tuple[str, str]] = []
        total = sum(len(entries) for entries in source.splits.values())
        with track(total, f"Decoding {source.name}", "images") as advance:
            for split, entries in source.splits.items():
                header["splits"][split] = _write_split(source, entries, image_size, work / split, problems, advance)
        if problems:
            raise BadInput(_unreadable_images(source, problems))
        text = json.dumps(header, sort_keys=True)
        (work / "header.json").write_text(json.dumps({"crc32": zlib.crc32(text.encode()), "header": header}))
        _move(work, entry)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            where = f"{entry.parent}; make room there, or let VITRAIL_CACHE name a folder on another disk"
            raise OSError(error.errno, f"no space left for the decoded images in {where}") from None
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_split(
    source: Source, entries: Sequence[Entry], image_size: int, stem: Path, problems: list[tuple[str, str]], advance: Advance
) -> dict[str, Any]:
    """Writes `<split>.bin` (pixels) and `<split>.npz` (all else); returns what the header says of them."""
    at_once = max(1, min(256, TASK // (image_size * image_size * 3)))
    tasks = [
        ([source.prefix + entry.name for entry in entries[start : start + at_once]], image_size)
        for start in range(0, len(entries), at_once)
    ]
    sizes: list[tuple[int, int]] = []
    with _Checked(stem.with_suffix(".bin")) as file:
        for pixels, found, failed in work_through(_decode, source.storage, tasks):
            problems += failed
            sizes += found
            file.write(pixels)
            advance(len(found))
    shape = np.array(sizes, np.int32).reshape(-1, 2)
    lengths = shape.astype(np.int64).prod(axis=1) * 3
    np.savez(
        stem.with_suffix(".npz"), sizes=shape, offsets=np.cumsum(lengths) - lengths,
        labels=np.array([entry.label for entry in entries], np.int64),
        names=np.frombuffer("\0".join(entry.name for entry in entries).encode("utf-8", "surrogateescape"), np.uint8),
    )  # fmt: skip
    return {"bytes": file.size, "crc32": file.sums}


def _decode(storage: Storage, task: tuple[list[str], int]) -> tuple[bytes, list[tuple[int, int]], list[tuple[str, str]]]:
    """In a worker: the pixels of some images, one after another; their heights and widths; what cannot be read, and why."""
    names, image_size = task
    pixels, sizes, problems = [], [], []
    for name in names:
        try:
            decoded = to_pixels(open_image(storage, name), image_size)
        except Unreadable as error:
            problems.append((name, str(error)))
            decoded = np.zeros((0, 0, 3), np.uint8)
        pixels.append(decoded.tobytes())
        sizes.append((decoded.shape[0], decoded.shape[1]))
    return b"".join(pixels), sizes, problems


class _Checked:
    """A file being written, with the checksum of each block of `BLOCK` bytes."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")
        self.size = 0
        self.sums: list[int] = []

    def __enter__(self) -> "_Checked":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, content: bytes) -> None:
        self.file.write(content)
        rest = memoryview(content)
        while len(rest):
            room = BLOCK - self.size % BLOCK
            part, rest = rest[:room], rest[room:]
            if room == BLOCK:
                self.sums.append(0)
            self.sums[-1] = zlib.crc32(part, self.sums[-1])
            self.size += len(part)


def _unreadable_images(source: Source, problems: list[tuple[str, str]]) -> str:
    listed = "; ".join(f"{name.removeprefix(source.prefix)} ({why})" for name, why in problems[:5])
    count = f"{len(problems):,} images" if len(problems) > 1 else "an image"
    more = "; …" if len(problems) > 5 else ""
    return (
        f"{source.name} has {count} that cannot be read: {listed}{more}. "
        "Mend or remove what `vitrail data` lists, and start again."
    )


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
        content = json.loads((entry / "header.json").read_text())
        header = content["header"]
        if content["crc32"] != zlib.crc32(json.dumps(header, sort_keys=True).encode()):
            raise _Damaged("header.json: wrong checksum")
        splits = {split: _open_split(entry / split, facts) for split, facts in header["splits"].items()}
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise _Damaged(str(error)) from None
    return Dataset(header["name"], tuple(header["classes"]), splits)


def _open_split(stem: Path, facts: dict[str, Any]) -> Images:
    path = stem.with_suffix(".bin")
    if path.stat().st_size != facts["bytes"]:
        raise _Damaged(f"{path.name} has {path.stat().st_size:,} bytes instead of {facts['bytes']:,}")
    # Mapped so that writing to it changes memory only: torch.from_numpy warns of arrays that cannot be written to.
    pixels = np.memmap(path, np.uint8, mode="c")
    _check(path.name, pixels, facts["crc32"])
    with np.load(stem.with_suffix(".npz"), allow_pickle=False) as index:  # the zip format has checksums of its own
        names = tuple(index["names"].tobytes().decode("utf-8", "surrogateescape").split("\0"))
        return Images(pixels, index["offsets"], index["sizes"], index["labels"], names)


def _check(name: str, pixels: NDArray[np.uint8], sums: list[int]) -> None:
    """Compares blocks with their checksums, on all cores (zlib lets go of Python's lock)."""
    step = max(1, math.ceil(len(sums) * BLOCK / CHECKED))
    blocks = range(0, len(sums), step)
    with ThreadPoolExecutor(cores()) as pool:
        found = pool.map(lambda block: zlib.crc32(pixels[block * BLOCK : (block + 1) * BLOCK]), blocks)
        for block, crc in zip(blocks, found, strict=True):
            if crc != sums[block]:
                raise _Damaged(f"{name}: wrong checksum at byte {block * BLOCK:,}")
