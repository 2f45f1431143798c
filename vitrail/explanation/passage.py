"""A few images on their way through a Vision Transformer, and all that is to be said of what it looks at in them: they
go through it once, and what enters each layer is kept. `explain.py` takes any number of images.

    B images    L layers    H heads    T tokens    g patches along a side    S side of the image

Attention is computed as equation 6 has it, and not caught by hooks, which fused kernels pass by; in the rows of some
queries at a time, so that long sequences need no matrix (T, T) of all heads.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitrail.errors import BadInput
from vitrail.vit.model import Attention, TransformerEncoderBlock, VisionTransformer
from vitrail.vit.positions import grid

PART = 1 << 25  # activations that are computed at once: 128 MB, of which some two or three are needed

Layer = tuple[int, TransformerEncoderBlock, Float[Tensor, "B T D"]]  # as `each_block` gives it


class Passage:
    """Images that go through a model once, for all that is asked of them. It is made and used inside `as_used`.

    Args:
        model: a Vision Transformer.
        images: normalised, on the model's device, at most `size_of_parts`.
        layers: those that are asked about, from 0; all if None, as logits, rollouts and distances need.

    Raises:
        BadInput: there is no such layer, or the images are of another shape than the model's.
    """

    def __init__(
        self, model: VisionTransformer, images: Float[Tensor, "B 3 S S"], layers: int | Collection[int] | None = None
    ) -> None:
        self.model = model
        self.layers = list(model.each_block(images, layers))

    @cached_property
    def encoded(self) -> Float[Tensor, "B T D"]:
        """z_L, which the last layer gives."""
        _, block, tokens = self.layers[-1]
        encoded: Tensor = block(tokens)
        return encoded

    def logits(self) -> Float[Tensor, "B C"]:
        """What the model says of the images."""
        return self.model.forward_head(self.model.norm(self.encoded))

    def weights(self) -> Iterator[tuple[int, Int[Tensor, " rows"], Float[Tensor, "B H rows T"]]]:
        """Attention weights, some rows of a layer at a time: which layer, which rows, and they."""
        for layer in self.layers:
            for rows, weights in _by_rows(*_queries_and_keys(layer)):
                yield layer[0], rows, weights

    def rollout(self) -> Float[Tensor, "B g g"]:
        """Attention rollout. The row that is read is all of R that is needed, and goes back from the last layer."""
        row = self._read()
        for layer in reversed(self.layers):
            row = (_through(*_queries_and_keys(layer), row).mean(1) + row) / 2
        return self._of_patches(row)

    def gradient_rollout(self, classes: Sequence[int] | None = None) -> Float[Tensor, "B g g"]:
        """The gradient-weighted one, for these classes or those that are predicted. The gradient goes back through one
        layer at a time, which is computed again for it, and the row that is read goes with it."""
        encoded = self.encoded.detach().requires_grad_()
        with torch.enable_grad():
            logits = self.model.forward_head(self.model.norm(encoded))
            chosen = logits.argmax(1) if classes is None else torch.tensor(list(classes), dtype=torch.int64)
            y = logits.gather(1, chosen[:, None].to(logits.device)).sum()
            (gradient,) = torch.autograd.grad(y, encoded)
        row = self._read()
        for layer in reversed(self.layers):
            row, gradient = _back(layer, row, gradient)
        return self._of_patches(row)

    def read_by_heads(self) -> dict[int, Float[Tensor, "B H g g"]]:
        """What the token that the head reads attends to, by each head of each layer asked about."""
        return {layer[0]: self._of_patches(_through(*_queries_and_keys(layer), self._read())) for layer in self.layers}

    def distances(self) -> Float[Tensor, "B L H"]:
        """How far each head looks in each of the images, in pixels."""
        config, prefix, found = self.model.config, self.model.config.num_prefix_tokens, []
        for layer in self.layers:
            q, k = _queries_and_keys(layer)
            places, sums = grid(config.grid**2, q.device).float() * config.cell, q.new_zeros(q.shape[:2])
            for rows, weights in _by_rows(q[:, :, prefix:], k):
                seen = weights[..., prefix:]
                far = (seen * (places[rows, None] - places).norm(dim=-1)).sum(-1)  # (B, H, rows)
                sums += (far / seen.sum(-1).clamp(min=1e-12)).sum(-1)
            found.append(sums / len(places))
        return torch.stack(found, dim=1)

    def _read(self) -> Float[Tensor, "B T"]:
        """The shares of the tokens in what the head reads: all of the class token, or as much of each patch."""
        tokens, prefix = self.layers[-1][2], self.model.config.num_prefix_tokens
        row = tokens.new_zeros(tokens.shape[:2])
        if self.model.config.classifier == "token":
            row[:, 0] = 1
        else:
            row[:, prefix:] = 1 / (row.shape[1] - prefix)
        return row

    def _of_patches(self, row: Float[Tensor, "*B T"]) -> Float[Tensor, "*B g g"]:
        """What such a row has of the patches, where they lie."""
        side = self.model.config.grid
        return row[..., self.model.config.num_prefix_tokens :].unflatten(-1, (side, side))


def explicit(
    block: TransformerEncoderBlock, x: Float[Tensor, "B T D"]
) -> tuple[Float[Tensor, "B T D"], tuple[Float[Tensor, "B H T K"], ...], Float[Tensor, "B H T K"]]:
    """What a block makes of its tokens, equations 2 and 3 without dropout, and on the way there the queries, keys and
    values, and what the heads take of the values: A v, with the weights A of which fused attention says nothing."""
    q, k, v = block.attention.project(block.attention_norm(x))
    taken = F.scaled_dot_product_attention(q, k, v)
    x = x + block.attention_scale(block.attention.out(taken.transpose(1, 2).flatten(2)))
    return x + block.mlp_scale(block.mlp(block.mlp_norm(x))), (q, k, v), taken


def _back(
    layer: Layer, row: Float[Tensor, "B T"], gradient: Float[Tensor, "B T D"]
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T D"]]:
    """A row of R and the gradient, followed back from what leaves a layer to what enters it (2103.15679). The gradient
    by the weights A comes from that by A v: dy / dA = dy / d(A v) · vᵀ."""
    _, block, tokens = layer
    with torch.enable_grad():
        before = tokens.detach().requires_grad_()
        after, projected, taken = explicit(block, before)
        by_taken, gradient = torch.autograd.grad(after, (taken, before), gradient)
    q, k, v = (each.detach() for each in projected)
    relevant = torch.zeros_like(row)
    for rows, weights in _by_rows(q, k, row):
        by_weights = by_taken[:, :, rows] @ v.transpose(-1, -2)
        relevance = (weights * by_weights).clamp(min=0).mean(1)  # equation 5, (B, rows, T)
        relevant += torch.einsum("bq, bqt -> bt", row[:, rows], relevance)
    return row + relevant, gradient  # equation 6


def _queries_and_keys(layer: Layer) -> tuple[Float[Tensor, "B H T K"], Float[Tensor, "B H T K"]]:
    _, block, tokens = layer
    q, k, _ = block.attention.project(block.attention_norm(tokens))
    return q, k


def _by_rows(
    q: Float[Tensor, "B H Q K"], k: Float[Tensor, "B H T K"], row: Float[Tensor, "B Q"] | None = None
) -> Iterator[tuple[Int[Tensor, " rows"], Float[Tensor, "B H rows T"]]]:
    """Attention weights of some queries at a time, and which these are: of all, or of those that `row` has any of."""
    asked = torch.arange(q.shape[2], device=q.device) if row is None else (row != 0).any(0).nonzero()[:, 0]
    for rows in asked.split(max(1, PART // max(1, k[..., 0].numel()))):
        yield rows, Attention.softmax(q[:, :, rows], k)


def _through(
    q: Float[Tensor, "B H T K"], k: Float[Tensor, "B H T K"], row: Float[Tensor, "B T"]
) -> Float[Tensor, "B H T"]:
    """A row of shares of tokens, times the attention weights of each head: shares of what these tokens attend to."""
    found = q.new_zeros(k.shape[:-1])
    for rows, weights in _by_rows(q, k, row):
        found += (row[:, None, None, rows] @ weights)[:, :, 0]
    return found


# How models are handled


@contextmanager
def as_used(model: nn.Module) -> Iterator[VisionTransformer]:
    """The block has the model without dropout and without gradients; then each of its modules goes on as it was.

    Raises:
        BadInput: it is no Vision Transformer.
    """
    vit = check_kind(model)
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield vit
    finally:
        for module, training in before:
            module.training = training


def check_kind(model: nn.Module) -> VisionTransformer:
    """The model, if it is one that has attention.

    Raises:
        BadInput: it is none.
    """
    if not isinstance(model, VisionTransformer):
        raise BadInput("a ResNet has no attention; only a Vision Transformer can be asked what it looks at.")
    return model


def size_of_parts(model: VisionTransformer) -> int:
    """Images that are worked on at once: what enters all layers is kept, and one layer is computed."""
    config = model.config
    return max(1, PART // (config.num_tokens * (config.num_layers * config.hidden_size + 3 * config.mlp_dim)))


def parts(
    model: VisionTransformer, images: Float[Tensor, "B 3 S S"]
) -> Iterator[tuple[slice, Float[Tensor, "_ 3 S S"]]]:  # fmt: skip
    """The images in parts of that size, and which of all they are."""
    size = size_of_parts(model)
    for first in range(0, max(len(images), 1), size):
        yield (place := slice(first, first + size)), images[place]
