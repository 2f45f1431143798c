"""A Vision Transformer as the paper's figure 1 draws one, from the model itself: what is there, and every number, is
read off its modules and its config. An SVG of 1600 × 900, as large as a slide; data goes up."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from vitrail.errors import BadInput, nearest
from vitrail.pages.svg import INK, PAPER, SOFT, Sheet
from vitrail.progress import counted
from vitrail.vit.additions import ConvolutionalStem
from vitrail.vit.model import MLP, Attention, TransformerEncoderBlock, VisionTransformer
from vitrail.vit.variants import VARIANTS
from vitrail.weights.load import read

MARK = "as figure 1 of arXiv 2010.11929"  # in what was drawn here
WIDTH, HEIGHT = 1600, 900
GREY, ROSE, VIOLET, YELLOW, GREEN, BLUE, ORANGE = (  # as in the paper: encoder, patches, positions, norm …
    "#eceef2", "#f7c8d4", "#cdb9e8", "#fbeeb0", "#c3e6c5", "#bcd9f5", "#fad3a4",
)  # fmt: skip
STRIPE = "#e1e4ea"  # of every other layer
LEFT, RIGHT = 300, 980  # of what the tokens go through
TOKENS, ENCODER = 584, 550  # where the row of tokens begins, and the encoder ends
BLOCK = (1050, 1540, 130, 800)  # left, right, top and bottom of what is in a block
COLUMN = 46  # side of a patch that is shown, in pixels of the drawing
RESNET = 94  # width of the ResNet of a hybrid
DENSEST = 32  # patches along a side of the image, up to which their edges are drawn
SHOWN = 9  # patches up to which all are shown

# Of the window that is cut into patches where no other image is given: rings, how many panes each has, and their glass.
RINGS, PANES = (0.0, 0.17, 0.44, 0.71, 0.94), (1, 8, 16, 24)
GLASS = np.array([(214, 48, 49), (36, 99, 190), (250, 196, 60), (20, 140, 110), (120, 60, 170), (240, 130, 50)])
LEAD, STONE = (24, 26, 38), (58, 74, 112)


def named(what: str, image_size: int | None = None) -> tuple[VisionTransformer, str, tuple[str, ...]]:
    """The model of a variant's name, or of weights: its modules without memory for weights, its name, and its classes.

    Raises:
        BadInput: there is neither, or the image size will not do.
    """
    classes: tuple[str, ...] = ()
    config, name = VARIANTS.get(what), what
    if config is None:
        path = Path(what)
        if not path.exists():
            raise BadInput(f"there is no variant and no file {what!r}{nearest(what, VARIANTS)} See: vitrail variants")
        imported, name = read(path), path.resolve().name
        config, classes = imported.config, imported.classes
    with torch.device("meta"):
        return VisionTransformer(replace(config, image_size=image_size or config.image_size)), name, classes


def draw(
    model: VisionTransformer, name: str, classes: Sequence[str] = (), image: NDArray[np.uint8] | None = None
) -> str:  # fmt: skip
    """The drawing, an SVG.

    Args:
        model: it may be on the meta device, for nothing is computed.
        name: what it is called.
        classes: what its classes are called, if anything.
        image: what is cut into patches, (height, width, 3), of which the square in the middle is taken; a window of
            stained glass if None.
    """
    sheet, config = Sheet(WIDTH, HEIGHT), model.config
    size = config.image_size
    sheet.text(60, 58, name, 34, "start", bold=True)
    classes_said = counted(config.num_classes, "class", "classes")
    said = f"{count(model):,} parameters, images of {size} × {size} pixels, {classes_said}"
    sheet.text(60, 98, said, 18, "start", colour=SOFT)
    pixels = window(size) if image is None else middle_of(image, size)
    columns = draw_patches(sheet, model, pixels)
    draw_tokens(sheet, model, columns)
    top = draw_encoder(sheet, model)
    draw_head(sheet, model, columns, classes, top)
    draw_block(sheet, model)
    return sheet.svg(f"{name}, {MARK}")


def middle_of(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The square that the model sees of an image at least as large."""
    top, left = ((side - size) // 2 for side in image.shape[:2])
    return image[top : top + size, left : left + size]


def count(*modules: nn.Module | nn.Parameter | None) -> int:
    """How many parameters they have."""
    weights = [
        weight for m in modules if m is not None for weight in (m.parameters() if isinstance(m, nn.Module) else (m,))
    ]
    return sum(weight.numel() for weight in weights)


def window(size: int) -> NDArray[np.uint8]:
    """A rose window, (size, size, 3): drawn four times as large, and shrunk."""
    along = np.linspace(-1, 1, 4 * size)
    y, x = np.meshgrid(along, along, indexing="ij")
    radius, turn = np.hypot(x, y), np.arctan2(y, x) / (2 * np.pi) + 0.5
    ring = np.clip(np.searchsorted(RINGS, radius) - 1, 0, len(PANES) - 1)
    place = turn * np.array(PANES)[ring] + 0.5 * (ring % 2)
    colours = GLASS[(np.floor(place).astype(int) % np.array(PANES)[ring] * (1 + ring) + 2 + 3 * ring) % len(GLASS)]
    glow = 0.72 + 0.36 * np.sin(np.pi * (place % 1)) * (1 - 0.4 * radius)
    pixels = colours * glow[..., None]
    corner = np.hypot(np.abs(x) - 0.82, np.abs(y) - 0.82)
    outside = radius > RINGS[-1]
    pixels[outside] = STONE
    pixels[outside & (corner < 0.13)] = GLASS[1]
    to_spoke = np.abs(place - np.round(place)) / np.array(PANES)[ring] * 2 * np.pi * radius
    to_ring = np.abs(radius[..., None] - np.array(RINGS[1:])).min(-1)
    lead = (to_ring < 0.016) | ((to_spoke < 0.012) & (ring > 0) & ~outside) | (np.abs(corner - 0.13) < 0.014)
    pixels[lead] = LEAD
    whole = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return np.asarray(whole.resize((size, size), Image.Resampling.BOX))


def shown_patches(grid: int) -> list[int | None]:
    """Which patches the row has, None for those that are left out: the first, some around the middle, and the last."""
    patches = grid**2
    if patches <= SHOWN:
        return list(range(patches))
    middle = grid // 2 * grid + grid // 2
    return [0, 1, None, *range(middle - 2, middle + 2), None, patches - 2, patches - 1]


def draw_patches(sheet: Sheet, model: VisionTransformer, image: NDArray[np.uint8]) -> list[tuple[int | None, float]]:
    """The image, cut up, or whole where a ResNet sees it, whose feature map is cut up then, and the projection of the
    patches; returns the patches of the row and where each stands."""
    config, size, resnet = model.config, model.config.image_size, model.resnet
    side, left, top, grid = 166, 60, 662, config.grid
    sheet.image(left, top, side, image)
    for n in range(1, grid) if grid <= DENSEST and resnet is None else ():
        at = side * n / grid
        sheet.thin(left + at, top, left + at, top + side, PAPER)
        sheet.thin(left, top + at, left + side, top + at, PAPER)
    sheet.text(left + side / 2, 848, f"image: {size} × {size} × 3", 15, colour=SOFT)
    shown = shown_patches(grid)
    spacing = min((RIGHT - LEFT) / (len(shown) + 1), 90)
    columns = [(patch, RIGHT - spacing * (len(shown) - place - 0.5)) for place, patch in enumerate(shown)]
    upper, cell = 774, config.cell
    for patch, x in columns:
        if patch is None:
            sheet.text(x, upper + COLUMN / 2, "…", 26)
            continue
        row, column = divmod(patch, grid)
        if resnet is None:
            sheet.image(x - COLUMN / 2, upper, COLUMN, image[row * cell :, column * cell :][:cell, :cell])
        else:
            for behind in (8, 4, 0):
                sheet.box(x - COLUMN / 2 + behind, upper + 8 - behind, COLUMN - 8, COLUMN - 8, GREY, 2)
        sheet.line((x, upper - 4), (x, 744))
    before, middle = columns[0][1] - COLUMN / 2 - 12, (columns[0][1] + columns[-1][1]) / 2
    start: float = left + side + 12
    if resnet is not None:
        sheet.line((start - 8, upper + COLUMN / 2), (start + 6, upper + COLUMN / 2))
        start = draw_resnet(sheet, model, start + 10, upper + COLUMN / 2)
    sheet.line((start, upper + COLUMN / 2), (before + 6 * (resnet is not None), upper + COLUMN / 2))
    channels, of = model.patch_embedding.projection.weight.shape[1], " of the ResNet's feature map"
    cut = f"{cell} × {cell} × 3" if resnet is None else f"{config.patch_size} × {config.patch_size} × {channels:,}{of}"
    sheet.text(middle, 848, f"{grid} × {grid} patches of {cut}", 15, colour=SOFT)
    draw_projection(sheet, model)
    return columns


def draw_resnet(sheet: Sheet, model: VisionTransformer, left: float, middle: float) -> float:
    """What makes the feature map of the image; returns where it ends."""
    blocks = "+".join(str(n) for n in model.config.resnet_blocks or ())
    details = [blocks or "root alone", f"{count(model.resnet):,}", "parameters"]
    sheet.labelled(left, middle - 45, RESNET, 90, ROSE, "ResNet", details)
    return left + RESNET + 4


def draw_projection(sheet: Sheet, model: VisionTransformer) -> None:
    """What makes tokens of patches."""
    stem = model.patch_embedding
    weights = stem.projection.weight
    name, numbers = "Linear projection of flattened patches", f"{weights[0].numel():,} → {len(weights):,}"
    if model.resnet is not None:
        name = "Linear projection"
    elif isinstance(stem, ConvolutionalStem):
        *maps, last = model.config.stem_widths
        units = [counted(model.config.stem_units, "unit")] if model.config.stem_units else []
        steps = [*(f"{width:,}" for width in (3, *maps)), *units, f"{last:,}", f"{len(weights):,}"]
        name, numbers = "Convolutions and linear projection", " → ".join(steps)
    sheet.labelled(LEFT, 680, RIGHT - LEFT, 60, ROSE, name, [f"{numbers}: {count(stem):,} parameters"])


def draw_tokens(sheet: Sheet, model: VisionTransformer, columns: Sequence[tuple[int | None, float]]) -> None:
    """The row of tokens that enters the encoder, each with its number, in front of which stands what is learnt."""
    top, height = TOKENS, 48
    spacing = columns[1][1] - columns[0][1] if len(columns) > 1 else 90
    tokens = [("*", 0, columns[0][1] - spacing)] if model.class_token is not None else []
    front = len(tokens)
    tokens += [("", patch + front, x) for patch, x in columns if patch is not None]
    for sign, place, x in tokens:
        sheet.box(x - 2, top, 26, height, ROSE, 7)
        sheet.text(x + 11, top + height / 2, sign, 20, bold=True)
        sheet.box(x - 24, top + 5, 26, height - 10, VIOLET, 13)
        sheet.text(x - 11, top + height / 2, f"{place}", 15 if place < 100 else 12 if place < 1000 else 9)
        sheet.line((x, top - 4), (x, 554))
        if not sign:
            sheet.line((x, 676), (x, top + height + 6))
    for patch, x in columns:
        if patch is None:
            sheet.text(x, top + height / 2, "…", 26)
    _, many, width = model.position_embedding.shape
    lines = [("Patch + position", True), ("embedding", True), (f"positions: {many:,} × {width:,}", False)]
    if model.class_token is not None:
        lines.append(("* learnt class token", False))
    for line, (text, bold) in enumerate(lines):
        y = top + height - 2 - 21 * (len(lines) - 1 - line)
        sheet.text(60, y, text, 17 if bold else 14, "start", colour=INK if bold else SOFT, bold=bold)


def draw_encoder(sheet: Sheet, model: VisionTransformer) -> int:
    """All blocks as one box, which is as high as what is above leaves it; returns where that begins."""
    config = model.config
    top = ENCODER - 90 - (50 if model.class_token is not None else 0) - (50 if model.pre_logits is None else 0)
    left, _, upper, lower = BLOCK
    sheet.thin(RIGHT, top + 8, left, upper + 20, SOFT, "3 6")
    sheet.thin(RIGHT, ENCODER - 8, left, lower - 20, SOFT, "3 6")
    tokens = f"{config.num_tokens:,} tokens of {config.hidden_size:,}"
    about = f"{count(model.blocks, model.norm):,} parameters"
    details = [f"{counted(len(model.blocks), 'encoder block')} and a norm, on {tokens}", about]
    width, height, layers = RIGHT - LEFT, ENCODER - top, len(model.blocks)
    sheet.box(LEFT, top, width, height, GREY)
    for layer in range(1, layers, 2):
        sheet.stripe(LEFT + 10, top + height * layer / layers, width - 20, height / layers - 1, STRIPE)
    sheet.words(LEFT, top, width, height, "Transformer encoder", details)
    return top


def draw_head(
    sheet: Sheet, model: VisionTransformer, columns: Sequence[tuple[int | None, float]], classes: Sequence[str],
    encoder: int,
) -> None:  # fmt: skip
    """From what the encoder leaves, at `encoder`, to classes."""
    out, into = model.head.weight.shape
    spacing = columns[1][1] - columns[0][1] if len(columns) > 1 else 90
    reads_token = model.class_token is not None
    x = columns[0][1] - spacing if reads_token else (columns[0][1] + columns[-1][1]) / 2
    top = encoder - 4
    if not reads_token:
        for patch, at in columns:
            if patch is not None:
                sheet.line((at, top), (at, top - 24))
        sheet.labelled(LEFT, top - 68, RIGHT - LEFT, 40, PAPER, "Mean of all patches")
        top -= 72
    width = 320
    left = max(x - width / 2, LEFT)
    if model.pre_logits is not None:
        wide, narrow = model.pre_logits.weight.shape
        sheet.line((x, top), (x, top - 26))
        about = f"{narrow:,} → {wide:,}: {count(model.pre_logits):,} parameters"
        sheet.labelled(left, top - 86, width, 56, ORANGE, "Layer with tanh", [about])
        top -= 90
    sheet.line((x, top), (x, top - 30))
    about = f"linear, {into:,} → {out:,}: {count(model.head):,} parameters"
    sheet.labelled(left, top - 98, width, 64, ORANGE, "Head", [about])
    sheet.line((x, top - 102), (x, top - 130))
    few = [name if len(name) <= 16 else f"{name[:15]}…" for name in classes[:3]]
    more = ", …" if len(classes) > 3 else ""
    said = f"class: {', '.join(few)}{more}" if few else f"one of {out:,} classes"
    sheet.text(left if reads_token else x, top - 148, said, 19, "start" if reads_token else "middle", bold=True)


def draw_block(sheet: Sheet, model: VisionTransformer) -> None:
    """What is in each block of the encoder: equations 2 and 3."""
    block = model.blocks[0]
    assert isinstance(block, TransformerEncoderBlock)  # for the type checker: a ModuleList forgets
    left, right, top, bottom = BLOCK
    middle, width, beside = (left + right) / 2 - 10, 320, right - 42
    sheet.box(left, top, right - left, bottom - top, GREY, 22)
    sheet.text(left + 26, top + 34, "Encoder block", 22, "start", bold=True)
    sheet.text(right - 26, top + 34, f"{len(model.blocks)} ×", 26, "end", bold=True)
    sheet.text(middle, 848, f"{model.config.num_tokens:,} tokens of {model.config.hidden_size:,}", 15, colour=SOFT)
    x = middle - width / 2
    below: float = bottom + 30
    attention = attention_said(block.attention)
    halves: list[tuple[nn.Module, str, str, list[str], Sequence[str]]] = [
        (block.attention_scale, GREEN, "Multi-head attention", attention, "vkq"),
        (block.mlp_scale, BLUE, "MLP", mlp_said(block.mlp), " "),
    ]
    for place, (scale, colour, name, details, inputs) in enumerate(halves):
        floor = 776 - 300 * place  # where the residual leaves
        sheet.line((middle, below), (middle, floor - 26))
        sheet.labelled(x, floor - 68, width, 38, YELLOW, "Norm")
        for n, letter in enumerate(inputs):
            at = middle + 70 * (n - (len(inputs) - 1) / 2)
            sheet.line((at, floor - 72), (at, floor - 94))
            sheet.text(at + 14, floor - 83, letter, 14, colour=SOFT)
        high = 36 + 20 * len(details)
        sheet.labelled(x, floor - 98 - high, width, high, colour, name, details)
        up = floor - 98 - high
        if count(scale):
            sheet.line((middle, up - 4), (middle, up - 20))
            up -= 24 + 22
            sheet.box(x + width / 4, up, width / 2, 22, PAPER, 8)
            sheet.text(middle, up + 11, f"× scale: {count(scale):,}", 14)
        sheet.line((middle, up - 4), (middle, floor - 257))
        sheet.line((middle, floor), (beside, floor), (beside, floor - 272), (middle + 17, floor - 272))
        sheet.plus(middle, floor - 272)
        below = floor - 286
    sheet.line((middle, below), (middle, top - 26))


def attention_said(attention: Attention) -> list[str]:
    """The numbers of an attention layer."""
    three, width = attention.qkv.weight.shape
    heads = f"{counted(attention.num_heads, 'head')} of {width // attention.num_heads}"
    return [f"{heads}, {width:,} → 3 × {three // 3:,} → {width:,}", f"{count(attention):,} parameters"]


def mlp_said(mlp: MLP) -> list[str]:
    """The numbers of an MLP."""
    hidden, width = mlp.hidden.weight.shape
    gelu = "GELU (tanh)" if mlp.approximate == "tanh" else "GELU"
    return [f"{width:,} → {hidden:,} → {width:,}, {gelu}", f"{count(mlp):,} parameters"]
