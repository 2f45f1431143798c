"""Runs that are to be compared: read, and those that differ in nothing but the seed put together."""

import itertools
import math
import re
import statistics
import string
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from vitrail.data.archives import SUFFIXES
from vitrail.errors import BadInput
from vitrail.pages.record import Record, read, read_log
from vitrail.progress import counted
from vitrail.settings import SIZES
from vitrail.vit.models import build
from vitrail.weights.checkpoint import Run

# Settings that do not make a run another: which images and which machine it had, whatever they were called, is known.
ELSEWHERE = {"data", "device"}
COLOURS = 8  # that the page has for curves
PROSE = {"val": "validation", "holdout": "held-out"}


@dataclass(frozen=True)
class Judged:
    """What a run's figures are of. None where a run that is not finished does not say."""

    dataset: str
    split: str | None
    classes: tuple[tuple[str, int], ...] | None  # the name of each, and of how many images

    @property
    def count(self) -> int:
        """Images."""
        return sum(count for _, count in self.classes or ())

    @property
    def images(self) -> str:
        """`359 test images`; of a run that is not finished, nothing."""
        return counted(self.count, f"{PROSE.get(self.split or '', self.split)} image") if self.classes else ""

    def __str__(self) -> str:
        return ", ".join(filter(None, [self.dataset, self.images]))

    def same_as(self, other: "Judged") -> bool:
        """Whether both are, for all that is known, figures of the same images: a data set may have got another name."""
        if self.classes is None or other.classes is None:
            return self.dataset == other.dataset
        return (self.split, self.classes) == (other.split, other.classes)


@dataclass(frozen=True)
class Entry:
    """A run folder, or a log like `results/original-vit-12.json`; `where` is how it was named."""

    where: Path
    record: Record

    @property
    def log(self) -> bool:
        """Whether it is a log: without settings, data set and cost."""
        return not self.record.settings

    @property
    def called(self) -> str:
        """The folder's name, or the file's."""
        path = self.where.resolve()
        return path.stem if self.log else path.name

    @property
    def finished(self) -> bool:
        """Whether its figures are those of its last weights."""
        return self.log or self.record.results is not None

    @property
    def commits(self) -> set[str | None]:
        """Of the program that trained it; None is one that is not known."""
        return {launch.get("commit") for launch in self.record.launches}

    @cached_property
    def figures(self) -> dict[str, Any]:
        """Of the last weights; of the last epoch, where there are no others."""
        if self.record.results:
            return self.record.results
        last = self.record.epochs[-1]
        found = {name: last.get(f"val_{name}") for name in ("top1", "top5", "loss")}
        return last | found | {"epochs": last["epoch"], "parameters": self.parameters}

    @property
    def parameters(self) -> int | None:
        """Of the model in the run folder; None where there is none yet, as with a log."""
        if self.log:
            return None
        with suppress(BadInput), torch.device("meta"):
            return sum(weight.numel() for weight in build(Run(self.where).config()[0]).parameters())
        return None

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting, and the weights that it began with, None for random ones; settings that there were not yet
        when it was trained have their defaults, and sizes that its model does not have are None."""
        if (recipe := self.record.recipe) is None:
            return {}
        begun = {"from": self.record.settings.get("from", {}).get("value")}
        return begun | asdict(recipe) | dict.fromkeys(SIZES if recipe.architecture != "vit" else ("resnet_width",))

    @property
    def judged(self) -> Judged | None:
        """By which images; None of a log, which does not say."""
        if self.log:
            return None
        results = self.record.results
        if results is None:
            name = Path(self.settings["data"]).name
            suffix = next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")
            return Judged(name[: len(name) - len(suffix)], None, None)
        classes = results.get("per_class") or [{"name": "", "count": results["count"]}]
        return Judged(results["dataset"], results["split"], tuple((row["name"], row["count"]) for row in classes))

    @property
    def hardware(self) -> str:
        """What it ran on, and with what precision."""
        said = []
        for launch in self.record.launches:
            cpu = re.sub(r"\((R|TM)\)", "", launch["cpu"] or "")
            cores = f", {launch['cores']} core{'s' * (launch['cores'] != 1)}" if launch["cores"] else ""
            said.append(launch["gpu"] or cpu + cores)
        return ", ".join([*dict.fromkeys(filter(None, said)), *filter(None, [self.settings.get("precision")])])


@dataclass(frozen=True)
class Row:
    """Runs that differ in the seed only, or one run."""

    name: str
    place: int  # from 0
    entries: tuple[Entry, ...]

    @property
    def first(self) -> Entry:
        """Which speaks for all where they do not differ."""
        return self.entries[0]

    @property
    def letter(self) -> str:
        """What it is called in the charts: A to Z, AA and so on."""
        more, last = divmod(self.place, 26)
        return (string.ascii_uppercase[more - 1] if more else "") + string.ascii_uppercase[last]

    @property
    def kind(self) -> str:
        """Its CSS classes."""
        return "plain dashed" if self.first.log else f"k{self.place % COLOURS}"

    def values(self, figure: str) -> list[float]:
        """A figure of each run that has it."""
        found = [entry.figures.get(figure) for entry in self.entries]
        return [float(value) for value in found if value is not None and math.isfinite(value)]

    def mean(self, figure: str) -> float | None:
        """The mean of a figure over the runs; None if none has it."""
        values = self.values(figure)
        return statistics.mean(values) if values else None

    def spread(self, figure: str) -> float | None:
        """The standard deviation of a figure over two runs or more."""
        values = self.values(figure)
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def epochs(self) -> str:
        """`80`, or `3 of 150`."""
        done, planned = self.first.figures["epochs"], self.first.settings.get("epochs", 0)
        return f"{done:,} of {planned:,}" if done < planned else f"{done:,}"


# Reading


def load(paths: Sequence[Path]) -> list[Row]:
    """The runs, in the order in which they are named; one that is named twice counts once.

    Raises:
        BadInput: one of them is no run folder and no log, is damaged, or has neither an epoch nor results.
    """
    once: dict[Path, Path] = {}
    for path in paths:
        once.setdefault(path.resolve(), path)
    entries = [Entry(path, read_log(path)) if path.is_file() else read_run(path) for path in once.values()]
    groups: dict[str, list[Entry]] = {}
    seeds: list[tuple[str, int]] = []
    for entry in entries:
        key = _all_but_the_seed(entry)
        if entry.finished and not entry.log:
            seeds.append((key, entry.settings["seed"]))
            key += f" {seeds.count(seeds[-1])}"  # a seed that comes again says nothing of the spread
        groups.setdefault(key, []).append(entry)
    names = _names(list(groups.values()))
    return [Row(name, place, tuple(of)) for place, (name, of) in enumerate(zip(names, groups.values(), strict=True))]


def read_run(path: Path) -> Entry:
    """A run folder; weights and predictions need not be in it.

    Raises:
        BadInput: it is none, is damaged, or there is nothing in it to compare.
    """
    record = read(path)
    if not record.settings:
        raise BadInput(f"{path} was not trained here: it has neither curves nor figures to compare.")
    if not record.results and not record.epochs:
        raise BadInput(f"{path} has nothing to compare yet: no epoch is complete in metrics.jsonl.")
    wanted = ("dataset", "split", "count", "top1", "epochs") if record.results else ()
    if missing := [name for name in wanted if name not in (record.results or {})]:
        raise BadInput(f"{path / 'results.json'} has no {', '.join(missing)}, without which nothing can be compared.")
    return Entry(path, record)


def _all_but_the_seed(entry: Entry) -> str:
    """What runs of one row have in common."""
    if entry.log or not entry.finished:
        return str(entry.where)
    settings = {name: value for name, value in entry.settings.items() if name not in {"from", "seed", *ELSEWHERE}}
    judged = entry.judged
    assert judged is not None
    weights = entry.record.settings.get("from", {}).get("digest")
    return repr((settings, weights, judged.split, judged.classes, entry.figures["epochs"], entry.hardware))


def _names(groups: Sequence[Sequence[Entry]]) -> list[str]:
    """What the rows are called: a run by its folder, several by the words with which their folders' names begin. Rows
    that would be called the same are called by their paths."""
    names = []
    for group in groups:
        parts = zip(*(re.split(r"([-_. ])", entry.called) for entry in group), strict=False)
        begin = "".join(part[0] for part in itertools.takewhile(lambda part: len(set(part)) == 1, parts))
        begin = re.sub(r"(^|[-_. ])(seed)?[-_. ]*$", "", begin) or group[0].record.name
        names.append(begin if len(group) > 1 else group[0].called)
    return [
        name if names.count(name) == 1 else str(group[0].where) for name, group in zip(names, groups, strict=True)
    ]  # fmt: skip
