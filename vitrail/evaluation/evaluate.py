"""Logits → figures."""

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

from vitrail.data.cache import Images
from vitrail.data.images import Unreadable, open_image, to_pixels
from vitrail.errors import BadInput, Partial
from vitrail.evaluation.calibration import calibration_error
from vitrail.evaluation.classifier import judged_images, open_classifier
from vitrail.input.batches import evaluation_batches
from vitrail.input.memory import images_at_once
from vitrail.input.pixels import Pixels, pixels_of
from vitrail.progress import counted, track
from vitrail.settings import Precision, Recipe
from vitrail.vit.config import HALF, Colours
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
    side: int | None = None,
) -> Predictions:
    """Run the model over every image of a split, each counted once and normalised by `mean` and `std`, and keep the
    `top` classes of each; `images_at_once` if no `batch_size` is given. With `mirror`, its logits are the mean of those
    of the image and of its mirror image. With `side`, it sees images of so many pixels a side.

    The processes of a `world` do equal parts of the work, and each returns the whole. The model is left in evaluation
    mode."""
    model.eval()
    labels, predicted, probabilities, losses = [], [], [], []
    with track(len(world.share(len(pixels))), "evaluating", "images") as advance:
        for batch, label in evaluation_batches(pixels, batch_size or images_at_once(model), mean, std, world, side):
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


def evaluate_run(path: Path, data: str | None = None, *, mirror: bool = False) -> dict[str, Any]:
    """Figures of the weights of a run, or of anything else that `vitrail import` takes, as in `results.json`: on the
    split that the run was judged by, or on `data`, brought to the size of the images that it learnt from. With
    `mirror`, they are followed by `mirrored`, those of test-time augmentation: the mean of the logits of each image and
    of its mirror image.

    Where `data` comes without a division into training and test images, all of its images count, unless they are
    those that the run itself was trained on: then those that it held out.

    Raises:
        BadInput: the run or the data cannot be used, or the data has classes that the run does not know.
    """
    opened = open_classifier(path)
    resolved, size, classes = opened.resolved, opened.image_size, opened.classes
    recipe = resolved.recipe if resolved else None
    name, split, images = judged_images(path, data, size, classes, shorter_side=opened.shorter_side, recipe=recipe)
    opened.say_if_unfinished()
    pixels = pixels_of(images, size, pick_device("auto"))
    predict = partial(
        predict_split, opened.model.to(pixels.device), pixels, precision=(recipe or Recipe()).precision,
        mean=opened.mean, std=opened.std,
    )  # fmt: skip
    found = figures(predict(), classes).as_dict()
    if mirror:
        both = figures(predict(mirror=True), classes)
        found["mirrored"] = {"top1": both.top1, "top5": both.top5, "loss": both.loss}
    return {"recipe": resolved.name if resolved else path.resolve().name, "dataset": name, "split": split, **found}


def readable(files: Sequence[Path], image_size: int, shorter_side: int | None) -> tuple[Images, str]:
    """Of image files those that can be read, as `to_pixels` has them for the model, and in a sentence why the others
    cannot; it is empty if there are none.

    Raises:
        BadInput: none can be read as an image; all are named.
    """
    read, names, problems = list[NDArray[np.uint8]](), [], []
    for file in files:
        try:
            read.append(to_pixels(open_image(file), image_size, shorter_side))
            names.append(str(file))
        except Unreadable as error:
            problems.append(str(error))
    said = "; ".join(problems)
    said += "" if not said or said.endswith("?") else "."
    if not read:
        raise BadInput(said)
    return Images.pack(read, names), said


def read_files(files: Sequence[Path], image_size: int, shorter_side: int | None) -> Images:
    """Image files, as `to_pixels` has them for the model.

    Raises:
        BadInput: some cannot be read as images; all of them are named.
    """
    images, problems = readable(files, image_size, shorter_side)
    if problems:
        raise BadInput(f"{problems} {len(images)} of the {len(files)} files can be read: leave the others out.")
    return images


def predict_files(path: Path, files: Sequence[Path], top: int = 5) -> list[dict[str, Any]]:
    """The most probable classes of each image file, by the weights of a run, or of anything else that `vitrail import`
    takes.

    Raises:
        BadInput: the weights cannot be used, or no file can be read as an image.
        Partial: some files cannot be; what is said of the others is its `result`.
    """
    opened = open_classifier(path)
    images, problems = readable(files, opened.image_size, opened.shorter_side)
    opened.say_if_unfinished()
    pixels = Pixels(images, opened.image_size, pick_device("auto"))
    model = opened.model.to(pixels.device)
    predictions = predict_split(model, pixels, top=top, mean=opened.mean, std=opened.std)
    answers = [
        {
            "image": name,
            "predictions": [
                {"class": opened.classes[index], "probability": float(probability)}
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
