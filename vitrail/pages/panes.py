"""Pictures of what a model looks at, and of what it has learnt: images lit where attention falls, and windows of small
panes with lead between them.

    h, w sides of an image    g patches along a side    s side of a pane
"""

import base64
import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from vitrail.pages.pictures import PIXELATED, Thumbnail, fitted

SHADOW = 0.36  # of an image's own light is left where no attention falls
GLOW = np.array((255, 190, 80), np.float32)  # falls on what is dark where most does, so that it shows on black too
GLOWING = 0.55  # of it at most
WARM = np.array((1, 0.94, 0.72), np.float32)  # what light of the sun leaves of red, green and blue
LEAD = (35, 37, 45)  # as the pages have it
WORDS, SOFT = (250, 249, 246), (190, 192, 198)  # on lead: the first line below a pane, and the others
# From low to high, and from dark to light: a window's blues, then its yellows.
STOPS = np.array(((16, 18, 32), (30, 52, 118), (61, 107, 196), (122, 158, 178), (214, 178, 84), (250, 240, 205)))
LINE = 22  # height of a line of text on a picture to be shared, in pixels


def enlarge(pixels: UInt8[np.ndarray, "h w 3"], side: int) -> UInt8[np.ndarray, "_h _w 3"]:
    """An image with a longer side of `side`. Small images that are not made smaller stay the squares that they are:
    their pixels are repeated, as often as comes nearest to that."""
    longest = max(pixels.shape[:2])
    if longest <= min(PIXELATED, side):
        times = round(side / longest)
        return pixels.repeat(times, axis=0).repeat(times, axis=1)
    size = [max(round(length * side / longest), 1) for length in pixels.shape[1::-1]]
    return np.asarray(Image.fromarray(pixels).resize((size[0], size[1]), Image.Resampling.LANCZOS))


def light(values: Float[np.ndarray, "g g"], height: int, width: int) -> Float[np.ndarray, "height width"]:
    """A map of what cannot be negative as light from 0 to 1, smooth, of an image's size.

    How far it goes apart says how far the map does: with the contrast c = (highest - lowest) / highest, the light is
    (1 - c) / 2 where the map is lowest, (1 + c) / 2 where it is highest, and in proportion between. So a map that is
    0 somewhere has all of the range, and one that is nearly the same everywhere is half lit nearly everywhere. Where
    nothing has any, there is no light.
    """
    low, high = float(values.min()), float(values.max())
    if not high > 0:
        return np.zeros((height, width), np.float32)
    dark = low / high / 2  # (1 - c) / 2
    cells = Image.fromarray((dark + (values - low) / high).astype(np.float32))
    return np.asarray(cells.resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)


def shine(
    pixels: UInt8[np.ndarray, "h w 3"], values: Float[np.ndarray, "g g"]
) -> UInt8[np.ndarray, "h w 3"]:  # fmt: skip
    """The image with light where the map is high, and dimmed, not hidden, where it is low, as `light` has it. The map
    is spread over the whole image, whatever the size of both."""
    lit = light(values, *pixels.shape[:2])[:, :, None]
    seen = pixels * (SHADOW + (1 - SHADOW) * lit) * (1 - lit**2 * (1 - WARM))
    dark = 1 - pixels.max(axis=2, keepdims=True) / np.float32(255)  # what light cannot brighten, it tints
    return (seen + (GLOW - seen).clip(0) * (GLOWING * dark * lit**2)).round().astype(np.uint8)


def heat(values: Float[np.ndarray, "h w"], low: float, high: float) -> UInt8[np.ndarray, "h w 3"]:
    """Numbers as colours: dark blue for `low` and below, light yellow for `high` and above."""
    at = ((values - low) / (high - low if high > low else 1)).clip(0, 1) * (len(STOPS) - 1)
    colours = [np.interp(at, np.arange(len(STOPS)), channel) for channel in STOPS.T]
    return np.stack(colours, axis=-1).round().astype(np.uint8)


def signed(values: Float[np.ndarray, "3 h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """A filter as colours: 0 is grey, and the value that is farthest from it black or full light."""
    scaled = values / max(float(np.abs(values).max()), 1e-12)
    return (127.5 * (1 + scaled.transpose(1, 2, 0))).round().astype(np.uint8)


def window(
    panes: Sequence[UInt8[np.ndarray, "s s 3"]], columns: int, lead: int = 2
) -> UInt8[np.ndarray, "h w 3"]:  # fmt: skip
    """Panes of one size in rows of so many, one at least, with that many pixels of lead between and around them."""
    side = panes[0].shape[0] + lead
    rows = -(-len(panes) // columns)
    found = np.full((rows * side + lead, columns * side + lead, 3), LEAD, np.uint8)
    for place, pane in enumerate(panes):
        top, left = (lead + side * at for at in divmod(place, columns))
        found[top : top + len(pane), left : left + len(pane)] = pane
    return found


def embed(pixels: UInt8[np.ndarray, "h w 3"], *, exact: bool = False) -> Thumbnail:
    """An image in its own size for the page: as a JPEG, or `exact` as a PNG."""
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    if exact:
        image.save(file, "PNG", optimize=True)
    else:
        image.save(file, "JPEG", quality=85, subsampling=0)  # its edges are those of small squares
    data = base64.b64encode(file.getvalue()).decode()
    return Thumbnail(f"data:image/{'png' if exact else 'jpeg'};base64,{data}", *image.size, pixelated=exact)


def side_by_side(panes: Sequence[tuple[UInt8[np.ndarray, "s s 3"], str]], lead: int = 6) -> Image.Image:
    """A picture to be shared: panes of one size in a row, in lead, with what they are below each: a line of words, or
    several."""
    side = panes[0][0].shape[0]
    glass = window([pane for pane, _ in panes], len(panes), lead)
    below = LINE * max(len(words.splitlines()) for _, words in panes)
    picture = Image.new("RGB", (glass.shape[1], glass.shape[0] + below + lead), LEAD)
    picture.paste(Image.fromarray(glass))
    pen = ImageDraw.Draw(picture)
    for place, (_, words) in enumerate(panes):
        for number, text in enumerate(words.splitlines()):
            line, font = fitted(text, 15, side)
            at = lead + place * (side + lead), glass.shape[0] + LINE * number
            pen.text(at, line, SOFT if number else WORDS, font)
    return picture
