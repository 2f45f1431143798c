"""What a Vision Transformer looks at, in numbers: attention, what it comes to through all layers, and figure 7 of the
paper. Pictures of them are made in `panes.py`.

    B images    L layers    H heads    T tokens    g patches along a side    P patch_size    S side of the image

Attention is computed as equation 6 has it, and not caught by hooks, which fused kernels pass by. Images are worked
through in parts, so that what is asked for, and not what it takes to compute it, is most of the memory.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from vitrail.batches import Pixels, evaluation_batches
from vitrail.cache import Images
from vitrail.config import HALF, Colours
from vitrail.errors import BadInput
from vitrail.model import PatchEmbedding, TransformerEncoderBlock, VisionTransformer
from vitrail.positions import Rotation, grid, rotary_positions
from vitrail.progress import track

By = Literal["rollout", "gradient"]
PART = 1 << 25  # activations of one layer that are computed at once: 128 MB, of which some two or three are needed


def attention(
    model: VisionTransformer, images: Float[Tensor, "B 3 S S"], layers: Collection[int] | None = None
) -> dict[int, Float[Tensor, "B H T T"]]:
    """Attention weights by layer (from 0), of the layers asked for, or of all: how much each token (row) takes from
    each other (column), equation 6. Each row adds up to 1; the class token and registers come before the patches.

    Args:
        model: any Vision Transformer; it is left as it was, in training mode too.
        images: normalised, on the model's device.
        layers: numbers from 0 up; all if None.

    Raises:
        BadInput: there is no such layer, or the images are of another shape than the model's.
    """
    with _as_used(model):
        found = [model.attention(part, layers) for part in _parts(model, images)]
    return {layer: torch.cat([part.pop(layer) for part in found]) for layer in list(found[0])}


def rollout(model: VisionTransformer, images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B g g"]:
    """Attention rollout (2005.00928, section 3; the paper's figure 6 and appendix D.8): how much of what the head reads
    comes from each patch, if attention mixes tokens as its weights say. The weights are averaged over the heads, the
    residual counts as much as they do, and the layers are multiplied: R_l = (A_l + I) / 2 · R_(l - 1).

    That is the class token's row of R_L, or the mean of the rows of all patches where the head reads these; what it has
    of the class token and registers is left out, so that a map adds up to less than 1.

    Raises:
        BadInput: the images are of another shape than the model's.
    """
    with _as_used(model):
        return torch.cat([_rollout(model, part) for part in _parts(model, images)])


def _rollout(model: VisionTransformer, images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B g g"]:
    same = torch.eye(model.config.num_tokens, device=images.device)
    joint = same.expand(len(images), -1, -1)
    for _, weights in model.each_attention(images):
        joint = (weights.mean(1) + same) / 2 @ joint
    return _of_patches(model, _read(model, joint))


def gradient_rollout(
    model: VisionTransformer, images: Float[Tensor, "B 3 S S"], classes: Sequence[int] | None = None
) -> Float[Tensor, "B g g"]:
    """What speaks for a class, by patch (2103.15679, equations 5 and 6): attention counts as far as more of it would
    raise the logit of the class: R_l = R_(l - 1) + mean over heads of max(A_l · dy / dA_l, 0) R_(l - 1).

    What is followed back is what the head reads, as with `rollout`. Predictions hang on the patches that it names about
    as much as on those of `rollout` (docs/log.md); but where attention has settled on one patch alone, more of it
    changes nothing, and then rollout is the surer guide.

    Args:
        model: any Vision Transformer, with a head that has learnt; it is left as it was.
        images: normalised, on the model's device.
        classes: a class for each image; the one that the model predicts if None.

    Raises:
        BadInput: there are not as many classes as images, there is no such class, or the images are of another shape
            than the model's.
    """
    if classes is not None and len(classes) != len(images):
        raise BadInput(f"there are {len(images)} images and {len(classes)} classes; name one for each image.")
    if wrong := [number for number in classes or [] if not 0 <= number < model.config.num_classes]:
        raise BadInput(f"the model has classes 0 to {model.config.num_classes - 1}, and no class {wrong[0]}.")
    chosen = None if classes is None else torch.tensor(list(classes), dtype=torch.int64, device=images.device)
    maps, done = [], 0
    with _as_used(model):
        for part in _parts(model, images):
            maps.append(_gradient_rollout(model, part, None if chosen is None else chosen[done : done + len(part)]))
            done += len(part)
    return torch.cat(maps)


def _gradient_rollout(
    model: VisionTransformer, images: Float[Tensor, "B 3 S S"], classes: Int[Tensor, " B"] | None
) -> Float[Tensor, "B g g"]:
    """The gradient goes back through one layer at a time, which is computed again for it: only what enters each is
    kept. The row that is read is all of R that is needed, and it can be followed back at the same time."""
    tokens = model.embed(images)
    rotation = rotary_positions(model.config, tokens)
    entering = []
    for block in model.blocks:
        entering.append(tokens)
        tokens = block(tokens, rotation=rotation)
    with torch.enable_grad():
        logits = model.forward_head(model.norm(tokens.requires_grad_()))
        chosen = logits.argmax(1) if classes is None else classes
        y = logits.gather(1, chosen[:, None]).sum()
        (gradient,) = torch.autograd.grad(y, tokens)
    row = _read(model, torch.eye(model.config.num_tokens, device=images.device)).expand(len(images), -1)
    for block, before in zip(reversed(list(model.blocks)), reversed(entering), strict=True):
        assert isinstance(block, TransformerEncoderBlock)  # for the type checker: a ModuleList forgets
        with torch.enable_grad():
            after, weights = explicit(block, before.requires_grad_(), rotation)
            by_weights, gradient = torch.autograd.grad(after, (weights, before), gradient)
        relevance = (weights.detach() * by_weights).clamp(min=0).mean(1)  # equation 5, (B, T, T)
        row = row + torch.einsum("bt, bts -> bs", row, relevance)  # equation 6
    return _of_patches(model, row)


def explicit(
    block: TransformerEncoderBlock, x: Float[Tensor, "B T D"], rotation: Rotation | None
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B H T T"]]:
    """What a block makes of its tokens, and the attention weights on the way there, which fused attention keeps to
    itself: equations 2 and 3, without dropout."""
    q, k, v = block.attention.project(block.attention_norm(x), rotation=rotation)
    weights = block.attention.softmax(q, k)
    x = x + block.attention_scale(block.attention.out((weights @ v).transpose(1, 2).flatten(2)))
    return x + block.mlp_scale(block.mlp(block.mlp_norm(x))), weights


def read_by_heads(
    model: VisionTransformer, images: Float[Tensor, "B 3 S S"], layers: Collection[int] | None = None
) -> dict[int, Float[Tensor, "B H g g"]]:
    """What the token that the head reads attends to in each layer asked for (from 0; all if None), by each of its
    heads: the weights of the patches alone. Where the head reads all patches, the mean over these.

    Raises:
        BadInput: there is no such layer, or the images are of another shape than the model's.
    """
    found: dict[int, list[Tensor]] = {}
    with _as_used(model):
        for part in _parts(model, images):
            for layer, weights in model.each_attention(part, layers):
                found.setdefault(layer, []).append(_of_patches(model, _read(model, weights)))
    return {layer: torch.cat(maps) for layer, maps in found.items()}


def attention_distance(model: VisionTransformer, images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "L H"]:
    """How far each head looks (figure 7 on the right, appendix D.7): the distance in pixels between the middles of a
    patch and of the patches that it attends to, weighted by that attention, mean over all patches of all images. What
    goes to the class token or registers is nowhere, and counts for nothing.

    Raises:
        BadInput: the images are of another shape than the model's.
    """
    config = model.config
    places = grid(config.grid**2, images.device).float() * config.cell
    distances = (places[:, None] - places[None]).norm(dim=-1)  # (patches, patches)
    sums = torch.zeros(config.num_layers, config.num_heads, device=images.device)
    with _as_used(model):
        for part in _parts(model, images):
            for layer, weights in model.each_attention(part):
                seen = weights[:, :, config.num_prefix_tokens :, config.num_prefix_tokens :]
                far = torch.einsum("bhqk, qk -> bhq", seen, distances)
                sums[layer] += (far / seen.sum(-1).clamp(min=1e-12)).mean(-1).sum(0)
    return sums / len(images)


def embedding_filters(model: VisionTransformer, count: int = 28) -> Float[Tensor, "n 3 P P"]:
    """The first principal components of the filters that embed a patch (figure 7 on the left), `count` of them or as
    many as there are, each of length 1. Their signs say nothing: the largest of its values is positive.

    Raises:
        BadInput: the model embeds patches otherwise than by one projection of their pixels.
    """
    embedding = model.patch_embedding
    if not isinstance(embedding, PatchEmbedding) or model.resnet is not None:
        by = "a ResNet" if model.resnet is not None else "convolutions one after another"
        raise BadInput(f"the model makes tokens by {by}, and has no filters of patches of pixels.")
    filters = embedding.projection.weight.detach().flatten(1).double().cpu()
    _, strengths, components = torch.linalg.svd(filters - filters.mean(0), full_matrices=False)
    components = components[strengths > 1e-9 * strengths[0]][:count]
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    return (components * largest.sign()).float().unflatten(1, (3, embedding.patch_size, embedding.patch_size))


def position_similarity(model: VisionTransformer) -> Float[Tensor, "g g g g"]:
    """Cosine similarity of the position embedding of each patch (by row and column) with those of all (figure 7 in the
    middle).

    Raises:
        BadInput: the model has learnt none.
    """
    if model.position_embedding is None:
        kind = model.config.positions
        raise BadInput(f"the model's positions are {kind}, the same in every such model: it has learnt none.")
    side, prefix = model.config.grid, int(model.config.classifier == "token")
    embeddings = F.normalize(model.position_embedding.detach()[0, prefix:].float(), dim=-1)
    return (embeddings @ embeddings.T).unflatten(0, (side, side)).unflatten(2, (side, side))


def attended(
    model: nn.Module,
    pictures: Sequence[NDArray[np.uint8]],
    mean: Colours = HALF,
    std: Colours = HALF,
    *,
    by: By = "rollout",
    classes: Sequence[int] | None = None,
) -> list[NDArray[np.float32]]:
    """What a model looks at in images as they are stored, each uint8 (height, width, 3) with sides of S or more: a map
    (g, g) for each, of the square in its middle that the model sees (`squares` cuts it out).

    Args:
        model: on any device; it is left as it was, in training mode too.
        pictures: the images.
        mean: what the model's images are normalised by, of pixels from 0 to 1.
        std: likewise.
        by: `rollout`, or `gradient` for `gradient_rollout`.
        classes: of the latter, one for each image; what the model predicts if None.

    Raises:
        BadInput: the model is no Vision Transformer, an image is too small, or as `gradient_rollout`.
    """
    if not isinstance(model, VisionTransformer):
        raise BadInput("a ResNet has no attention; only a Vision Transformer can be asked what it looks at.")
    device, size, found = next(model.parameters()).device, model.config.image_size, list[NDArray[np.float32]]()
    if not pictures:
        return found
    pixels = _pack(pictures, size, device)
    with track(len(pictures), "looking at what it looks at") as advance:
        for batch, label in evaluation_batches(pixels, _part(model), mean, std):
            images, done = batch[: len(label)], len(found)
            if by == "rollout":
                maps = rollout(model, images)
            else:
                maps = gradient_rollout(model, images, None if classes is None else classes[done : done + len(label)])
            found += list(maps.float().cpu().numpy())
            advance(len(label))
    return found


def squares(pictures: Sequence[NDArray[np.uint8]], image_size: int) -> list[NDArray[np.uint8]]:
    """Of images as they are stored the square in the middle, uint8 (S, S, 3): what a model sees of them when it is not
    being trained.

    Raises:
        BadInput: an image is smaller.
    """
    if not pictures:
        return []
    pixels = _pack(pictures, image_size, torch.device("cpu"))
    middle = torch.full((len(pictures), 2), 0.5)
    return list(pixels.cut(torch.arange(len(pictures)), middle).permute(0, 2, 3, 1).numpy())


def _pack(pictures: Sequence[NDArray[np.uint8]], image_size: int, device: torch.device) -> Pixels:
    for picture in pictures:
        if min(picture.shape[:2]) < image_size:
            raise BadInput(f"an image of {picture.shape[1]} × {picture.shape[0]} is too small for {image_size} pixels.")
    return Pixels(Images.pack(pictures, [""] * len(pictures)), image_size, device)


@contextmanager
def _as_used(model: nn.Module) -> Iterator[None]:
    """The block has the model without dropout and without gradients; then it goes on as it was."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _part(model: VisionTransformer) -> int:
    """Images that are worked on at once."""
    config = model.config
    tokens = config.num_tokens
    return max(1, PART // (config.num_heads * tokens**2 + 3 * config.mlp_dim * tokens))


def _parts(model: VisionTransformer, images: Float[Tensor, "B 3 S S"]) -> tuple[Float[Tensor, "_ 3 S S"], ...]:
    return images.split(_part(model))


def _read(model: VisionTransformer, rows: Float[Tensor, "*B T T"]) -> Float[Tensor, "*B T"]:
    """Of the rows of all tokens what concerns the head: the class token's, or the mean of the patches'."""
    if model.config.classifier == "token":
        return rows[..., 0, :]
    return rows[..., model.config.num_prefix_tokens :, :].mean(-2)


def _of_patches(model: VisionTransformer, row: Float[Tensor, "*B T"]) -> Float[Tensor, "*B g g"]:
    """What such a row has of the patches, where they lie."""
    return row[..., model.config.num_prefix_tokens :].unflatten(-1, (model.config.grid, model.config.grid))
