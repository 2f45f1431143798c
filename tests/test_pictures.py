"""The report's pictures: axes, labels, curves, thumbnails, and how figures are written."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from vitrail.pages import pictures


@pytest.mark.parametrize(
    ("low", "high", "whole", "ticks"),
    [
        (0, 0.95, False, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 5.4, False, [0, 2, 4, 6]),
        (0, 0.002, False, [0, 0.0005, 0.001, 0.0015, 0.002]),
        (0, 0, False, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (1, 60, True, [20, 40, 60]),
        (1, 3, True, [1, 2, 3]),
        (1, 1, True, [1]),
    ],
)
def test_nice_ticks(low: float, high: float, whole: bool, ticks: list[float]) -> None:
    assert pictures.nice_ticks(low, high, whole=whole) == ticks


def test_labels_are_spread() -> None:
    assert pictures.spread([50, 10, 52], 8) == [50, 10, 58]
    assert pictures.spread([99, 98], 8) == [100, 92]


def test_chart_leaves_out_what_is_not_finite() -> None:
    epochs = [1, 2, 3, 4]
    series = [
        pictures.Series("a", "x", epochs, [1.0, None, float("nan"), 3.0]), pictures.Series("b", "x", epochs, [None] * 4)
    ]  # fmt: skip
    chart = pictures.chart("Loss", series, str)
    assert chart is not None
    assert [(c.name, c.path) for c in chart.curves] == [("a", "M0.00 66.67M100.00 0.00")]
    assert pictures.chart("Loss", [pictures.Series("b", "x", [1], [float("inf")])], str) is None


def test_curves_that_do_not_share_their_x() -> None:
    minutes = pictures.Axis("minutes", lambda at: f"{at:g} min", lambda at: f"{at:g}")
    short = pictures.Series("a", "x", [1, 3], [2.0, 4.0], called="A, short")
    long = pictures.Series("b", "y", [2, 4], [1.0, 3.0], between=([0.5, 2.0], [2.0, 6.0]))
    chart = pictures.chart("Loss", [short, long], str, by=minutes)
    assert chart is not None
    assert [tick.text for tick in chart.y] == ["0.0", "2.0", "4.0", "6.0"]  # so that the area fits in
    assert [tick.text for tick in chart.x] == ["0", "1", "2", "3", "4"]  # from 0, where no point is
    assert [curve.path for curve in chart.curves] == ["M25.00 66.67L75.00 33.33", "M50.00 83.33L100.00 50.00"]
    assert [curve.area for curve in chart.curves] == ["", "M50.00 91.67L100.00 66.67L100.00 0.00L50.00 66.67Z"]
    assert chart.hover["title"] == ["1 min", "2 min", "3 min", "4 min"]
    assert chart.hover["curves"] == [
        # between its own points the value of the earlier one, but no dot; nothing behind its last, nor before its first
        {"name": "A, short", "kind": "x", "y": [66.67, None, 33.33, None], "text": ["2.0", "2.0", "4.0", "–"]},
        {"name": "b", "kind": "y", "y": [None, 83.33, None, 50.0], "text": ["–", "1.0", "1.0", "3.0"]},
    ]


def test_thumbnails() -> None:
    small = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    shown = pictures.thumbnail(small)
    kind, data = shown.uri.split(",")
    assert kind == "data:image/png;base64"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), small)
    assert (shown.width, shown.height, shown.pixelated) == (9, 8, True)
    large = pictures.thumbnail(np.zeros((256, 512, 3), np.uint8))
    assert (large.width, large.height, large.pixelated) == (144, 72, False)


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (pictures.percent(0.98123), "98.1%"),
        (pictures.percent(0.97), "97.0%"),
        (pictures.percent(1), "100%"),
        (pictures.percent(0.9999), ">99.9%"),
        (pictures.percent(0.996, 0), ">99%"),
        (pictures.percent(0.0001), "<0.1%"),
    ],
)
def test_writing(written: str, text: str) -> None:
    assert written == text
