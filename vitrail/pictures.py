"""Geometry, pixels and words of the report: axes, curves, thumbnails, how figures are written. The template draws them.

Positions are percentages of the plot (x from its left edge, y from its top), so that a page can stretch a plot to
any width while its text keeps its size.
"""

import base64
import datetime
import io
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PLOT_HEIGHT = 220  # of a full plot, in CSS pixels
LABEL_HEIGHT = 17  # of one line of text beside it
PIXELATED = 32  # images up to this side are shown as the squares that they are, not smoothed
EXACT = 64  # images up to this side are embedded losslessly, larger ones as JPEG
THUMBNAIL = 144  # longer side of the latter, in pixels


@dataclass(frozen=True)
class Tick:
    """A mark of an axis: where it lies, in percent of the plot, and what it says."""

    at: float
    text: str


@dataclass(frozen=True)
class Series:
    """One curve to be drawn: a value for each x, None (or not finite) where there is none."""

    name: str
    kind: str  # the CSS class that colours it
    values: Sequence[float | None]


@dataclass(frozen=True)
class Curve:
    """One curve, drawn: an SVG path over 0..100 × 0..100, and where its name stands beside the plot."""

    name: str
    kind: str
    path: str
    dotted: bool  # few enough points to show each
    label: Tick


@dataclass(frozen=True)
class Chart:
    """All that the template needs for one plot. `hover` holds, for each x, the values under the pointer."""

    title: str
    unit: str
    height: int
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    curves: tuple[Curve, ...]
    widest_tick: int  # characters of the longest text left of the plot,
    widest_end: int  # and right of it
    hover: dict[str, object]
    description: str


@dataclass(frozen=True)
class Thumbnail:
    """An image for an `<img>`: its data URI, size in pixels, and whether it is to be shown pixel by pixel."""

    uri: str
    width: int
    height: int
    pixelated: bool


def nice_ticks(low: float, high: float, most: int = 6, whole: bool = False) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) that cover low..high, at most `most` of them.

    With `whole`, only whole numbers, and only those inside low..high.
    """
    if not high > low:
        return [low] if whole else nice_ticks(low, low + (abs(low) or 1.0), most)
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (power * factor for factor in (1, 2, 2.5, 5, 10, 20, 25, 50)):
        if whole and (step < 1 or step != int(step)):
            continue
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first < most:
            ticks = [round(k * step, 12) for k in range(first, last + 1)]
            return [t for t in ticks if low <= t <= high] if whole else ticks
    raise AssertionError("a step of 50 powers of ten always covers")


def spread(tops: Sequence[float], gap: float) -> list[float]:
    """Positions moved as little as needed so that no two are nearer than `gap`, the order kept, within 0..100."""
    order = sorted(range(len(tops)), key=lambda i: tops[i])
    placed = list(tops)
    for before, after in itertools.pairwise(order):
        placed[after] = max(placed[after], placed[before] + gap)
    ceiling = 100.0
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def chart(
    title: str, epochs: Sequence[int], series: Sequence[Series], write: Callable[[float], str], *,
    unit: str = "", write_tick: Callable[[float], str] | None = None, top: float | None = None,
    height: int = PLOT_HEIGHT,
) -> Chart | None:  # fmt: skip
    """Curves over epochs, from 0 to the largest value (at most `top`); None if there is no finite value.

    `write` turns a value into text, `write_tick` one of the axis. A series without any value is left out.
    """
    numbers = {s.name: [_finite(v) for v in s.values] for s in series}
    series = [s for s in series if any(v is not None for v in numbers[s.name])]
    if not series:
        return None
    largest = max(v for s in series for v in numbers[s.name] if v is not None)
    y = nice_ticks(0.0, largest, most=6 if height >= PLOT_HEIGHT else 4)
    y = [tick for tick in y if top is None or tick <= top + 1e-9]
    low, high = (min(epochs), max(epochs)) if len(epochs) > 1 else (epochs[0] - 1, epochs[0] + 1)
    across = [100 * (epoch - low) / (high - low) for epoch in epochs]
    down = {name: [None if v is None else 100 - 100 * v / y[-1] for v in values] for name, values in numbers.items()}
    ends = {s.name: next(v for v in reversed(numbers[s.name]) if v is not None) for s in series}
    labels = spread([100 - 100 * ends[s.name] / y[-1] for s in series], 100 * LABEL_HEIGHT / height)
    return Chart(
        title, unit, height,
        tuple(Tick(100 * (t - low) / (high - low), f"{t:,.0f}") for t in nice_ticks(min(epochs), max(epochs), 7, True)),
        tuple(Tick(100 - 100 * t / y[-1], (write_tick or write)(t)) for t in y),
        tuple(
            Curve(s.name, s.kind, path(across, down[s.name]), len(epochs) <= 30, Tick(at, write(ends[s.name])))
            for s, at in zip(series, labels, strict=True)
        ),
        max(len((write_tick or write)(t)) for t in y), max(len(f"{s.name} {write(ends[s.name])}") for s in series),
        {"x": _rounded(across), "title": [f"epoch {epoch}" for epoch in epochs],
         "curves": [{"name": s.name, "kind": s.kind, "y": _rounded(down[s.name]),
                     "text": ["–" if v is None else write(v) for v in numbers[s.name]]} for s in series]},
        f"{title} by epoch, {epochs[0]} to {epochs[-1]}: "
        + "; ".join(f"{s.name} ends at {write(ends[s.name])}" for s in series) + ".",
    )  # fmt: skip


def path(x: Sequence[float], y: Sequence[float | None]) -> str:
    """An SVG path through the points, interrupted where y is None."""
    pieces, pen = [], "M"
    for across, down in zip(x, y, strict=True):
        if down is not None:
            pieces.append(f"{pen}{across:.2f} {down:.2f}")
        pen = "M" if down is None else "L"
    return "".join(pieces)


def dots(path: str) -> str:
    """The points of such a path as one path of strokes without length, which round line caps make visible."""
    return re.sub(r"[ML]([^ML]+)", r"M\1h0", path)


def thumbnail(pixels: NDArray[np.uint8]) -> Thumbnail:
    """An image of uint8 (height, width, 3) for the page: small ones exactly (PNG), larger ones shrunk (JPEG)."""
    picture = Image.fromarray(pixels)
    small = max(picture.size) <= EXACT
    if not small:
        picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if small:
        picture.save(file, "PNG", optimize=True)
    else:
        picture.save(file, "JPEG", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    kind = "png" if small else "jpeg"
    return Thumbnail(f"data:image/{kind};base64,{data}", *picture.size, pixelated=max(picture.size) <= PIXELATED)


def percent(share: float, digits: int = 1) -> str:
    """`98.1%`; what is nearly all or nearly nothing is not rounded to it."""
    if share in (0, 1):
        return f"{100 * share:.0f}%"
    text = f"{100 * share:.{digits}f}"
    if float(text) == 100:
        return f">{100 - 10**-digits:.{digits}f}%"
    return f"<{10**-digits:.{digits}f}%" if float(text) == 0 else f"{text}%"


def number(value: float) -> str:
    """`1,437`, `29,400`: whole, with thousands set off."""
    return f"{value:,.0f}"


def figures(value: float) -> str:
    """Four significant figures, `0.2796`, `5.403`, `1e-05`."""
    return f"{value:.4g}"


def moment(iso: str) -> str:
    """`2026-11-23 05:31 UTC` of an ISO time."""
    return f"{datetime.datetime.fromisoformat(iso).astimezone(datetime.UTC):%Y-%m-%d %H:%M} UTC"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    return [None if v is None else round(v, 2) for v in values]
