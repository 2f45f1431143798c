"""A run's curves: what it trains on and what it does not, the gap between the two, and the original's behind them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from vitrail.pages import pictures
from vitrail.pages.pictures import LOSSES, Chart, Series, figures, number, percent
from vitrail.pages.record import Record, read_log

ORIGINAL = Path(__file__).parent / "original-vit-12.json"  # the log of the original's experiment of that name


@cache
def original() -> tuple[dict[str, Any], ...]:
    """The epochs of the original's VIT-12 on Tiny ImageNet: `val_top1`, `train_loss` and `val_loss`, as in
    metrics.jsonl."""
    return tuple(read_log(ORIGINAL).epochs)


def compared(record: Record, split: str) -> Sequence[dict[str, Any]]:
    """The epochs of the original that a run's can be laid beside, as far as the run has come; none where the run is of
    another recipe, of other images, or judged by others."""
    same = record.name == "vit-12" and record.dataset.startswith("tiny-imagenet")
    return original()[: record.epochs[-1]["epoch"]] if same and split != "holdout" and record.epochs else ()


def charts(record: Record, split: str) -> list[Chart]:
    """Accuracy, loss, learning rate and speed by epoch, those of them that there are."""
    epochs, beside = record.epochs, compared(record, split)

    def curve(key: str, name: str, kind: str) -> Series:
        return Series(name, kind, [row["epoch"] for row in epochs], [row.get(key) for row in epochs])

    def both(train: str, held: str) -> list[Series]:
        behind = Series("original", "plain dashed", [row["epoch"] for row in beside],
                        [row.get(held) for row in beside], called=f"original, {split}")  # fmt: skip
        return [behind, *gap(curve(train, "train", "train"), curve(held, split, "held"))]

    accuracy, loss = both("train_accuracy", "val_top1"), both("train_loss", "val_loss")
    found = [
        pictures.chart("Accuracy", accuracy, percent, write_tick=lambda share: f"{100 * share:g}%", top=1.0,
                       unit=told(accuracy, lambda share: f"{100 * share:.1f} points")),
        pictures.chart("Loss", loss, figures, unit=", ".join(filter(None, [
            LOSSES[record.objective], told(loss, figures),
        ]))),
        pictures.chart("Learning rate", [curve("lr", "", "plain")], "{:.3g}".format, height=110),
        pictures.chart("Speed", [curve("images_per_second", "", "plain")], number,
                       unit="images/s of each epoch", height=110),
    ]  # fmt: skip
    return [chart for chart in found if chart is not None] if epochs else []


def gap(train: Series, held: Series) -> tuple[Series, Series]:
    """Both curves, the second with what lies between them, where each has a value everywhere."""
    there, back = [v for v in train.values if v is not None], [v for v in held.values if v is not None]
    whole = len(there) == len(train.values) and len(back) == len(held.values)
    return train, replace(held, between=(there, back)) if whole and all(map(math.isfinite, there + back)) else held


def told(series: Sequence[Series], write: Callable[[float], str]) -> str:
    """`train and val end 3.1 points apart`, of the last two curves."""
    last = [each for each in series[-2:] if each.values]
    ends = [end for each in last if (end := each.values[-1]) is not None and math.isfinite(end)]
    return f"{last[0].name} and {last[1].name} end {write(abs(ends[1] - ends[0]))} apart" if len(ends) == 2 else ""
