"""Models with random weights, and folders of transformers and timm that hold them."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vitrail.errors import BadInput
from vitrail.vit.config import ViTConfig
from vitrail.vit.model import VisionTransformer
from vitrail.vit.variants import VARIANTS
from vitrail.weights.card import model_card
from vitrail.weights.exchange import WRITE, Library, check_options
from vitrail.weights.formats import Imported

LIBRARIES: tuple[Library, ...] = ("transformers", "timm")
SMALL = ViTConfig(image_size=16, patch_size=4, hidden_size=24, mlp_dim=50, num_heads=3, num_layers=2, num_classes=3)
TINY = replace(SMALL, image_size=8, hidden_size=8, mlp_dim=8, num_heads=2, num_layers=1)
KINDS = {  # by what the head reads
    "token": SMALL, "gap": replace(SMALL, classifier="gap"),
    "tanh": replace(SMALL, classifier="gap", representation_size=10),
    "larger images": replace(SMALL, image_size=36),
}  # fmt: skip
ADDED = {  # by what is in their blocks, or before them
    "LayerScale": replace(SMALL, layer_scale=0.1),
    "convolutions": replace(SMALL, stem="convolutions", stem_units=1),
    "hybrid": replace(SMALL, resnet_blocks=(1,), patch_size=1),
    "all": replace(SMALL, layer_scale=0.1, stem="convolutions", stem_units=1, classifier="gap"),
}  # fmt: skip
CLASSES = ("cat", "dög", "a, \"b\"")  # fmt: skip
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def sayable() -> Iterator[Any]:
    """Each variant for each library that has such a model; all widths, but of two layers."""
    for name, config in VARIANTS.items():
        small = replace(config, num_layers=2, num_classes=3)
        for library in LIBRARIES:
            try:
                check_options(small, library)
            except BadInput:
                assert library == "transformers"
                assert config.resnet_blocks is not None or config.classifier == "gap"
            else:
                yield pytest.param(library, small, id=f"{library}-{name}")


def model_of(config: ViTConfig) -> VisionTransformer:
    """A model with weights that make attention uneven."""
    torch.manual_seed(0)
    model = VisionTransformer(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model


def imported(config: ViTConfig, **others: Any) -> Imported:
    """A model whose weights are all random, so that none can be in another's place unnoticed."""
    torch.manual_seed(0)
    with torch.device("meta"):
        state = VisionTransformer(config).state_dict()
    tensors = {name: torch.randn(tensor.shape) * (0.2 if tensor.ndim > 1 else 0.5) for name, tensor in state.items()}
    classes = CLASSES if config.num_classes == len(CLASSES) else tuple(map(str, range(config.num_classes)))
    return Imported(config, tensors, classes, **{"mean": MEAN, "std": STD} | others)


def written(folder: Path, library: Library, model: Imported) -> Path:
    folder.mkdir()
    WRITE[library](folder, model, model_card(model, library, folder.name, None))
    return folder


def images(config: ViTConfig, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(1))


def change(path: Path, **settings: Any) -> None:
    """Change what a JSON file says; None takes it out."""
    content = json.loads(path.read_text("utf-8")) | settings
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}), "utf-8")


def change_weights(folder: Path, do: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    do(weights)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
