"""What is in a data set, and what is wrong with it."""

import dataclasses
import hashlib
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitrail.data.archives import Storage
from vitrail.data.cifar import unpacked
from vitrail.data.images import Unreadable, locate, parse_image, read_file, to_rgb
from vitrail.data.layouts import HELD_OUT, Layout, Tree, read_layout, readable_names
from vitrail.data.workers import work_through
from vitrail.progress import counted, track

AT_ONCE = 64  # images that a worker looks at between two reports
SHOWN = 10  # names shown of each problem; `to_dict` has all


@dataclass(frozen=True)
class SplitFigures:
    """`images` and `classes` that have some; the fewest, the median and the most images of one."""

    images: int
    classes: int
    fewest: int
    median: float
    most: int


@dataclass(frozen=True)
class Problem:
    """What is wrong: `kind` for programs, `message` for people, and the files or classes that it is about."""

    kind: str
    message: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """What is in a data set. `sizes` ("64 × 48", width first), `modes` (Pillow's: RGB, L …) and `formats` count
    images, the most frequent first; `smallest` and `largest` are sides in pixels; `bytes` are those of the image
    files; `divided`: it came without a split to be judged by, and was given one; `left_out` are files that are not
    taken for images of a class."""

    name: str
    classes: tuple[str, ...]
    splits: dict[str, SplitFigures]
    divided: bool
    bytes: int
    sizes: dict[str, int]
    smallest: int
    largest: int
    modes: dict[str, int]
    formats: dict[str, int]
    left_out: tuple[str, ...]
    problems: tuple[Problem, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class _Look:
    """One image, looked at. `digest` is of its pixels, upright and in RGB; `reason` is why it cannot be read."""

    length: int
    size: tuple[int, int] = (0, 0)
    mode: str = ""
    format: str = ""
    digest: bytes = b""
    reason: str = ""


@dataclass(frozen=True)
class _Image:
    """Where an image stands, and how it looks."""

    name: str
    split: str
    folder: str
    look: _Look


def inspect(data: str) -> Inspection:
    """Reads every image of a data set, on all cores.

    Raises:
        BadInput: there is no such data set, or no images are found in it.
    """
    name, storage = locate(data)
    storage = unpacked(storage)
    layout = read_layout(storage, data)
    stands = [
        (split, folder, image)
        for split, tree in layout.splits.items()
        for folder, images in sorted(tree.items())
        for image in images
    ]
    tasks = [
        [layout.prefix + image for _, _, image in stands[start : start + AT_ONCE]]
        for start in range(0, len(stands), AT_ONCE)
    ]
    looks: list[_Look] = []
    with track(len(stands), f"Looking at {name}", "images") as advance:
        for found in work_through(_look_at, storage, tasks):
            looks += found
            advance(len(found))
    images = [_Image(image, split, folder, look) for (split, folder, image), look in zip(stands, looks, strict=True)]
    sound = [image.look for image in images if not image.look.reason]
    folders = sorted({folder for tree in layout.splits.values() for folder, some in tree.items() if some})
    return Inspection(
        name=name,
        classes=readable_names(storage, layout.prefix, folders),
        splits={split: _figures(tree) for split, tree in layout.splits.items()},
        divided=layout.divided,
        bytes=sum(look.length for look in looks),
        sizes=_counts(f"{look.size[0]} × {look.size[1]}" for look in sound),
        smallest=min((min(look.size) for look in sound), default=0),
        largest=max((max(look.size) for look in sound), default=0),
        modes=_counts(look.mode for look in sound),
        formats=_counts(look.format for look in sound),
        left_out=tuple(sorted(layout.left_out)),
        problems=tuple(_problems(layout, images)),
    )


def _look_at(storage: Storage, names: list[str]) -> list[_Look]:
    """In a worker."""
    looks = []
    for name in names:
        content = b""
        try:
            content = read_file(storage, name)
            image = parse_image(content)
            size, mode, kind = image.size, image.mode, image.format or ""
            rgb = to_rgb(image)
            digest = hashlib.blake2b(repr(rgb.size).encode() + rgb.tobytes(), digest_size=16).digest()
            looks.append(_Look(len(content), size, mode, kind, digest))
        except Unreadable as error:
            looks.append(_Look(len(content), reason=str(error)))
    return looks


def _figures(tree: Tree) -> SplitFigures:
    counts = [len(images) for images in tree.values() if images]
    if not counts:
        return SplitFigures(0, 0, 0, 0.0, 0)
    return SplitFigures(sum(counts), len(counts), min(counts), statistics.median(counts), max(counts))


def _counts(values: Iterator[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _problems(layout: Layout, images: Sequence[_Image]) -> Iterator[Problem]:
    unreadable = [f"{image.name}: {image.look.reason}" for image in images if image.look.reason]
    yield from _some("unreadable", unreadable, "image", "that cannot be read, to be mended or removed")
    yield from _class_problems(layout)
    alike: dict[bytes, list[_Image]] = defaultdict(list)
    for image in images:
        if not image.look.reason:
            alike[image.look.digest].append(image)
    groups = [group for group in alike.values() if len(group) > 1]
    leaked = [_same(group) for group in groups if len({image.split for image in group}) > 1]
    passing = "in more than one split; learning by heart would pass for success"
    yield from _some("leaked", leaked, "picture", passing)
    for split in layout.splits:
        within = [[image for image in group if image.split == split] for group in groups]
        torn = [_same(group) for group in within if len({image.folder for image in group}) > 1]
        yield from _some("ambiguous", torn, "picture", f"in more than one class of {split}")


def _class_problems(layout: Layout) -> Iterator[Problem]:
    trained = {folder for folder, images in layout.splits.get("train", {}).items() if images}
    if not trained:
        yield Problem("no train", "no images in train/CLASS/: it can be evaluated on, but nothing can be trained", ())
    elif len(trained) < 2:
        yield Problem("one class", "one class with images; it takes two or more to train", ())
    for split, tree in layout.splits.items():
        if split != "train" and layout.divided:
            continue  # what it lacks is of our making: a class of one image
        having = {folder for folder, images in tree.items() if images}
        for kind, lacking, what in (
            ("empty", tree.keys() - having, f"without images in {split}"),
            ("untrained", having - trained, f"in {split}, but not in train"),
            ("untested", trained - having, f"in train, but not in {split}"),
        ):
            if kind == "empty" or (split != "train" and trained):
                yield from _some(kind, sorted(lacking), "class", what, "classes")


def _some(kind: str, names: list[str], one: str, what: str, several: str = "") -> Iterator[Problem]:
    """A problem, if it has names; each is that of `one` thing, `several` of which are called so."""
    if names:
        yield Problem(kind, f"{counted(len(names), one, several)} {what}", tuple(names))


def _same(group: Sequence[_Image]) -> str:
    return " = ".join(sorted(image.name for image in group))


def show(inspection: Inspection, console: Console) -> None:
    """Prints what was found, for people."""
    total = sum(split.images for split in inspection.splits.values())
    classes = counted(len(inspection.classes), "class", "classes")
    console.print(Text(f"{inspection.name}: {counted(total, 'image')} of {classes}", style="bold"))
    console.print(Text(f"classes  {_first(inspection.classes, ', ')}"))
    console.print(Text(f"sizes    {_shares(inspection.sizes)}; sides of {inspection.smallest} to {inspection.largest}"))
    console.print(Text(f"modes    {_shares(inspection.modes)}"))
    console.print(Text(f"files    {_shares(inspection.formats)}; {inspection.bytes / 1e6:,.1f} MB"))
    if inspection.left_out:
        left_out = counted(len(inspection.left_out), "file")
        console.print(Text(f"left out {left_out}: {_first(inspection.left_out, ', ', 3)}"))
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("split", "images", "classes", "fewest a class", "median", "most"):
        grid.add_column(heading, justify="left" if heading == "split" else "right")
    for name, split in inspection.splits.items():
        figures = (split.images, split.classes, split.fewest, split.median, split.most)
        grid.add_row(name, *(f"{figure:,g}" if figure < 1e5 else f"{figure:,.0f}" for figure in figures))
    console.print()
    console.print(grid)
    if inspection.divided:
        console.print(f"It has no val or test of its own: {HELD_OUT:.0%} of each class is test, the same in all runs.")
    console.print()
    if not inspection.problems:
        console.print("Nothing is wrong with it.")
    for problem in inspection.problems:
        console.print(Text(f"! {problem.message}", style="bold red"))
        for name in problem.names[:SHOWN]:
            console.print(Text(f"  {name}"))
        if len(problem.names) > SHOWN:
            console.print(f"  … and {len(problem.names) - SHOWN:,} more (--json lists all)")


def _shares(counts: dict[str, int]) -> str:
    total = sum(counts.values())
    shown = ", ".join(f"{name} ({count / total:.1%})" for name, count in list(counts.items())[:5])
    return f"{shown}, and {len(counts) - 5:,} more" if len(counts) > 5 else shown or "none"


def _first(names: Sequence[str], between: str, count: int = SHOWN) -> str:
    return between.join(names[:count]) + (f"{between}…" if len(names) > count else "")
