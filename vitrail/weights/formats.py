"""What the formats of other libraries have in common: a folder with a `config.json` and a `model.safetensors`.

A folder may come from anywhere. JSON and tensors are all that is taken from it, pickles are never opened; the model's
shape is read from the weights, which cannot promise more than they have, and compared with what the config says.
"""

import itertools
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitrail.data.images import MARGIN
from vitrail.errors import BadInput, first_of
from vitrail.vit.config import ADDITIONS, HALF, Colours, ViTConfig, shorten
from vitrail.vit.model import VisionTransformer
from vitrail.weights.files import check_plain, check_shapes, no_safetensors
from vitrail.weights.official import grid_of

# The names that another library has for one of Vitrail's weights: several, if it keeps the rows of it apart.
Names = Callable[[str], tuple[str, ...]]

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HEAD = ("head.weight", "head.bias")
COMPARED = 2  # random images
TOLERANCE = 1e-4  # between outputs of the model and of what is written of it


@dataclass(frozen=True)
class Imported:
    """A model from elsewhere, in Vitrail's terms.

    `tensors` are its weights under Vitrail's names, in float32. Where it comes without a head, so do they; `classes` is
    then empty, and the config's `num_classes` says nothing. Images are to have `mean` subtracted from them, of pixels
    from 0 to 1, and to be divided by `std`. `shorter_side` is what that of an image is resized to before the square in
    its middle is cut out; None for what Vitrail does to large images.
    """

    config: ViTConfig
    tensors: dict[str, Tensor]
    classes: tuple[str, ...]
    mean: Colours = HALF
    std: Colours = HALF
    shorter_side: int | None = None

    def shorter_side_at(self, image_size: int) -> int | None:
        """`shorter_side` for a model of these weights that sees images of that size: not known for another."""
        return self.shorter_side if image_size == self.config.image_size else None

    @property
    def resized_to(self) -> int:
        """What an image's shorter side is resized to, in pixels."""
        return self.shorter_side or round(self.config.image_size * MARGIN)


def random_images(config: ViTConfig) -> Float[Tensor, "B 3 S S"]:
    """What a model and what is written of it are compared on."""
    size = config.image_size
    return torch.rand(COMPARED, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def section(content: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    """What a JSON file says by name under a key; nothing where it has no such key.

    Raises:
        BadInput: something else stands there.
    """
    found = content.get(key) or {}
    if not isinstance(found, dict):
        raise BadInput(f"{path} has {key} = {shorten(found)}, and no settings by name.")
    return found


def read_weights(folder: Path, mend: str) -> dict[str, Tensor]:
    """The weights of a folder. They stay in its file, and take no memory, until something is done with their values.

    Args:
        folder: has `model.safetensors`.
        mend: what to do where they are in a pickle.

    Raises:
        BadInput: the file is missing or damaged, or holds something other than floats.
    """
    path = folder / "model.safetensors"
    if not path.exists():
        raise BadInput(_instead(folder, mend))
    check_plain(path)
    try:
        with safe_open(path, framework="pt") as file:  # NumPy has no bfloat16
            names = file.keys()  # of something that is no dict
            found: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise no_safetensors(path, error) from None
    for name, tensor in found.items():
        if tensor.dtype not in FLOATS:
            raise BadInput(f"{path} has {name} of {tensor.dtype}, and not of floats of 16 bits or more.")
    return found


def _instead(folder: Path, mend: str) -> str:
    """Why a folder has no weights that could be read."""
    names = sorted(file.name for file in folder.iterdir())
    if "model.safetensors.index.json" in names:
        return f"the weights of {folder} are divided into several files, and Vitrail reads one: {mend}."
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        return (
            f"the weights of {folder} are a pickle, {pickles[0]}, which may run any program when it is opened; Vitrail "
            f"never does, and reads safetensors. If you trust it: {mend}."
        )
    return f"{folder / 'model.safetensors'} is missing."


@dataclass(frozen=True)
class Shape:
    """What weights tell of their model. `num_classes` is None where they have no head."""

    image_size: int
    patch_size: int
    channels: int
    hidden_size: int
    mlp_dim: int
    num_layers: int
    num_classes: int | None

    def config(self, path: Path, **others: Any) -> ViTConfig:
        """The config of that shape and what else the file `path` says.

        Raises:
            BadInput: there is no such model; the message names the file.
        """
        sizes = asdict(self) | {"num_classes": self.num_classes or 1}
        del sizes["channels"]
        try:
            return ViTConfig(**sizes, **others)
        except (BadInput, TypeError) as error:
            raise BadInput(f"{path}: {str(error).rstrip('.')}.") from None


def measure(weights: Mapping[str, Tensor], names: Names, path: Path) -> Shape:
    """The shape of the model that another library's weights are of.

    Raises:
        BadInput: they are no Vision Transformer's, or one's for images that are no squares.
    """

    def dimensions(ours: str, count: int) -> tuple[int, ...]:
        name = names(ours)[0]
        if name not in weights:
            raise BadInput(f"the weights of {path} are no Vision Transformer's: {name} is missing.")
        if weights[name].ndim != count:
            shape = tuple(weights[name].shape)
            raise BadInput(f"the weights of {path} are no Vision Transformer's: {name} has shape {shape}.")
        return tuple(weights[name].shape)

    hidden_size, channels, _, patch_size = dimensions("patch_embedding.projection.weight", 4)
    (token,) = names("class_token")
    try:
        grid = grid_of(dimensions("position_embedding", 3)[1], token, token in weights)
    except ValueError as error:
        raise BadInput(f"the weights of {path} have {error}.") from None
    return Shape(
        image_size=grid * patch_size,
        patch_size=patch_size,
        channels=channels,
        hidden_size=hidden_size,
        mlp_dim=dimensions("blocks.0.mlp.hidden.weight", 2)[0],
        num_layers=next(n for n in itertools.count() if names(f"blocks.{n}.mlp.hidden.weight")[0] not in weights),
        num_classes=dimensions("head.weight", 2)[0] if names("head.weight")[0] in weights else None,
    )


def refuse(names: Collection[str], parts: dict[str, str], path: Path) -> None:
    """Refuse weights of parts that Vitrail's model does not have.

    Args:
        names: of the weights.
        parts: what such parts are, by a pattern that is found in the names of their weights.
        path: the weights' file.

    Raises:
        BadInput: there are some; the message names the part and its weights.
    """
    for pattern, part in parts.items():
        if found := sorted(name for name in names if re.search(pattern, name)):
            raise BadInput(f"{path} is of a model with {part}, which Vitrail does not read: {first_of(found, 2)}.")


def unsaid(config: ViTConfig, plain: dict[str, Any]) -> dict[str, Any]:
    """What a model has that another library's format cannot say, or that Vitrail does not write there, by the name of
    the option. `plain` is what the format has of some; what later papers add, Vitrail writes for none."""
    plain = plain | {name: getattr(ViTConfig, name) for name in ADDITIONS}
    return {name: value for name, there in plain.items() if (value := getattr(config, name)) != there}


def compare(said: dict[str, tuple[Any, Any]], config: Path, weights: Path) -> None:
    """Compare what a config says, None for nothing, with what the weights have, by the config's name for it.

    Raises:
        BadInput: they differ.
    """
    for key, (stated, found) in said.items():
        if stated is not None and stated != found:
            raise BadInput(f"{config} says {key} = {shorten(stated)}, and the weights in {weights} have {found}.")


def side(sizes: Any) -> Any:
    """One of a height and a width that are the same; anything else as it is."""
    return sizes[0] if isinstance(sizes, list) and len(sizes) == 2 and sizes[0] == sizes[1] else sizes


def to_theirs(state: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Vitrail's weights under another library's names."""
    found: dict[str, Tensor] = {}
    for ours, tensor in state.items():
        theirs = names(ours)
        found |= zip(theirs, tensor.chunk(len(theirs)), strict=True)
    return found


def to_ours(found: dict[str, Tensor], names: Names, config: ViTConfig, path: Path) -> dict[str, Tensor]:
    """Another library's weights under Vitrail's names, in float32, no longer tied to the file that `read_weights` found
    them in. A head may be missing.

    Raises:
        BadInput: others are missing, or unexpected, or of another shape than the config's; the message lists them.
    """
    with torch.device("meta"):
        expected = VisionTransformer(config).state_dict()
    if not any(theirs in found for ours in HEAD for theirs in names(ours)):
        expected = {ours: tensor for ours, tensor in expected.items() if ours not in HEAD}
    check_shapes(to_theirs(expected, names), found, path)
    # Joined, even one alone, they are a copy.
    return {ours: torch.cat([found[name] for name in names(ours)]).to(torch.float32) for ours in expected}
