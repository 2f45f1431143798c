"""The variants side by side, as the paper's table 1 has them: drawn from their configs, to scale. An SVG, 1600 wide."""

from dataclasses import replace

from vitrail.pages.drawing import BLUE, GREEN, ROSE, VIOLET
from vitrail.pages.svg import SOFT, Sheet
from vitrail.vit.config import ViTConfig
from vitrail.vit.variants import VARIANTS, Size

MARK = "as table 1 of arXiv 2010.11929"  # in what was drawn here
WIDTH, TOP, ROW, BOTTOM = 1600, 176, 54, 64
GROUP = 46  # what a group of rows is called
KINDS = {
    "token": "The head reads the class token",
    "gap": "The head reads the mean of all patches",
    "hybrid": "Hybrids: patches of a ResNet's feature map, and a class token",
}
# Where columns begin; those of figures, where they end.
NAME, GRID, PATCHES, BLOCKS = 60, 268, 326, 470
LAYERS, WIDE, MLP, HEADS = 744, 830, 914, 990
WEIGHTS, FLOPS = 1042, 1324  # where bars begin
BAR, SIDE = 130, 42  # of the longest bar, and of the image that is cut into patches
BLOCK = (7, 5)  # from one encoder block to the next, and the thickness of one


def line_up(found: list[Size], image_size: int) -> str:
    """The picture of variants as `variants.sizes` found them at that image size: a row each, and in each the image cut
    into its patches, a bar for each encoder block, as high as it is wide, and bars of parameters and FLOPs."""
    configs = [replace(VARIANTS[size.name], image_size=image_size) for size in found]
    kinds = list(dict.fromkeys(map(kind, configs)))
    bottom = TOP + ROW * len(found) + GROUP * len(kinds)
    sheet = Sheet(WIDTH, bottom + BOTTOM)
    sheet.text(NAME, 58, "Variants of the Vision Transformer", 34, "start", bold=True)
    said = f"for images of {image_size} × {image_size} pixels and {configs[0].num_classes:,} classes"
    sheet.text(NAME, 98, said, 18, "start", colour=SOFT)
    head(sheet)
    top = TOP
    for one in kinds:
        sheet.text(NAME, top + GROUP - 16, KINDS[one], 15, "start", colour=SOFT)
        top += GROUP
        for size, config in zip(found, configs, strict=True):
            if kind(config) == one:
                row(sheet, top, size, config, found)
                top += ROW
    sheet.stripe(NAME, bottom + 8, WIDTH - 2 * NAME, 1.5, SOFT)
    notes = "GFLOP of one image's logits, every token computed, 2 for each multiply-add."
    sheet.text(NAME, bottom + BOTTOM / 2 + 4, notes, 15, "start", colour=SOFT)
    return sheet.svg(f"The variants, {MARK}")


def kind(config: ViTConfig) -> str:
    """What a variant is grouped by."""
    return "hybrid" if config.resnet_blocks is not None else config.classifier


def head(sheet: Sheet) -> None:
    """What the columns are called."""
    y = TOP - 26
    for x, name, anchor in (
        (NAME, "Model", "start"), (GRID, "Patches", "start"), (BLOCKS, "Encoder blocks", "start"),
        (LAYERS, "Layers", "end"), (WIDE, "Width", "end"), (MLP, "MLP", "end"), (HEADS, "Heads", "end"),
        (WEIGHTS, "Parameters", "start"), (FLOPS, "GFLOP an image", "start"),
    ):  # fmt: skip
        sheet.text(x, y, name, 16, anchor, colour=SOFT, bold=True)
    sheet.stripe(NAME, TOP - 9, WIDTH - 2 * NAME, 1.5, SOFT)


def row(sheet: Sheet, top: float, size: Size, config: ViTConfig, found: list[Size]) -> None:
    """One variant."""
    middle = top + ROW / 2
    sheet.text(NAME, middle, size.name, 19, "start", bold=True)
    cut(sheet, GRID, middle - SIDE / 2, config.grid)
    sheet.text(PATCHES, middle - 9, f"{config.grid} × {config.grid}", 16, "start")
    sheet.text(PATCHES, middle + 11, f"of {config.cell} × {config.cell}", 14, "start", colour=SOFT)
    step, thick = BLOCK
    high = SIDE * size.hidden_size / max(other.hidden_size for other in found)
    for layer in range(size.num_layers):
        sheet.stripe(BLOCKS + step * layer, middle - high / 2, thick, high, GREEN)
    for x, value in ((LAYERS, size.num_layers), (WIDE, size.hidden_size), (MLP, size.mlp_dim), (HEADS, size.num_heads)):
        sheet.text(x, middle, f"{value:,}", 17, "end")
    bar(sheet, WEIGHTS, middle, size.parameters / max(other.parameters for other in found), ROSE,
        f"{size.parameters / 1e6:,.1f} M")  # fmt: skip
    bar(sheet, FLOPS, middle, size.flops / max(other.flops for other in found), BLUE, f"{size.flops / 1e9:,.1f}")


def cut(sheet: Sheet, left: float, top: float, grid: int) -> None:
    """An image cut into that many patches a side."""
    sheet.stripe(left, top, SIDE, SIDE, VIOLET)
    for n in range(1, grid):
        at = SIDE * n / grid
        sheet.stripe(left + at - 0.3, top, 0.6, SIDE, "#ffffff")
        sheet.stripe(left, top + at - 0.3, SIDE, 0.6, "#ffffff")


def bar(sheet: Sheet, left: float, middle: float, share: float, fill: str, figure: str) -> None:
    """A share of the largest, and its figure behind it."""
    sheet.stripe(left, middle - 10, BAR * share, 20, fill)
    sheet.text(left + BAR * share + 8, middle, figure, 17, "start")
