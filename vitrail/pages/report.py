"""A run folder → one page, report.html, that needs nothing but itself: no network, no other file.

What is on it comes from `scores.py`, `curves.py`, `gallery.py` and `views.py`, is drawn by `pictures.py`, and laid out
in `templates/report.html`.
"""

import dataclasses
import datetime
import math
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from vitrail import __version__
from vitrail.data.cache import Dataset
from vitrail.errors import BadInput
from vitrail.evaluation.calibration import CALIBRATION_BINS
from vitrail.evaluation.scores import wilson
from vitrail.pages import pictures
from vitrail.pages.curves import charts, compared, original
from vitrail.pages.gallery import scored
from vitrail.pages.pictures import figures, moment, number, percent
from vitrail.pages.record import LAUNCH, Record, read
from vitrail.pages.snapshot import write_snapshot
from vitrail.pages.views import SEEN, VIEWS, reconstructed, samples, tiles
from vitrail.progress import duration
from vitrail.settings import Recipe
from vitrail.weights.files import read_about, write_text

PICTURE = "<img "
SEEN_LIMIT = 300_000  # characters that training images, and what augmentation makes of them, take at most


def write_report(run: Path, dataset: Dataset | None, why_none: str = "") -> Path:
    """Write `run/report.html`, at once or not at all, and return its path; of a run that is done, `run/results.png`
    too, a picture of it to be shown around.

    It can be written while the run goes on: it then has the curves so far. `dataset` is what the run was evaluated
    on, for the pictures; without it the page says that there are none, and `why_none` may say why.

    Raises:
        BadInput: `run` is no run folder, or the images are not to be had, and there is a page that has some.
    """
    record = read(run)
    split = split_of(record, dataset)
    told = scored(record, dataset, split)
    its_own = is_its_own(run, dataset)
    html = render(record, dataset, told, its_own=its_own)
    if not its_own or (told and told["no_pictures"]):
        why_none = why_none or (told["no_pictures"] if told else "")
        another = "" if dataset is None else "The data set is another than the run was trained on."
        keep_pictures(run / "report.html", html, why_none or another)
    write_text(run / "report.html", html)
    if record.results and record.settings:
        write_snapshot(run / "results.png", record, told, charts(record, split))
    return run / "report.html"


def keep_pictures(page: Path, html: str, why: str) -> None:
    """Make sure that a page with pictures does not give way to one that has fewer, for they could not be made again.

    Raises:
        BadInput: it would.
    """
    if page.is_file() and page.read_text(encoding="utf-8").count(PICTURE) > html.count(PICTURE):
        raise BadInput(
            f"{page} has pictures that a new page would be without, and is left as it is; delete it to have one all "
            f"the same. {why}".rstrip()
        )


def is_its_own(run: Path, dataset: Dataset | None) -> bool:
    """Whether nothing says that the data set is another than the run was trained on."""
    state = run / "last" / "state.safetensors"
    return dataset is not None and (not state.is_file() or read_about(state).get("images") == dataset.digest())


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


def render(
    record: Record, dataset: Dataset | None, told: dict[str, Any] | None = None, *, its_own: bool = True
) -> str:  # fmt: skip
    """The page as HTML. `told`: what `gallery.scored` says of single predictions. `its_own`: nothing says that the data
    set is another than the run was trained on."""
    split = split_of(record, dataset)
    objective = record.objective
    return fill(
        "report.html", record=record, results=record.results, split=split,
        dataset=record.dataset, total=record.settings.get("epochs", {}).get("value"),
        last=record.epochs[-1] if record.epochs else None,
        launch=record.launches[-1] if record.launches else LAUNCH,
        train_count=len(dataset.splits["train"]) if dataset and "train" in dataset.splits else None,
        judged_count=len(dataset.splits[split]) if dataset and split in dataset.splits else None,
        meaning={f.name: f.metadata["help"] for f in dataclasses.fields(Recipe)},
        charts=charts(record, split), interval=_interval(record.results),
        original=original() if compared(record, split) else None,
        objective=objective, blind=math.log(512), loss=pictures.LOSSES[objective],
        reconstructed=reconstructed(record.reconstructions) if record.reconstructions else [],
        scored=told, bins=CALIBRATION_BINS,
        seen=_seen(record, dataset) if its_own and not (told and told["no_pictures"]) else [],
    )  # fmt: skip


def split_of(record: Record, dataset: Dataset | None) -> str:
    """What is evaluated on; `evaluation` where nothing says what that is, as while a run goes on."""
    if record.results:
        return str(record.results["split"])
    if dataset:
        return dataset.evaluation
    return "holdout" if record.settings.get("holdout", {}).get("value") else "evaluation"


def _interval(results: dict[str, Any] | None) -> tuple[float, float] | None:
    told = results and "top1" in results
    return wilson(round(results["top1"] * results["count"]), results["count"]) if results and told else None


def _seen(record: Record, dataset: Dataset | None) -> list[dict[str, Any]]:
    """Training images, and what augmentation makes of them; nothing where they cannot be had."""
    if dataset is None or record.recipe is None or "train" not in dataset.splits:
        return []
    rows = samples(dataset.splits["train"], record.recipe, SEEN, VIEWS)
    return tiles(rows, dataset.classes, SEEN_LIMIT)
