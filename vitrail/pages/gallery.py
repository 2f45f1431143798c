"""The images of a run's page: the surest mistakes, the rightest, the confused, and where the model looked in them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrail.data.cache import Dataset, Split
from vitrail.errors import BadInput
from vitrail.evaluation.calibration import calibration
from vitrail.evaluation.scores import (
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
from vitrail.explanation.explain import attended, squares
from vitrail.pages.panes import enlarge, shine
from vitrail.pages.pictures import thumbnail
from vitrail.pages.record import Record
from vitrail.vit.model import VisionTransformer
from vitrail.weights.checkpoint import Run
from vitrail.weights.load import load

MATRIX = 20  # classes up to which a confusion matrix can be read
PAIRS = 20  # confused pairs listed where there is no matrix,
PAIRS_BESIDE = 8  # and beside one
MISTAKES = 16
RIGHTEST = 8
EXAMPLES = 3  # pictures beside each confused pair
MOST_FLOPS = 3e12  # floating-point operations that looking at where the model looked may take: some 20 s of two cores
LIT = 144  # side of an image with light on it, about, in pixels


def scored(record: Record, dataset: Dataset | None, split: str) -> dict[str, Any] | None:
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
    images, why_none = images_of(dataset, split, label)
    mistakes = confident_mistakes(confidence, right, MISTAKES)
    best = rightest(confidence, right, label, RIGHTEST)
    lit = looked(record.path, images, [*mistakes, *best]) if images and record.path else {}
    return {
        "names": names, "matrix": counts if len(names) <= MATRIX else None, "classes": per_class(counts),
        "mistaken": int((~right).sum()), "commonest": float(counts.sum(1).max() / len(label)),
        "accuracy": float(right.mean()), "confidence": float(confidence.mean(dtype=float)),
        "bins": [(b, wilson(round(b.accuracy * b.count), b.count)) for b in calibration(confidence, right)],
        "mistakes": _shown(images, answers, mistakes, lit), "rightest": _shown(images, answers, best, lit),
        "pairs": [(pair, _shown(images, answers, surest_of(answers, pair, EXAMPLES), {})) for pair in pairs],
        "lit": bool(lit), "no_pictures": why_none,
    }  # fmt: skip


def _shown(
    images: Split | None, answers: Answers, chosen: Sequence[int], lit: dict[int, NDArray[np.uint8]]
) -> list[dict[str, Any]]:
    """The chosen images with what was said of them, for the template; none where there are no images."""
    if images is None:
        return []
    return [
        {"picture": thumbnail(images.image(i)), "name": images.names[i], "label": int(answers.label[i]),
         "said": int(answers.said[i]), "confidence": float(answers.confidence[i]),
         "lit": {"picture": thumbnail(lit[i]), "name": images.names[i]} if i in lit else None,
         "pixels": images.image(i), "light": lit.get(i)}
        for i in chosen
    ]  # fmt: skip


def images_of(dataset: Dataset | None, split: str, label: Ints) -> tuple[Split | None, str]:
    """The images that were scored; where they cannot be had, None and a sentence that says why."""
    if dataset is None:
        return None, "No pictures here: the page was written without the data set."
    images = dataset.splits.get(split)
    if images is None or not np.array_equal(images.labels, label):
        return None, "No pictures here: the data set is no longer the one that was scored."
    return images, ""


def looked(run: Path, images: Split, chosen: Sequence[int]) -> dict[int, NDArray[np.uint8]]:
    """The chosen images, uint8 (L, L, 3), as the run's weights see them, with light where they look (attention
    rollout): as many of them, from the first, as take some seconds. None where there are no weights, or where they are
    of a model that has no attention."""
    try:
        model, (mean, std) = load(run), Run(run).preprocessing()
        if not isinstance(model, VisionTransformer):
            return {}
        weights = sum(weight.numel() for weight in model.parameters())
        at_once = MOST_FLOPS / (2 * weights * model.config.num_tokens)
        chosen = list(dict.fromkeys(chosen))[: max(int(at_once), 1)]
        seen = squares([images.image(i) for i in chosen], model.config.image_size)
        maps = attended(model, seen, mean, std)
    except BadInput:  # a page without light is better than none
        return {}
    return {i: shine(enlarge(square, LIT), lit) for i, square, lit in zip(chosen, seen, maps, strict=True)}
