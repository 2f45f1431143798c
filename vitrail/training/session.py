"""The loop around the training steps: evaluation after each epoch, checkpoints on the way, figures at the end."""

import math
import shlex
import signal
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.data.cache import Dataset
from vitrail.environment import launcher
from vitrail.errors import Diverged, Stopped
from vitrail.evaluation.evaluate import Judgement, judge_classes, predict_split
from vitrail.input.batches import TrainingBatches
from vitrail.input.pixels import pixels_of
from vitrail.process import kept_memory_as_it_is, peak_memory
from vitrail.progress import counted, say
from vitrail.recipes import Resolved
from vitrail.training.books import Books
from vitrail.training.optimize import RunningAverage, averaged, learning_rate
from vitrail.training.parallel import finite, ordinary, replicate, whole
from vitrail.training.pretraining import Pretraining, Trainee, judge_reconstruction
from vitrail.training.resume import Progress, state_of
from vitrail.training.step import train_step
from vitrail.training.track import looked_at
from vitrail.training.trackers import Tracker
from vitrail.vit.config import HALF, Colours
from vitrail.vit.model import VisionTransformer
from vitrail.vit.models import Model
from vitrail.weights.checkpoint import Run
from vitrail.weights.files import read_about
from vitrail.world import ALONE, World

READ_EVERY = 0.25  # seconds between two looks at losses that wait on the device
LOOKING = 0.01  # share of training's time that pictures of what the model looks at may take beside it,
EARLY = 5.0  # and seconds of training before the first


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, and what `results.json` there says."""

    run: Path
    results: dict[str, Any]


@dataclass
class Session:
    """One stretch of a run, from its start or a checkpoint up to its end or the next interruption."""

    run: Run
    resolved: Resolved
    dataset: Dataset
    model: Trainee
    optimizer: torch.optim.Optimizer
    average: RunningAverage
    progress: Progress
    device: torch.device
    checkpoint_every: float
    counted_until: float  # by `time.perf_counter`: when `progress.wall_seconds` ends; at first, the start
    mean: Colours = HALF  # what images are normalised by
    std: Colours = HALF
    tracker: Tracker | None = None
    world: World = ALONE
    books: Books | None = None  # of one of the processes
    pending: list[Float[Tensor, "2"]] = field(default_factory=list)  # outcomes of steps, still on the device
    lost: str = ""  # what is no longer finite
    images_per_second: float = 0.0  # of the latest steps
    evaluation_seconds: float = 0.0  # that the last one took
    look_at: float = 0.0  # seconds of training behind which there is the next picture of what the model looks at

    def __post_init__(self) -> None:
        self.recipe = self.resolved.recipe
        train, judged = self.dataset.splits["train"], self.dataset.splits[self.dataset.evaluation]
        pixels = pixels_of(train, self.recipe.image_size, self.device)
        self.batches = TrainingBatches(pixels, self.recipe, self.mean, self.std, self.world)
        parts = -(-self.progress.parts // self.world.size)
        self.batches.divided_by = self.batches.parts_from(max(self.recipe.accumulate, parts))
        self.judged = pixels_of(judged, self.recipe.image_size, self.device, beside=pixels)
        self.trained = replicate(self.model, self.recipe, self.world)
        self.parameters = sum(weight.numel() for weight in self.shipped.parameters())
        self.saved = self.read = time.perf_counter()

    @property
    def shipped(self) -> Model:
        """The model that the run is for: what pre-training needs beside it stays behind."""
        return self.model.encoder if isinstance(self.model, Pretraining) else self.model

    @property
    def samples_seen(self) -> int:
        """Images that the steps done have taken, each as often as it came."""
        return self.progress.step * self.recipe.batch_size

    @property
    def left(self) -> float:
        """Seconds to the end of the run, at the rate of the latest steps (of pixels: they may grow) and evaluation."""
        progress, recipe, batches = self.progress, self.recipe, self.batches
        images = batches.pixels_left(progress.step) / batches.stretch(max(0, progress.step - 1)).side ** 2
        evaluations = recipe.epochs * (1 - progress.step / batches.steps)
        return images / self.images_per_second + evaluations * self.evaluation_seconds

    def announce(self) -> None:
        """Say what is trained on what, and where it goes."""
        images, batch = len(self.batches.pixels), self.recipe.batch_size
        many = f"{self.world.size} processes ({self.recipe.parallel}), " if self.world.size > 1 else ""
        if self.progress.step:
            say(f"going on with {self.run.path} at step {self.progress.step:,} of {self.batches.steps:,}")
        say(
            f"{self.resolved.name} ({self.parameters:,} parameters) on {self.dataset.name}: {images:,} training and "
            f"{counted(len(self.judged), f'{self.dataset.evaluation} image')} of {len(self.dataset.classes)} classes, "
            f"{many}{self.device.type}, {self.recipe.precision} → {self.run.path}"
        )
        if batch > images:
            say(
                f"a batch of {batch} is more than the {images} images there are: {counted(self.batches.steps, 'step')} "
                f"in {counted(self.recipe.epochs, 'epoch')}, and a smaller --batch-size would learn more"
            )

    def fit(self, last_epoch: int, stopped: list[int]) -> Result:
        """Train up to the end of `last_epoch` (counted from 1), evaluating after each epoch and saving on the way.
        `stopped` gets the number of a signal when one comes."""
        progress, batches = self.progress, self.batches
        # A checkpoint between an epoch's last step and its evaluation still counts steps of that epoch.
        at = progress.step - (progress.counted > 0)
        epochs_done = next((e for e in range(last_epoch) if batches.first_step(e + 1) > at), last_epoch)
        judgement: Judgement | None = None
        if at and epochs_done == last_epoch:
            done = f"{counted(last_epoch, 'epoch')} {'is' if last_epoch == 1 else 'are'} done"
            say(f"its {done}: nothing is trained, its figures and page are written anew")
        if self.world.first:
            self.books = Books(self.run, self.resolved, self.dataset, self.tracker, at)
        if progress.step == 0:
            self.save()  # so that there is something to resume from, however early the end comes
        with self.books or nullcontext():
            for epoch in range(epochs_done, last_epoch):
                self.train_epoch(epoch, stopped)
                if progress.counted:  # where a batch holds more images than there are, some epochs have no step
                    judgement = self.end_epoch(epoch, last=epoch + 1 == last_epoch)
            self.save(page=False)  # which is written with the figures
            return self.finish(judgement if judgement is not None else self.evaluate())

    def train_epoch(self, epoch: int, stopped: list[int]) -> None:
        """The steps of an epoch (from 0) that are still to be done."""
        progress, batches = self.progress, self.batches
        end = batches.first_step(epoch + 1)
        began = self.read = time.perf_counter()
        for step in range(progress.step, end):
            due = began - self.saved >= self.checkpoint_every
            to_end, to_stop, to_save = self.world.any(bool(self.lost), bool(stopped), due)
            if to_end or to_stop or to_save:
                if self.pending:  # a signal came after they were looked for, or another process asks for it
                    self.read_outcomes()
                    progress.spend(time.perf_counter() - began)
                self.check_loss()
                self.save()
                if to_stop:
                    self.stop(stopped[0] if stopped else signal.SIGTERM)
                began = self.read = time.perf_counter()
            self.pending.append(train_step(self.trained, self.optimizer, batches, step))
            self.average.update(step)
            progress.step = step + 1
            now = time.perf_counter()
            due = now - self.saved >= self.checkpoint_every
            if due or progress.step == end or now - self.read >= READ_EVERY or stopped:
                loss, accuracy = self.read_outcomes()  # which waits for the device, and so belongs to the time
                progress.spend(time.perf_counter() - began)
                self.show(loss, accuracy)
                began = self.read = time.perf_counter()
        self.check_loss()

    def show(self, loss: float, accuracy: float) -> None:
        """Say how far the run is, and what the latest steps gave."""
        if self.books is None:
            return
        step, steps, epochs = self.progress.step, self.batches.steps, self.recipe.epochs
        learnt = f"loss {loss:.3f}" + (f" · accuracy {accuracy:.3f}" if not self.recipe.self_supervised else "")
        self.books.display.update(step, steps, step / steps * epochs, epochs, learnt, self.images_per_second, self.left)

    def read_outcomes(self) -> tuple[float, float]:
        """Read what the last steps gave: mean loss and accuracy of them, which are also added to the epoch's."""
        outcomes = torch.stack(self.pending).tolist()
        self.pending.clear()
        self.progress.input_seconds += self.batches.watch.read()
        first = self.progress.step - len(outcomes)
        for step, (loss, _) in enumerate(outcomes, start=first + 1):
            if not math.isfinite(loss) and not self.lost:
                self.lost = f"the training loss is {loss} at step {step}"
        now = time.perf_counter()
        pace = len(outcomes) * self.recipe.batch_size / (now - self.read)
        self.images_per_second = 0.8 * self.images_per_second + 0.2 * pace if self.images_per_second else pace
        losses, correct = sum(loss for loss, _ in outcomes), sum(round(right) for _, right in outcomes)
        self.progress.loss += losses
        self.progress.correct += correct
        self.progress.counted += len(outcomes)
        return losses / len(outcomes), correct / (len(outcomes) * self.recipe.batch_size)

    def check_loss(self) -> None:
        """See whether the losses that were read are finite. All processes ask at the same step, for each reads its own
        when it has the time.

        Raises:
            Diverged: they are not.
        """
        if self.lost:
            self.diverged(self.lost)

    def end_epoch(self, epoch: int, *, last: bool) -> Judgement | None:
        """Evaluate, leave a line of figures behind, and start the next epoch's count. Returns what can be reported of
        the weights: nothing where they were judged by small images."""
        progress, recipe = self.progress, self.recipe
        side = self.batches.stretch(progress.step - 1).whole
        began = time.perf_counter()
        judgement = self.evaluate(side)
        self.evaluation_seconds = time.perf_counter() - began
        found = judgement.curves
        if not math.isfinite(found["loss"]):
            self.diverged(f"the {self.dataset.evaluation} loss is {found['loss']} after step {progress.step}")
        accuracy = progress.correct / (progress.counted * recipe.batch_size)
        metrics = {
            "epoch": epoch + 1,
            "step": progress.step,
            "samples_seen": self.samples_seen,
            "lr": learning_rate(recipe, progress.step - 1, self.batches.steps),
            "train_loss": progress.loss / progress.counted,
            **({} if recipe.self_supervised else {"train_accuracy": accuracy}),
            **{f"val_{name}": value for name, value in found.items()},
            **({"val_image_size": side} if recipe.first_size is not None else {}),
            "train_seconds": progress.train_seconds,
            "images_per_second": progress.counted * recipe.batch_size / progress.epoch_seconds,
            "input_share": progress.input_seconds / progress.train_seconds,
        }
        if any(self.world.any(last or progress.train_seconds >= max(self.look_at, EARLY))):
            self.look()
        if self.books is not None:
            self.books.metrics(metrics, progress.step)
        progress.begin_epoch()
        return judgement if side == recipe.image_size else None

    def look(self) -> None:
        """Show what the model looks at in a few images, and see to it that doing so again waits for its share of the
        time."""
        if not isinstance(self.shipped, VisionTransformer):  # a ResNet has no attention
            return
        began = time.perf_counter()
        with self.average.in_place():
            model = ordinary(self.shipped, self.world)
            assert isinstance(model, VisionTransformer)
            if self.books is not None:
                picture = looked_at(model, self.judged, self.mean, self.std)
                self.books.picture("attention", picture, self.progress.step)
        self.look_at = self.progress.train_seconds + (time.perf_counter() - began) / LOOKING

    def evaluate(self, side: int | None = None) -> Judgement:
        """What the evaluated split, its images of `side` pixels where that is said, says of the weights as they are, or
        of their running average. While training images are small, it is of small ones too: larger ones are not learnt
        yet, and what they would say of the weights is no measure of them."""
        kept = self.device.type == "cpu" and not self.recipe.checkpoint_activations
        with self.average.in_place(), kept_memory_as_it_is(kept):
            if isinstance(self.model, Pretraining):
                judgement = judge_reconstruction(self.model, self.judged, self.recipe, self.world, side)
            else:
                predictions = predict_split(
                    self.model, self.judged, precision=self.recipe.precision, mean=self.mean, std=self.std,
                    world=self.world, side=side,
                )  # fmt: skip
                judgement = judge_classes(predictions, self.dataset.classes)
        self.model.train()
        return judgement

    def save(self, *, page: bool = True) -> None:
        """Make a checkpoint, write the weights to ship, and the page as it is so far, if the weights are finite.

        Raises:
            Diverged: they are not.
        """
        bad = [name for name, tensor in averaged(self.model).items() if not finite(tensor)]
        if any(self.world.any(bool(bad))):
            self.diverged(f"{bad[0] if bad else 'a weight'} is no longer finite after step {self.progress.step}")
        self.count()
        state = whole(state_of(self.model, self.optimizer, self.average.weights), self.world)
        with self.average.in_place():
            model = ordinary(self.shipped, self.world)
            if self.books is not None:
                self.run.save_model(model, self.dataset.classes, self.mean, self.std, self.dataset.shorter_side)
        if self.books is not None:
            self.run.save_state(state, self.progress.as_dict())
            if page:
                self.books.page()
        self.saved = time.perf_counter()

    def count(self) -> None:
        """Take down what belongs to the stretch, not to its steps: time, memory, and how memory divides batches."""
        progress, now = self.progress, time.perf_counter()
        divided = self.batches.divided_by > self.recipe.accumulate
        progress.parts = self.batches.divided_by * self.world.size if divided else 1
        progress.peak_memory = max(progress.peak_memory, peak_memory(self.device))
        progress.wall_seconds += now - self.counted_until
        self.counted_until = now

    def diverged(self, what: str) -> NoReturn:
        """End the run, its last good checkpoint kept."""
        kept = read_about(self.run.path / "last" / "state.safetensors")["step"]
        raise Diverged(
            f"training diverged: {what}. The checkpoint of step {kept} is kept in {self.run.path}. "
            f"Try a lower --lr (it was {self.recipe.lr:g}), a longer --warmup, or --clip 1."
        )

    def stop(self, number: int) -> NoReturn:
        """End this stretch because a signal came; the state was saved just before."""
        track = f" --track {self.tracker.name}" if self.tracker else ""
        raise Stopped(
            f"stopped at step {self.progress.step} of {self.batches.steps}; go on with: "
            f"{launcher()} train --resume{track} --output {shlex.quote(str(self.run.path))}",
            128 + number,
        )

    def finish(self, judgement: Judgement) -> Result:
        """Write the figures of the last weights, what is behind them, and the report."""
        self.count()
        progress, recipe = self.progress, self.recipe
        results = {
            "recipe": self.resolved.name,
            "dataset": self.dataset.name,
            "split": self.dataset.evaluation,
            **judgement.results,
            "parameters": self.parameters,
            "epochs": max(e for e in range(recipe.epochs + 1) if self.batches.first_step(e) <= progress.step),
            "epochs_planned": recipe.epochs,
            "samples_seen": self.samples_seen,
            "train_seconds": round(progress.train_seconds, 2),
            "wall_seconds": round(progress.wall_seconds, 2),
            "images_per_second": round(self.samples_seen / progress.train_seconds, 1),
            "input_share": round(progress.input_seconds / progress.train_seconds, 4),
            "peak_memory": progress.peak_memory,
            "device": self.device.type,
            "precision": recipe.precision,
            "seed": recipe.seed,
        }
        if "per_class" in results:
            results["per_class"] = results.pop("per_class")  # last, for it is long
        if self.books is not None:
            self.books.results(results, judgement, progress.step)
        return Result(self.run.path, results)
