"""Decode once: uint8 arrays on disk, checked."""

import contextlib
import errno
import hashlib
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

from vitrail.archives import UNFINISHED, cache_root
from vitrail.decoding import decode
from vitrail.errors import BadInput
from vitrail.images import BUILT_IN, Source, locate, read_source
from vitrail.layouts import hold_out
from vitrail.progress import say
from vitrail.workers import cores


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

    def digest(self) -> str:
        """A short text that changes with the classes, the images, by name, their labels and their splits: with what
        a run's course hangs on. It does not when the data set moves, or is packed into an archive."""
        hashed = hashlib.blake2b(repr(self.classes).encode(), digest_size=16)
        for split, images in sorted(self.splits.items()):
            hashed.update(repr((split, images.names)).encode())
            hashed.update(images.labels.tobytes())
        return hashed.hexdigest()


def _offsets(sizes: NDArray[np.int32]) -> NDArray[np.int64]:
    """Where each image begins, when images of these heights and widths, (N, 2), lie one after another."""
    lengths: NDArray[np.int64] = sizes.astype(np.int64).prod(axis=1) * 3
    return lengths.cumsum() - lengths


FORMAT = 2  # of the files below and of what `to_pixels` makes; a cache of another is not looked at
CHECKED = 3 << 29  # bytes checked at most when a cache is opened, spread evenly: what takes about a second


class _Damaged(Exception):
    """A cache that is not as it was written. The message says in what."""


@dataclass(frozen=True)
class _Cached:
    """What a cache holds. `folders`, `divided` and `flaw` are as in `Source`."""

    dataset: Dataset
    folders: tuple[str, ...]
    divided: bool
    flaw: str
    pixels: NDArray[np.uint8]  # of all splits, one after another


def load(data: str, image_size: int, *, holdout: float = 0.0) -> Dataset:
    """The data set that `data` names, decoded: from the cache, where it is built first if need be.

    Args:
        data: `digits`, `tiny-imagenet`, a folder, or an archive.
        image_size: the side, in pixels, that models will see. Images are stored at 1 to 8/7 times it.
        holdout: above 0, that share of each class's training images becomes the split `holdout`, and there is no
            other beside `train`: what tuning looks at is never what is reported. The slice is the same in all runs.

    Raises:
        BadInput: there is no such data set, or nothing can be trained on it; unreadable images are named.
        OSError: the cache cannot be written, for want of space for one. Nothing is left half-written.
    """
    return _with_holdout(_cached(data, image_size, to_train=True).dataset, holdout)


def load_for_evaluation(
    data: str, image_size: int, classes: tuple[str, ...], *, own: str = "", holdout: float = 0.0, others: bool = False
) -> tuple[str, str, Images]:
    """What a model that tells `classes` apart is measured on when it is handed a data set, decoded, cached as by
    `load`. Nothing need be there to train on, and not every class need have images.

    That is the split that the data set comes with (val, else test); all of its images (`all`) where it comes with none,
    being `CLASS/*` or `train/` alone: they are new to the model. They are not where it was trained on that very data
    set, which `own` says (the `Dataset.digest` of what `load` gave, with this `holdout`): that is divided as it was
    then, and so are the built-in data sets.

    Returns:
        The name of the data set, that of the split, and the images, whose labels are indices into `classes`.

    Raises:
        BadInput: there is no such data set, or it has images of other classes; unreadable images are named. With
            `others`, these are labelled -1.
        OSError: the cache cannot be written.
    """
    cached = _cached(data, image_size, to_train=False)
    dataset = cached.dataset
    whole = cached.divided and data not in BUILT_IN
    if own and not cached.flaw and (as_trained := _with_holdout(dataset, holdout)).digest() == own:
        dataset, whole = as_trained, False
    split = "all" if whole else dataset.evaluation
    images = _together(cached) if whole else dataset.splits[split]
    return dataset.name, split, _relabelled(data, images, cached, classes, others)


def _cached(data: str, image_size: int, to_train: bool) -> _Cached:
    """The data set, from the cache, where it is built first if need be.

    Raises:
        BadInput: as `load`'s; that nothing can be trained on it only if it is `to_train`.
    """
    name, storage = locate(data)
    plain = re.sub(r"[^\w.-]", "_", name)[:80]  # what any file system takes
    entry = cache_root() / f"{plain}-{storage.fingerprint()}-{image_size}-v{FORMAT}"
    found = _open_or_none(entry) or read_source(data, name, storage)
    if to_train and found.flaw:
        raise BadInput(f"{data} {found.flaw}")
    if isinstance(found, _Cached):
        return found
    _build(found, image_size, entry)
    return _open(entry)


def _together(cached: _Cached) -> Images:
    """The images of all splits as one."""
    splits = list(cached.dataset.splits.values())
    begins = itertools.accumulate((len(images.pixels) for images in splits), initial=0)
    return Images(
        cached.pixels,
        np.concatenate([begin + images.offsets for begin, images in zip(begins, splits, strict=False)]),
        np.concatenate([images.sizes for images in splits]),
        np.concatenate([images.labels for images in splits]),
        tuple(name for images in splits for name in images.names),
    )


def _relabelled(data: str, images: Images, cached: _Cached, classes: tuple[str, ...], others: bool) -> Images:
    """The images with their labels as indices into `classes`, -1 if of none of them.

    Raises:
        BadInput: some are of none of them, and `others` may not be.
    """
    place = {name: label for label, name in enumerate(classes)}
    label_of = [
        # A class goes by its folder's name where one of the two data sets has no `words.txt`, and by both where the
        # other has more classes of the same name.
        next((place[name] for name in (readable, f"{readable} ({folder})", folder) if name in place), -1)
        for readable, folder in zip(cached.dataset.classes, cached.folders, strict=True)
    ]
    unknown = [cached.folders[label] for label in np.unique(images.labels) if label_of[label] < 0]
    if unknown and not others:
        theirs, ours = (", ".join(names[:5]) + " …" * (len(names) > 5) for names in (unknown, classes))
        raise BadInput(
            f"{data} has images of {theirs}, which are none of the {len(classes)} classes that the model tells apart "
            f"({ours}). Rename what is one of them, and take the rest away."
        )
    return replace(images, labels=np.array(label_of, np.int64)[images.labels])


def _with_holdout(dataset: Dataset, share: float) -> Dataset:
    """The data set as it is for tuning, if `share` is above 0."""
    if not share:
        return dataset
    train = dataset.splits["train"]
    index = {name: i for i, name in enumerate(train.names)}
    held: list[int] = []
    for label in np.unique(train.labels):
        names = [train.names[i] for i in np.flatnonzero(train.labels == label)]
        held += [index[name] for name in hold_out(names, share, "holdout")[1]]
    chosen = np.zeros(len(train), bool)
    chosen[held] = True
    parts = {"train": train.take(np.flatnonzero(~chosen)), "holdout": train.take(np.flatnonzero(chosen))}
    return replace(dataset, splits=parts)


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
    sizes, blocks = decode(source, image_size, folder / "pixels.bin")
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
        index[f"{split}.offsets"] = _offsets(here)
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


def _open_or_none(entry: Path) -> _Cached | None:
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


def _open(entry: Path) -> _Cached:
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
        dataset = Dataset(header["name"], tuple(header["classes"]), splits)
        return _Cached(dataset, tuple(header["folders"]), header["divided"], header["flaw"], pixels)
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
