"""Shapes on a page, as SVG."""

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

INK, SOFT, PAPER = "#1b1d25", "#5a5f6e", "#ffffff"


class Sheet:
    """Shapes on a page, in the order in which they lie over one another."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.shapes: list[str] = []

    def thin(self, x1: float, y1: float, x2: float, y2: float, colour: str, dashes: str = "none") -> None:
        """A thin line."""
        self.shapes.append(f'<path d="M{x1:g},{y1:g} L{x2:g},{y2:g}" stroke="{colour}" stroke-dasharray="{dashes}"/>')

    def box(self, x: float, y: float, width: float, height: float, fill: str, radius: float = 10) -> None:
        """A rectangle with round corners; x and y are those of its corner on the upper left."""
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" fill="{fill}" '
            f'stroke="{INK}" stroke-width="1.5"/>'
        )

    def stripe(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        """A rectangle without an edge."""
        self.shapes.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"/>')

    def text(
        self, x: float, y: float, words: str, size: int = 17, anchor: str = "middle", *, colour: str = INK,
        bold: bool = False,
    ) -> None:  # fmt: skip
        """A line of text; y is that of its middle."""
        font = f'font-size="{size}" font-weight="{600 if bold else 400}" text-anchor="{anchor}"'
        self.shapes.append(f'<text x="{x:g}" y="{y + 0.35 * size:g}" {font} fill="{colour}">{escape(words)}</text>')

    def labelled(
        self, x: float, y: float, width: float, height: float, fill: str, name: str, details: Sequence[str] = ()
    ) -> None:
        """A box with a name in it, and smaller lines below that."""
        self.box(x, y, width, height, fill)
        self.words(x, y, width, height, name, details)

    def words(self, x: float, y: float, width: float, height: float, name: str, details: Sequence[str]) -> None:
        """What stands in such a box."""
        step = 20
        top = y + height / 2 - step * len(details) / 2
        self.text(x + width / 2, top, name, bold=True)
        for line, words in enumerate(details, start=1):
            self.text(x + width / 2, top + step * line + 1, words, 14, colour=SOFT)

    def line(self, *points: tuple[float, float], head: bool = True) -> None:
        """A line through the points, with the head of an arrow at its end."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        end = ' marker-end="url(#head)"' if head else ""
        self.shapes.append(f'<polyline points="{path}" fill="none" stroke="{INK}" stroke-width="1.8"{end}/>')

    def plus(self, x: float, y: float) -> None:
        """Where a residual is added."""
        self.shapes.append(f'<circle cx="{x:g}" cy="{y:g}" r="14" fill="{PAPER}" stroke="{INK}" stroke-width="1.8"/>')
        self.line((x - 8, y), (x + 8, y), head=False)
        self.line((x, y - 8), (x, y + 8), head=False)

    def image(self, x: float, y: float, side: float, pixels: NDArray[np.uint8]) -> None:
        """A square image, pixels as they are."""
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG", optimize=True)
        data = base64.b64encode(file.getvalue()).decode()
        self.shapes.append(
            f'<image x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}" preserveAspectRatio="none" '
            f'style="image-rendering: pixelated" href="data:image/png;base64,{data}"/>'
        )

    def svg(self, title: str) -> str:
        """The page, as a file has it."""
        width, height = self.width, self.height
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'role="img" font-family="Helvetica Neue, Helvetica, Arial, Liberation Sans, sans-serif">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="head" viewBox="0 0 10 10" refX="8.5" refY="5" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path d="M0,0 L10,5 L0,10 z" fill="{INK}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="{PAPER}"/>', *self.shapes, "</svg>\n",
        ])  # fmt: skip
