"""CIFAR-10 and CIFAR-100 (Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009) in their binary
version, which has no pickle in it: files of records, each the labels of an image, a byte each, and its 32 × 32 pixels,
all red ones first, then green, then blue (https://www.cs.toronto.edu/~kriz/cifar.html)."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrail.data.archives import Storage
from vitrail.errors import BadInput

SIDE = 32
PIXELS = 3 * SIDE**2


@dataclass(frozen=True)
class Kind:
    """One of the two: its files, how many bytes of labels a record has, the last of which is the class, and the file
    with the names of the classes."""

    files: dict[str, tuple[str, ...]]  # split → files of records
    labels: int
    classes: str


KINDS = (
    Kind({"train": tuple(f"data_batch_{n}.bin" for n in range(1, 6)), "test": ("test_batch.bin",)}, 1,
         "batches.meta.txt"),
    Kind({"train": ("train.bin",), "test": ("test.bin",)}, 2, "fine_label_names.txt"),
)  # fmt: skip


def unpacked(storage: Storage) -> Storage:
    """The storage itself or, where it has the files of one of the two, the images in them."""
    names = storage.names()
    for kind in KINDS:
        first = kind.files["train"][0]
        for prefix in (name.removesuffix(first) for name in names if name.rpartition("/")[2] == first):
            files = (kind.classes, *(file for files in kind.files.values() for file in files))
            if all(f"{prefix}{file}" in names for file in files):
                return Cifar(storage, kind, prefix)
    return storage


class Cifar:
    """The images as files in folders of classes: `train/frog/00000.ppm`, where the number is that of the record.

    Args:
        storage: has the files of records.
        kind: which of the two it is.
        prefix: stands before the names of its files.

    Raises:
        BadInput: on first use, where a file is cut short, or has a label that there is no name for.
    """

    def __init__(self, storage: Storage, kind: Kind, prefix: str) -> None:
        self.storage, self.kind, self.prefix = storage, kind, prefix
        self.records = lru_cache(self._records)

    def __reduce__(self) -> tuple[Any, ...]:
        return Cifar, (self.storage, self.kind, self.prefix)

    def _records(self, file: str) -> NDArray[np.uint8]:
        """The records of a file, a row each."""
        content = np.frombuffer(self.storage.read(self.prefix + file), np.uint8)
        length = self.kind.labels + PIXELS
        if not len(content) or len(content) % length:
            raise BadInput(f"{self.prefix}{file} is damaged: {len(content):,} bytes are no records of {length:,}.")
        return content.reshape(-1, length)

    @cached_property
    def _places(self) -> dict[str, tuple[str, int]]:
        """Where each image is: the file, and the number of its record there."""
        lines = self.storage.read(self.prefix + self.kind.classes).decode("utf-8", "replace").splitlines()
        classes, places = [line.strip() for line in lines if line.strip()], {}
        for split, files in self.kind.files.items():
            number = 0
            for file in files:
                for row, label in enumerate(self.records(file)[:, self.kind.labels - 1].tolist()):
                    if label >= len(classes):
                        raise BadInput(
                            f"{self.prefix}{file} is damaged: record {row} is of class {label}, and "
                            f"{self.kind.classes} has names of {len(classes)}."
                        )
                    places[f"{split}/{classes[label]}/{number:05}.ppm"] = (file, row)
                    number += 1
        return places

    def names(self) -> list[str]:
        """`SPLIT/CLASS/NUMBER.ppm`."""
        return list(self._places)

    def read(self, name: str) -> bytes:
        """An image as a PPM file."""
        file, row = self._places[name]
        colours = self.records(file)[row, self.kind.labels :].reshape(3, SIDE, SIDE)
        return b"P6 %d %d 255\n" % (SIDE, SIDE) + colours.transpose(1, 2, 0).tobytes()

    def fingerprint(self) -> str:
        """That of the files."""
        return self.storage.fingerprint()
