"""The ResNet in front of the hybrid's Transformer (section 3.1, "Hybrid Architecture"), as the official code has it
(models_resnet.py): BiT's, with GroupNorm and weight-standardised convolutions (arXiv 1912.11370), activations last. Of
the same parts, `ResNetClassifier` is the CNN to compare the Vision Transformer with, as the paper does (section 4.1).

    B batch    W width of a stage    h, w sides of a feature map

Convolutions and pooling are padded as TensorFlow's "SAME": at stride 2 more on the right and below, where PyTorch's own
padding is symmetric and sees other pixels.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitrail.errors import BadInput, wrong_shape

GROUPS = 32
GROUP_NORM_EPS = 1e-6
ROOT_WIDTH = 64
EXPANSION = 4  # a bottleneck's output is this many times as wide as its middle
POOLED_FROM = 128  # pixels; a root that divides the sides by 4 would leave little of smaller images
MOST = 1 << 17  # of anything: more is a mistake, or a file that would have us take a terabyte


@dataclass(frozen=True)
class ResNetConfig:
    """The shape of a `ResNetClassifier`. The defaults are ResNet-18's (1512.03385, table 1).

    Raises:
        BadInput: there is no such model; the message says what would do.
    """

    image_size: int = 224
    num_classes: int = 1000
    width: int = ROOT_WIDTH  # channels of the root and the first stage; each stage after it has twice as many
    blocks: tuple[int, ...] = (2, 2, 2, 2)  # of each stage

    def __post_init__(self) -> None:
        for name in ("image_size", "num_classes", "width"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= MOST:
                raise BadInput(f"{name} is {value!r:.60}; it must be a whole number from 1 to {MOST:,}.")
        if self.width % GROUPS:
            raise BadInput(f"a ResNet {self.width} wide cannot be; its norms need a multiple of {GROUPS}.")
        blocks: list[Any] = list(self.blocks)  # from a file, it may be anything
        if not 1 <= len(blocks) <= 6 or not all(isinstance(count, int) and 1 <= count <= 100 for count in blocks):
            raise BadInput(f"a ResNet with stages of {blocks!r:.60} cannot be; take 1 to 6 stages of 1 to 100 blocks.")

    @property
    def pooled(self) -> bool:
        """Whether the root divides the sides of the image by 4."""
        return self.image_size >= POOLED_FROM

    @property
    def features(self) -> int:
        """W of the last stage, which the head reads."""
        return self.width << (len(self.blocks) - 1)


def out_channels(blocks: tuple[int, ...]) -> int:
    """Channels of the feature map of a ResNet with these bottlenecks a stage; of the bare root if there are none."""
    return ROOT_WIDTH * 2 ** (len(blocks) - 1) * EXPANSION if blocks else ROOT_WIDTH


def stride(blocks: tuple[int, ...]) -> int:
    """Pixels of the image along a side of one cell of that feature map."""
    return 4 * 2 ** max(0, len(blocks) - 1)


def flops(blocks: tuple[int, ...], image_size: int) -> int:
    """Floating-point operations of one image's feature map: 2 for each multiply-add, convolutions only."""

    def convolution(channels: int, width: int, kernel_size: int) -> int:
        return 2 * channels * width * kernel_size**2 * side**2  # with the side of its result

    side = -(-image_size // 2)
    total = convolution(3, ROOT_WIDTH, 7)
    side, channels = -(-side // 2), ROOT_WIDTH
    for stage, count in enumerate(blocks):
        width = ROOT_WIDTH * 2**stage
        for unit in range(count):
            step = 2 if stage and not unit else 1
            total += convolution(channels, width, 1)
            side = -(-side // step)
            total += convolution(width, width, 3) + convolution(width, width * EXPANSION, 1)
            if channels != width * EXPANSION or step > 1:
                total += convolution(channels, width * EXPANSION, 1)
            channels = width * EXPANSION
    return total


class StdConv(nn.Conv2d):
    """A convolution without bias whose kernel is standardised for each output channel (Qiao et al., 1903.10520)."""

    def __init__(self, channels: int, width: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__(channels, width, kernel_size, stride, bias=False)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B W _h _w"]:
        centred = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        # The official code adds its epsilon to the standard deviation, others to the variance.
        weight = centred / (centred.square().mean(dim=(1, 2, 3), keepdim=True).sqrt() + 1e-5)
        return F.conv2d(pad_same(x, self.kernel_size[0], self.stride[0]), weight, stride=self.stride)


class Bottleneck(nn.Module):
    """Three convolutions beside a shortcut, which is projected where the shape changes."""

    expansion = EXPANSION

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = width * EXPANSION
        self.conv1, self.norm1 = StdConv(channels, width, 1), group_norm(width)
        self.conv2, self.norm2 = StdConv(width, width, 3, stride), group_norm(width)
        self.conv3, self.norm3 = StdConv(width, out, 1), group_norm(out)
        self.projection = projection(channels, out, stride)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B W _h _w"]:
        shortcut = x if self.projection is None else self.projection(x)
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return F.relu(shortcut + self.norm3(self.conv3(x)))


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut, which is projected where the shape changes (1512.03385, figure 5, left)."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = StdConv(channels, width, 3, stride), group_norm(width)
        self.conv2, self.norm2 = StdConv(width, width, 3), group_norm(width)
        self.projection = projection(channels, width, stride)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B W _h _w"]:
        shortcut = x if self.projection is None else self.projection(x)
        x = F.relu(self.norm1(self.conv1(x)))
        return F.relu(shortcut + self.norm2(self.conv2(x)))


class ResNet(nn.Module):
    """Images → feature map. The root divides each side by 4; each stage after the first by 2 again.

    Args:
        blocks: how many there are in each stage; () for the root alone.
        block: which they are.
        width: channels of the root.
        pooled: if not, the root is a single 3×3 convolution that leaves the sides as they are.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        block: type[Bottleneck] | type[BasicBlock] = Bottleneck,
        width: int = ROOT_WIDTH,
        pooled: bool = True,
    ) -> None:
        super().__init__()
        self.pooled = pooled
        self.root, self.norm = StdConv(3, width, *((7, 2) if pooled else (3, 1))), group_norm(width)
        self.stages = nn.ModuleList()
        channels = width
        for stage, count in enumerate(blocks):
            units = []
            for unit in range(count):
                units.append(block(channels, width << stage, 2 if stage and not unit else 1))
                channels = (width << stage) * block.expansion
            self.stages.append(nn.Sequential(*units))

    def forward(
        self, images: Float[Tensor, "B 3 height width"], checkpointed: bool = False
    ) -> Float[Tensor, "B W h w"]:
        """The feature map. `checkpointed` keeps only what enters each block for the backward pass."""
        if images.device.type == "cpu":  # where colours come last, as batches have them, it would take twice the time
            images = images.contiguous()
        x = F.relu(self.norm(self.root(images)))
        if self.pooled:
            x = F.max_pool2d(pad_same(x, 3, 2, -torch.inf), 3, stride=2)
        for stage in self.stages:
            assert isinstance(stage, nn.Sequential)  # for the type checker: a ModuleList forgets
            for block in stage:
                x = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
        return x

    @torch.no_grad()
    def initialise(self) -> None:
        """Initial weights as in the official code: LeCun normal; each block begins as its shortcut."""
        for module in self.modules():
            if isinstance(module, StdConv):
                lecun_normal_(module)
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.norm3.weight)
            elif isinstance(module, BasicBlock):
                nn.init.zeros_(module.norm2.weight)


class ResNetClassifier(nn.Module):
    """A ResNet of basic blocks, the mean over its feature map, and a linear head: the CNN of the paper's comparison,
    "ResNet (BiT)" (section 4.1), in the size that fits small images. Blocks and norms are the hybrid's. Images below
    128 pixels have a 3×3 root at stride 1, without pooling, as ResNets for CIFAR do (1512.03385, section 4.2).

    Args:
        config: the model's shape.
    """

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config = config
        # Keep only what enters each block, and compute the rest again in the backward pass: less memory, more time.
        self.checkpoint_activations = False
        self.accepts_smaller = False  # images in evaluation too, and not in training alone
        self.resnet = ResNet(config.blocks, BasicBlock, config.width, config.pooled)
        self.head = nn.Linear(config.features, config.num_classes)
        self.initialise()

    def forward(self, images: Float[Tensor, "B channels height width"]) -> Float[Tensor, "B classes"]:
        """Logits of normalised images.

        Raises:
            BadInput: the images are not of the shape that the model was made for.
        """
        return self.head(self.features(images))

    def features(self, images: Float[Tensor, "B channels height width"]) -> Float[Tensor, "B W"]:
        """What the head reads: the mean over the last feature map. In training, and where the model `accepts_smaller`,
        images may be smaller squares.

        Raises:
            BadInput: as `forward`.
        """
        size, shape = self.config.image_size, images.shape
        smaller = (self.training or self.accepts_smaller) and shape[2] == shape[3] < size
        if shape[1] != 3 or not (smaller or shape[2:] == (size, size)):
            raise wrong_shape(size, shape, "resize them, or load the model with image_size=…")
        return self.resnet(images, self.training and self.checkpoint_activations).mean(dim=(2, 3))

    def resize(self, image_size: int) -> None:
        """Make the model one for images of another size.

        Raises:
            BadInput: images of that size have another root.
        """
        config = replace(self.config, image_size=image_size)
        if config.pooled != self.config.pooled:
            its, there = ("from", "below") if self.config.pooled else ("below", "from")
            raise BadInput(
                f"a ResNet for images {its} {POOLED_FROM} pixels has another root than one for images {there} that: "
                f"it cannot be made one for images of {image_size} pixels."
            )
        self.config = config

    def replace_head(self, num_classes: int) -> None:
        """Put a new head of zeros on."""
        self.config = replace(self.config, num_classes=num_classes)
        self.head = nn.Linear(self.config.features, num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @torch.no_grad()
    def initialise(self) -> None:
        """Initial weights as in the official code: those of `ResNet`, and a head of zeros."""
        if self.head.weight.is_meta:  # as of the Vision Transformer
            return
        self.resnet.initialise()
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)


def projection(channels: int, width: int, stride: int) -> nn.Sequential | None:
    """What a shortcut goes through; None where it is of the shape that the block gives."""
    if channels == width and stride == 1:
        return None
    return nn.Sequential(StdConv(channels, width, 1, stride), group_norm(width))


def group_norm(width: int) -> nn.GroupNorm:
    """As the official code has it."""
    return nn.GroupNorm(GROUPS, width, GROUP_NORM_EPS)


def pad_same(
    x: Float[Tensor, "B C h w"], kernel_size: int, stride: int, value: float = 0.0
) -> Float[Tensor, "B C _h _w"]:
    """As many cells around the map as make its sides divided by the stride, rounded up, the sides of the result."""
    pads: list[int] = []
    for side in (x.shape[3], x.shape[2]):  # F.pad begins with the last dimension
        total = max(0, (-(-side // stride) - 1) * stride + kernel_size - side)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads, value=value) if any(pads) else x


def lecun_normal_(layer: nn.Linear | nn.Conv2d) -> None:
    """Flax's default: a normal cut off at two standard deviations, of variance 1 / fan-in after the cut; bias 0."""
    std = 1 / math.sqrt(layer.weight[0].numel()) / 0.87962566103423978  # the cut leaves 0.8796 of the deviation
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
