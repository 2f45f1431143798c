"""Where a run's figures go beside its folder: into TensorBoard's event files always, and to a tracker if one wants it.

A tracker is shown what the folder has, and nothing hangs on it: a run computes the same bits with one and without, and
one that does not answer stops nothing. What it has not taken is offered again, by a later stretch of the run too.
"""

import contextlib
import json
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from vitrail.data.cache import Dataset
from vitrail.errors import BadInput, Stopped
from vitrail.explanation.explain import attended
from vitrail.input.pixels import Pixels
from vitrail.pages.panes import enlarge, shine
from vitrail.pages.views import SEEN, VIEWS, samples, sheet
from vitrail.progress import say
from vitrail.recipes import Resolved
from vitrail.settings import Recipe
from vitrail.training.trackers import Tracker, answering, first_line
from vitrail.vit.config import Colours
from vitrail.vit.model import VisionTransformer
from vitrail.weights.checkpoint import Run
from vitrail.weights.files import write_text

NOTE = "tracked.json"  # of a run folder: by tracker, the id of the run there, and the last step that it has taken
AGAIN = 60.0  # seconds before a tracker that did not answer is asked again
LOOKED_AT, SIDE, GAP = 8, 96, 4  # judged images that attention is drawn of, and the side of each, in pixels


class Trackers:
    """All that takes the figures of one stretch of a run: TensorBoard's events, and a tracker where there is one.

    Args:
        run: what has them anyway. Metrics that the tracker lacks, of earlier stretches, are sent to it at once.
        resolved: the settings.
        step: how many steps were done before.
        tracker: connected.

    Raises:
        BadInput: the tracker does not take the run.
    """

    def __init__(self, run: Run, resolved: Resolved, step: int, tracker: Tracker | None) -> None:
        self.run, self.tracker = run, tracker
        self.waiting: deque[dict[str, float]] = deque()  # metrics that the tracker has still to take
        self.told: tuple[dict[str, Any], int] | None = None  # and results with their step, if they are there
        self.sent = -1  # the last step that it has taken
        self.answers, self.ask_at = True, 0.0
        if tracker is not None:
            self._begin(tracker, resolved)
        self.events = SummaryWriter(str(run.path), purge_step=step + 1)

    def _begin(self, tracker: Tracker, resolved: Resolved) -> None:
        self.noted = self._noted()
        known = self.noted.get(tracker.name, {"run": None})
        begun_with = {"from": resolved.weights} if resolved.weights is not None else {}
        settings = {"recipe": resolved.name, **begun_with, **asdict(resolved.recipe)}
        with answering(tracker):
            self.id = tracker.begin(self.run.path, settings, known["run"])
        if self.id == known["run"]:
            self.sent = known["step"]
        self._note(tracker)
        metrics = self.run.path / "metrics.jsonl"
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
        self.waiting.extend(line for line in map(json.loads, lines) if line["step"] > self.sent)
        self._send()

    def _noted(self) -> dict[str, dict[str, Any]]:
        path = self.run.path / NOTE
        try:
            noted = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(noted, dict) or not all(map(_names_a_run, noted.values())):
                raise ValueError("it does not name runs and their last steps")
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise BadInput(f"{path} is damaged ({error}); delete it, and the run is sent anew.") from None
        return noted

    def _note(self, tracker: Tracker) -> None:
        self.noted[tracker.name] = {"run": self.id, "step": self.sent}
        write_text(self.run.path / NOTE, json.dumps(self.noted, indent=2) + "\n")

    def scalars(self, metrics: dict[str, float], step: int) -> None:
        """Figures of the weights behind a step, the last thing to be said of it."""
        for name, value in metrics.items():
            self.events.add_scalar(name, value, step)
        self.events.flush()
        if self.tracker is not None and step > self.sent:  # else it is work that was lost and is done again
            self.waiting.append(metrics)
            self._send()

    def _send(self) -> None:
        """Send what waits; where the tracker does not answer, it goes on waiting."""
        if self.tracker is None or not (self.waiting or self.told) or time.monotonic() < self.ask_at:
            return
        with self._patient(self.tracker):
            while self.waiting:
                step = int(self.waiting[0]["step"])
                self.tracker.scalars(self.waiting[0], step)
                self.waiting.popleft()
                self.sent = step
            if self.told is not None:
                self.tracker.results(*self.told)
                self.told = None
            self.answers = True
        with contextlib.suppress(OSError):  # where no space is left, that is said when something has to be saved
            self._note(self.tracker)

    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """A picture (height, width, 3) of what is behind a step, before the figures of it."""
        self.events.add_image(name, pixels, step, dataformats="HWC")
        self._send()  # figures of earlier steps, which wandb would drop behind the picture of this one
        if self.tracker is not None and step > self.sent and time.monotonic() >= self.ask_at:
            with self._patient(self.tracker):
                self.tracker.picture(name, pixels, step)

    def results(self, results: dict[str, Any], step: int) -> None:
        """What `results.json` has, but for what is said of each class. It is sent last of all."""
        self.told = {k: v for k, v in results.items() if k != "per_class"}, step

    @contextlib.contextmanager
    def _patient(self, tracker: Tracker) -> Iterator[None]:
        """The block is of what training does not depend on."""
        try:
            yield
        except Exception as error:  # there is no knowing what a library raises
            if self.answers:
                why = first_line(error)
                say(f"{tracker.name} does not answer; the run goes on, and its figures are sent when it does: {why}")
            self.answers, self.ask_at = False, time.monotonic() + AGAIN

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.tracker is not None:
            self._end(self.tracker, error)
        # Where no space is left, what ended the run says more.
        with contextlib.suppress(*[OSError] * (error is not None)):
            self.events.close()

    def _end(self, tracker: Tracker, error: BaseException | None) -> None:
        self.ask_at = 0.0
        self._send()
        stopped = isinstance(error, Stopped | KeyboardInterrupt)
        with self._patient(tracker):
            tracker.close("FINISHED" if error is None else "KILLED" if stopped else "FAILED")
        to_send = (f"{len(self.waiting)} of the epochs", self.waiting), ("the results", self.told)
        if lacks := [what for what, waits in to_send if waits]:
            say(f"{tracker.name} did not take {' and '.join(lacks)}; --resume --track {tracker.name} sends them")


def _names_a_run(noted: Any) -> bool:
    return isinstance(noted, dict) and isinstance(noted.get("run"), str) and isinstance(noted.get("step"), int)


def training_images(dataset: Dataset, recipe: Recipe) -> NDArray[np.uint8]:
    """A picture (height, width, 3) of training images, and of what augmentation makes of them."""
    rows = samples(dataset.splits["train"], recipe, SEEN, VIEWS)
    return np.asarray(sheet(f"{dataset.name}: training images", rows, dataset.classes))


def looked_at(model: VisionTransformer, judged: Pixels, mean: Colours, std: Colours) -> NDArray[np.uint8]:
    """A picture (height, width, 3) of a few images, taken evenly, always the same, from those that the run is judged
    by: above as they are, below lit where the model looks."""
    index = torch.linspace(0, len(judged) - 1, min(LOOKED_AT, len(judged)), device=judged.device).long()
    middle = torch.full((len(index), 2), 0.5, device=judged.device)
    images = list(judged.cut(index, middle).permute(0, 2, 3, 1).cpu().numpy())
    large = [enlarge(image, SIDE) for image in images]
    lit = [shine(pixels, values) for pixels, values in zip(large, attended(model, images, mean, std), strict=True)]
    margin = ((0, GAP), (0, GAP), (0, 0))
    return np.vstack([np.hstack([np.pad(each, margin, constant_values=255) for each in row]) for row in (large, lit)])
