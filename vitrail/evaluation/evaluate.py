"""Logits → figures."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from vitrail.data import cache
from vitrail.data.cache import Images, Split
from vitrail.data.hub import PREFIX
from vitrail.data.images import Unreadable, is_there, open_image, to_pixels
from vitrail.errors import BadInput, Partial
from vitrail.evaluation.calibration import calibration_error
from vitrail.input.batches import evaluation_batches
from vitrail.input.memory import images_at_once
from vitrail.input.pixels import Pixels, pixels_of
from vitrail.progress import counted, say, track
from vitrail.recipes import Resolved
from vitrail.settings import Precision, Recipe
from vitrail.vit.config import HALF, Colours
from vitrail.weights.checkpoint import Run
from vitrail.weights.files import read_about
from vitrail.world import ALONE, World


@dataclass(frozen=True)
class Predictions:
    """What a model says of each image of a split, in the split's order. N images; k is 5, or all classes if fewer."""

    label: NDArray[np.int64]  # (N,)
    predicted: NDArray[np.int64]  # (N, k) classes, the most probable first
    probability: NDArray[np.float32]  # (N, k) theirs
    loss: NDArray[np.float32]  # (N,) cross-entropy, in nats

    def arrays(self) -> dict[str, NDArray[Any]]:
        """By name, as they are kept in `predictions.safetensors`."""
        return dict(vars(self))


@dataclass(frozen=True)
class ClassFigures:
    """Of one class: how many images it has, and the share of them that is recognised (None where it has none)."""

    name: str
    count: int
    top1: float | None


@dataclass(frozen=True)
class Figures:
    """What is reported of a split. Rates are fractions of 1, the loss is the mean cross-entropy in nats."""

    count: int
    top1: float
    top5: float
    loss: float
    calibration_error: float
    per_class: tuple[ClassFigures, ...]

    def as_dict(self) -> dict[str, Any]:
        """As it stands in `results.json`."""
        return asdict(self)


@dataclass(frozen=True)
class Judgement:
    """What a run's weights make of the split that it is judged by: `curves`, which `metrics.jsonl` has after each epoch
    (as `val_loss` and so on), what `results.json` has of the last, and the `arrays` behind that, kept in the file of
    that name."""

    curves: dict[str, float]
    results: dict[str, Any]
    name: str
    arrays: dict[str, torch.Tensor]


def pick_device(name: str) -> torch.device:
    """The device of that name; for `auto` CUDA where there is one, else Apple's MPS, else the CPU.

    Raises:
        BadInput: this machine has no such device.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        here = ", ".join(device for device, there in available.items() if there)
        raise BadInput(f"there is no {name} device here; there is {here}.")
    if name == "cuda":  # float32 is float32 in convolutions too, as it is in other products; torch rounds to TF32 there
        torch.backends.cudnn.allow_tf32 = False
    return torch.device(name)


@torch.inference_mode()
def predict_split(
    model: nn.Module,
    pixels: Pixels,
    *,
    batch_size: int | None = None,
    precision: Precision = "fp32",
    top: int = 5,
    mean: Colours = HALF,
    std: Colours = HALF,
    mirror: bool = False,
    world: World = ALONE,
) -> Predictions:
    """Run the model over every image of a split, each counted once and normalised by `mean` and `std`, and keep the
    `top` classes of each; `images_at_once` if no `batch_size` is given. With `mirror`, its logits are the mean of those
    of the image and of its mirror image.

    The processes of a `world` do equal parts of the work, and each returns the whole. The model is left in evaluation
    mode."""
    model.eval()
    labels, predicted, probabilities, losses = [], [], [], []
    with track(len(world.share(len(pixels))), "evaluating", "images") as advance:
        for batch, label in evaluation_batches(pixels, batch_size or images_at_once(model), mean, std, world):
            with torch.autocast(pixels.device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = model(batch)[: len(label)]
                if mirror:
                    logits = (logits + model(batch.flip(3))[: len(label)]) / 2
            # Figures are made on the processor: float64, which some devices lack, orders nearly equal probabilities.
            logits, label = logits.float().cpu(), label.cpu()
            best = F.softmax(logits.double(), dim=1).topk(min(top, logits.shape[1]))
            labels.append(label)
            predicted.append(best.indices)
            probabilities.append(best.values.float())
            losses.append(F.cross_entropy(logits, label, reduction="none", ignore_index=-1))  # -1: not known
            advance(len(label))
    arrays = (torch.cat(parts).numpy() for parts in (labels, predicted, probabilities, losses))
    return Predictions(*(world.joined(array)[: len(pixels)] for array in arrays))


def figures(predictions: Predictions, classes: tuple[str, ...]) -> Figures:
    """The figures of a split from its predictions."""
    right = predictions.predicted == predictions.label[:, None]  # (N, k)
    counts = np.bincount(predictions.label, minlength=len(classes))
    hits = np.bincount(predictions.label[right[:, 0]], minlength=len(classes))
    return Figures(
        count=len(predictions.label),
        top1=float(right[:, 0].mean()),
        top5=float(right.any(axis=1).mean()),
        loss=float(predictions.loss.mean(dtype=np.float64)),
        calibration_error=calibration_error(predictions.probability[:, 0], right[:, 0]),
        per_class=tuple(
            ClassFigures(name, int(count), float(hit / count) if count else None)
            for name, count, hit in zip(classes, counts, hits, strict=True)
        ),
    )


def judge_classes(predictions: Predictions, classes: tuple[str, ...]) -> Judgement:
    """What predictions say of the weights that they come from."""
    found = figures(predictions, classes)
    curves = {"loss": found.loss, "top1": found.top1, "top5": found.top5}
    arrays = {name: torch.from_numpy(array) for name, array in predictions.arrays().items()}
    return Judgement(curves, found.as_dict(), "predictions", arrays)


def open_classifier(path: Path) -> tuple[Run, Resolved | None]:
    """A run whose model has learnt classes, and its recipe; None of weights from elsewhere, which have none.

    Raises:
        BadInput: there is no such run, or it is one of pre-training.
    """
    run = Run.open(path)
    resolved = run.recipe() if run.trained else None
    if resolved is not None and resolved.recipe.self_supervised:
        raise BadInput(
            f"{path} was pre-trained, and has learnt no classes. Train it on: vitrail train {resolved.name} --from "
            f"{path}; or measure what it sees: vitrail probe {path}."
        )
    return run, resolved


def so_far(run: Run, resolved: Resolved | None) -> tuple[int, int] | None:
    """How many epochs of how many a run that is not at its end has done; None of one that is, or that was not trained
    here."""
    path, planned = run.path / "metrics.jsonl", resolved.recipe.epochs if resolved else 0
    lines = path.read_text(encoding="utf-8") if path.is_file() else ""
    done = max(map(int, re.findall(r'^\{"epoch": (\d+),', lines, re.MULTILINE)), default=0)
    if done >= planned and (resolved is None or run.ended):
        return None
    return done, planned


def say_if_unfinished(run: Run, resolved: Resolved | None) -> tuple[int, int] | None:
    """Say what has to be known of a run that is not at its end; returns what `so_far` does."""
    if epochs := so_far(run, resolved):
        done = f"{epochs[0]} of its {counted(epochs[1], 'epoch')}"
        say(f"{run.path} is not finished: it has done {done}, and these weights are those of its last checkpoint")
    return epochs


def own_images(run: Run, recipe: Recipe | None = None) -> str:
    """The data set that a run was trained on. `recipe` is its, where that has been read already.

    Raises:
        BadInput: it is not where it was, or the run was not trained here.
    """
    if not run.trained:
        raise BadInput(
            f"{run.path} was not trained here, and has no images of its own. Say with --data D which to take."
        )
    data = (recipe or run.recipe().recipe).data
    if is_there(data):
        return data
    why = "which is no longer there"
    if not Path(data.removeprefix(PREFIX)).expanduser().is_absolute():
        why = "a path from the folder in which that was started; there is no such thing in this one"
    raise BadInput(f"{run.path} was trained on {data}, {why}. Say with --data D where the images are now.")


def judged_images(
    run: Run, data: str | None, image_size: int, classes: tuple[str, ...], *, others: bool = False,
    recipe: Recipe | None = None,
) -> tuple[str, str, Split]:  # fmt: skip
    """The split that a run was judged by, or that it is to be judged by now, of `data`: the name of the data set and of
    the split, and the images, as `evaluate_run` takes them. `recipe` is the run's, where that has been read already.

    Raises:
        BadInput: the data cannot be used, or has classes that the run does not know; with `others`, `data` may have.
    """
    recipe = recipe or (run.recipe().recipe if run.trained else None)
    holdout, stream = (recipe.holdout, recipe.stream) if recipe else (0.0, False)
    if data is not None:
        state = run.path / "last" / "state.safetensors"
        own = read_about(state)["images"] if state.is_file() else ""
        return cache.load_for_evaluation(
            data, image_size, classes, own=own, holdout=holdout, others=others, stream=stream
        )
    dataset = cache.load(own_images(run, recipe), image_size, holdout=holdout, stream=stream)
    if dataset.classes != classes:
        were = counted(len(classes), "class", "classes")
        raise BadInput(f"{dataset.name} no longer has the {were} that {run.path} was trained on.")
    return dataset.name, dataset.evaluation, dataset.splits[dataset.evaluation]


def evaluate_run(path: Path, data: str | None = None, *, mirror: bool = False) -> dict[str, Any]:
    """Figures of a run's weights, as in `results.json`: on the split that the run was judged by, or on `data`. With
    `mirror`, they are followed by `mirrored`, those of test-time augmentation: the mean of the logits of each image and
    of its mirror image.

    Where `data` comes without a division into training and test images, all of its images count, unless they are
    those that the run itself was trained on: then those that it held out.

    Raises:
        BadInput: the run or the data cannot be used, or the data has classes that the run does not know.
    """
    run, resolved = open_classifier(path)
    recipe = resolved.recipe if resolved else None
    model, classes = run.load_model()
    mean, std = run.preprocessing()
    size = model.config.image_size
    name, split, images = judged_images(run, data, size, classes, recipe=recipe)
    say_if_unfinished(run, resolved)
    pixels = pixels_of(images, size, pick_device("auto"))
    predict = partial(
        predict_split, model.to(pixels.device), pixels, precision=(recipe or Recipe()).precision, mean=mean, std=std
    )
    found = figures(predict(), classes).as_dict()
    if mirror:
        both = figures(predict(mirror=True), classes)
        found["mirrored"] = {"top1": both.top1, "top5": both.top5, "loss": both.loss}
    return {"recipe": resolved.name if resolved else path.resolve().name, "dataset": name, "split": split, **found}


def readable(files: Sequence[Path], image_size: int) -> tuple[Images, str]:
    """Of image files those that can be read, as the model is to see them, and in a sentence why the others cannot; it
    is empty if there are none.

    Raises:
        BadInput: none can be read as an image; all are named.
    """
    read, names, problems = list[NDArray[np.uint8]](), [], []
    for file in files:
        try:
            read.append(to_pixels(open_image(file), image_size))
            names.append(str(file))
        except Unreadable as error:
            problems.append(str(error))
    said = "; ".join(problems)
    said += "" if not said or said.endswith("?") else "."
    if not read:
        raise BadInput(said)
    return Images.pack(read, names), said


def read_files(files: Sequence[Path], image_size: int) -> Images:
    """Image files as the model is to see them.

    Raises:
        BadInput: some cannot be read as images; all of them are named.
    """
    images, problems = readable(files, image_size)
    if problems:
        raise BadInput(f"{problems} {len(images)} of the {len(files)} files can be read: leave the others out.")
    return images


def predict_files(path: Path, files: Sequence[Path], top: int = 5) -> list[dict[str, Any]]:
    """The most probable classes of each image file, by the weights of a run.

    Raises:
        BadInput: the run cannot be used, or no file can be read as an image.
        Partial: some files cannot be; what is said of the others is its `result`.
    """
    run, resolved = open_classifier(path)
    model, classes = run.load_model()
    mean, std = run.preprocessing()
    size = model.config.image_size
    images, problems = readable(files, size)
    say_if_unfinished(run, resolved)
    pixels = Pixels(images, size, pick_device("auto"))
    predictions = predict_split(model.to(pixels.device), pixels, top=top, mean=mean, std=std)
    answers = [
        {
            "image": name,
            "predictions": [
                {"class": classes[index], "probability": float(probability)}
                for index, probability in zip(predicted, probabilities, strict=True)
            ],
        }
        for name, predicted, probabilities in zip(
            images.names, predictions.predicted, predictions.probability, strict=True
        )
    ]
    if problems:
        others = "file" if len(images) == 1 else counted(len(images), "file")
        raise Partial(f"{problems} The other {others} could be read.", answers)
    return answers
