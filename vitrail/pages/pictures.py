"""Geometry, pixels and words of the report: axes, curves, thumbnails, how figures are written, and how words are fitted
into pictures. The template draws the charts.

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
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFont

PLOT_HEIGHT = 220  # of a full plot, in CSS pixels
LABEL_HEIGHT = 17  # of one line of text beside it
PIXELATED = 32  # images up to this side are shown as the squares that they are, not smoothed
EXACT = 64  # images up to this side are embedded losslessly, larger ones as JPEG
THUMBNAIL = 144  # longer side of the latter, in pixels
EMBEDDED = re.compile(r"[ -~±·…]*")  # what the font that comes with Pillow can write
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial Unicode.ttf", "Arial.ttf")
LOSSES = {  # by objective, what is minimised
    "classes": "cross-entropy, nats",
    "patches": "cross-entropy of 512 colours, nats",
    "pixels": "squared error of normalised pixels",
}


@dataclass(frozen=True)
class Tick:
    """A mark of an axis: where it lies, in percent of the plot, and what it says."""

    at: float
    text: str


@dataclass(frozen=True)
class Series:
    """One curve to be drawn: a value for each x (which rise), None (or not finite) where there is none."""

    name: str
    kind: str  # the CSS classes that colour it
    x: Sequence[float]
    values: Sequence[float | None]
    between: tuple[Sequence[float], Sequence[float]] | None = None  # what the area around it lies between
    called: str = ""  # what it is called under the pointer, if not by its name


@dataclass(frozen=True)
class Axis:
    """What curves run over."""

    name: str  # as in `by epoch`
    write: Callable[[float], str]  # one of its values, as in `epoch 3`
    tick: Callable[[float], str]
    whole: bool = False  # it has whole numbers only, and begins with the first of them; else with 0


EPOCHS = Axis("epoch", lambda epoch: f"epoch {epoch:.0f}", lambda epoch: f"{epoch:,.0f}", whole=True)


@dataclass(frozen=True)
class Curve:
    """One curve, drawn: SVG paths over 0..100 × 0..100, and where its name stands beside the plot."""

    name: str
    kind: str
    path: str
    area: str  # beside or around it: up to another curve, or all that it is the mean of
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
    title: str, series: Sequence[Series], write: Callable[[float], str], *, by: Axis = EPOCHS,
    unit: str = "", write_tick: Callable[[float], str] | None = None, top: float | None = None,
    height: int = PLOT_HEIGHT,
) -> Chart | None:  # fmt: skip
    """Curves over epochs or another axis, from 0 to the largest value (at most `top`); None if there is no finite one.

    `write` turns a value into text, `write_tick` one of the axis. A series without any value is left out.
    """
    series = [replace(s, values=[_finite(v) for v in s.values]) for s in series]
    series = [s for s in series if any(v is not None for v in s.values)]
    if not series:
        return None
    largest = max(v for s in series for v in (*s.values, *(s.between[1] if s.between else ())) if v is not None)
    y = nice_ticks(0.0, largest, most=6 if height >= PLOT_HEIGHT else 4)
    y = [tick for tick in y if top is None or tick <= top + 1e-9]
    x = sorted({at for s in series for at in s.x})
    begin = x[0] if by.whole else 0
    low, high = (begin, x[-1]) if x[-1] > begin else (begin - 1, begin + 1)

    def across(at: float) -> float:
        return 100 * (at - low) / (high - low)

    def down(value: float | None) -> float | None:
        return None if value is None else 100 - 100 * value / y[-1]

    ends = [next(v for v in reversed(s.values) if v is not None) for s in series]
    labels = spread([100 - 100 * end / y[-1] for end in ends], 100 * LABEL_HEIGHT / height)
    texts = [(write_tick or write)(t) for t in y]
    return Chart(
        title, unit, height,
        tuple(Tick(across(t), by.tick(t)) for t in nice_ticks(begin, x[-1], 7, by.whole) if t <= high),
        tuple(Tick(100 - 100 * t / y[-1], text) for t, text in zip(y, texts, strict=True)),
        tuple(
            Curve(s.name, s.kind, path(list(map(across, s.x)), list(map(down, s.values))), _area(s, across, down),
                  len(s.x) <= 30, Tick(at, write(end)))
            for s, at, end in zip(series, labels, ends, strict=True)
        ),
        max(map(len, texts)), max(len(f"{s.name} {write(end)}") for s, end in zip(series, ends, strict=True)),
        {"x": _rounded(list(map(across, x))), "title": [by.write(at) for at in x],
         "curves": [_pointed_at(s, x, down, write) for s in series]},
        f"{title} by {by.name}, {by.tick(x[0])} to {by.tick(x[-1])}: "
        + "; ".join(f"{s.name} ends at {write(end)}" for s, end in zip(series, ends, strict=True)) + ".",
    )  # fmt: skip


def _area(
    series: Series, across: Callable[[float], float], down: Callable[[float | None], float | None]
) -> str:  # fmt: skip
    """The outline of the area of a curve."""
    if series.between is None:
        return ""
    there, back = series.between
    x = [across(at) for at in series.x]
    return path([*x, *reversed(x)], [down(value) for value in (*there, *reversed(back))]) + "Z"


def _pointed_at(
    series: Series, x: Sequence[float], down: Callable[[float | None], float | None], write: Callable[[float], str]
) -> dict[str, object]:
    """What a curve has at each x of all curves together: between two of its own points, the value of the earlier one,
    without a dot; nothing before the first and after the last."""
    own = dict(zip(series.x, series.values, strict=True))
    last, texts = None, []
    for at in x:
        last = own.get(at, last if at <= series.x[-1] else None)
        texts.append("–" if last is None else write(last))
    y = _rounded([down(own.get(at)) for at in x])
    return {"name": series.called or series.name, "kind": series.kind, "y": y, "text": texts}


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


def font_for(words: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that comes with Pillow, or, for what that cannot write, one of the system's, where there is one."""
    for name in () if EMBEDDED.fullmatch(words) else FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def fitted(words: str, size: int, room: float) -> tuple[str, ImageFont.FreeTypeFont | ImageFont.ImageFont]:
    """A line of text, cut off where it would take more than `room` pixels, and the font that it is for."""
    font = font_for(words, size)
    if font.getlength(words) > room:
        while words and font.getlength(words + "…") > room:
            words = words[:-1]
        words = words.rstrip() + "…"
    return words, font


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
