"""The paper's few-shot linear evaluation (section 4.1): how well classes can be told apart by frozen features.

A linear map takes the features of a few training images of each class to targets of -1 and 1. It is found in closed
form, by regularised least squares, and names the images that the data set is judged by. All numbers are those of the
authors' later code (big_vision: evaluators/fewshot_lsr.py, configs/common_fewshot.py), which the paper does not give.

    N images    D features    C classes
"""

import hashlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn

from vitrail import __version__
from vitrail.data import cache
from vitrail.data.archives import cache_root
from vitrail.data.cache import Images, Split
from vitrail.environment import commit
from vitrail.errors import BadInput
from vitrail.evaluation.classifier import own_images
from vitrail.evaluation.evaluate import pick_device
from vitrail.input.batches import evaluation_batches
from vitrail.input.pixels import pixels_of
from vitrail.progress import counted, track
from vitrail.vit.config import Colours
from vitrail.vit.floor import native_precision
from vitrail.vit.models import Model
from vitrail.weights.checkpoint import Run
from vitrail.weights.files import read_tensors, write_tensors
from vitrail.weights.formats import HEAD
from vitrail.weights.load import build, digest, is_run, read

SHOTS = (1, 5, 10, 25)  # training images a class
DRAWS = 5  # of them; the code has 3
PENALTY = 2.0**10  # on the squared weights
CONSTANT = 100.0  # a feature of all images, whose weight is the bias: so large that the penalty hardly moves it
LEAST_SPREAD = 1e-5  # added to the standard deviation of each feature
RAW_SIDE = 32  # pixels: larger images are shrunk to this before their pixels are taken for features
BATCH = 200


@dataclass(frozen=True)
class LinearMap:
    """From features to a score of each class."""

    mean: Float64[Tensor, " D"]
    spread: Float64[Tensor, " D"]
    weight: Float64[Tensor, "D_and_1 C"]

    def __call__(self, features: Float[Tensor, "N D"]) -> Float64[Tensor, "N C"]:
        """The scores, of which the highest is the answer."""
        return prepared(features, self.mean, self.spread) @ self.weight


def prepared(
    features: Float[Tensor, "N D"], mean: Float64[Tensor, " D"], spread: Float64[Tensor, " D"]
) -> Float64[Tensor, "N D_and_1"]:
    """Features as the map reads them: standardised, and the constant behind them."""
    return F.pad((features.double() - mean) / spread, (0, 1), value=CONSTANT)


def fit(features: Float[Tensor, "N D"], labels: Int[Tensor, " N"], num_classes: int) -> LinearMap:
    """The map W that makes |X W - Y|² + PENALTY |W|² least, where X are the features, standardised, and Y is 1 for the
    class of an image and -1 for the others: (XᵀX + PENALTY)⁻¹ XᵀY or, the same and less work where there are fewer
    images than features, Xᵀ (XXᵀ + PENALTY)⁻¹ Y."""
    mean, spread = features.double().mean(0), features.double().std(0, correction=0) + LEAST_SPREAD
    x = prepared(features, mean, spread)
    y = 2 * F.one_hot(labels, num_classes).double() - 1
    few = x.shape[0] < x.shape[1]
    products = x @ x.T if few else x.T @ x
    products.diagonal().add_(PENALTY)
    solved = torch.cholesky_solve(y if few else x.T @ y, torch.linalg.cholesky(products))
    return LinearMap(mean, spread, x.T @ solved if few else solved)


def draw(labels: Int[np.ndarray, " images"], num_classes: int, shots: int, seed: int) -> Int[np.ndarray, "C shots"]:
    """Which images of each class are taken, at random; the first of them are what a draw of fewer takes."""
    noise = np.random.default_rng(seed)
    return np.stack([noise.permutation(np.flatnonzero(labels == label))[:shots] for label in range(num_classes)])


def probe(source: Path, data: str | None = None, shots: Sequence[int] | None = None) -> dict[str, Any]:
    """Top-1 of a linear map on what the head of a model reads, and on raw pixels, by the number of training images a
    class: the mean over `DRAWS` draws, and the standard deviation.

    Features are computed in bf16 where the device has instructions for it, else in float32; which, hangs on the device
    alone, so that the same command has the same figures.

    Args:
        source: a run folder, or anything else that `weights.load.read` reads.
        data: a data set; that of the run if None.
        shots: images a class; those of `SHOTS` that there are of each class, if None.

    Raises:
        BadInput: the weights or the data cannot be used, or some class has fewer training images.
    """
    model, mean, std = headless(source)
    size = model.config.image_size
    run = Run(source)
    if data is None:
        own, recipe = own_images(run), run.recipe().recipe
        dataset = cache.load(own, size, holdout=recipe.holdout, stream=recipe.stream)
    else:
        dataset = cache.load(data, size)
    train, judged = dataset.splits["train"], dataset.splits[dataset.evaluation]
    wanted = choose_shots(shots, train.labels, dataset.classes, dataset.name)
    draws = [draw(train.labels, len(dataset.classes), wanted[-1], seed) for seed in range(DRAWS)]
    used = np.unique(np.stack(draws))  # of all the training images, those that some draw has
    device = pick_device("auto")
    precision = native_precision(device)
    few = train.take(used)
    extract = Extractor(model.to(device).eval(), device, precision, mean, std)
    raw = nn.Sequential(nn.AdaptiveAvgPool2d(min(size, RAW_SIDE)), nn.Flatten())
    readings = {
        "features": [extract.cached(images) for images in (few, judged)],
        "pixels": [Extractor(raw, device, "fp32", mean, std).features(images, size) for images in (few, judged)],
    }
    places = [np.searchsorted(used, each) for each in draws]
    labels = [torch.from_numpy(images.labels) for images in (few, judged)]
    found = {
        name: accuracies((seen, labels[0]), (unseen, labels[1]), places, wanted, len(dataset.classes))
        for name, (seen, unseen) in readings.items()
    }
    return {
        "weights": str(source), "dataset": dataset.name, "split": dataset.evaluation, "count": len(judged),
        "classes": len(dataset.classes), "draws": DRAWS, "precision": precision,
        **{name: {"size": both[0].shape[1], "shots": found[name]} for name, both in readings.items()},
    }  # fmt: skip


def headless(source: Path) -> tuple[Model, Colours, Colours]:
    """The model without its head, so that it gives what the head would read, and what its images are normalised by.

    Raises:
        BadInput: as `vitrail.load`.
    """
    model: Model
    if is_run(source):
        run = Run.open(source)
        (model, _), (mean, std) = run.load_model(), run.preprocessing()
    else:
        imported = read(source)
        model = build(imported, source, num_classes=None if HEAD[0] in imported.tensors else 1)
        mean, std = imported.mean, imported.std
    model.head = nn.Identity()  # type: ignore[assignment]  # it is not trained or saved any more
    return model, mean, std


def choose_shots(
    shots: Sequence[int] | None, labels: Int[np.ndarray, " images"], classes: Sequence[str], name: str
) -> list[int]:
    """The numbers of images a class, in order, each once.

    Raises:
        BadInput: some class has fewer.
    """
    counts = np.bincount(labels, minlength=len(classes))
    fewest = int(counts.min())
    wanted = sorted(set(shots if shots is not None else [1, *(n for n in SHOTS if n <= fewest)]))
    if wanted[-1] > fewest:
        where = f"{name} has {counted(fewest, 'training image')} of the class {classes[int(counts.argmin())]}"
        raise BadInput(f"{where}, and --shots {wanted[-1]} takes as many of each; take at most {fewest}.")
    return wanted


@dataclass(frozen=True)
class Extractor:
    """A frozen model, and how images are given to it."""

    model: nn.Module
    device: torch.device
    precision: Literal["fp32", "bf16"]
    mean: Colours
    std: Colours

    @torch.inference_mode()
    def features(self, images: Split, size: int) -> Float[Tensor, "N D"]:
        """What the model gives of each image's centre, a square of `size` pixels: on the processor, in float32."""
        found = []
        pixels = pixels_of(images, size, self.device)
        with track(len(pixels), "features", "images") as advance:
            for batch, labels in evaluation_batches(pixels, BATCH, self.mean, self.std):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                    given = self.model(batch)[: len(labels)]
                found.append(given.float().cpu())
                advance(len(labels))
        return torch.cat(found)

    def cached(self, images: Split) -> Float[Tensor, "N D"]:
        """The same at the size that the model is for, from the cache if the same weights have seen the same images by
        the same version of the program. Of a checkout with changes it is not known which version that is: there,
        nothing is read from the cache or written to it."""
        assert isinstance(self.model, Model)
        config, version = self.model.config, commit() or __version__
        if version.endswith("+changes"):
            return self.features(images, config.image_size)
        program = (version, torch.__version__, self.device.type, self.precision)
        seen = (digest(self.model.state_dict()), config, self.mean, self.std, of_images(images))
        key = hashlib.blake2b(repr((program, seen)).encode(), digest_size=16).hexdigest()
        return kept(cache_root() / "features" / f"{key}.safetensors", lambda: self.features(images, config.image_size))


def of_images(images: Split) -> str:
    """A digest of the pixels of images, in their order; of those that are streamed, of what they are called."""
    if not isinstance(images, Images):
        called = (images.decoders.storage.fingerprint(), images.decoders.image_size, images.names)
        return hashlib.blake2b(repr(called).encode(), digest_size=16).hexdigest()
    hashed = hashlib.blake2b(images.sizes.tobytes(), digest_size=16)
    for index in range(len(images)):
        hashed.update(images.image(index).ravel().data)
    return hashed.hexdigest()


def kept(path: Path, make: Callable[[], Tensor]) -> Tensor:
    """The features in a file, which is written where there is none, or none that can be read."""
    if path.is_file():
        try:
            return read_tensors(path)[0]["features"]
        except (BadInput, KeyError):
            pass
    features = make()
    write_tensors(path, {"features": features})
    return features


def accuracies(
    few: tuple[Float[Tensor, "N D"], Int[Tensor, " N"]], judged: tuple[Float[Tensor, "M D"], Int[Tensor, " M"]],
    draws: Sequence[Int[np.ndarray, "C most"]], shots: Sequence[int], num_classes: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Top-1 on the judged images by the number of images a class that the map is fitted to: those of each draw. Images
    are features and labels."""
    rows, (features, labels) = [], few
    with track(len(draws) * sum(shots) * num_classes, "fitting", "images") as advance:
        for shot in shots:
            top1 = []
            for drawn in draws:
                index = torch.from_numpy(drawn[:, :shot].ravel())
                scores = fit(features[index], labels[index], num_classes)(judged[0])
                top1.append(float((scores.argmax(1) == judged[1]).double().mean()))
                advance(len(index))
            rows.append({"shots": shot, "top1": statistics.mean(top1), "top1_std": statistics.stdev(top1)})
    return rows
