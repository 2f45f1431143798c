"""What a Vision Transformer looks at, in numbers: attention, what it comes to through all layers, and figure 7 of the
paper. Pictures of them are made in `panes.py`.

    B images    L layers    H heads    T tokens    g patches along a side    P patch_size    S side of the image

Images are worked through in parts, and attention in the rows of some queries at a time, so that what is asked for, and
not what it takes to compute it, is most of the memory (`passage.py`).
"""

from collections.abc import Collection, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from vitrail.data.cache import Images
from vitrail.errors import BadInput
from vitrail.explanation.passage import Passage, as_used, check_kind, parts, size_of_parts
from vitrail.input.batches import evaluation_batches
from vitrail.input.pixels import Pixels
from vitrail.progress import track
from vitrail.vit.config import HALF, Colours
from vitrail.vit.model import PatchEmbedding


def attention(
    model: nn.Module, images: Float[Tensor, "B 3 S S"], layers: int | Collection[int] | None = None
) -> dict[int, Float[Tensor, "B H T T"]]:
    """Attention weights by layer (from 0), of the layers asked for, or of all: how much each token (row) takes from
    each other (column), equation 6. Each row adds up to 1; the class token comes before the patches.

    Args:
        model: any Vision Transformer; it is left as it was, in training mode too.
        images: normalised, on the model's device.
        layers: their numbers, from 0 up, or the one of a single layer; all if None.

    Raises:
        BadInput: there is no such layer, the images are of another shape than the model's, or it is a ResNet.
    """
    found: dict[int, Tensor] = {}
    with as_used(model) as vit:
        for place, part in parts(vit, images):
            for layer, rows, weights in Passage(vit, part, layers).weights():
                if layer not in found:
                    found[layer] = images.new_empty(len(images), weights.shape[1], *2 * weights.shape[-1:])
                found[layer][place, :, rows] = weights
    return found


def rollout(model: nn.Module, images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B g g"]:
    """Attention rollout (2005.00928, section 3; the paper's figure 6 and appendix D.8): how much of what the head reads
    comes from each patch, if attention mixes tokens as its weights say. The weights are averaged over the heads, the
    residual counts as much as they do, and the layers are multiplied: R_l = (A_l + I) / 2 · R_(l - 1).

    That is the class token's row of R_L, or the mean of the rows of all patches where the head reads these; what it has
    of the class token is left out, so that a map adds up to less than 1.

    Raises:
        BadInput: the images are of another shape than the model's, or it is a ResNet.
    """
    with as_used(model) as vit:
        return torch.cat([Passage(vit, part).rollout() for _, part in parts(vit, images)])


def gradient_rollout(
    model: nn.Module, images: Float[Tensor, "B 3 S S"], classes: Sequence[int] | None = None
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
        BadInput: there are not as many classes as images, there is no such class, the images are of another shape than
            the model's, or it is a ResNet.
    """
    vit = check_kind(model)
    if classes is not None and len(classes) != len(images):
        raise BadInput(f"there are {len(images)} images and {len(classes)} classes; name one for each image.")
    if wrong := [number for number in classes or [] if not 0 <= number < vit.config.num_classes]:
        raise BadInput(f"the model has classes 0 to {vit.config.num_classes - 1}, and no class {wrong[0]}.")
    with as_used(vit):
        return torch.cat([
            Passage(vit, part).gradient_rollout(None if classes is None else classes[place])
            for place, part in parts(vit, images)
        ])  # fmt: skip


def read_by_heads(
    model: nn.Module, images: Float[Tensor, "B 3 S S"], layers: int | Collection[int] | None = None
) -> dict[int, Float[Tensor, "B H g g"]]:
    """What the token that the head reads attends to in each layer asked for (as in `attention`), by each of its heads:
    the weights of the patches alone. Where the head reads all patches, the mean over these.

    Raises:
        BadInput: there is no such layer, the images are of another shape than the model's, or it is a ResNet.
    """
    found: dict[int, list[Tensor]] = {}
    with as_used(model) as vit:
        for _, part in parts(vit, images):
            for layer, maps in Passage(vit, part, layers).read_by_heads().items():
                found.setdefault(layer, []).append(maps)
    return {layer: torch.cat(maps) for layer, maps in found.items()}


def attention_distance(model: nn.Module, images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "L H"]:
    """How far each head looks (figure 7 on the right, appendix D.7): the distance in pixels between the middles of a
    patch and of the patches that it attends to, weighted by that attention, mean over all patches of all images. What
    goes to the class token is nowhere, and counts for nothing.

    Raises:
        BadInput: the images are of another shape than the model's, or it is a ResNet.
    """
    with as_used(model) as vit:
        return torch.cat([Passage(vit, part).distances() for _, part in parts(vit, images)]).mean(0)


def embedding_filters(model: nn.Module, count: int = 28, *, grey: bool = False) -> Float[Tensor, "n 3 P P"]:
    """The first principal components of the filters that embed a patch (figure 7 on the left), `count` of them or as
    many as there are, each of length 1. Their signs say nothing: the largest of its values is positive.

    With `grey`, they are of what the filters are to images without colour, and have none: there, each counts by the sum
    of its three colours, and in what these differ nothing was learnt.

    Raises:
        BadInput: the model embeds patches otherwise than by one projection of their pixels, its filters are all the
            same, or it is a ResNet.
    """
    vit = check_kind(model)
    embedding = vit.patch_embedding
    if not isinstance(embedding, PatchEmbedding) or vit.resnet is not None:
        by = "a ResNet" if vit.resnet is not None else "convolutions one after another"
        raise BadInput(f"the model makes tokens by {by}, and has no filters of patches of pixels.")
    weight = embedding.projection.weight.detach().cpu().double()  # which MPS lacks
    filters = (weight.mean(1, keepdim=True).expand_as(weight) if grey else weight).flatten(1)
    _, strengths, components = torch.linalg.svd(filters - filters.mean(0), full_matrices=False)
    components = components[strengths > 1e-9 * strengths[0]][:count]
    if not len(components):
        raise BadInput("the model's filters are all the same, and have no principal components.")
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    return (components * largest.sign()).float().unflatten(1, (3, embedding.patch_size, embedding.patch_size))


def position_similarity(model: nn.Module) -> Float[Tensor, "g g g g"]:
    """Cosine similarity of the position embedding of each patch (by row and column) with those of all (figure 7 in the
    middle).

    Raises:
        BadInput: the model is a ResNet.
    """
    vit = check_kind(model)
    side, prefix = vit.config.grid, vit.config.num_prefix_tokens
    embeddings = F.normalize(vit.position_embedding.detach()[0, prefix:].float(), dim=-1)
    return (embeddings @ embeddings.T).unflatten(0, (side, side)).unflatten(2, (side, side))


def attended(
    model: nn.Module, pictures: Sequence[NDArray[np.uint8]], mean: Colours = HALF, std: Colours = HALF
) -> list[NDArray[np.float32]]:
    """What a model looks at in images as they are stored, each uint8 (height, width, 3) with sides of S or more: the
    rollout (g, g) of each, of the square in its middle that the model sees (`squares` cuts it out).

    Args:
        model: on any device; it is left as it was, in training mode too.
        pictures: the images.
        mean: what the model's images are normalised by, of pixels from 0 to 1.
        std: likewise.

    Raises:
        BadInput: the model is no Vision Transformer, or an image is too small.
    """
    vit = check_kind(model)
    device, size, found = next(vit.parameters()).device, vit.config.image_size, list[NDArray[np.float32]]()
    if not pictures:
        return found
    pixels = _pack(pictures, size, device)
    with track(len(pictures), "looking at what it looks at") as advance:
        for batch, label in evaluation_batches(pixels, size_of_parts(vit), mean, std):
            found += list(rollout(vit, batch[: len(label)]).float().cpu().numpy())
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
