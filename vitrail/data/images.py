"""Where images come from: a folder, an archive, Tiny ImageNet, CIFAR, digits, Hugging Face's data sets; and how each
becomes pixels."""

import io
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from vitrail.data.archives import SUFFIXES, Storage, cache_root, open_storage
from vitrail.data.cifar import unpacked
from vitrail.data.download import CIFAR_10, CIFAR_100, TINY_IMAGENET, fetch
from vitrail.data.hub import PREFIX, Address, Hub
from vitrail.data.layouts import Layout, is_image, read_layout, readable_names
from vitrail.errors import BadInput, nearest

REMOTES = {"tiny-imagenet": TINY_IMAGENET, "cifar-10": CIFAR_10, "cifar-100": CIFAR_100}
BUILT_IN = ("digits", *REMOTES)

# Stored images keep a margin around the square that the model sees, for random crops: 8/7, which is 256 for 224.
MARGIN = 8 / 7
LONGEST = 4  # a side is stored at up to this many times the other


# What makes an image upright, by the EXIF tag `Orientation` (EXIF 2.3, 4.6.4)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


class Unreadable(BadInput):
    """A file is no image that can be read. The message says why; the name is there where the file was named."""


@dataclass(frozen=True)
class Entry:
    """One image: its path in the source, below the folders that wrap everything, and the index of its class."""

    name: str
    label: int


@dataclass(frozen=True)
class Source:
    """A data set as it is stored.

    `splits` has some of `train`, `val` and `test`, each sorted by label and name. `classes` are shown to people, and
    in the order of `folders`, which are theirs. `fingerprint` changes with the contents. `divided`: it came without a
    split to be judged by, and was given one. `flaw`: why nothing can be trained on it, to be put behind its name;
    empty where it can.
    """

    name: str
    classes: tuple[str, ...]
    folders: tuple[str, ...]
    splits: dict[str, tuple[Entry, ...]]
    fingerprint: str
    storage: Storage
    prefix: str
    divided: bool
    flaw: str


def locate(data: str) -> tuple[str, Storage]:
    """The name of a data set, and where its bytes are, which those of `REMOTES` download first. It lists nothing
    yet.

    Raises:
        BadInput: there is no such data set, or it cannot be had.
    """
    if data == "digits":
        return data, Digits()
    if data in REMOTES:
        return data, open_storage(fetch(REMOTES[data], cache_root()))
    if data.startswith(PREFIX):
        address = Address.parse(data)
        return address.path.resolve().stem if address.path else address.name, Hub(address)
    path = Path(data).expanduser()
    if not data or not path.exists():
        raise BadInput(
            f"there is no data set, folder or archive {data!r}{nearest(data, BUILT_IN)} It can be "
            f"{', '.join(BUILT_IN)}, a folder, an archive ({', '.join(SUFFIXES)}), or {PREFIX}NAME."
        )
    name = path.resolve().name
    suffix = next((suffix for suffix in SUFFIXES if path.is_file() and name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)] or data, open_storage(path)


def is_there(data: str) -> bool:
    """Whether there is such a data set, as far as can be told without the network."""
    if not data.startswith(PREFIX):
        return data in BUILT_IN or Path(data).expanduser().exists()
    try:
        Address.parse(data)
    except BadInput:
        return False
    return True


def read_source(data: str, name: str, storage: Storage) -> Source:
    """The data set that `locate` has found. `data` is what messages call it.

    Raises:
        BadInput: it has no images, or they lie as those of no data set do.
    """
    storage = unpacked(storage)
    layout = read_layout(storage, data)
    folders = sorted({folder for tree in layout.splits.values() for folder, images in tree.items() if images})
    splits = {}
    for split, tree in layout.splits.items():
        entries = [Entry(image, label) for label, folder in enumerate(folders) for image in tree.get(folder, [])]
        if entries:
            splits[split] = tuple(entries)
    classes = readable_names(storage, layout.prefix, folders)
    return Source(
        name, classes, tuple(folders), splits, storage.fingerprint(), storage, layout.prefix, layout.divided,
        _flaw(layout),
    )  # fmt: skip


def _flaw(layout: Layout) -> str:
    """Why nothing can be trained and judged on a data set: what follows its name in the sentence that says so."""
    having = {split: {folder for folder, some in tree.items() if some} for split, tree in layout.splits.items()}
    trained = having.pop("train", set())
    judged = [split for split, folders in having.items() if folders]
    if not trained:
        return f"has images in {' and '.join(judged)}, but none to train on; those go to train/CLASS/."
    if len(trained) < 2:
        return "has one class with images to train on; it takes two or more."
    for split in judged:
        if unknown := sorted(having[split] - trained):
            some = f"{', '.join(unknown[:5])}{' …' if len(unknown) > 5 else ''}"
            return f"has images of {some} in {split}, but none to train on; add some, or take that folder away."
    if not judged:
        return "has one image a class; it takes two or more, to train on some and test on others."
    return ""


class Digits:
    """scikit-learn's 1,797 scans of handwritten digits, 8 × 8 pixels in 17 greys, as files in folders of classes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Digits, ()

    @cached_property
    def _files(self) -> dict[str, bytes]:
        from sklearn.datasets import load_digits  # takes a second to import, which a cached data set need not

        digits = load_digits()
        scans = np.round(digits.images * (255 / 16)).astype(np.uint8)
        return {
            f"{label}/{index:04}.pgm": b"P5 8 8 255\n" + scan.tobytes()
            for index, (label, scan) in enumerate(zip(digits.target, scans, strict=True))
        }

    def names(self) -> list[str]:
        """`CLASS/INDEX.pgm`, where the index is scikit-learn's."""
        return list(self._files)

    def read(self, name: str) -> bytes:
        """A scan as a PGM file."""
        return self._files[name]

    def fingerprint(self) -> str:
        """The scans do not change."""
        return "1797"


@contextmanager
def _unreadable(name: str = "") -> Iterator[None]:
    """Turns whatever goes wrong with a file into Unreadable. Pillow's decoders raise anything on bad input (OSError,
    SyntaxError, struct.error, zlib.error, KeyError …), and warn of much that does no harm."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except MemoryError:
            raise  # of which the file is innocent
        except Exception as error:
            raise Unreadable(f"{name}: {_reason(error)}" if name else _reason(error)) from None


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} million pixels"
    if isinstance(error, UnidentifiedImageError):
        return "it is no image, or of a format that Pillow cannot read"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return reason.strip().rstrip(".") or type(error).__name__


def read_file(storage: Storage, name: str) -> bytes:
    """The bytes of a file.

    Raises:
        Unreadable: it is not there, or cannot be read.
    """
    with _unreadable():
        return storage.read(name)


def parse_image(content: bytes) -> Image.Image:
    """The image that a file's bytes are, not decoded yet.

    Raises:
        Unreadable: they are no image.
    """
    with _unreadable():
        return Image.open(io.BytesIO(content))


def _check_file(path: Path) -> None:
    """Say what would do where there is no file of that name."""
    if path.is_dir():
        suffixes = Counter(file.suffix for file in path.iterdir() if is_image(file.name))
        those = " ".join(f"{path}/*{suffix}" for suffix, _ in suffixes.most_common())
        inside = f": {those}" if suffixes else ", of which there is none"
        raise Unreadable(f"{path}: it is a folder; name the images in it{inside}")
    if not path.exists():
        there = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest(path.name, there).rstrip(".") or f" in {path.parent.resolve()}"
        raise Unreadable(f"{path}: there is no such file{near}")


def open_image(path: Path) -> Image.Image:
    """The image in a file, not decoded yet.

    Raises:
        Unreadable: it is not there, is no image, or cannot be read. The message names it, and so does that of what
            goes wrong when it is decoded.
    """
    _check_file(path)
    with _unreadable(str(path)):
        image = Image.open(io.BytesIO(path.read_bytes()))
    image.filename = str(path)
    return image


def to_pixels(image: Image.Image, image_size: int, shorter_side: int | None = None) -> NDArray[np.uint8]:
    """An image as it is stored and as every model sees it: upright, in colour, the aspect kept, with that
    `shorter_side`, or, where none is given, one between `image_size` and 8/7 of that.

    An image whose shorter side is so already is not resized. Without `shorter_side`, a longer one is resized to 8/7 of
    `image_size`, a smaller one to `image_size` (Pillow's bicubic, antialiased), after trimming the longer side, about
    the centre, to four times the shorter. Best given an image that is open but not decoded yet: large JPEGs then decode
    faster, at half the size or less, though never below twice what is wanted.

    Returns:
        uint8 (height, width, 3), RGB, both sides `image_size` or more.

    Raises:
        Unreadable: it is damaged, or its pixels have no set range (floats).
    """
    with _unreadable(getattr(image, "filename", "")):
        shorter = min(image.size)
        wanted = shorter_side or min(max(shorter, image_size), round(image_size * MARGIN))
        if shorter >= 4 * wanted:
            image.draft(None, (2 * wanted, 2 * wanted))
        image = _rgb(image)
        width, height = image.size
        shorter = min(width, height)
        left, top = max(width - LONGEST * height, 0) // 2, max(height - LONGEST * width, 0) // 2
        box = (left, top, left + min(width, LONGEST * height), top + min(height, LONGEST * width))
        scale = wanted / shorter
        size = round((box[2] - box[0]) * scale), round((box[3] - box[1]) * scale)
        if size != image.size:
            image = image.resize(size, Image.Resampling.BICUBIC, box)
        return np.array(image)


def read_pixels(storage: Storage, name: str, image_size: int, shorter_side: int | None = None) -> NDArray[np.uint8]:
    """A file of a data set as `to_pixels` has it.

    Raises:
        Unreadable: it is not there, or is no image that can be read.
    """
    return to_pixels(parse_image(read_file(storage, name)), image_size, shorter_side)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image upright, as its EXIF says, and in RGB: greys (of 16 bits the upper 8), palettes, CMYK; what is
    transparent shows white.

    Raises:
        Unreadable: it is damaged, or its pixels have no set range (floats).
    """
    with _unreadable():
        return _rgb(image)


def _rgb(image: Image.Image) -> Image.Image:
    image.load()
    image = _upright(image)
    if image.mode == "F":
        raise Unreadable("its pixels are floating-point numbers, which have no set range; save it in 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)  # Pillow would cut them off at 255
        if values.min() < 0 or values.max() > 0xFFFF:
            raise Unreadable("its greys go beyond 16 bits; save it in 8 or 16 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        seen = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # damaged EXIF, which is no reason to do without the image
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
