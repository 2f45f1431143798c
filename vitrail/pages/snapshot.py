"""A run in one picture, results.png, to be shown where a page cannot be: in a chat, on a slide.

Lengths are pixels of the picture; everything is drawn twice as large and then reduced, for smooth edges. The colours
are those of the page in the light.
"""

import itertools
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vitrail import __version__
from vitrail.evaluation.scores import wilson
from vitrail.pages.pictures import LOSSES, PIXELATED, Chart, figures, fitted, number, percent
from vitrail.pages.record import LAUNCH, Record
from vitrail.progress import duration
from vitrail.weights.files import write

WIDTH, HEIGHT, FINE = 1600, 900, 2
MARGIN, COLUMN = 60, 640  # where the left column begins, and the right one
PAPER, INK, SOFT, RULE, LEAD = "#faf9f6", "#1b1d25", "#5a5f6e", "#dedad1", "#23252d"
KINDS = {"held": "#2348b0", "train": "#a4570a", "plain": SOFT}
WRONG, RIGHT = "#a81e38", "#17694a"
GLASS = ("#27489c", "#c9952c", "#8fb7d9", "#a3243b", "#2f7d62", "#e3c77b", "#3d6bc4", "#6b3f83", "#c4d7dc", "#b5522b")
SIDE, SEAM, BETWEEN = 111, 2, 24  # of the images in the row below, between those of one, and between them


class Canvas:
    """What is drawn on. Positions are those of the picture, however finely it is drawn."""

    def __init__(self) -> None:
        self.picture = Image.new("RGB", (WIDTH * FINE, HEIGHT * FINE), PAPER)
        self.pen = ImageDraw.Draw(self.picture)

    def write(
        self, x: float, y: float, words: str, size: int, colour: str = INK, *, anchor: str = "ls",
        room: float = math.inf,
    ) -> float:  # fmt: skip
        """A line of text, cut off where it would take more than `room`; returns how wide it is. `anchor` as Pillow has
        it: `ls` begins at x, `rs` ends there, and y is the base line of both."""
        words, font = fitted(words, size * FINE, room * FINE)
        self.pen.text((x * FINE, y * FINE), words, colour, font, anchor=anchor)
        return font.getlength(words) / FINE

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 1) -> None:
        """A line through the points."""
        self.pen.line([(x * FINE, y * FINE) for x, y in points], colour, round(width * FINE), joint="curve")

    def shape(self, points: Sequence[tuple[float, float]], colour: str) -> None:
        """A filled shape with these corners."""
        self.pen.polygon([(x * FINE, y * FINE) for x, y in points], colour)

    def box(self, x: float, y: float, width: float, height: float, colour: str, radius: float = 0) -> None:
        """A filled rectangle with round corners."""
        self.pen.rounded_rectangle(
            [x * FINE, y * FINE, (x + width) * FINE - 1, (y + height) * FINE - 1], radius * FINE, colour
        )

    def image(self, x: float, y: float, pixels: NDArray[np.uint8]) -> None:
        """The middle of an image, uint8 (height, width, 3), as a square of SIDE; small ones stay the squares that they
        are made of."""
        side = min(pixels.shape[:2])
        top, left = ((length - side) // 2 for length in pixels.shape[:2])
        square = Image.fromarray(pixels[top : top + side, left : left + side])
        how = Image.Resampling.NEAREST if side <= PIXELATED else Image.Resampling.LANCZOS
        self.picture.paste(square.resize((SIDE * FINE, SIDE * FINE), how), (round(x * FINE), round(y * FINE)))


def write_snapshot(path: Path, record: Record, told: dict[str, Any] | None, charts: Sequence[Chart]) -> None:
    """Write the picture of a run that is done, at once or not at all. `told` is what `gallery.scored` says."""
    picture = draw(record, told, charts)
    write(path, lambda file: picture.save(file, "PNG"))


def draw(record: Record, told: dict[str, Any] | None, charts: Sequence[Chart]) -> Image.Image:
    """The picture: on the left what came out, on the right how, below what the model saw."""
    assert record.results is not None
    canvas = Canvas()
    glass(canvas)
    at = MARGIN + canvas.write(MARGIN, 122, record.name, 46, room=COLUMN)
    where = f"on {record.dataset}" if record.dataset not in ("", record.name) else ""
    how = "" if record.objective == "classes" else "without labels"
    canvas.write(at + 14, 122, f"{where} {how}".strip(), 46, SOFT, room=WIDTH - MARGIN - at)
    headline(canvas, record)
    facts(canvas, record)
    tiles = images(record, told)
    curves = [chart for chart in charts if chart.title in ("Accuracy", "Loss")]
    wide = (WIDTH - MARGIN - COLUMN) / max(len(curves), 1)
    for place, chart in enumerate(curves):
        plot(canvas, chart, COLUMN + wide * place, 178, wide - 20, (590 if tiles else 800) - 178)
    row(canvas, tiles, how_chosen(record, told))
    canvas.write(MARGIN, 872, made_by(record), 18, SOFT)
    return canvas.picture.reduce(FINE)


def made_by(record: Record) -> str:
    """What asks for the same run, where there is room for all of that, and what it was made by."""
    commit = (record.launches[-1] if record.launches else LAUNCH)["commit"]
    by = [f"Vitrail {__version__}", *([f"commit {commit[:12]}"] if commit else [])]
    said = " · ".join([asked_for(record), *by])
    fits = fitted(said, 18 * FINE, (WIDTH - 2 * MARGIN) * FINE)[0] == said
    return said if fits else " · ".join(by)


def asked_for(record: Record) -> str:
    """A command that asks for the same run: the recipe, and what the command line set, as it set it; of an absolute
    path no more than its name, for a picture gets around."""
    flags = []
    for name, setting in record.settings.items():
        flag, value = name.replace("_", "-"), setting["value"]
        if setting["set_by"] == "command line" and name != "device":
            if Path(str(value)).expanduser().is_absolute():
                value = Path(value).name
            named = "" if isinstance(value, bool) else f" {shlex.quote('none' if value is None else str(value))}"
            flags.append(f"--{'no-' if value is False else ''}{flag}{named}")
    return " ".join(["vitrail", "train" if record.objective == "classes" else "pretrain", record.name, *flags])


def glass(canvas: Canvas) -> None:
    """The panes along the upper edge, as the page has them."""
    canvas.box(0, 0, WIDTH, 36, LEAD)
    edges = list(
        itertools.accumulate(itertools.islice(itertools.cycle((46, 31, 58, 37, 52, 28, 44, 61)), 37), initial=-10)
    )
    for place, (left, right) in enumerate(itertools.pairwise(edges)):
        lean, middle = (6, -5, 3, -8, 7)[place % 5], (19, 13, 22, 11, 17)[place * 3 % 5]
        canvas.shape([(left + 1, 0), (right - 2, 0), (right - 2 + lean / 2, middle - 1), (left + 1, middle - 1)],
                     GLASS[place * 3 % 10])  # fmt: skip
        canvas.shape([(left + 1, middle + 2), (right - 2 + lean / 2, middle + 2), (right - 2, 33), (left + 1, 33)],
                     GLASS[(place * 7 + 3) % 10])  # fmt: skip


def headline(canvas: Canvas, record: Record) -> None:
    """What came out, with how sure that is."""
    results = record.results or {}
    prose = {"val": "validation", "holdout": "held-out"}.get(results["split"], results["split"])
    if "top1" not in results:
        canvas.write(MARGIN, 272, figures(results["loss"]), 112, KINDS["held"])
        canvas.write(MARGIN, 322, f"loss on {number(results['count'])} {prose} images", 26)
        canvas.write(MARGIN, 354, LOSSES[record.objective], 20, SOFT)
        return
    low, high = wilson(round(results["top1"] * results["count"]), results["count"])
    canvas.write(MARGIN, 272, percent(results["top1"]), 112, KINDS["held"])
    canvas.write(MARGIN, 322, f"top-1 on {number(results['count'])} {prose} images", 26)
    room = COLUMN - MARGIN - 80
    canvas.box(MARGIN, 348, room, 12, "#e6e2d8", 6)
    canvas.box(MARGIN + room * low, 348, max(room * (high - low), 4), 12, "#a7b6df", 6)
    canvas.box(MARGIN + room * results["top1"] - 3, 342, 6, 24, KINDS["held"], 3)
    canvas.write(MARGIN, 392, f"95% interval {percent(low)} to {percent(high)}", 20, SOFT)


def facts(canvas: Canvas, record: Record) -> None:
    """What was trained, and at what cost."""
    results, recipe = record.results or {}, record.recipe
    launch = record.launches[-1] if record.launches else LAUNCH
    cores = f", {launch['cores']} cores" if launch["cores"] else ""
    planned = results.get("epochs_planned", results["epochs"])
    epochs = f"{number(results['epochs'])} of " if planned > results["epochs"] else ""
    epochs += f"{number(planned)} epoch{'s' * (planned != 1)}"
    shape, cut = "", ""
    if recipe and recipe.architecture == "vit":
        shape = f"{recipe.num_layers} layers, width {recipe.hidden_size}, {recipe.num_heads} heads"
        cut = f" in patches of {recipe.patch_size}"
    elif recipe:
        shape = f"{recipe.architecture}, {recipe.resnet_width} channels at first"
    lines = [
        ("model", shape), ("", f"{number(results['parameters'])} parameters"),
        ("images", f"{recipe.image_size if recipe else ''} px{cut}"),
        ("cost", f"{epochs} in {duration(results['train_seconds'])}, "
                 f"{number(results['images_per_second'])} images/s"),
        ("on", re.sub(r"\((R|TM)\)", "", launch["gpu"] or f"{launch['cpu'] or results['device']}{cores}")),
        ("", f"{results['precision']}, seed {results['seed']}"),
    ]  # fmt: skip
    for place, (name, words) in enumerate(lines):
        canvas.write(MARGIN, 440 + 30 * place, name, 20, SOFT)
        canvas.write(MARGIN + 80, 440 + 30 * place, words, 20, room=COLUMN - MARGIN - 150)


def plot(canvas: Canvas, chart: Chart, x: float, y: float, width: float, height: float) -> None:
    """A chart as the page has it, in a box."""
    canvas.write(x, y, chart.title, 24)
    left, top, right, bottom = x + 62, y + 34, x + width - 126, y + height - 34

    def place(across: float, down: float) -> tuple[float, float]:
        return left + (right - left) * across / 100, top + (bottom - top) * down / 100

    for tick in chart.y:
        canvas.line([place(0, tick.at), place(100, tick.at)], SOFT if tick is chart.y[0] else RULE)
        canvas.write(left - 12, place(0, tick.at)[1], tick.text, 18, SOFT, anchor="rm")
    for tick in chart.x:
        canvas.write(place(tick.at, 0)[0], bottom + 26, tick.text, 18, SOFT, anchor="ms")
    canvas.write(right + 28, bottom + 26, "epoch", 18, SOFT)
    for curve in chart.curves:
        if curve.area:
            canvas.shape([place(*point) for point in points(curve.area)[0]], "#e2e5f0")
    for curve in chart.curves:
        colour = KINDS[curve.kind.split()[0]]
        for stretch in points(curve.path):
            line = [place(*point) for point in stretch]
            canvas.line(line, colour, 1.5 if "dashed" in curve.kind else 3)
            for across, down in line if len(line) == 1 else ():
                canvas.box(across - 4, down - 4, 8, 8, colour, 4)
        words = f"{curve.name} {curve.label.text}"
        canvas.write(right + 10, place(0, curve.label.at)[1], words, 18, colour, anchor="lm", room=WIDTH - right - 20)


def points(path: str) -> list[list[tuple[float, float]]]:
    """The points of a chart's path, stretch by stretch, in percent of the plot."""
    numbers = [re.findall(r"[\d.-]+", stretch) for stretch in path.split("M")[1:]]
    return [[(float(a), float(b)) for a, b in zip(found[::2], found[1::2], strict=True)] for found in numbers]


def images(record: Record, told: dict[str, Any] | None) -> list[tuple[list[NDArray[np.uint8]], str, str]]:
    """What is shown in the row below: pictures that belong together, what is said of them, and in which colour."""
    if record.reconstructions is not None:
        kinds = [record.reconstructions[name] for name in ("seen", "predicted", "original")]
        return [(list(each), "what it saw, made of it, and is", SOFT) for each in zip(*kinds, strict=True)]
    shown = []
    for one in itertools.zip_longest(*((told["rightest"], told["mistakes"]) if told else ())):
        for image in filter(None, one):
            names, right = told["names"] if told else (), image["said"] == image["label"]
            words = f"said {names[image['said']]} {percent(image['confidence'], 0)}"
            words += "" if right else f"\nis {names[image['label']]}"
            both = [image["pixels"], *([image["light"]] if image["light"] is not None else [])]
            shown.append((both, words, RIGHT if right else WRONG))
    return shown


def how_chosen(record: Record, told: dict[str, Any] | None) -> str:
    """How the pictures below come to be there: mistakes are many more of them than of all images."""
    if record.reconstructions is not None or not (told and record.results):
        return "taken evenly from all" if record.reconstructions is not None else ""
    kinds = [kind for kind, there in (("right", told["rightest"]), ("wrong", told["mistakes"])) if there]
    wrong = f"it is wrong on {number(told['mistaken'])} of {number(record.results['count'])}"
    return f"chosen, not typical: where it was surest and {', and surest and '.join(kinds)}; {wrong}"


def row(canvas: Canvas, tiles: Sequence[tuple[list[NDArray[np.uint8]], str, str]], chosen: str) -> None:
    """As many of them as have room side by side, and how they were chosen."""
    if not tiles:
        return
    wide = max((SIDE + SEAM) * max(len(pictures) for pictures, _, _ in tiles) - SEAM, SIDE + 40)
    several = len(tiles[0][0]) == 2
    words = "Images it had not seen, and where it looked" if several else "Images it had not seen"
    end = MARGIN + canvas.write(MARGIN, 652, words, 24)
    canvas.write(end + 18, 652, chosen, 18, SOFT, room=WIDTH - MARGIN - end - 18)
    for place, (pictures, words, colour) in enumerate(tiles[: (WIDTH - 2 * MARGIN + BETWEEN) // (wide + BETWEEN)]):
        x = MARGIN + (wide + BETWEEN) * place
        for across, pixels in enumerate(pictures):
            canvas.image(x + (SIDE + SEAM) * across, 674, pixels)
        for line, said in enumerate(words.split("\n")):
            canvas.write(x, 674 + SIDE + 25 + 23 * line, said, 18, INK if line else colour, room=wide)
