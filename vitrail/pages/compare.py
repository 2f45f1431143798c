"""Runs side by side: what they reached, what it cost, and in what they differ; as Markdown and as a page."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from vitrail.evaluation.scores import wilson
from vitrail.pages import pictures
from vitrail.pages.pictures import EPOCHS, Axis, Chart, Series, Tick, figures, number, percent
from vitrail.pages.report import fill
from vitrail.pages.runs import ELSEWHERE, Judged, Row
from vitrail.progress import duration, say
from vitrail.settings import TRANSFORMER_ONLY, Recipe
from vitrail.weights.files import write_text

MARK = '<meta name="generator" content="vitrail compare">'  # by which a page of ours is known
COLUMNS = (
    "run", "data", ">parameters", ">epochs", ">samples seen", ">top-1", ">training", ">images/s", "hardware", "runs",
)  # fmt: skip
SAMPLES = Axis("samples seen", lambda count: f"{count:,.0f} samples", lambda count: _short(count))
MINUTES = Axis("minutes of training", lambda minutes: duration(60 * minutes), lambda minutes: f"{minutes:,g}")


# What is said


def remarks(rows: Sequence[Row]) -> Iterator[str]:
    """What has to be known before figures are compared, a sentence each."""
    judges = by_judge(rows)
    if len(judges) > 1:
        each = [f"{_listed(row.name for row in among)} by {_images_of(judge)}" for judge, among in judges]
        yield f"These runs were not judged by the same images, and cannot be ranked: {'; '.join(each)}."
    for _, among in judges:
        names = list(dict.fromkeys(row.first.judged.dataset for row in among if row.first.judged))
        if len(names) > 1:
            alike = "the same classes, with as many images in each"
            yield f"{_listed(names)} have {alike}, and are taken for the same data."
    for row in rows:
        if row.first.log:
            yield (
                f"{row.name} is a log: it has curves, and does not say by which images it was judged, with what "
                "settings or at what cost."
            )
        elif not row.first.finished:
            side = row.first.figures.get("val_image_size")  # which may be smaller than at the end
            after = f"epoch {row.epochs}" + (f", by images of {side} pixels" if side else "")
            yield f"{row.name} is not finished: its figures are those after {after}, and are no result yet."
        if len(row.entries) > 1 and len(set.union(*(entry.commits for entry in row.entries))) > 1:
            versions = "were trained by several versions of the program, not only from several seeds."
            yield f"The runs of {row.name} {versions}"


def by_judge(rows: Sequence[Row]) -> list[tuple[Judged, list[Row]]]:
    """The rows by the images that they were judged by; logs, which do not say, left out."""
    judges: list[tuple[Judged, list[Row]]] = []
    for row in rows:
        if (judged := row.first.judged) is not None:
            among = next((among for judge, among in judges if judge.same_as(judged)), None)
            if among is None:
                judges.append((judged, [row]))
            else:
                among.append(row)
    return judges


def _listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _images_of(judge: Judged) -> str:
    return f"the {judge.images or 'images'} of {judge.dataset}"


def differences(rows: Sequence[Row]) -> tuple[list[Row], dict[str, list[str]]]:
    """The rows that have settings, and the settings in which they differ, with what each row has; `none` where its
    model has no such thing."""
    having = [row for row in rows if row.first.settings]
    of_vit = [row.first.settings["architecture"] == "vit" for row in having]
    found = {"recipe": [row.first.record.name for row in having]}
    for name in ("from", *(field.name for field in fields(Recipe) if field.name not in ELSEWHERE)):
        values = [dict.fromkeys(_said(entry.settings[name]) for entry in row.entries) for row in having]
        found[name] = [", ".join(each) for each in values]
    differing = {name: values for name, values in found.items() if len(set(values)) > 1}
    for name in differing.keys() & set(TRANSFORMER_ONLY):
        differing[name] = [value if there else "none" for value, there in zip(differing[name], of_vit, strict=True)]
    return having, differing


def _said(value: Any) -> str:
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


# As text


def cells(row: Row) -> tuple[str, ...]:
    """Those below COLUMNS, in Markdown."""
    runs = [f"[{entry.settings.get('seed', 'log')}]({quote(entry.where.as_posix())})" for entry in row.entries]
    name = f"`{row.name}`" if row.first.finished else f"`{row.name}`, not finished"
    return (
        name, str(row.first.judged or "–"), write(row.mean("parameters"), number), row.epochs,
        write(row.mean("samples_seen"), number), top1(row), write(row.mean("train_seconds"), "{:,.0f} s".format),
        write(row.mean("images_per_second"), number), row.first.hardware or "–", " ".join(runs),
    )  # fmt: skip


def top1(row: Row) -> str:
    """`0.981 ± 0.003`, a fraction of 1."""
    spread = row.spread("top1")
    return write(row.mean("top1"), "{:.3f}".format) + (f" ± {spread:.3f}" if spread is not None else "")


def write(value: float | None, form: Callable[[float], str]) -> str:
    """A figure, or a dash where there is none."""
    return "–" if value is None else form(value)


# The page


@dataclass(frozen=True)
class Strip:
    """The top-1 of a row on a scale, in percent of its width: each run, their mean, and what the number of images
    leaves open (Wilson's 95% interval of the mean)."""

    row: Row
    runs: tuple[float, ...]
    mean: float
    low: float
    high: float


def write_page(path: Path, rows: Sequence[Row]) -> None:
    """Write the page, at once or not at all. What is there gives way, which is said."""
    if path.exists():
        say(f"vitrail: the page that an earlier call wrote as {path} gives way to this one's")
    having, settings = differences(rows)
    scale, strips = on_a_scale(rows)
    write_text(path, fill(
        "compare.html", mark=MARK, rows=rows, remarks=list(remarks(rows)), charts=charts(rows), scale=scale,
        strips=strips, judges=[_images_of(judge) for judge, _ in by_judge(rows)], settings=settings,
        having=[f"{row.letter} {row.name}" for row in having],
        write=write, top1=top1, share="{:.3f}".format, count=number, time=duration,
    ))  # fmt: skip


def on_a_scale(rows: Sequence[Row]) -> tuple[list[Tick], list[Strip]]:
    """The finished rows' top-1, and the marks of the scale; nothing where they were judged by different images, or
    where there is one figure only."""
    ranked = [row for row in rows if row.first.finished and row.first.judged is not None]
    if len(by_judge(ranked)) != 1 or sum(len(row.entries) for row in ranked) < 2:
        return [], []
    found = []
    for row in ranked:
        mean, count = row.mean("top1") or 0.0, row.first.figures["count"]
        found.append((row, row.values("top1"), mean, *wilson(round(mean * count), count)))
    shown = [value for _, runs, _, *interval in found for value in (*runs, *interval)]
    ticks = [tick for tick in pictures.nice_ticks(min(shown), max(shown)) if tick <= 1]

    def at(value: float) -> float:
        return round(100 * (value - ticks[0]) / (max(ticks[-1], max(shown)) - ticks[0]), 2)

    strips = [Strip(row, tuple(map(at, runs)), at(mean), at(low), at(high)) for row, runs, mean, low, high in found]
    return [Tick(at(tick), f"{100 * tick:g}%") for tick in ticks], strips


def charts(rows: Sequence[Row]) -> list[Chart]:
    """Top-1 by epoch, by samples seen and by time, and the loss on the training images."""
    found = [
        pictures.chart("Top-1", mean_curves(rows, x, "val_top1", unit), percent, by=axis, unit=f"by {axis.name}",
                       write_tick=lambda share: f"{100 * share:g}%", top=1.0)
        for axis, x, unit in ((EPOCHS, "epoch", 1), (SAMPLES, "samples_seen", 1), (MINUTES, "train_seconds", 60))
    ]  # fmt: skip
    losses = mean_curves(rows, "epoch", "train_loss")
    found.append(pictures.chart("Training loss", losses, figures, unit="by epoch, cross-entropy in nats"))
    return [chart for chart in found if chart is not None]


def mean_curves(rows: Sequence[Row], x: str, figure: str, unit: float = 1) -> list[Series]:
    """The mean of each row's curves over the epochs that all of its runs have, x in `unit`; logs that have no such x
    left out."""
    found = []
    for row in rows:
        each = [{line["epoch"]: line for line in entry.record.epochs} for entry in row.entries]
        epochs = [epoch for epoch in each[0] if all(epoch in lines for lines in each)]
        along, values = (
            np.array([[lines[epoch].get(key) for lines in each] for epoch in epochs], float) for key in (x, figure)
        )
        if not epochs or np.isnan(along).any():
            continue
        several = len(each) > 1 and bool(np.isfinite(values).all())
        between = (values.min(1).tolist(), values.max(1).tolist()) if several else None
        found.append(Series(
            row.letter, row.kind, (along.mean(1) / unit).tolist(), values.mean(1).tolist(), between,
            called=f"{row.letter} {row.name}",
        ))  # fmt: skip
    return found


def _short(count: float) -> str:
    """`250`, `300k`, `1.5M`."""
    return f"{count / 1e6:g}M" if count >= 1e6 else f"{count / 1e3:g}k" if count >= 1e3 else f"{count:g}"
