"""The recipe vit-12 with the original's two departures from the paper.

Its LayerNorm was over tokens and channels jointly, with a weight for each of both, and its projections of patches and
of attention had no biases. The first three epochs are in `vit-12/`, run at the commit that its `environment.json`
names:

    python original.py tiny-imagenet-200.zip
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

import vitrail
from vitrail.training import train as training


class JointLayerNorm(nn.Module):
    """(B, T, D) → (B, T, D), of mean 0 and variance 1 over all of an image's T · D numbers, then scaled and shifted."""

    def __init__(self, tokens: int, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(tokens, width)), nn.Parameter(torch.zeros(tokens, width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Of each image by itself."""
        return nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


build = training.build_model


def departing(*args: Any, **more: Any) -> nn.Module:
    """The model of the recipe, with the two departures."""
    model = build(*args, **more)
    tokens, width = model.position_embedding.shape[1:]
    for block in model.blocks:
        block.attention_norm, block.mlp_norm = JointLayerNorm(tokens, width), JointLayerNorm(tokens, width)
        for layer in (block.attention.qkv, block.attention.out):
            without_bias(layer)
    without_bias(model.patch_embedding.projection)
    model.norm = JointLayerNorm(tokens, width)
    # The last block computes all tokens: the norm behind it is over all of them.
    model.forward = lambda images: model.forward_head(model.forward_encoder(model.embed(images)))
    return model


def without_bias(layer: nn.Linear | nn.Conv2d) -> None:
    """Have the bias be zero, and stay so."""
    nn.init.zeros_(layer.bias)
    layer.bias.requires_grad_(False)


training.build_model = departing
vitrail.train("vit-12", output="vit-12", data=sys.argv[1], stop_after=3)
