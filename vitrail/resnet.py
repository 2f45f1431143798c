"""The ResNet in front of the hybrid's Transformer (section 3.1, "Hybrid Architecture"), as the official code has it
(models_resnet.py): BiT's, with GroupNorm and weight-standardised convolutions (arXiv 1912.11370), activations last.

    B batch    W width of a stage    h, w sides of a feature map

Convolutions and pooling are padded as TensorFlow's "SAME": at stride 2 more on the right and below, where PyTorch's own
padding is symmetric and sees other pixels.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

GROUPS = 32
GROUP_NORM_EPS = 1e-6
ROOT_WIDTH = 64
EXPANSION = 4  # a bottleneck's output is this many times as wide as its middle


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

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = width * EXPANSION
        self.conv1, self.norm1 = StdConv(channels, width, 1), group_norm(width)
        self.conv2, self.norm2 = StdConv(width, width, 3, stride), group_norm(width)
        self.conv3, self.norm3 = StdConv(width, out, 1), group_norm(out)
        projected = channels != out or stride > 1
        self.projection = nn.Sequential(StdConv(channels, out, 1, stride), group_norm(out)) if projected else None

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B W _h _w"]:
        shortcut = x if self.projection is None else self.projection(x)
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return F.relu(shortcut + self.norm3(self.conv3(x)))


class ResNet(nn.Module):
    """Images → feature map. The root divides each side by 4; each stage after the first by 2 again.

    Args:
        blocks: bottlenecks of each stage; () for the root alone.
    """

    def __init__(self, blocks: tuple[int, ...]) -> None:
        super().__init__()
        self.root, self.norm = StdConv(3, ROOT_WIDTH, 7, stride=2), group_norm(ROOT_WIDTH)
        self.stages = nn.ModuleList()
        channels = ROOT_WIDTH
        for stage, count in enumerate(blocks):
            width = ROOT_WIDTH * 2**stage
            units = []
            for unit in range(count):
                units.append(Bottleneck(channels, width, 2 if stage and not unit else 1))
                channels = width * EXPANSION
            self.stages.append(nn.Sequential(*units))

    def forward(self, images: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B W h w"]:
        x = F.relu(self.norm(self.root(images)))
        x = F.max_pool2d(pad_same(x, 3, 2, -torch.inf), 3, stride=2)
        for stage in self.stages:
            x = stage(x)
        return x

    @torch.no_grad()
    def initialise(self) -> None:
        """Initial weights as in the official code: LeCun normal; each block begins as its shortcut."""
        for module in self.modules():
            if isinstance(module, StdConv):
                lecun_normal_(module)
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.norm3.weight)


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
