"""The shape of a Vision Transformer, and what its images are normalised by."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from vitrail.errors import BadInput
from vitrail.settings import Classifier, Stem
from vitrail.vit.resnet import MOST, stride

MOST_LAYERS = 1000

Gelu = Literal["tanh", "exact"]
Colours = tuple[float, float, float]  # red, green, blue

# What later papers add to what the model computes; no other library's format says all of it.
ADDITIONS = ("stem", "layer_scale")

# The official code's mean and standard deviation, of pixels from 0 to 1: they become -1…1.
HALF: Colours = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class ViTConfig:
    """The shape of a Vision Transformer. The defaults are ViT-B/16 as pre-trained on ImageNet.

    Raises:
        BadInput: a size does not divide as it must; the message says which sizes would do.
    """

    image_size: int = 224
    patch_size: int = 16
    hidden_size: int = 768
    mlp_dim: int = 3072
    num_heads: int = 12
    num_layers: int = 12
    num_classes: int = 1000
    classifier: Classifier = "token"
    representation_size: int | None = None
    dropout: float = 0.0
    resnet_blocks: tuple[int, ...] | None = None  # the hybrid's: bottlenecks of each stage, () for the bare root
    # As the official code has them; weights that were trained by other libraries need theirs.
    gelu: Gelu = "tanh"
    layer_norm_eps: float = 1e-6
    # What later papers add (additions.py); the last two are of training alone.
    stem: Stem = "patch"
    stem_units: int = 0  # of a stem of convolutions
    layer_scale: float | None = None  # what the scales are at first
    stochastic_depth: float = 0.0
    patch_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "hidden_size", "mlp_dim", "num_heads", "num_layers", "num_classes",
                     "representation_size"):  # fmt: skip
            value = getattr(self, name)
            if value is None and name == "representation_size":
                continue
            if not isinstance(value, int):
                raise BadInput(f"a model with {name} = {shorten(value)} cannot be; it must be a whole number.")
            if value < 1:
                raise BadInput(f"a model with {name} = {value} cannot be; it must be at least 1.")
            if value > MOST:  # a mistake, or a file that would have us take a terabyte
                raise BadInput(f"a model with {name} = {value} cannot be; it must be at most {MOST:,}.")
        for name, kind in (("classifier", Classifier), ("gelu", Gelu), ("stem", Stem)):
            if getattr(self, name) not in (choices := get_args(kind)):
                raise BadInput(f"{name} is {shorten(getattr(self, name))}; it must be one of {', '.join(choices)}.")
        if not 0 < self.layer_norm_eps < 1:
            raise BadInput(f"layer_norm_eps is {self.layer_norm_eps}; it must be above 0 and below 1.")
        for name in ("dropout", "stochastic_depth", "patch_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise BadInput(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1.")
        blocks: tuple[Any, ...] = self.resnet_blocks or ()
        if not all(isinstance(count, int) and count >= 1 for count in blocks):
            raise BadInput(f"a ResNet with stages of {blocks} cannot be; each must have a block at least.")
        if self.num_layers > MOST_LAYERS or sum(blocks) > MOST_LAYERS:
            raise BadInput(f"a model of more than {MOST_LAYERS:,} layers cannot be.")
        if self.image_size % self.cell:
            below = self.image_size - self.image_size % self.cell
            sizes = " or ".join(str(size) for size in (below, below + self.cell) if size)
            others = f", or patches of {divisors(self.image_size)}" if self.resnet_blocks is None else ""
            raise BadInput(
                f"images of {self.image_size} pixels do not divide into patches of {self.cell}: "
                f"take images of {sizes}{others}."
            )
        if self.grid**2 > MOST:
            raise BadInput(
                f"images of {self.image_size} pixels are {self.grid**2:,} patches of {self.cell}; a model takes at "
                f"most {MOST:,}."
            )
        if self.hidden_size % self.num_heads:
            heads = divisors(self.hidden_size)
            raise BadInput(f"{self.num_heads} heads do not divide a width of {self.hidden_size}: take {heads} heads.")
        self._check_additions()

    def _check_additions(self) -> None:
        units: Any = self.stem_units  # from a file, it may be anything
        if not isinstance(units, int) or not 0 <= units <= MOST_LAYERS:
            raise BadInput(f"stem_units is {shorten(units)}; it must be a whole number from 0 to {MOST_LAYERS:,}.")
        if self.layer_scale is not None and not 0 < self.layer_scale < math.inf:
            raise BadInput(f"layer_scale is {self.layer_scale}; it must be above 0, or left out.")
        if units and self.stem == "patch":
            raise BadInput(f"stem_units is {units}; it does nothing unless stem is convolutions.")
        if self.stem == "convolutions":
            if self.resnet_blocks is not None:
                raise BadInput("a hybrid's ResNet is a stem already; leave out stem = 'convolutions'.")
            if self.patch_size & (self.patch_size - 1) or self.patch_size == 1:
                raise BadInput(
                    f"convolutions halve an image until a patch is left: {self.patch_size} is no power of 2."
                )
            if self.stem_units and self.patch_size < 4:
                raise BadInput(
                    f"stem_units is {self.stem_units}; units stand between the stem's two last convolutions, of which "
                    f"there is one for patches of {self.patch_size}: take 0, or larger patches."
                )
            if self.hidden_size % (self.patch_size // 2):
                raise BadInput(
                    f"the stem's first convolution is as wide as {self.hidden_size} / {self.patch_size // 2}, which is "
                    f"no whole number; take a multiple of {self.patch_size // 2} for hidden_size."
                )

    @property
    def cell(self) -> int:
        """Side of what one token sees of the image, in pixels. The hybrid's patches are cut from a feature map."""
        return self.patch_size * (1 if self.resnet_blocks is None else stride(self.resnet_blocks))

    @property
    def grid(self) -> int:
        """Patches along a side of the image."""
        return self.image_size // self.cell

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of those of the patches: the class token, where there is one."""
        return int(self.classifier == "token")

    @property
    def num_tokens(self) -> int:
        """T, the length of the sequence: every patch, and what stands in front of them."""
        return self.num_prefix_tokens + self.grid**2

    @property
    def unit_width(self) -> int:
        """Channels of the residual units of a convolutional stem."""
        return self.hidden_size // 2

    @property
    def stem_widths(self) -> list[int]:
        """Channels behind each of the convolutions of stride 2 in a convolutional stem."""
        return [self.hidden_size >> more for more in reversed(range(self.patch_size.bit_length() - 1))]

    def kept_patches(self, count: int) -> int:
        """How many of an image's patches a training step goes on with."""
        return max(1, round(count * (1 - self.patch_dropout)))


def divisors(number: int) -> str:
    """`1, 2, 4` for 4."""
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def check_colours(mean: Any, std: Any) -> tuple[Colours, Colours]:
    """Mean and standard deviation of pixels from 0 to 1, as some file has them: three numbers each, or one for all.

    Raises:
        BadInput: they are something else, or something that cannot be divided by.
    """
    found: list[Colours] = []
    for name, values in (("mean", mean), ("std", std)):
        row = [values] * 3 if isinstance(values, int | float) else values
        numbers = isinstance(row, list | tuple) and all(isinstance(v, int | float) and abs(v) < 1e6 for v in row)
        if not numbers or len(row) != 3 or (name == "std" and min(row) <= 0):
            raise BadInput(f"its {name} of {shorten(values)} is not what three colours can be normalised by.")
        found.append((float(row[0]), float(row[1]), float(row[2])))
    return found[0], found[1]


def shorten(value: object) -> str:
    """What a file has where something else was expected, for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
