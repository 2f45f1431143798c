"""What a model looks at, for people: a page with images lit where it looks and the paper's figure 7, and a picture of
each image to be shared."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from vitrail import cache, explain, panes, weights
from vitrail.batches import evaluation_batches
from vitrail.cache import Images
from vitrail.checkpoint import Run, write, write_text
from vitrail.config import Colours
from vitrail.errors import BadInput, nearest
from vitrail.evaluate import judged_images, pick_device, read_files
from vitrail.formats import HEAD
from vitrail.model import VisionTransformer
from vitrail.passage import Passage, as_used
from vitrail.pictures import Thumbnail, Tick, nice_ticks, percent
from vitrail.pixels import Pixels
from vitrail.progress import track
from vitrail.report import fill
from vitrail.resnet import ResNetConfig

MARK = "vitrail explain"  # by which pages and pictures of ours are known,
OURS = re.compile(r".+\.(png|html)(\.\d+)?")  # and by their names; the numbered are what a killed call left
SHOWN = 8  # images of a data set
MOST = 64  # images on a page
NAMED = 12  # classes that a message names
GUESSES = 3  # classes that are named for an image
SIDE, SMALL, SHARED = 224, 64, 448  # of an image on the page, lit by one head, and on a picture to be shared: pixels
SIMILARITIES = 480  # and of the similarities of positions, about
PANES = 6_000_000  # pixels of all panes of heads on a page, at most: some 6 MB


@dataclass(frozen=True)
class Explained:
    """A model of which it is to be said what it looks at, and what its weights came with. `told`: it has learnt
    classes, so that what it predicts means something."""

    name: str
    model: VisionTransformer
    classes: tuple[str, ...]
    mean: Colours
    std: Colours
    told: bool


@dataclass(frozen=True)
class Look:
    """An image as the model sees it, uint8 (S, S, 3), and what it makes of it: its likeliest classes and their
    probabilities, the rollout (g, g), the gradient-weighted one for `target`, a class, and what each head of each layer
    reads, (L, H, g, g). `label` is -1 where it is not known."""

    name: str
    pixels: NDArray[np.uint8]
    label: int
    guesses: tuple[tuple[int, float], ...]
    target: int
    rollout: NDArray[np.float32]
    gradient: NDArray[np.float32] | None
    heads: NDArray[np.float32]


# What there is to see


def open_model(source: Path, image_size: int | None = None) -> Explained:
    """The model of a run folder, or of anything else that `vitrail import` takes; for images of another size, if one is
    given.

    Raises:
        BadInput: it cannot be read, or is no Vision Transformer, or the size will not do.
    """
    told = True
    if weights.is_run(source):
        run = Run.open(source)
        if isinstance(run.config()[0], ResNetConfig):
            raise BadInput(f"{source} is a run of a ResNet, which has no attention to look at.")
        told = not (run.trained and run.recipe().recipe.self_supervised)
    found = weights.read(source)
    classes = None if HEAD[0] in found.tensors else 1
    model = weights.build(found, source, image_size=image_size, num_classes=classes)
    name = re.sub(r"\.npz$", "", source.resolve().name)
    return Explained(
        name, model, found.classes, found.mean, found.std, told and bool(model.head.weight.any())
    )  # fmt: skip


def some_images(source: Path, explained: Explained, files: Sequence[Path], data: str | None) -> tuple[str, Images]:
    """The images to look at, and what they are: those files, or else some of the split that the model is judged by,
    taken evenly from it. Those of classes that the model does not know are labelled -1.

    Raises:
        BadInput: there are too many, some cannot be read, or there is no data set to take any from.
    """
    size = explained.model.config.image_size
    if len(files) > MOST:
        raise BadInput(f"a page has room for {MOST} images, not for {len(files)}; name fewer at a time.")
    if files:
        if data is not None:
            raise BadInput("--data is where images are taken from if none are named; leave out one of the two.")
        return "", read_files(files, size)
    if weights.is_run(source):
        name, split, images = judged_images(Run.open(source), data, size, explained.classes, others=True)
    elif data is None:
        raise BadInput(f"{source} has no images of its own. Name some to look at, or say with --data D where some are.")
    else:
        name, split, images = cache.load_for_evaluation(data, size, explained.classes, others=True)
    chosen = np.linspace(0, len(images) - 1, min(SHOWN, len(images))).round().astype(np.int64)
    return f"{name}, {split}", images.take(chosen)


def look(explained: Explained, images: Images, target: int | None) -> tuple[list[Look], NDArray[np.float32]]:
    """What the model looks at in each image, for the class `target` or the one that it predicts, and how far each head
    looks in all of them, in pixels (L, H)."""
    model, size = explained.model, explained.model.config.image_size
    device = next(model.parameters()).device
    squares = explain.squares([images.image(number) for number in range(len(images))], size)
    found, distances = list[Look](), list[Tensor]()
    with as_used(model), track(len(images), "looking") as advance:
        for batch, _ in evaluation_batches(Pixels(images, size, device), 1, explained.mean, explained.std):
            number, seen = len(found), Passage(model, batch)
            probabilities = seen.logits().float().cpu().double().softmax(1)  # float64 is what MPS lacks
            sure, classes = (part[0].tolist() for part in probabilities.sort(1, True))
            against = classes[0] if target is None else target
            found.append(
                Look(
                    images.names[number], squares[number], int(images.labels[number]),
                    tuple(zip(classes, sure, strict=True))[:GUESSES] if explained.told else (), against,
                    _numbers(seen.rollout()[0]),
                    _numbers(seen.gradient_rollout([against])[0]) if explained.told else None,
                    np.stack([_numbers(maps[0]) for maps in seen.read_by_heads().values()]),
                )
            )  # fmt: skip
            distances.append(seen.distances())
            advance()
    return found, _numbers(torch.cat(distances).mean(0))


def _numbers(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.float().cpu().numpy()


# How it is shown


def explain_run(
    source: Path, files: Sequence[Path], output: Path | None = None, *, target: str | None = None,
    data: str | None = None, image_size: int | None = None,
) -> Path:  # fmt: skip
    """Write `explain.html`, and a picture of each image beside it, and return the page's path. What an earlier call
    wrote gives way, and nothing else.

    Args:
        source: a run folder, or anything else that `vitrail import` takes.
        files: images to look at; some of the data set if there are none.
        output: the folder; by default `explain` in a run folder, and `NAME-explain` in this one for other weights.
        target: the class for which it is shown what speaks for it; the predicted one by default.
        data: the data set, if not the run's own.
        image_size: side of the images that the model is to see, if not of those that it was made for.

    Raises:
        BadInput: the model, the images or the class are not there, or the folder has something else in it.
    """
    if output is None:
        output = source / "explain" if weights.is_run(source) else Path(f"{source.resolve().stem}-explain")
    check_folder(output)
    explained = open_model(source, image_size)
    number = class_of(explained, target) if target is not None else None
    where, images = some_images(source, explained, files, data)
    explained.model.to(pick_device("auto"))
    looks, distances = look(explained, images, number)
    for old in output.glob("*"):
        if old.name != "explain.html" and _is_ours(old):
            old.unlink()
    shared = [share(output, each, explained) for each in looks]
    write_text(output / "explain.html", page(explained, looks, distances, where, shared, target is not None))
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


def class_of(explained: Explained, name: str) -> int:
    """The number of a class.

    Raises:
        BadInput: there is none of that name, or the model has learnt none.
    """
    if not explained.told:
        raise BadInput(f"{explained.name} has learnt no classes; leave out --class {name}.")
    if name not in explained.classes:
        some = f" It has {', '.join(explained.classes[:NAMED])}{' …' * (len(explained.classes) > NAMED)}."
        raise BadInput(f"the model has no class {name!r}{nearest(name, explained.classes)}{some}")
    return explained.classes.index(name)


def share(folder: Path, one: Look, explained: Explained) -> str:
    """Write the picture of an image and of what the model looks at in it; returns the file's name."""
    large, even = panes.enlarge(one.pixels, SHARED), percent(1 / one.rollout.size)
    known = f", is {explained.classes[one.label]}" if one.label >= 0 and explained.told else ""
    most = f" (lightest patch {percent(found)}, evenly {even})" if (found := lightest(one.rollout)) else ""
    row = [
        (large, f"{Path(one.name).stem}{known}"),
        (panes.shine(large, one.rollout), f"{explained.name} looks here{most}"),
    ]
    if one.gradient is not None:
        sure = dict(one.guesses).get(one.target)
        said = f" ({percent(sure, 0)})" if sure is not None else ""
        row.append((panes.shine(large, one.gradient), f"for {explained.classes[one.target]}{said}"))
    plain = re.sub(r"[^\w.-]", "_", Path(one.name).stem)[:80] or "image"
    names = (plain, *(f"{plain}-{number}" for number in range(2, MOST + 2)))
    path = next(path for path in (folder / f"{name}.png" for name in names) if not path.exists())
    about, picture = PngInfo(), panes.side_by_side(row)
    about.add_text("Software", MARK)
    write(path, lambda file: picture.save(file, "PNG", pnginfo=about))
    return path.name


def page(
    explained: Explained, looks: Sequence[Look], distances: NDArray[np.float32], where: str, shared: Sequence[str],
    asked: bool,
) -> str:  # fmt: skip
    """The page as HTML."""
    config = explained.model.config
    filters, no_filters = _or_why(lambda: explain.embedding_filters(explained.model))
    similar, no_similar = _or_why(lambda: explain.position_similarity(explained.model))
    return fill(
        "explain.html", mark=f'<meta name="generator" content="{MARK}">', name=explained.name, where=where,
        config=config, classes=explained.classes, told=explained.told, asked=asked,
        images=[_shown(each, name, len(looks)) for each, name in zip(looks, shared, strict=True)],
        filters=_filters(filters) if filters is not None else None, no_filters=no_filters,
        similar=_similarities(similar) if similar is not None else None, no_similar=no_similar,
        distance=_distances(distances),
    )  # fmt: skip


def lightest(values: NDArray[np.float32]) -> float:
    """How much the lightest patch has of what all have, which a picture of a map, over its own range, does not show. 0
    where none has any."""
    return float(values.max() / values.sum()) if values.any() else 0.0


def pane_side(images: int, heads: int) -> int:
    """Side of an image lit by one head, where a page has so many images and each is lit by so many heads: the more of
    them, the smaller, so that pages stay small enough to be sent."""
    return max(min(SMALL, math.isqrt(PANES // (images * heads))), 1)


def _shown(one: Look, file: str, images: int) -> dict[str, Any]:
    side = pane_side(images, one.heads.shape[0] * one.heads.shape[1])
    large, small = panes.enlarge(one.pixels, SIDE), panes.enlarge(one.pixels, side)
    heads = [panes.shine(small, values) for layer in one.heads for values in layer]
    return {
        "name": one.name, "file": file, "label": one.label, "guesses": one.guesses, "target": one.target,
        "picture": panes.embed(large), "rollout": panes.embed(panes.shine(large, one.rollout)),
        "gradient": None if one.gradient is None else panes.embed(panes.shine(large, one.gradient)),
        "most": lightest(one.rollout), "most_for": 0.0 if one.gradient is None else lightest(one.gradient),
        "heads": panes.embed(panes.window(heads, one.heads.shape[1])),
    }  # fmt: skip


def _or_why(find: Callable[[], Tensor]) -> tuple[NDArray[np.float32] | None, str]:
    """What is there, or a sentence that says why there is none."""
    try:
        return _numbers(find()), ""
    except BadInput as error:
        return None, str(error)


def _filters(components: NDArray[np.float32]) -> Thumbnail:
    cells = [panes.enlarge(panes.signed(each), 48) for each in components]
    return panes.embed(panes.window(cells, min(7, len(cells))), exact=True)


def _similarities(values: NDArray[np.float32]) -> dict[str, Any]:
    """A window of windows: in the place of each patch, how like its position is to all. A position is wholly like
    itself, which is left out of the range of colours."""
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
