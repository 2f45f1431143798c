"""Data sets that Hugging Face's `datasets` reads, `hf:NAME`: those on its hub by name; files here by path, that is
Parquet, WebDataset tars, a folder of these, or one of images with a `metadata.csv`.

Each row is a file of `Storage`, `SPLIT/CLASS/ROW.image`, with the bytes that the data set has; it is decoded where all
others are. The extra `hub` has the library, which is imported when such a data set is first opened.
"""

import contextlib
import errno
import hashlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from vitrail.data.archives import Folder, archive_fingerprint, cache_root
from vitrail.data.layouts import ROW, SPLITS
from vitrail.errors import BadInput
from vitrail.progress import say

PREFIX = "hf:"
SPELLING = "hf:NAME, hf:NAME:CONFIG, and ?image=COLUMN&label=COLUMN behind either"
BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}  # of one file
LABELS = ("label", "labels", "cls", "class")  # columns that have the class, where none is of the type ClassLabel
PATIENCE = 10.0  # seconds that the hub has to answer


@dataclass(frozen=True)
class Address:
    """What `hf:NAME[:CONFIG][?image=COLUMN&label=COLUMN]` names: a path, or a data set on the hub and one of its
    configurations, if it has several. A column within another is `json.label`."""

    text: str
    name: str
    config: str | None = None
    image: str | None = None
    label: str | None = None

    @staticmethod
    def parse(data: str) -> "Address":
        """Raises BadInput where it is spelled otherwise, or is a path to nothing."""
        name, _, query = data.removeprefix(PREFIX).partition("?")
        config: str | None = None
        if not Path(name).expanduser().exists():
            name, _, config = name.partition(":")
        chosen = dict(parse_qsl(query, keep_blank_values=True))
        if not name or chosen.keys() - {"image", "label"} or not all(chosen.values()):
            raise BadInput(f"{data!r} names no data set; it is spelled {SPELLING}.")
        address = Address(data, name, config or None, chosen.get("image"), chosen.get("label"))
        if address.path is None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            raise BadInput(f"{name} is no folder or file here, and no name that a data set on the hub can have.")
        return address

    @property
    def path(self) -> Path | None:
        """Where it lies, if it is not on the hub."""
        path = Path(self.name).expanduser()
        return path if path.exists() else None


class Hub:
    """The rows of a data set as files in folders of classes. Rows without a label (none, or -1) are left out, and a
    line says so. Classes that are numbers get zeros in front, so that their order is that of the numbers.

    Raises:
        BadInput: on first use, where it cannot be had, or which of its columns are meant does not show.
    """

    def __init__(self, address: Address, splits: dict[str, Any] | None = None) -> None:
        self.address = address
        self._loaded = splits

    def __reduce__(self) -> tuple[Any, ...]:
        return Hub, (self.address, self._splits)  # Arrow files, which a process maps by their paths

    @cached_property
    def _splits(self) -> dict[str, Any]:
        """By name, those that Vitrail can use, each with the columns `image`, not decoded, and `label`."""
        if self._loaded is None:
            self._loaded = _known_splits(_load(self.address), self.address)
        return self._loaded

    @cached_property
    def _columns(self) -> tuple[str, str]:
        return _find_columns(next(iter(self._splits.values())).features, self.address)

    @cached_property
    def _names(self) -> list[str]:
        names, left_out = [], []
        for split, rows in self._splits.items():
            folders = _folders(rows, self._columns[1])
            width = len(str(len(folders)))
            has_label = [(row, folder) for row, folder in enumerate(folders) if folder is not None]
            names += [f"{split}/{folder}/{row:0{width}}{ROW}" for row, folder in has_label]
            if len(has_label) < len(folders):
                left_out.append(f"{len(folders) - len(has_label):,} of {split}")
        if left_out:
            say(f"{self.address.text} has rows without a label, which are left out: {', '.join(left_out)}")
        return names

    def names(self) -> list[str]:
        """`SPLIT/CLASS/ROW.image`, where the number is the row's in its split."""
        return self._names

    def read(self, name: str) -> bytes:
        """The bytes of an image, as its row or the file that it names has them."""
        split, _, row = name.split("/")
        value = self._splits[split][int(row.removesuffix(ROW))][self._columns[0]]
        if isinstance(value, bytes):
            return value
        if value is None or not (value.get("bytes") or value.get("path")):
            raise ValueError("the row has no image")
        return value["bytes"] or Path(value["path"]).read_bytes()

    def fingerprint(self) -> str:
        """Of files here theirs; of the hub's, the classes and the revision that the library keeps its files by."""
        path = self.address.path
        parts = [self.address.image or "", self.address.label or "", self.address.config or ""]
        if path is not None:
            parts.append(Folder(path).fingerprint() if path.is_dir() else archive_fingerprint(path))
        else:
            for split, rows in self._splits.items():
                files = ["/".join(Path(file["filename"]).parts[-4:]) for file in rows.cache_files]
                parts.append(repr((split, len(rows), rows.features, files)))
        return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


def _library() -> Any:
    """The package `datasets`.

    Raises:
        BadInput: it is not installed.
    """
    for name in ("datasets", "huggingface_hub"):
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name, as many have one, is no library
            raise BadInput(
                f"{name} is not installed, which reads hf: data sets: pip install 'vitrail[hub]', or, in a checkout, "
                "pip install -e '.[hub]'."
            )
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    return datasets


def _load(address: Address) -> Any:
    """Its splits, as the library has them. What is on the hub is kept where the library keeps such things, the tables
    that it makes of files here in Vitrail's cache folder.

    Raises:
        BadInput: it cannot be had, or is nothing that the library reads.
    """
    library, path = _library(), address.path
    try:
        if path is None:
            with _offline(address.name, not _reachable(address)):
                return library.load_dataset(address.name, address.config)
        tables = str(cache_root() / "datasets")
        if path.is_dir():
            return library.load_dataset(str(path), address.config, cache_dir=tables)
        if path.suffix not in BUILDERS:
            raise BadInput(f"{path} is neither a folder nor a file that ends in {', '.join(BUILDERS)}.")
        return library.load_dataset(BUILDERS[path.suffix], data_files=str(path.resolve()), cache_dir=tables)
    except (BadInput, MemoryError):
        raise
    except Exception as error:  # there is no knowing what a library raises
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        if isinstance(root, OSError) and root.errno in (errno.ENOSPC, errno.EDQUOT):
            raise root from None
        reason = (str(root).strip().splitlines() or [type(root).__name__])[0][:300].rstrip(". ")
        raise BadInput(f"{address.text} cannot be read: {reason}.") from None


def _reachable(address: Address) -> bool:
    """Whether the hub answers. Asked once, for the library itself would try again for half a minute.

    Raises:
        BadInput: it answers that there is no such data set, or that the user may not have it.
    """
    from huggingface_hub import HfApi, constants, errors

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        HfApi().dataset_info(address.name, timeout=PATIENCE)
    except errors.GatedRepoError:
        raise BadInput(
            f"{address.name} is given on conditions: accept them on {constants.ENDPOINT}/datasets/{address.name}, then "
            "say who you are with `hf auth login`."
        ) from None
    except errors.RepositoryNotFoundError:
        raise BadInput(
            f"there is no data set {address.name!r} on the hub, nor a file or folder of that name here. If it is a "
            "private one, say who you are with `hf auth login`."
        ) from None
    except Exception:  # the library's, its client's or the system's, for whatever stands between here and there
        return False
    return True


@contextlib.contextmanager
def _offline(name: str, offline: bool) -> Iterator[None]:
    """The block does without the hub, with what was downloaded before.

    Raises:
        BadInput: it was not.
    """
    if not offline:
        yield
        return
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    except ConnectionError:
        raise BadInput(
            f"{name} is no file or folder here; {constants.ENDPOINT}, where it may be a data set, cannot be reached, "
            "and it was not downloaded before. Go online, or give the path of a copy that is here, hf:PATH."
        ) from None
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _known_splits(found: Any, address: Address) -> dict[str, Any]:
    """Those that Vitrail can use, ready to be read. One alone, whatever its name, is what is trained on."""
    usable = {name: rows for name, rows in found.items() if name.lower() in SPLITS}
    if not usable and len(found) == 1:
        usable = {"train": next(iter(found.values()))}
    if not usable:
        raise BadInput(f"{address.text} has the splits {', '.join(found)}; one has to be called train, val or test.")
    if others := [str(name) for name in found if name.lower() not in SPLITS and len(found) > 1]:
        say(f"{address.text}: the splits {', '.join(others)} are left out")
    image, label = _find_columns(next(iter(usable.values())).features, address)
    library = _library()
    ready = {}
    for name, rows in usable.items():
        rows = rows.select_columns(list(dict.fromkeys((image, label.partition(".")[0]))))
        if isinstance(rows.features[image], library.Image):
            rows = rows.cast_column(image, library.Image(decode=False))
        ready[name] = rows
    return ready


def _find_columns(features: Any, address: Address) -> tuple[str, str]:
    """Which column has the images, and which the labels, by their types.

    Raises:
        BadInput: there is none, or more than one, of either.
    """
    library = _library()
    images = [name for name, feature in features.items() if isinstance(feature, library.Image)]
    images = images or [name for name, feature in features.items() if _holds_bytes(feature)]
    labels = [name for name, feature in features.items() if isinstance(feature, library.ClassLabel)]
    flat = {f"{name}.{inner}": of for name, feature in features.items() if isinstance(feature, dict)
            for inner, of in feature.items()}  # fmt: skip
    everything = {**features, **flat}
    for within in (features, flat):
        labels = labels or [name for name in within if name.rpartition(".")[2].lower() in LABELS
                            and isinstance(within[name], library.Value | library.ClassLabel)]  # fmt: skip
    chosen = []
    for kind, asked, found in (("image", address.image, images), ("label", address.label, labels)):
        found = [asked] if asked in everything else found
        if len(found) != 1 or asked not in (None, found[0]):
            many = f"several columns that can be the {kind} ({', '.join(found)})"
            problem = f"no column {asked!r}" if asked else many if found else f"no column that can be the {kind}"
            columns = ", ".join(f"{name} ({_type_of(of)})" for name, of in everything.items())
            raise BadInput(f"{address.text} has {problem}. Its columns are {columns}; say which with ?{kind}=COLUMN.")
        chosen.append(found[0])
    return chosen[0], chosen[1]


def _holds_bytes(feature: Any) -> bool:
    """Whether values are files: their bytes, or those beside their path, as `datasets` writes images."""
    feature = feature.get("bytes") if isinstance(feature, dict) else feature
    return getattr(feature, "dtype", "") in ("binary", "large_binary")


def _type_of(feature: Any) -> str:
    if isinstance(feature, dict):
        return "struct"
    return str(feature.dtype) if type(feature).__name__ == "Value" else type(feature).__name__


def _folders(rows: Any, label: str) -> list[str | None]:
    """The folder of each row's class; None where it has none."""
    top, _, inner = label.partition(".")
    values = rows.select_columns([top])[:][top]
    feature = rows.features[top]
    if inner:
        values = [value and value[inner] for value in values]
        feature = feature[inner]
    names: dict[Any, str | None] = {None: None, -1: None}
    known = sorted({value for value in values if value is not None and value != -1})
    width = len(str(known[-1])) if known and isinstance(known[-1], int) else 0
    for value in known:
        text = feature.int2str(value) if hasattr(feature, "int2str") else f"{value:0{width}}" if width else str(value)
        text = re.sub(r"[/\0]", "_", text).strip() or "_"
        names[value] = f"{text} ({value})" if text in names.values() else text
    return [names[value] for value in values]
