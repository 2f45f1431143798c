"""A model of which it is to be said what it looks at, the images to look at, and what it makes of each."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitrail.data.cache import Split
from vitrail.errors import BadInput, nearest
from vitrail.evaluation.classifier import judged_images, say_if_unfinished
from vitrail.evaluation.evaluate import read_files
from vitrail.explanation import explain
from vitrail.explanation.passage import Passage, as_used
from vitrail.input.batches import evaluation_batches
from vitrail.input.pixels import pixels_of
from vitrail.progress import counted, track
from vitrail.vit.config import Colours
from vitrail.vit.model import VisionTransformer
from vitrail.vit.resnet import ResNetConfig
from vitrail.weights.checkpoint import Run
from vitrail.weights.formats import HEAD
from vitrail.weights.load import build, is_run, read

SHOWN = 8  # images of a data set
MOST = 64  # images at once
NAMED = 12  # classes that a message names
GUESSES = 3  # classes that are named for an image


@dataclass(frozen=True)
class Explained:
    """A model of which it is to be said what it looks at, and what its weights came with. `told`: it has learnt
    classes, so that what it predicts means something. `made_for`: the side of the images that it was made for.
    `shorter_side`: of those that it is shown, as `to_pixels` has it. `done`: `3 of 150 epochs` of a run that is not
    finished; empty of others."""

    name: str
    model: VisionTransformer
    classes: tuple[str, ...]
    mean: Colours
    std: Colours
    told: bool
    made_for: int
    shorter_side: int | None
    done: str = ""

    @property
    def resized(self) -> str:
        """`, at 128 pixels instead of 64`, where it sees images of another size than it was made for."""
        size = self.model.config.image_size
        return "" if size == self.made_for else f", at {size} pixels instead of {self.made_for}"


@dataclass(frozen=True)
class Look:
    """An image as the model sees it, uint8 (S, S, 3), and what it makes of it: its likeliest classes, `target` if that
    is none of them, and their probabilities, the rollout (g, g), the gradient-weighted one for `target`, a class, and
    what each head of each layer reads, (L, H, g, g). `label` is -1 where it is not known."""

    name: str
    pixels: NDArray[np.uint8]
    label: int
    guesses: tuple[tuple[int, float], ...]
    target: int
    rollout: NDArray[np.float32]
    gradient: NDArray[np.float32] | None
    heads: NDArray[np.float32]


def open_model(source: Path, image_size: int | None = None) -> Explained:
    """The model of a run folder, or of anything else that `vitrail import` takes; for images of another size, if one is
    given. Of a run that is not finished, that is said.

    Raises:
        BadInput: it cannot be read, or is no Vision Transformer, or the size will not do.
    """
    told, done = True, ""
    if is_run(source):
        run = Run.open(source)
        if isinstance(run.config()[0], ResNetConfig):
            raise BadInput(f"{source} is a run of a ResNet, which has no attention to look at.")
        resolved = run.recipe() if run.trained else None
        told = not (resolved and resolved.recipe.self_supervised)
        if epochs := say_if_unfinished(run, resolved):
            done = f"{epochs[0]} of {counted(epochs[1], 'epoch')}"
    found = read(source)
    classes = None if HEAD[0] in found.tensors else 1
    model = build(found, source, image_size=image_size, num_classes=classes)
    side = found.shorter_side_at(model.config.image_size)
    return Explained(
        called(source), model, found.classes, found.mean, found.std, told and bool(model.head.weight.any()),
        found.config.image_size, side, done,
    )  # fmt: skip


def called(source: Path) -> str:
    """What weights are called: as their folder, or their file."""
    return re.sub(r"\.npz$", "", source.resolve().name)


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


def some_images(source: Path, explained: Explained, files: Sequence[Path], data: str | None) -> tuple[str, Split]:
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
        return "", read_files(files, size, explained.shorter_side)
    if data is None and not is_run(source):
        raise BadInput(f"{source} has no images of its own. Name some to look at, or say with --data D where some are.")
    side = explained.shorter_side
    name, split, images = judged_images(source, data, size, explained.classes, shorter_side=side, others=True)
    chosen = np.linspace(0, len(images) - 1, min(SHOWN, len(images))).round().astype(np.int64)
    return f"{name}, {split}", images.take(chosen)


def look(explained: Explained, images: Split, target: int | None) -> tuple[list[Look], NDArray[np.float32]]:
    """What the model looks at in each image, for the class `target` or the one that it predicts, and how far each head
    looks in all of them, in pixels (L, H)."""
    model, size = explained.model, explained.model.config.image_size
    device = next(model.parameters()).device
    squares = explain.squares([images.image(number) for number in range(len(images))], size)
    found, distances = list[Look](), list[Tensor]()
    with as_used(model), track(len(images), "looking") as advance:
        for batch, _ in evaluation_batches(pixels_of(images, size, device), 1, explained.mean, explained.std):
            number, seen = len(found), Passage(model, batch)
            probabilities = seen.logits().float().cpu().double().softmax(1)[0]  # float64 is what MPS lacks
            likeliest = probabilities.argsort(descending=True)[:GUESSES].tolist()
            against = likeliest[0] if target is None else target
            named = dict.fromkeys([*likeliest, against]) if explained.told else ()
            found.append(
                Look(
                    images.names[number], squares[number], int(images.labels[number]),
                    tuple((each, float(probabilities[each])) for each in named), against,
                    numbers(seen.rollout()[0]),
                    numbers(seen.gradient_rollout([against])[0]) if explained.told else None,
                    np.stack([numbers(maps[0]) for maps in seen.read_by_heads().values()]),
                )
            )  # fmt: skip
            distances.append(seen.distances())
            advance()
    return found, numbers(torch.cat(distances).mean(0))


def numbers(tensor: Tensor) -> NDArray[np.float32]:
    """For NumPy, whatever the device and precision."""
    return tensor.float().cpu().numpy()


def lightest(values: NDArray[np.float32]) -> float:
    """How much the lightest patch has of what all have. 0 where none has any."""
    return float(values.max() / values.sum()) if values.any() else 0.0
