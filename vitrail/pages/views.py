"""What augmentation makes of training images: a few of them as they are, and as training would show them, in turn; and
what pre-training made of hidden patches.

The batches are training's own (`TrainingBatches`), of a data set that has only these images: so each comes once in a
step, step s is epoch s, and whatever is mixed is in sight.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vitrail.data.cache import Images, Split
from vitrail.input.batches import TrainingBatches
from vitrail.input.pixels import Pixels, pixels_of
from vitrail.pages.pictures import Thumbnail, fitted, percent, thumbnail
from vitrail.settings import Recipe

SEEN, VIEWS = 4, 5  # training images that a run shows beside its figures, and views of each
SHORTEST = 4  # steps to a view at least, among which the views' are chosen
SIDE, WIDEST = 128, 160  # of an image on the sheet, in pixels: about, for images are enlarged by whole numbers
GAP = 8
LINE = 16  # height of a line of text
INK, SOFT = "#1b1d25", "#5a5f6e"


@dataclass(frozen=True)
class View:
    """An image as training shows it: uint8 (S, S, 3). What it shows is `share` of the class `label` and the rest of
    the class `other`."""

    pixels: NDArray[np.uint8]
    label: int
    other: int
    share: float

    def shows(self, classes: Sequence[str]) -> list[str]:
        """`goldfish`, or, of a mix, `72% goldfish` and `28% bullfrog`."""
        if self.label == self.other or self.share in (0, 1):
            return [classes[self.label if self.share else self.other]]
        return [
            f"{percent(share, 0)} {classes[label]}"
            for share, label in ((self.share, self.label), (1 - self.share, self.other))
        ]


@dataclass(frozen=True)
class Sample:
    """A training image as it is stored, uint8 (height, width, 3), and views of it."""

    pixels: NDArray[np.uint8]
    name: str
    label: int
    views: tuple[View, ...]


def samples(train: Split, recipe: Recipe, count: int, views: int) -> list[Sample]:
    """The first images that training takes, `count` of them or one less where it mixes pairs, and the views of each in
    the first epochs of each stretch of the run: the images may grow while it goes on. The same for the same recipe and
    seed, on the processor whatever the recipe's device."""
    count = min(count, len(train))
    count -= count % 2 if recipe.mixes else 0
    # As many epochs, which are steps here, as it takes for each stretch to have one
    epochs, cpu = max(recipe.epochs, SHORTEST * views), torch.device("cpu")
    recipe = replace(recipe, batch_size=count, accumulate=1, repeats=1, epochs=epochs)
    chosen = TrainingBatches(pixels_of(train, recipe.image_size, cpu), recipe).order(0).numpy()
    few = replace(
        Images.pack([train.image(i) for i in chosen], [train.names[i] for i in chosen]), labels=train.labels[chosen]
    )
    batches = TrainingBatches(Pixels(few, recipe.image_size, cpu), recipe)
    seen: list[list[View]] = [[] for _ in chosen]
    for step in steps_shown(batches, views):
        ((images, targets),) = batches.parts(step)
        shown = ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        shares = zip(targets.labels.tolist(), targets.others.tolist(), targets.share.tolist(), strict=True)
        for place, pixels, of in zip(batches.order(step).tolist(), shown, shares, strict=True):
            seen[place].append(View(pixels, *of))
    return [Sample(few.image(i), few.names[i], int(few.labels[i]), tuple(of)) for i, of in enumerate(seen)]


def steps_shown(batches: TrainingBatches, views: int) -> list[int]:
    """So many steps: the first of each stretch, then the second of each, and so on."""
    turns = zip_longest(*(stretch.steps for stretch in batches.stretches))
    return sorted([step for turn in turns for step in turn if step is not None][:views])


def tiles(rows: Sequence[Sample], classes: Sequence[str], limit: int) -> list[dict[str, Any]]:
    """The rows for a page: as many as `limit` characters of images hold, and one at least."""
    shown: list[dict[str, Any]] = []
    for row in rows:
        picture, views = thumbnail(row.pixels), [thumbnail(view.pixels) for view in row.views]
        limit -= sum(len(each.uri) for each in (picture, *views))
        if limit < 0 and shown:
            break
        views_shown = [
            {"picture": each, "name": row.name, "shows": view.shows(classes)}
            for each, view in zip(views, row.views, strict=True)
        ]
        shown.append({"picture": picture, "name": row.name, "shows": [classes[row.label]], "views": views_shown})
    return shown


def reconstructed(arrays: dict[str, NDArray[np.uint8]]) -> list[dict[str, Thumbnail]]:
    """The images of `reconstructions.safetensors` for a page: each as the model saw it, as it made it, and as it is."""
    names = ("seen", "predicted", "original")
    rows = zip(*(arrays[name] for name in names), strict=True)
    return [dict(zip(names, map(thumbnail, row), strict=True)) for row in rows]


def sheet(title: str, rows: Sequence[Sample], classes: Sequence[str]) -> Image.Image:
    """One picture of all of them: in each row an image, its class below, and its views, with what a mix shows below."""
    side = max(max(view.pixels.shape[0] for view in row.views) for row in rows)
    side = min(side * max(round(SIDE / side), 1), WIDEST)
    mixed = any(len(view.shows(classes)) > 1 for row in rows for view in row.views)
    across, down = side + GAP, side + GAP + LINE * (2 if mixed else 1)
    top, columns = GAP + 2 * LINE + GAP, len(rows[0].views) + 1
    picture = Image.new("RGB", (3 * GAP + across * columns, top + down * len(rows)), "white")
    pen = ImageDraw.Draw(picture)

    def write(left: int, upper: int, text: str, room: int, colour: str = INK) -> None:
        line, font = fitted(text, 13, room)
        pen.text((left, upper), line, colour, font)

    write(GAP, GAP, title, picture.width - 2 * GAP)
    write(GAP, GAP + LINE, "as it is", side, SOFT)
    write(2 * GAP + across, GAP + LINE, "as training shows it, each time anew", picture.width - across, SOFT)
    for row, sample in enumerate(rows):
        upper = top + down * row
        paste(picture, sample.pixels, GAP, upper, side)
        write(GAP, upper + side, classes[sample.label], side)
        for column, view in enumerate(sample.views, start=1):
            left = 2 * GAP + across * column
            paste(picture, view.pixels, left, upper, side)
            for line, text in enumerate(view.shows(classes) if mixed else []):
                write(left, upper + side + LINE * line, text, side)
    return picture


def paste(picture: Image.Image, pixels: NDArray[np.uint8], left: int, top: int, side: int) -> None:
    """Put an image into a square of the picture, as large as fits there: pixels stay pixels where it is enlarged."""
    image = Image.fromarray(pixels)
    scale = side / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    image = image.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)
    picture.paste(image, (left + (side - image.width) // 2, top + (side - image.height) // 2))
