"""Weights from elsewhere: the official checkpoints (`.npz`) and Vitrail's own run folders, by one `load`."""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitrail.checkpoint import Run, check_shapes
from vitrail.errors import BadInput
from vitrail.model import VisionTransformer, ViTConfig

Arrays = Mapping[str, NDArray[Any]]


def load(source: Path | str, *, image_size: int | None = None) -> VisionTransformer:
    """A model with the weights of a run folder, or of an official checkpoint (a file `.npz`), in evaluation mode.

    `image_size` resizes the position embeddings to images of that size.

    Raises:
        BadInput: there is no such file or folder, it is damaged, or its weights are of another model.
    """
    path = Path(source)
    if path.suffix == ".npz":
        config, weights = read_official(path)
        with torch.device("meta"):
            model = VisionTransformer(config)
        check_shapes(model.state_dict(), weights, path)
        model.load_state_dict(weights, assign=True)
    else:
        model, _ = Run.open(path).load_model()
    if image_size is not None and image_size != model.config.image_size:
        model.resize(image_size)
    return model.eval()


def read_official(path: Path) -> tuple[ViTConfig, dict[str, Tensor]]:
    """A checkpoint of the official JAX code: the shape that its arrays tell, and its weights under Vitrail's names.

    Raises:
        BadInput: the file is missing or damaged, holds Python objects, or is no Vision Transformer's.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name], dtype=np.float32) for name in file.files}
    except FileNotFoundError:
        raise BadInput(f"there is no file {path}.") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise BadInput(f"{path} cannot be read as a NumPy archive of plain arrays: {error}") from None
    try:
        config = _config(arrays)
        return config, _weights(arrays, config)
    except KeyError as error:
        raise BadInput(f"{path} is no checkpoint of the official Vision Transformer: {error} is missing.") from None
    except (ValueError, IndexError, TypeError) as error:
        raise BadInput(f"the arrays of {path} are not of the shapes of a Vision Transformer's: {error}.") from None


def _config(arrays: Arrays) -> ViTConfig:
    patch_size, _, _, hidden_size = arrays["embedding/kernel"].shape
    classifier = "token" if "cls" in arrays else "gap"
    tokens = arrays["Transformer/posembed_input/pos_embedding"].shape[1] - (classifier == "token")
    return ViTConfig(
        image_size=patch_size * round(tokens**0.5),
        patch_size=patch_size,
        hidden_size=hidden_size,
        mlp_dim=arrays["Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel"].shape[1],
        num_heads=arrays["Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"].shape[1],
        num_layers=len({found[1] for name in arrays if (found := re.match(r"Transformer/encoderblock_(\d+)/", name))}),
        num_classes=arrays["head/kernel"].shape[1],
        classifier="token" if "cls" in arrays else "gap",
        representation_size=arrays["pre_logits/kernel"].shape[1] if "pre_logits/kernel" in arrays else None,
    )


def _weights(arrays: Arrays, config: ViTConfig) -> dict[str, Tensor]:
    """The official arrays under Vitrail's names. Flax keeps a matrix as (in, out) and attention's as (D, H, K)."""
    width = config.hidden_size
    found = {
        "patch_embedding.projection.weight": arrays["embedding/kernel"].transpose(3, 2, 0, 1),  # (D, 3, P, P)
        "patch_embedding.projection.bias": arrays["embedding/bias"],
        "position_embedding": arrays["Transformer/posembed_input/pos_embedding"],
        "norm.weight": arrays["Transformer/encoder_norm/scale"],
        "norm.bias": arrays["Transformer/encoder_norm/bias"],
        "head.weight": arrays["head/kernel"].T,
        "head.bias": arrays["head/bias"],
    }
    if config.classifier == "token":
        found["class_token"] = arrays["cls"]
    if config.representation_size:
        found |= {"pre_logits.weight": arrays["pre_logits/kernel"].T, "pre_logits.bias": arrays["pre_logits/bias"]}
    for layer in range(config.num_layers):
        theirs, ours = f"Transformer/encoderblock_{layer}", f"blocks.{layer}"
        attention, mlp = f"{theirs}/MultiHeadDotProductAttention_1", f"{theirs}/MlpBlock_3"
        projections = [
            arrays[f"{attention}/{name}/kernel"].reshape(width, width).T for name in ("query", "key", "value")
        ]
        biases = [arrays[f"{attention}/{name}/bias"].reshape(width) for name in ("query", "key", "value")]
        found |= {
            f"{ours}.attention_norm.weight": arrays[f"{theirs}/LayerNorm_0/scale"],
            f"{ours}.attention_norm.bias": arrays[f"{theirs}/LayerNorm_0/bias"],
            f"{ours}.attention.qkv.weight": np.concatenate(projections),
            f"{ours}.attention.qkv.bias": np.concatenate(biases),
            f"{ours}.attention.out.weight": arrays[f"{attention}/out/kernel"].reshape(width, width).T,
            f"{ours}.attention.out.bias": arrays[f"{attention}/out/bias"],
            f"{ours}.mlp_norm.weight": arrays[f"{theirs}/LayerNorm_2/scale"],
            f"{ours}.mlp_norm.bias": arrays[f"{theirs}/LayerNorm_2/bias"],
            f"{ours}.mlp.hidden.weight": arrays[f"{mlp}/Dense_0/kernel"].T,
            f"{ours}.mlp.hidden.bias": arrays[f"{mlp}/Dense_0/bias"],
            f"{ours}.mlp.out.weight": arrays[f"{mlp}/Dense_1/kernel"].T,
            f"{ours}.mlp.out.bias": arrays[f"{mlp}/Dense_1/bias"],
        }
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in found.items()}
