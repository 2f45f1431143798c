"""What later papers add to the Vision Transformer, and recipes for few images take; each is off until the config, or
the recipe, asks for it.

    B batch    T tokens    N patches    D hidden_size    W channels of a feature map    h, w its sides
"""

from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitrail.vit.config import ViTConfig

# What the averages that evaluation normalises by take of each batch: they are of some twenty, where torch's 0.1 has
# ten. Training does not depend on it.
BATCH_NORM_MOMENTUM = 0.05


class ConvolutionalStem(nn.Module):
    """Image → patches → tokens by 3×3 convolutions of stride 2, each twice as wide as the one before and the last as
    wide as a token, and a projection: 2106.14881, section 3, of the widths of its ViT_C-1GF and 4GF, with its BatchNorm
    (1502.03167): in training, what becomes of an image hangs on the others of its batch, or of the part of it that is
    worked through at once; in evaluation, on averages of what training met.

    `stem_units` more, of stride 1, stand in front of the last of these, where h = w = 2 √N and W = D / 2: two cells
    along each side of a patch. Each adds its result to what it is given (1512.03385, equation 1); those of stride 1 in
    the former paper's largest stem do not. Patches are at least 2 pixels wide, 4 with units (`ViTConfig`).
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        *maps, last = pairwise([3, *config.stem_widths])
        layers = [layer for before, width in maps for layer in convolution(before, width, stride=2)]
        layers += [ResidualUnit(config.unit_width) for _ in range(config.stem_units)]
        self.layers = nn.Sequential(*layers, *convolution(*last, stride=2))
        self.projection = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, images: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B N D"]:
        if images.device.type == "cpu":  # where colours come last, as batches have them, it would take longer
            images = images.contiguous()
        return self.projection(self.layers(images).flatten(2).transpose(1, 2))


class ResidualUnit(nn.Module):
    """A 3×3 convolution whose result is added to what it is given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*convolution(width, width, stride=1))

    def forward(self, x: Float[Tensor, "B W h w"]) -> Float[Tensor, "B W h w"]:
        return x + self.layers(x)


def convolution(before: int, width: int, stride: int) -> tuple[nn.Module, ...]:
    """A 3×3 convolution from so many channels to so many, its norm and its ReLU."""
    norm = nn.BatchNorm2d(width, momentum=BATCH_NORM_MOMENTUM)
    return nn.Conv2d(before, width, 3, stride, padding=1, bias=False), norm, nn.ReLU()


class ResidualScale(nn.Module):
    """What the output of attention or MLP is multiplied by before it joins the residual: LayerScale, a weight for each
    channel (2103.17239, section 2), and stochastic depth, 0 for a random share of the images and as much more for the
    others (1603.09382; the share rises with the layer, which counts from 1, as its equation 4). 1 where both are off.
    """

    def __init__(self, config: ViTConfig, layer: int) -> None:
        super().__init__()
        scale, width = config.layer_scale, config.hidden_size
        self.weight = nn.Parameter(torch.full((width,), scale)) if scale is not None else None
        self.dropped = config.stochastic_depth * layer / config.num_layers

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        scale: Tensor | None = self.weight
        if self.training and self.dropped:
            kept = (torch.rand(len(x), 1, 1, device=x.device) >= self.dropped) / (1 - self.dropped)
            scale = kept if scale is None else kept * scale  # first, for both are small
        return x if scale is None else x * scale


def drop_patches(tokens: Float[Tensor, "B T D"], config: ViTConfig) -> Float[Tensor, "B _ D"]:
    """Patch dropout (2208.07220): what stands in front of the patches, and as many patches as the config leaves, drawn
    for each image by itself."""
    batch, count = len(tokens), tokens.shape[1] - config.num_prefix_tokens
    kept = torch.rand(batch, count, device=tokens.device).argsort(dim=1)[:, : config.kept_patches(count)]
    return keep_patches(tokens, kept, config)


def keep_patches(tokens: Float[Tensor, "B T D"], kept: Int[Tensor, "B _"], config: ViTConfig) -> Float[Tensor, "B _ D"]:
    """What stands in front of the patches, and the patches of those numbers."""
    front, device = config.num_prefix_tokens, tokens.device
    index = torch.cat([torch.arange(front, device=device).expand(len(tokens), -1), front + kept], dim=1)
    return rows_of(tokens, index)


def rows_of(x: Float[Tensor, "B T width"], index: Int[Tensor, "B M"]) -> Float[Tensor, "B M width"]:
    """Of each image, the rows of those numbers."""
    # The gradient of torch.gather is slow where CUDA is to add up in a fixed order: it sorts every number's index.
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def initialise_as_torch(model: nn.Module) -> None:
    """Draw all linear layers and convolutions anew as PyTorch does where nobody says otherwise, biases included:
    uniformly, with a variance of 1 / (3 fan-in). That is a third of the official code's for queries, keys and values,
    and between 0.8 (the MLP's hidden layer) and 0.2 (its output) of it elsewhere in a block.

    Queries and keys are smaller, so that attention begins flatter, and stays so at learning rates at which it
    otherwise collapses onto single tokens (docs/log.md; 2303.06296 describes the collapse).
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.reset_parameters()


def zero_residuals(model: nn.Module) -> None:
    """Have each encoder block begin as one that gives back what it is given: the last projections of attention and MLP
    are 0, biases included, until they have learnt."""
    for name, weight in model.named_parameters():
        if name.endswith((".out.weight", ".out.bias")):
            nn.init.zeros_(weight)
