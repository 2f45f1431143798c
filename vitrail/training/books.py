"""What a run leaves behind while it goes on: in its folder, on the screen, in trackers. One process of those that train
it keeps the books."""

import json
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from vitrail.data.cache import Dataset
from vitrail.evaluation.evaluate import Judgement
from vitrail.pages.report import write_report
from vitrail.progress import TrainingDisplay
from vitrail.recipes import Resolved
from vitrail.training.track import Trackers, training_images
from vitrail.training.trackers import Tracker
from vitrail.weights.checkpoint import Run
from vitrail.weights.files import write_tensors, write_text


class Books:
    """The books of one stretch of a run, which is open while a `with` block runs.

    Args:
        run: the folder.
        resolved: the settings.
        dataset: what it trains on and is judged by.
        tracker: connected, if there is one.
        step: how many steps were done before. What is of later ones is dropped: it is done again.
    """

    def __init__(self, run: Run, resolved: Resolved, dataset: Dataset, tracker: Tracker | None, step: int) -> None:
        self.run, self.resolved, self.dataset, self.tracker, self.step = run, resolved, dataset, tracker, step
        self.open = ExitStack()

    def __enter__(self) -> Self:
        self.run.go_back(self.step)
        with ExitStack() as opening:
            self.trackers = opening.enter_context(Trackers(self.run, self.resolved, self.step, self.tracker))
            self.display = opening.enter_context(TrainingDisplay(self.run.path / "progress.json"))
            if self.step == 0:
                self.picture("training images", training_images(self.dataset, self.resolved.recipe), 0)
            self.open = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.open.__exit__(kind, error, traceback)

    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """A picture (height, width, 3) of what is behind a step, before the metrics of it."""
        self.trackers.picture(name, pixels, step)

    def metrics(self, metrics: dict[str, float], step: int) -> None:
        """Figures of an epoch, whose last step it is: in metrics.jsonl, in trackers, and as a line on the terminal."""
        self.run.add_metrics(metrics)
        self.trackers.scalars(metrics, step)
        epochs, split = self.resolved.recipe.epochs, self.dataset.evaluation
        top1 = f"  top-1 {metrics['val_top1']:.4f}" if "val_top1" in metrics else ""
        pixels = f" at {metrics['val_image_size']} pixels" if "val_image_size" in metrics else ""
        self.display.line(
            f"epoch {metrics['epoch']:>3}/{epochs}  loss {metrics['train_loss']:.4f}  {split} loss "
            f"{metrics['val_loss']:.4f}{top1}{pixels}  {metrics['images_per_second']:,.0f} images/s, "
            f"input {metrics['input_share']:.1%}"
        )

    def page(self) -> None:
        """The page, with what is there so far."""
        write_report(self.run.path, self.dataset)

    def results(self, results: dict[str, Any], judgement: Judgement, step: int) -> None:
        """The figures of the last weights, and what is behind them."""
        write_tensors(self.run.path / f"{judgement.name}.safetensors", judgement.arrays)
        write_text(self.run.path / "results.json", json.dumps(results, indent=2) + "\n")
        self.page()
        self.trackers.results(results, step)
