"""What a model looks at, for people: a page with images lit where it looks and the paper's figure 7, and a picture of
each image to be shared."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.PngImagePlugin import PngInfo

from vitrail.errors import BadInput
from vitrail.evaluation.evaluate import pick_device
from vitrail.explanation import explain
from vitrail.explanation.looks import (
    GUESSES,
    MOST,
    Explained,
    Look,
    called,
    class_of,
    lightest,
    look,
    numbers,
    open_model,
    some_images,
)
from vitrail.pages import panes
from vitrail.pages.pictures import Thumbnail, Tick, nice_ticks, percent
from vitrail.pages.report import fill
from vitrail.progress import say
from vitrail.vit.model import VisionTransformer
from vitrail.weights.files import write, write_text
from vitrail.weights.load import is_run

MARK = "vitrail explain"  # by which pages and pictures of ours are known,
OURS = re.compile(r".+\.(png|html)(\.\d+)?")  # and by their names; the numbered are what a killed call left
SIDE, SMALL, SHARED = 224, 64, 448  # of an image on the page, lit by one head, and on a picture to be shared: pixels
SIMILARITIES = 480  # and of the similarities of positions, about
PANES = 6_000_000  # pixels of all panes of heads on a page, at most: some 6 MB


def explain_run(
    source: Path, files: Sequence[Path], output: Path | None = None, *, target: str | None = None,
    data: str | None = None, image_size: int | None = None,
) -> Path:  # fmt: skip
    """Write `explain.html`, and a picture of each image beside it, and return the page's path. In a folder that is
    named, what an earlier call wrote there gives way, which is said, and nothing else does.

    Args:
        source: a run folder, or anything else that `vitrail import` takes.
        files: images to look at; some of the data set if there are none.
        output: the folder; by default `explain` in a run folder, and `NAME-explain` in this one for other weights, or,
            where that is there, `explain-2` and so on.
        target: the class for which it is shown what speaks for it; the predicted one by default.
        data: the data set, if not the run's own.
        image_size: side of the images that the model is to see, if not of those that it was made for.

    Raises:
        BadInput: the model, the images or the class are not there, or the folder has something else in it.
    """
    if output is None:
        wanted = source / "explain" if is_run(source) else Path(f"{called(source)}-explain")
        names = itertools.chain([wanted.name], (f"{wanted.name}-{number}" for number in itertools.count(2)))
        output = next(path for path in map(wanted.with_name, names) if not path.exists())
    check_folder(output)
    explained = open_model(source, image_size)
    number = class_of(explained, target) if target is not None else None
    where, images = some_images(source, explained, files, data)
    explained.model.to(pick_device("auto"))
    looks, distances = look(explained, images, number)
    if (output / "explain.html").exists():
        say(f"vitrail: what an earlier call wrote in {output} gives way to this one's")
    for old in output.glob("*"):
        if old.name != "explain.html" and _is_ours(old):
            old.unlink()
    titles = called_apart([each.name for each in looks])
    shared = [share(output, each, explained, title) for each, title in zip(looks, titles, strict=True)]
    write_text(output / "explain.html", page(explained, looks, distances, where, titles, shared))
    return output / "explain.html"


def check_folder(folder: Path) -> None:
    """Make sure that the page can go there. Hidden files, which systems leave in folders, are in nobody's way.

    Raises:
        BadInput: there is a file of that name, or a folder with other things in it.
    """
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file; name a folder with --output.")
    others = [path.name for path in sorted(folder.glob("*")) if not (path.name.startswith(".") or _is_ours(path))]
    if others:
        raise BadInput(
            f"{folder} has {', '.join(others[:3])}{' …' * (len(others) > 3)} in it, which this command did not write; "
            "name a folder of its own with --output."
        )


def _is_ours(path: Path) -> bool:
    if not path.is_file() or not OURS.fullmatch(path.name):
        return False
    with path.open("rb") as file:
        return MARK.encode() in file.read(4000)


def called_apart(names: Sequence[str]) -> list[str]:
    """What images are called below their pictures: like their files, and where several are called so, by the path as it
    was typed."""
    stems = Counter(Path(name).stem for name in names)
    return [name if stems[Path(name).stem] > 1 else Path(name).name for name in names]


def share(folder: Path, one: Look, explained: Explained, title: str) -> str:
    """Write the picture of an image, which has that title, and of what the model looks at in it; returns the file's
    name."""
    large = panes.enlarge(one.pixels, SHARED)
    after = f", after {explained.done}" if explained.done else ""
    looks = f"where {explained.name} looks{explained.resized}{after}"
    row = [
        (large, f"{title}\n{verdict(one, explained.classes)}"),
        (panes.shine(large, one.rollout), f"{looks}\n{most(one.rollout)}"),
    ]
    if one.gradient is not None:
        target = f"{explained.classes[one.target]} ({percent(dict(one.guesses)[one.target], 0)})"
        row.append((panes.shine(large, one.gradient), f"what speaks for {target}\n{most(one.gradient)}"))
    plain = re.sub(r"[^\w.-]", "_", Path(one.name).stem)[:80] or "image"
    names = (plain, *(f"{plain}-{number}" for number in range(2, MOST + 2)))
    path = next(path for path in (folder / f"{name}.png" for name in names) if not path.exists())
    about, picture = PngInfo(), panes.side_by_side(row)
    about.add_text("Software", MARK)
    write(path, lambda file: picture.save(file, "PNG", pnginfo=about))
    return path.name


def verdict(one: Look, classes: Sequence[str]) -> str:
    """What an image is, as far as that is known, and what it is taken for; nothing where no classes were learnt."""
    if not one.guesses:
        return ""
    said, sure = classes[one.guesses[0][0]], percent(one.guesses[0][1], 0)
    if one.label < 0:
        return f"taken for {said} ({sure})"
    right = one.label == one.guesses[0][0]
    return f"is {classes[one.label]}, {'recognised' if right else f'mistaken for {said}'} ({sure})"


def most(values: NDArray[np.float32]) -> str:
    """How much the lightest patch has, and what it would be if all had as much."""
    found = lightest(values)
    return f"lightest patch {percent(found)}, {percent(1 / values.size)} if even" if found else "no patch"


def page(
    explained: Explained, looks: Sequence[Look], distances: NDArray[np.float32], where: str, titles: Sequence[str],
    shared: Sequence[str],
) -> str:  # fmt: skip
    """The page as HTML."""
    config = explained.model.config
    grey = all((each.pixels == each.pixels[:, :, :1]).all() for each in looks)
    filters, no_filters = _filters(explained.model, grey)
    return fill(
        "explain.html", mark=f'<meta name="generator" content="{MARK}">', name=explained.name, where=where,
        config=config, made_for=explained.made_for, classes=explained.classes, told=explained.told, grey=grey,
        done=explained.done,
        images=[
            _shown(each, title, file, len(looks))
            for each, title, file in zip(looks, titles, shared, strict=True)
        ],
        filters=filters, no_filters=no_filters, similar=_similarities(explained.model),
        distance=_distances(distances),
    )  # fmt: skip


def pane_side(images: int, heads: int) -> int:
    """Side of an image lit by one head, where a page has so many images and each is lit by so many heads: the more of
    them, the smaller, so that pages stay small enough to be sent."""
    return max(min(SMALL, math.isqrt(PANES // (images * heads))), 1)


def _shown(one: Look, title: str, file: str, images: int) -> dict[str, Any]:
    side = pane_side(images, one.heads.shape[0] * one.heads.shape[1])
    large, small = panes.enlarge(one.pixels, SIDE), panes.enlarge(one.pixels, side)
    heads = [panes.shine(small, values) for layer in one.heads for values in layer]
    return {
        "name": one.name, "title": title, "file": file, "label": one.label, "target": one.target,
        "guesses": one.guesses, "asked": len(one.guesses) > GUESSES,
        "picture": panes.embed(large), "rollout": panes.embed(panes.shine(large, one.rollout)),
        "gradient": None if one.gradient is None else panes.embed(panes.shine(large, one.gradient)),
        "most": lightest(one.rollout), "most_for": 0.0 if one.gradient is None else lightest(one.gradient),
        "heads": panes.embed(panes.window(heads, one.heads.shape[1])),
    }  # fmt: skip


def _filters(model: VisionTransformer, grey: bool) -> tuple[Thumbnail | None, str]:
    """What the model sees in a patch, or a sentence that says why that cannot be drawn."""
    try:
        components = numbers(explain.embedding_filters(model, grey=grey))
    except BadInput as error:
        return None, str(error)
    cells = [panes.enlarge(panes.signed(each), 48) for each in components]
    return panes.embed(panes.window(cells, min(7, len(cells))), exact=True), ""


def _similarities(model: VisionTransformer) -> dict[str, Any]:
    """A window of windows: in the place of each patch, how like its position is to all. A position is wholly like
    itself, which is left out of the range of colours."""
    values = numbers(explain.position_similarity(model))
    side = len(values)
    others = values.reshape(side**2, side**2)[~np.eye(side**2, dtype=bool)] if side > 1 else values.ravel()
    low, high = float(others.min()), float(others.max())
    times = max(SIMILARITIES // (side * side), 1)
    cells = [panes.heat(each, low, high) for row in values for each in row]
    cells = [cell.repeat(times, axis=0).repeat(times, axis=1) for cell in cells]
    scale = panes.heat(np.linspace(0, 1, 64, dtype=np.float32)[None], 0.0, 1.0)
    return {"picture": panes.embed(panes.window(cells, side), exact=True), "low": low, "high": high,
            "scale": panes.embed(scale, exact=True)}  # fmt: skip


def _distances(distances: NDArray[np.float32]) -> dict[str, Any]:
    """The dots of the plot, in percent of it: of each head of each layer."""
    layers, heads = distances.shape
    up = nice_ticks(0.0, max(float(distances.max()), 1e-6))

    def across(layer: int) -> float:
        return 100 * (layer - 0.5) / layers

    step = math.ceil(layers / 8)
    return {
        "x": [Tick(across(layer), f"{layer}") for layer in range(1, layers + 1, step)],
        "y": [Tick(100 - 100 * tick / up[-1], f"{tick:g}") for tick in up],
        "dots": [
            {"x": across(layer + 1), "y": 100 - 100 * float(distances[layer, head]) / up[-1],
             "text": f"layer {layer + 1}, head {head + 1}: {distances[layer, head]:.1f} pixels"}
            for layer in range(layers) for head in range(heads)
        ],
        "nearest": float(distances.min()), "farthest": float(distances.max()),
    }  # fmt: skip
