"""A data set, decoded: once, into uint8 arrays on disk, or streamed, each image when it is needed."""

import hashlib
import itertools
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from vitrail.data.archives import cache_root
from vitrail.data.images import BUILT_IN, Source, locate, read_source
from vitrail.data.layouts import hold_out
from vitrail.data.stored import FORMAT, build, offsets, open_or_none, open_stored
from vitrail.data.stream import Decoders, Streamed
from vitrail.errors import BadInput
from vitrail.progress import counted, say

AHEAD = 1024  # images whose pages are fetched before they are asked for, where they are more than memory holds


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
        return Images(pixels, offsets(sizes), sizes, np.full(len(images), -1, np.int64), tuple(names))

    def take(self, index: NDArray[np.int64]) -> "Images":
        """The images of `index`, in its order; the pixels are shared, not copied."""
        names = tuple(self.names[i] for i in index)
        return replace(
            self, offsets=self.offsets[index], sizes=self.sizes[index], labels=self.labels[index], names=names
        )

    @property
    def ahead(self) -> int:
        """How many images are fetched before they are asked for: none where all of them stay in memory."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return AHEAD if isinstance(self.pixels, np.memmap) and self.pixels.nbytes > memory / 2 else 0

    def expect(self, index: Sequence[int]) -> None:
        """Have the system fetch from disk the images of `index`, which will be read next."""
        whole = self.pixels
        while isinstance(whole.base, np.memmap):
            whole = whole.base
        mapped, page = getattr(whole, "_mmap", None), mmap.ALLOCATIONGRANULARITY
        if mapped is None or not hasattr(mmap, "MADV_WILLNEED"):
            return
        begin = self.pixels.ctypes.data - whole.ctypes.data
        for i in index:
            at = begin + int(self.offsets[i])
            end = at + 3 * int(self.sizes[i, 0]) * int(self.sizes[i, 1])
            mapped.madvise(mmap.MADV_WILLNEED, at // page * page, end - at // page * page)

    def read(self, index: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """The images of `index`, in its order."""
        return map(self.image, index)


Split = Images | Streamed


@dataclass(frozen=True)
class Dataset:
    """A data set, decoded or streamed: `splits` has `train` and what it is judged by (`evaluation` says which)."""

    name: str
    classes: tuple[str, ...]
    splits: dict[str, Split]

    @property
    def evaluation(self) -> str:
        """The split that figures are reported on: the held-out slice while tuning, else val, else test."""
        return next(split for split in ("holdout", "val", "test") if split in self.splits)

    @cached_property
    def shorter_side(self) -> int | None:
        """That of each image that the model is judged by, in pixels; None if they differ, or are streamed."""
        judged = self.splits[self.evaluation]
        sides = set(judged.sizes.min(axis=1).tolist()) if isinstance(judged, Images) else set()
        return sides.pop() if len(sides) == 1 else None

    def close(self) -> None:
        """End the processes that decode images which are streamed."""
        for images in self.splits.values():
            if isinstance(images, Streamed):
                images.decoders.close()

    def digest(self) -> str:
        """A short text that changes with the classes, the images, by name, their labels and their splits: with what
        a run's course hangs on. It does not when the data set moves, or is packed into an archive."""
        hashed = hashlib.blake2b(repr(self.classes).encode(), digest_size=16)
        for split, images in sorted(self.splits.items()):
            hashed.update(repr((split, images.names)).encode())
            hashed.update(images.labels.tobytes())
        return hashed.hexdigest()


@dataclass(frozen=True)
class _Opened:
    """A data set, and what is known of where it comes from: `folders`, `divided` and `flaw` are as in `Source`."""

    dataset: Dataset
    folders: tuple[str, ...]
    divided: bool
    flaw: str
    pixels: NDArray[np.uint8] | None  # of all splits, one after another, where they are decoded


def load(data: str, image_size: int, *, holdout: float = 0.0, stream: bool = False) -> Dataset:
    """The data set that `data` names, decoded: from the cache, where it is built first if need be.

    Args:
        data: `digits`, `tiny-imagenet`, a folder, an archive, or `hf:NAME`.
        image_size: the side, in pixels, that models will see. Images are stored at 1 to 8/7 times it.
        holdout: above 0, that share of each class's training images becomes the split `holdout`, and there is no
            other beside `train`: what tuning looks at is never what is reported. The slice is the same in all runs.
        stream: decode nothing yet, and keep nothing; the images are the same.

    Raises:
        BadInput: there is no such data set, or nothing can be trained on it; unreadable images are named.
        OSError: the cache cannot be written, for want of space for one. Nothing is left half-written.
    """
    opened = _open(data, image_size, None, to_train=True, stream=stream)
    if opened.divided and data not in BUILT_IN and not holdout:
        images = counted(len(opened.dataset.splits["test"]), "image")
        say(f"{opened.dataset.name} comes undivided: {images}, a fifth of each class, are judged by and not trained on")
    return _with_holdout(opened.dataset, holdout)


def load_for_evaluation(
    data: str, image_size: int, classes: tuple[str, ...], *, shorter_side: int | None = None, own: str = "",
    holdout: float = 0.0, others: bool = False, stream: bool = False,
) -> tuple[str, str, Split]:  # fmt: skip
    """What a model that tells `classes` apart is measured on when it is handed a data set, decoded and cached, or
    streamed, as by `load`, but with the `shorter_side` of the images that it learnt from, where that is known. Nothing
    need be there to train on, and not every class need have images.

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
    opened = _open(data, image_size, shorter_side, to_train=False, stream=stream)
    dataset = opened.dataset
    whole = opened.divided and data not in BUILT_IN
    if own and not opened.flaw and (as_trained := _with_holdout(dataset, holdout)).digest() == own:
        dataset, whole = as_trained, False
    split = "all" if whole else dataset.evaluation
    images = _together(opened) if whole else dataset.splits[split]
    return dataset.name, split, _relabelled(data, images, opened, classes, others)


def _open(data: str, image_size: int, shorter_side: int | None, *, to_train: bool, stream: bool) -> _Opened:
    """The data set, as `to_pixels` makes its images, streamed or from the cache, where it is built first if need be.

    Raises:
        BadInput: as `load`'s; that nothing can be trained on it only if it is `to_train`.
    """
    name, storage = locate(data)
    plain = re.sub(r"[^\w.-]", "_", name)[:80]  # what any file system takes
    kept = cache_root() / f"{plain}-{storage.fingerprint()}"
    entry = kept.with_name(f"{kept.name}-{image_size}-v{FORMAT}")
    stored = None if stream else open_or_none(entry)
    if shorter_side is not None and not (stored and stored.judged_have(shorter_side)):
        entry = kept.with_name(f"{kept.name}-{image_size}-{shorter_side}-v{FORMAT}")
        stored = None if stream else open_or_none(entry)
    found = stored or read_source(data, name, storage)
    if to_train and found.flaw:
        raise BadInput(f"{data} {found.flaw}")
    splits: dict[str, Split] = {}
    if isinstance(found, Source) and stream:
        splits |= _streamed(found, image_size, shorter_side)
    elif isinstance(found, Source):
        build(found, image_size, entry, shorter_side)
        stored = open_stored(entry)
    if stored is not None:
        splits |= {split: Images(*parts) for split, parts in stored.splits.items()}
    dataset = Dataset(found.name, found.classes, splits)
    return _Opened(dataset, found.folders, found.divided, found.flaw, stored.pixels if stored else None)


def _streamed(source: Source, image_size: int, shorter_side: int | None) -> dict[str, Streamed]:
    """The splits of a data set, which share the processes that decode them."""
    decoders = Decoders(source.storage, source.prefix, image_size, shorter_side)
    return {
        split: Streamed(
            np.array([entry.label for entry in entries], np.int64), tuple(entry.name for entry in entries), decoders
        )
        for split, entries in source.splits.items()
    }


def _together(opened: _Opened) -> Split:
    """The images of all splits as one."""
    splits = list(opened.dataset.splits.values())
    labels = np.concatenate([images.labels for images in splits])
    names = tuple(name for images in splits for name in images.names)
    decoded = [images for images in splits if isinstance(images, Images)]
    if opened.pixels is None or not decoded:
        return replace(splits[0], labels=labels, names=names)
    begins = itertools.accumulate((len(images.pixels) for images in decoded), initial=0)
    at = np.concatenate([begin + images.offsets for begin, images in zip(begins, decoded, strict=False)])
    return Images(opened.pixels, at, np.concatenate([images.sizes for images in decoded]), labels, names)


def _relabelled(data: str, images: Split, opened: _Opened, classes: tuple[str, ...], others: bool) -> Split:
    """The images with their labels as indices into `classes`, -1 if of none of them.

    Raises:
        BadInput: some are of none of them, and `others` may not be.
    """
    place = {name: label for label, name in enumerate(classes)}
    label_of = [
        # A class goes by its folder's name where one of the two data sets has no `words.txt`, and by both where the
        # other has more classes of the same name.
        next((place[name] for name in (readable, f"{readable} ({folder})", folder) if name in place), -1)
        for readable, folder in zip(opened.dataset.classes, opened.folders, strict=True)
    ]
    unknown = [opened.folders[label] for label in np.unique(images.labels) if label_of[label] < 0]
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
