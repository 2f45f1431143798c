"""Figures agree with their definitions, worked out another way."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score

from vitrail.data.cache import Images
from vitrail.errors import Partial
from vitrail.evaluation.calibration import calibration, calibration_error
from vitrail.evaluation.evaluate import Predictions, figures, predict_files, predict_split
from vitrail.input.pixels import Pixels
from vitrail.vit.resnet import ResNetClassifier, ResNetConfig
from vitrail.weights.checkpoint import Run

CLASSES = tuple("abcdefg")


class Fixed(torch.nn.Module):
    """Gives image i the i-th row of logits, whatever it shows; the pixel at the top left says which i."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits[((images[:, 0, 0, 0] + 1) * 127.5).round().long()]


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) * 2


@pytest.fixture
def images() -> Images:
    pixels = np.repeat(np.arange(50, dtype=np.uint8), 4 * 4 * 3)
    labels = np.random.default_rng(0).integers(0, 6, 50)  # none of the last class
    return Images(pixels, np.arange(50) * 48, np.full((50, 2), 4, np.int32), labels, tuple(map(str, range(50))))


@pytest.mark.parametrize("batch_size", [1, 7, 50, 64])
def test_every_image_counts_whatever_the_batch(batch_size: int, logits: torch.Tensor, images: Images) -> None:
    predictions = predict_split(Fixed(logits), Pixels(images, 4, torch.device("cpu")), batch_size=batch_size)
    found = figures(predictions, CLASSES)
    probabilities = logits.softmax(1).numpy()
    assert found.count == 50
    assert found.top1 == pytest.approx(accuracy_score(images.labels, probabilities.argmax(1)))
    assert found.top5 == pytest.approx(top_k_accuracy_score(images.labels, probabilities, k=5, labels=range(7)))
    assert found.loss == pytest.approx(log_loss(images.labels, probabilities, labels=range(7)), rel=1e-5)
    for label, row in enumerate(found.per_class):
        of_class = images.labels == label
        right = (probabilities.argmax(1) == label)[of_class]
        assert (row.name, row.count) == (CLASSES[label], of_class.sum())
        assert row.top1 == (pytest.approx(right.mean()) if len(right) else None)
    np.testing.assert_allclose(predictions.probability, np.sort(probabilities)[:, :-6:-1], rtol=1e-5)


def test_fewer_classes_than_five_are_all_kept() -> None:
    predictions = Predictions(
        label=np.array([0, 1]), predicted=np.array([[0, 1], [0, 1]]),
        probability=np.array([[0.9, 0.1], [0.8, 0.2]], np.float32), loss=np.array([0.1, 1.6], np.float32),
    )  # fmt: skip
    found = figures(predictions, ("a", "b"))
    assert (found.top1, found.top5) == (0.5, 1.0)


def test_calibration_error_is_the_gap_weighted_by_images() -> None:
    # 15 bins: three images in (9/15, 10/15], two right; one in (14/15, 1], wrong
    confidence = np.array([0.65, 0.65, 0.65, 1.0], np.float32)
    right = np.array([True, True, False, False])
    expected = (3 * abs(0.65 - 2 / 3) + 1 * abs(1 - 0)) / 4
    assert calibration_error(confidence, right) == pytest.approx(expected, rel=1e-5)
    assert calibration_error(np.ones(5, np.float32), np.ones(5, bool)) == 0


def test_calibration_bins_are_those_of_the_definition() -> None:
    generator = np.random.default_rng(1)
    confidence = np.append(generator.uniform(0.1, 1, 500), [1.0, 1 / 15, 0.2]).astype(np.float32)
    right = generator.random(len(confidence)) < confidence**2
    bins = calibration(confidence, right)
    assert sum(b.count for b in bins) == len(confidence)
    exact = confidence.astype(float)
    for b in bins:
        inside = (exact > b.index / 15) & (exact <= (b.index + 1) / 15)
        assert b.confidence == pytest.approx(exact[inside].mean())
    error = sum(b.count * abs(b.accuracy - b.confidence) for b in bins) / len(confidence)
    assert error == pytest.approx(calibration_error(confidence, right), abs=1e-7)


@pytest.mark.parametrize(("good", "said"), [(1, "The other file could be read."), (2, "The other 2 files could")])
def test_how_many_files_could_be_read(good: int, said: str, tmp_path: Path) -> None:
    Run.create(tmp_path / "run").save_model(ResNetClassifier(ResNetConfig(8, 2, 32, (1,))), ("cat", "dog"))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "bad.png").touch()
    with pytest.raises(Partial, match=said):
        predict_files(tmp_path / "run", [tmp_path / "bad.png", *[tmp_path / "a.png"] * good])
