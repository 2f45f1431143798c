"""What single predictions say: confusions, classes, the surest mistakes, and how sure a share is."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Answers:
    """The class of each image (N,), the class that was said, and with what probability."""

    label: Ints
    said: Ints
    confidence: Floats

    @property
    def right(self) -> NDArray[np.bool_]:
        """Which of them were right, (N,)."""
        right: NDArray[np.bool_] = self.said == self.label
        return right


@dataclass(frozen=True)
class Pair:
    """`times` of the `of` images of class `label` were said to be of class `said`."""

    label: int
    said: int
    times: int
    of: int


@dataclass(frozen=True)
class ClassRow:
    """One class: its images, how many were recognised, how often it was said, and what it was most taken for."""

    label: int
    count: int
    right: int
    said: int
    mistaken_for: Pair | None


def wilson(right: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval for a share of `right` in `count` (Wilson 1927); z = 1.96 gives 95%."""
    share, weight = right / count, z * z / count
    centre = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * (share * (1 - share) / count + weight / (4 * count)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def confusion(label: Ints, said: Ints, classes: int) -> Ints:
    """Counts (classes, classes): row = the true class, column = the class said."""
    return np.bincount(label * classes + said, minlength=classes * classes).reshape(classes, classes)


def worst_pairs(counts: Ints, limit: int) -> list[Pair]:
    """The confusions that happened most often; of equally frequent ones, first those of the smaller class."""
    of = counts.sum(1)
    pairs = [
        Pair(int(a), int(b), int(counts[a, b]), int(of[a]))
        for a, b in np.argwhere(counts > 0) if a != b
    ]  # fmt: skip
    return sorted(pairs, key=lambda p: (-p.times, p.of, p.label, p.said))[:limit]


def per_class(counts: Ints) -> list[ClassRow]:
    """Each class's figures out of the confusion counts, in the order of the classes."""
    rows = []
    for k, row in enumerate(counts):
        others = np.where(np.arange(len(row)) == k, 0, row)
        worst = int(others.argmax())
        pair = Pair(k, worst, int(others[worst]), int(row.sum())) if others[worst] else None
        rows.append(ClassRow(k, int(row.sum()), int(row[k]), int(counts[:, k].sum()), pair))
    return rows


def confident_mistakes(confidence: Floats, right: NDArray[np.bool_], limit: int) -> list[int]:
    """Indices of the wrong predictions made with the highest confidence, the most confident first."""
    order = np.argsort(-confidence, kind="stable")
    return [int(i) for i in order[~right[order]][:limit]]


def surest_of(answers: Answers, pair: Pair, limit: int) -> list[int]:
    """Indices of the images that were so confused, the most confident first."""
    chosen = np.flatnonzero((answers.label == pair.label) & (answers.said == pair.said))
    return [int(i) for i in chosen[np.argsort(-answers.confidence[chosen], kind="stable")][:limit]]


def rightest(confidence: Floats, right: NDArray[np.bool_], label: Ints, limit: int) -> list[int]:
    """Indices of the right predictions made with the highest confidence, at most one of each class."""
    order = np.argsort(-confidence, kind="stable")
    order = order[right[order]]
    _, first = np.unique(label[order], return_index=True)
    return [int(i) for i in order[np.sort(first)][:limit]]
