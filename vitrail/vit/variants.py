"""The paper's models by name (table 1), and the others, hybrids too, that the official code has (configs/models.py)."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from vitrail.errors import BadInput, nearest
from vitrail.vit import resnet
from vitrail.vit.config import ViTConfig
from vitrail.vit.floor import forward_flops
from vitrail.vit.model import VisionTransformer

# hidden_size, mlp_dim, num_heads, num_layers
SHAPES: dict[str, tuple[int, int, int, int]] = {
    "Ti": (192, 768, 3, 12),
    "S": (384, 1536, 6, 12),
    "B": (768, 3072, 12, 12),
    "L": (1024, 4096, 16, 24),
    "H": (1280, 5120, 16, 32),
}


def _config(size: str, patch_size: int, **others: Any) -> ViTConfig:
    hidden_size, mlp_dim, num_heads, num_layers = SHAPES[size]
    return ViTConfig(
        patch_size=patch_size, hidden_size=hidden_size, mlp_dim=mlp_dim, num_heads=num_heads, num_layers=num_layers,
        **others,
    )  # fmt: skip


# Dropout is the official configuration's, for training from scratch.
VARIANTS: dict[str, ViTConfig] = {
    "ViT-Ti/16": _config("Ti", 16),
    "ViT-S/16": _config("S", 16),
    "ViT-S/32": _config("S", 32),
    "ViT-B/8": _config("B", 8),
    "ViT-B/16": _config("B", 16),
    "ViT-B/32": _config("B", 32),
    "ViT-L/16": _config("L", 16, dropout=0.1),
    "ViT-L/32": _config("L", 32),
    "ViT-H/14": _config("H", 14, dropout=0.1),
    "ViT-S/16-gap": _config("S", 16, classifier="gap"),
    "ViT-B/16-gap": _config("B", 16, classifier="gap"),
    # Hybrids. Their patches are of the feature map: `R50+ViT-B/16` sees 16 × 16 pixels of the image in each.
    "R+ViT-Ti/16": _config("Ti", 8, resnet_blocks=()),
    "R26+ViT-S/32": _config("S", 1, resnet_blocks=(2, 2, 2, 2)),
    "R26+ViT-B/32": _config("B", 1, resnet_blocks=(2, 2, 2, 2)),
    "R50+ViT-B/16": _config("B", 1, resnet_blocks=(3, 4, 9), dropout=0.1),
    "R50+ViT-L/32": _config("L", 1, resnet_blocks=(3, 4, 6, 3), dropout=0.1),
}


def create(name: str, *, image_size: int = 224, num_classes: int = 1000) -> VisionTransformer:
    """A model of that name with random weights.

    Raises:
        BadInput: no variant has that name, or the image size is no multiple of its patch size.
    """
    if name not in VARIANTS:
        raise BadInput(f"there is no variant {name!r}{nearest(name, VARIANTS)} There are: {', '.join(VARIANTS)}.")
    return VisionTransformer(replace(VARIANTS[name], image_size=image_size, num_classes=num_classes))


@dataclass(frozen=True)
class Size:
    """A variant at an image size: its shape, and what it takes. `flops` are those of one image's logits, 2 for each
    multiply-add, every token computed, matrix products and convolutions only: what papers quote, where they do not
    quote half of it. `bytes` are those of the weights in float32."""

    name: str
    num_layers: int
    hidden_size: int
    mlp_dim: int
    num_heads: int
    parameters: int
    flops: int
    bytes: int


def sizes(image_size: int = 224, num_classes: int = 1000) -> list[Size]:
    """All variants that images of that size can be cut into patches for, counted without taking memory for weights.

    Raises:
        BadInput: there are none.
    """
    fitting = [name for name, config in VARIANTS.items() if image_size % config.cell == 0]
    if not fitting:
        raise BadInput(f"no variant has patches that images of {image_size} pixels divide into; take a multiple of 32.")
    return [_size(name, image_size, num_classes) for name in fitting]


def _size(name: str, image_size: int, num_classes: int) -> Size:
    with torch.device("meta"):
        model = create(name, image_size=image_size, num_classes=num_classes)
    config, parameters = model.config, sum(weight.numel() for weight in model.parameters())
    return Size(
        name, config.num_layers, config.hidden_size, config.mlp_dim, config.num_heads, parameters, flops(config),
        4 * parameters,
    )  # fmt: skip


def flops(config: ViTConfig) -> int:
    """Floating-point operations of one image's logits, as `Size` has them."""
    if config.resnet_blocks is None:
        return forward_flops(config, every_token=True)
    # Behind the ResNet, the hybrid is a ViT of images as large as the feature map, which has more channels.
    plain = replace(config, image_size=config.grid * config.patch_size, resnet_blocks=None)
    more = resnet.out_channels(config.resnet_blocks) - 3
    patches = 2 * config.grid**2 * config.patch_size**2 * more * config.hidden_size
    return resnet.flops(config.resnet_blocks, config.image_size) + patches + forward_flops(plain, every_token=True)
