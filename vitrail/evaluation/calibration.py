"""How far the confidence of predictions is to be trusted: Guo et al., "On Calibration of Modern Neural Networks"
(1706.04599)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

CALIBRATION_BINS = 15  # as there


@dataclass(frozen=True)
class Bin:
    """The predictions whose confidence fell into one interval: how many, their mean confidence, the share right."""

    index: int
    count: int
    confidence: float
    accuracy: float


def calibration(confidence: NDArray[np.floating[Any]], right: NDArray[np.bool_]) -> list[Bin]:
    """Predictions by confidence, in `CALIBRATION_BINS` equal intervals, open below and closed above; empty ones left
    out (Guo et al., section 2)."""
    # Of a model that has diverged, they are no numbers.
    which = np.ceil(np.nan_to_num(confidence.astype(np.float64)) * CALIBRATION_BINS).astype(int) - 1
    which = np.clip(which, 0, CALIBRATION_BINS - 1)
    inside = {index: which == index for index in np.unique(which).tolist()}
    return [
        Bin(index, int(mask.sum()), float(confidence[mask].mean(dtype=float)), float(right[mask].mean()))
        for index, mask in inside.items()
    ]


def calibration_error(confidence: NDArray[np.floating[Any]], right: NDArray[np.bool_]) -> float:
    """Expected calibration error: how far confidence and accuracy lie apart in the bins, weighted by their images
    (Guo et al., equation 3)."""
    gaps = (bin.count * abs(bin.accuracy - bin.confidence) for bin in calibration(confidence, right))
    return sum(gaps) / len(confidence)
