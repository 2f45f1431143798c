"""What the files of a data set are: which is whose split's image of which class, told by their names alone."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from vitrail.data.archives import Storage
from vitrail.errors import BadInput

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm",
    ".pnm", ".jp2", ".tga", ".avif",
)  # fmt: skip
ROW = ".image"  # of names that are rows of a table: images, whatever their format
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
ANNOTATIONS = "val_annotations.txt"  # Tiny ImageNet's: image, class and bounding box, a line each

HELD_OUT = 0.2  # of each class, where a data set comes without a split to be judged by
SEED = 0  # of that, and of every slice held out: fixed, so that no run trains on what another is judged by

Tree = dict[str, list[str]]  # class folder → its images


@dataclass
class Layout:
    """`splits`: split → class folder → names of its images, below `prefix`, the folders that wrap everything; there
    may be no `train`. `left_out`: files that are not taken. A class without images has an empty list. Nothing is
    judged yet."""

    prefix: str
    splits: dict[str, Tree]
    left_out: list[str] = field(default_factory=list)
    divided: bool = False  # it came without a split to be judged by, and was given one


def is_image(name: str) -> bool:
    """Whether a file is taken for an image, by its name."""
    return name.lower().endswith((*IMAGE_SUFFIXES, ROW))


def read_layout(storage: Storage, data: str) -> Layout:
    """Finds the splits, `train/CLASS/**` with `val|valid|validation` or `test`; Tiny ImageNet's, whose validation
    images lie in one folder, with their classes in `val_annotations.txt`; or the classes, `CLASS/**` alone.
    In the last case, and where there is a `train` alone, a fifth of each class becomes `test`. There may be only
    `val` and `test`, to be evaluated on. `data` is what messages call it.

    Raises:
        BadInput: it is none of these; there are no images; the annotations lack one.
    """
    names = sorted(storage.names())
    if not any(map(is_image, names)):
        endings = ", ".join(IMAGE_SUFFIXES)
        raise BadInput(f"{data} has no images (files whose names end in {endings}).")
    prefix = _wrapping(names)
    names = [name[len(prefix) :] for name in names if len(name) > len(prefix) and name.startswith(prefix)]
    folders = _split_folders(names, data)
    if not folders:
        layout = Layout(prefix, {})
        layout.splits["train"] = _classes(names, "", layout.left_out)
    else:
        layout = _read_splits(storage, data, prefix, names, folders)
    if not any(images for tree in layout.splits.values() for images in tree.values()):
        raise BadInput(f"{data} has images, but in no folder; put those of each class into a folder of its own.")
    if not any(layout.splits.get("val", {}).values()) and not any(layout.splits.get("test", {}).values()):
        layout.divided = True
        kept, held = {}, {}
        for folder, images in layout.splits["train"].items():
            kept[folder], held[folder] = hold_out(images, HELD_OUT, "test")
        layout.splits = {"train": kept, "test": held}
    return layout


def hold_out(names: Sequence[str], share: float, purpose: str) -> tuple[list[str], list[str]]:
    """Divides the images of one class: what is kept, and the `share` (0 to 1) that is held out. It holds out at
    least one of two or more, and keeps at least one. Both are sorted.

    An image is chosen by a hash of its name, so that the choice is the same on any machine and with any version,
    in a folder and in an archive of it, and hardly changes when images are added.
    """
    count = min(max(round(len(names) * share), 1), len(names) - 1) if share > 0 and names else 0

    def rank(name: str) -> bytes:
        return hashlib.blake2b(f"{SEED} {purpose} {name}".encode("utf-8", "surrogateescape")).digest()

    ranked = sorted(names, key=rank)
    return sorted(ranked[count:]), sorted(ranked[:count])


def readable_names(storage: Storage, prefix: str, folders: Sequence[str]) -> tuple[str, ...]:
    """What classes are called: the first synonym that `words.txt` has for a folder's name (a WordNet id), where
    there is such a file; the folder's name otherwise. Where two are the same, the folder's name is added."""
    if f"{prefix}words.txt" not in set(storage.names()):
        return tuple(folders)
    wanted, words = set(folders), {}
    for line in storage.read(f"{prefix}words.txt").decode("utf-8", "replace").splitlines():
        folder, _, synonyms = line.partition("\t")
        if folder in wanted and synonyms.strip():
            words[folder] = synonyms.split(",")[0].strip()
    names = [words.get(folder, folder) for folder in folders]
    return tuple(
        f"{name} ({folder})" if names.count(name) > 1 and name != folder else name
        for name, folder in zip(names, folders, strict=True)
    )


def _wrapping(names: Sequence[str]) -> str:
    """The folders that wrap everything: as long as there is one folder alone, with folders of images in it."""
    images = [name.split("/") for name in names if is_image(name)]
    depth = 0
    while len({tuple(parts[: depth + 1]) for parts in images}) == 1 and all(len(parts) > depth + 2 for parts in images):
        depth += 1
    return "".join(f"{part}/" for part in images[0][:depth])


def _split_folders(names: Sequence[str], data: str) -> dict[str, str]:
    """Split → its folder at the top; empty where the folders at the top are classes."""
    top = {name.split("/")[0] for name in names if "/" in name and is_image(name)}
    folders: dict[str, str] = {}
    for folder in sorted(top):
        split = SPLITS.get(folder.lower())
        if split in folders:
            raise BadInput(f"{data} has {folders[split]}/ as well as {folder}/; leave one of them.")
        if split:
            folders[split] = folder
    # A folder `train` with images right in it, beside `car` and `bus`, is a class.
    train = folders.get("train")
    if train and any(name.startswith(f"{train}/") and name.count("/") > 1 and is_image(name) for name in names):
        return folders
    if set(folders.values()) != top:
        return {}
    if train:
        raise BadInput(f"{data} has images right in {train}/; put those of each class into a folder of its own there.")
    return folders


def _read_splits(storage: Storage, data: str, prefix: str, names: Sequence[str], folders: dict[str, str]) -> Layout:
    layout = Layout(prefix, {})
    within: dict[str, list[str]] = {folder: [] for folder in folders.values()}
    for name in names:
        folder = name.split("/")[0]
        if folder in within:
            within[folder].append(name)
        elif not name.endswith("/"):
            layout.left_out.append(name)
    train: Tree = {}
    if "train" in folders:
        train = layout.splits["train"] = _classes(within[folders["train"]], f"{folders['train']}/", layout.left_out)
    annotated = False
    if "val" in folders:
        folder, inside = folders["val"], within[folders["val"]]
        loose = [name for name in inside if is_image(name) and _is_loose(name)]
        annotated = f"{folder}/{ANNOTATIONS}" in inside
        if loose and annotated:
            lines = storage.read(f"{prefix}{folder}/{ANNOTATIONS}").decode("utf-8", "replace").splitlines()
            layout.splits["val"] = _annotated(loose, lines, train)
            inside = sorted(set(inside) - set(loose) - {f"{folder}/images/"})
        elif loose and all(name.count("/") == 1 for name in loose):
            raise BadInput(
                f"{data} has images right in {folder}/; put those of each class into a folder of its own, "
                f"or give a {ANNOTATIONS} with their classes."
            )
        for name, images in _classes(inside, f"{folder}/", layout.left_out).items():
            tree = layout.splits.setdefault("val", {})
            tree[name] = sorted(tree.get(name, []) + images)
    if "test" in folders:
        tree = _classes(within[folders["test"]], f"{folders['test']}/", layout.left_out)
        if annotated and not set(tree) & set(train):
            layout.left_out += [name for images in tree.values() for name in images]  # Tiny ImageNet's has no labels
        else:
            layout.splits["test"] = tree
    return layout


def _is_loose(name: str) -> bool:
    """Whether an image of val/ lies in it or in its images/, as Tiny ImageNet's do, and not in a class's folder."""
    parts = name.split("/")
    return len(parts) == 2 or (len(parts) == 3 and parts[1] == "images")


def _annotated(images: Sequence[str], lines: Iterable[str], train: Tree) -> Tree:
    """Validation images by the classes that the lines of `val_annotations.txt` give them."""
    folder_of = {}
    for line in lines:
        image, _, rest = line.partition("\t")
        folder_of[image] = rest.partition("\t")[0].strip()
    tree: Tree = {folder: [] for folder in train}
    for name in images:
        folder = folder_of.get(name.rpartition("/")[2])
        if not folder:
            raise BadInput(f"{ANNOTATIONS} does not say the class of {name}; add it, or remove the image.")
        tree.setdefault(folder, []).append(name)
    return tree


def _classes(names: Iterable[str], prefix: str, left_out: list[str]) -> Tree:
    """The class folders right below `prefix`, each with all images in it, at any depth."""
    tree: Tree = {}
    for name in names:
        folder, slash, rest = name[len(prefix) :].partition("/")
        if not slash:
            if folder:
                left_out.append(name)
            continue
        images = tree.setdefault(folder, [])
        if is_image(name):
            images.append(name)
        elif rest and not name.endswith("/"):
            left_out.append(name)
    return tree
