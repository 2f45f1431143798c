"""A run folder → one page, report.html, that needs nothing but itself: no network, no other file.

The figures are computed here by pure functions, drawn in `pictures.py`, and laid out in `templates/report.html`.
"""

import dataclasses
import datetime
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors.numpy import load_file

from vitrail import __version__, pictures
from vitrail.cache import Dataset, Images
from vitrail.checkpoint import Run, read_about, write_text
from vitrail.errors import BadInput
from vitrail.evaluate import CALIBRATION_BINS, calibration
from vitrail.pictures import figures, moment, number, percent
from vitrail.progress import duration
from vitrail.scores import (
    Answers,
    Ints,
    confident_mistakes,
    confusion,
    per_class,
    rightest,
    surest_of,
    wilson,
    worst_pairs,
)
from vitrail.settings import Recipe
from vitrail.views import reconstructed, samples, tiles

MATRIX = 20  # classes up to which a confusion matrix can be read
PAIRS = 20  # confused pairs listed where there is no matrix,
PAIRS_BESIDE = 8  # and beside one
MISTAKES = 24
RIGHTEST = 8
EXAMPLES = 3  # pictures beside each confused pair
SEEN = 4  # training images that are shown with what augmentation makes of them,
VIEWS = 5  # views of each,
SEEN_LIMIT = 300_000  # and characters that these take at most
LAUNCH: dict[str, Any] = dict.fromkeys((
    "started", "command", "commit", "step", "vitrail", "python", "torch", "numpy", "pillow", "platform", "cpu",
    "cores", "threads", "device", "gpu",
))  # fmt: skip


@dataclass(frozen=True)
class Record:
    """What a run folder says. `results` and `predictions` are None while the run goes on."""

    name: str  # of the recipe; of the folder, where the weights were not trained here
    settings: dict[str, dict[str, Any]]  # with who set them
    recipe: Recipe | None  # None where the weights were not trained here
    launches: list[dict[str, Any]]
    epochs: list[dict[str, Any]]
    results: dict[str, Any] | None
    predictions: dict[str, NDArray[Any]] | None
    classes: tuple[str, ...] | None
    reconstructions: dict[str, NDArray[Any]] | None = None  # of pre-training, which has no predictions


# Reading


def read(run: Path) -> Record:
    """The files of a run folder, those of a run that still goes on included.

    Raises:
        BadInput: it is no run folder, or a file in it is damaged.
    """
    opened = Run.open(run)
    resolved = opened.recipe() if opened.trained else None
    recipe = _parsed(run / "recipe.yaml", yaml.safe_load) or {"recipe": run.resolve().name, "settings": {}}
    begun_with = {"from": recipe["from"]} if "from" in recipe else {}  # weights, shown like a setting
    config = _parsed(run / "model" / "config.json", json.loads)
    results = _parsed(run / "results.json", json.loads)
    predictions, reconstructions = (
        load_file(path) if results and path.is_file() else None
        for path in (run / "predictions.safetensors", run / "reconstructions.safetensors")
    )
    return Record(
        recipe["recipe"], begun_with | recipe["settings"], resolved.recipe if resolved else None,
        [LAUNCH | launch for launch in (_parsed(run / "environment.json", json.loads) or {}).get("launches", [])],
        _epochs(run / "metrics.jsonl"), results, predictions, tuple(config["classes"]) if config else None,
        reconstructions,
    )  # fmt: skip


def _parsed(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (ValueError, yaml.YAMLError) as error:
        raise BadInput(f"{path} is damaged: {error}") from None


def _epochs(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, one for each epoch; a last line that is still being written is left for later."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    try:
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return list({row["epoch"]: row for row in rows}.values())
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is damaged: {error}.") from None


# Writing


def write_report(run: Path, dataset: Dataset | None) -> Path:
    """Write `run/report.html`, at once or not at all, and return its path.

    It can be written while the run goes on: it then has the curves so far. `dataset` is what the run was evaluated
    on, for the pictures; without it the page says why there are none.

    Raises:
        BadInput: `run` is no run folder.
    """
    record = read(run)
    state = run / "last" / "state.safetensors"
    its_own = dataset and (not state.is_file() or read_about(state).get("images") == dataset.digest())
    write_text(run / "report.html", render(record, dataset, its_own=bool(its_own)))
    return run / "report.html"


def fill(template: str, **content: Any) -> str:
    """A page, from one of the templates and what it asks for. All text in `content` is escaped."""
    written = datetime.datetime.now(datetime.UTC).isoformat()
    return _templates().get_template(template).render(version=__version__, written=written, **content)


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        function.__name__: function
        for function in (percent, duration, number, figures, moment, pictures.dots)
    }  # fmt: skip
    return environment


def render(record: Record, dataset: Dataset | None, *, its_own: bool = True) -> str:
    """The page as HTML. `its_own`: nothing says that the data set is another than the run was trained on."""
    split = _split(record, dataset)
    objective = record.recipe.objective if record.recipe else "classes"
    scored = _scored(record, dataset, split)
    return fill(
        "report.html", record=record, results=record.results, split=split,
        dataset=_dataset_name(record), total=record.settings.get("epochs", {}).get("value"),
        last=record.epochs[-1] if record.epochs else None,
        launch=record.launches[-1] if record.launches else LAUNCH,
        train_count=len(dataset.splits["train"]) if dataset and "train" in dataset.splits else None,
        judged_count=len(dataset.splits[split]) if dataset and split in dataset.splits else None,
        meaning={f.name: f.metadata["help"] for f in dataclasses.fields(Recipe)},
        charts=_charts(record.epochs, split, pictures.LOSSES[objective]), interval=_interval(record.results),
        objective=objective, blind=math.log(512), loss=pictures.LOSSES[objective],
        reconstructed=reconstructed(record.reconstructions) if record.reconstructions else [],
        scored=scored, bins=CALIBRATION_BINS,
        seen=_seen(record, dataset) if its_own and not (scored and scored["no_pictures"]) else [],
    )  # fmt: skip


def _split(record: Record, dataset: Dataset | None) -> str:
    """What is evaluated on; `evaluation` where nothing says what that is, as while a run goes on."""
    if record.results:
        return str(record.results["split"])
    if dataset:
        return dataset.evaluation
    return "holdout" if record.settings.get("holdout", {}).get("value") else "evaluation"


def _dataset_name(record: Record) -> str:
    if record.results:
        return str(record.results["dataset"])
    return Path(str(record.settings.get("data", {}).get("value", ""))).name


def _interval(results: dict[str, Any] | None) -> tuple[float, float] | None:
    told = results and "top1" in results
    return wilson(round(results["top1"] * results["count"]), results["count"]) if results and told else None


def _charts(epochs: list[dict[str, Any]], split: str, loss: str) -> list[pictures.Chart]:
    if not epochs:
        return []
    which = [row["epoch"] for row in epochs]

    def curve(key: str, name: str, kind: str) -> pictures.Series:
        return pictures.Series(name, kind, which, [row.get(key) for row in epochs])

    charts = [
        pictures.chart("Accuracy", [curve("train_accuracy", "train", "train"), curve("val_top1", split, "held")],
                       percent, write_tick=lambda share: f"{100 * share:g}%", top=1.0),
        pictures.chart("Loss", [curve("train_loss", "train", "train"), curve("val_loss", split, "held")],
                       figures, unit=loss),
        pictures.chart("Learning rate", [curve("lr", "", "plain")], "{:.3g}".format, height=110),
        pictures.chart("Speed", [curve("images_per_second", "", "plain")], number,
                       unit="images/s of each epoch", height=110),
    ]  # fmt: skip
    return [chart for chart in charts if chart is not None]


def _seen(record: Record, dataset: Dataset | None) -> list[dict[str, Any]]:
    """Training images, and what augmentation makes of them; nothing where they cannot be had."""
    if dataset is None or record.recipe is None or "train" not in dataset.splits:
        return []
    rows = samples(dataset.splits["train"], record.recipe, SEEN, VIEWS)
    return tiles(rows, dataset.classes, SEEN_LIMIT)


def _scored(record: Record, dataset: Dataset | None, split: str) -> dict[str, Any] | None:
    """All that the page says about single predictions, or None while there are none."""
    if record.predictions is None:
        return None
    label, ranked, probability = (record.predictions[key] for key in ("label", "predicted", "probability"))
    answers = Answers(label, ranked[:, 0], probability[:, 0])
    confidence, right = answers.confidence, answers.right
    highest = int(max(label.max(), ranked.max()))
    names = record.classes or (dataset.classes if dataset else tuple(str(k) for k in range(highest + 1)))
    counts = confusion(label, answers.said, len(names))
    pairs = worst_pairs(counts, PAIRS if len(names) > MATRIX else PAIRS_BESIDE)
    images, why_none = _images(dataset, split, label)
    return {
        "names": names, "matrix": counts if len(names) <= MATRIX else None, "classes": per_class(counts),
        "mistaken": int((~right).sum()), "commonest": float(counts.sum(1).max() / len(label)),
        "accuracy": float(right.mean()), "confidence": float(confidence.mean(dtype=float)),
        "bins": [(b, wilson(round(b.accuracy * b.count), b.count)) for b in calibration(confidence, right)],
        "mistakes": _gallery(images, answers, confident_mistakes(confidence, right, MISTAKES)),
        "rightest": _gallery(images, answers, rightest(confidence, right, label, RIGHTEST)),
        "pairs": [(pair, _gallery(images, answers, surest_of(answers, pair, EXAMPLES))) for pair in pairs],
        "no_pictures": why_none,
    }  # fmt: skip


def _gallery(images: Images | None, answers: Answers, chosen: list[int]) -> list[dict[str, Any]]:
    """The chosen images with what was said of them, for the template; none where there are no images."""
    if images is None:
        return []
    return [
        {"picture": pictures.thumbnail(images.image(i)), "name": images.names[i], "label": int(answers.label[i]),
         "said": int(answers.said[i]), "confidence": float(answers.confidence[i])}
        for i in chosen
    ]  # fmt: skip


def _images(dataset: Dataset | None, split: str, label: Ints) -> tuple[Images | None, str]:
    """The images that were scored; where they cannot be had, None and a sentence that says why."""
    if dataset is None:
        return None, "No pictures here: the page was written without the data set."
    images = dataset.splits.get(split)
    if images is None or not np.array_equal(images.labels, label):
        return None, "No pictures here: the data set is no longer the one that was scored."
    return images, ""
