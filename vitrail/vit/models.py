"""The models that there are, as `model/config.json` has them: the Vision Transformer, and a ResNet to compare."""

from dataclasses import asdict, fields
from typing import Any

from vitrail.errors import BadInput
from vitrail.settings import without_gone
from vitrail.vit.config import ViTConfig, shorten
from vitrail.vit.model import VisionTransformer
from vitrail.vit.resnet import ResNetClassifier, ResNetConfig

Config = ViTConfig | ResNetConfig
Model = VisionTransformer | ResNetClassifier


def build(config: Config) -> Model:
    """The model of that shape, with its initial weights."""
    return VisionTransformer(config) if isinstance(config, ViTConfig) else ResNetClassifier(config)


def to_json(config: Config) -> dict[str, Any]:
    """What kind of model it is, and its shape."""
    return {"architecture": "ResNet" if isinstance(config, ResNetConfig) else "VisionTransformer",
            "model": asdict(config)}  # fmt: skip


def from_json(content: dict[str, Any]) -> Config:
    """The shape that `to_json` wrote down.

    Raises:
        BadInput: it is of a kind, or has settings, that this version of Vitrail lacks, or there is no such model.
        KeyError, TypeError, AttributeError: it was something else.
    """
    kinds: dict[str, type[Config]] = {"VisionTransformer": ViTConfig, "ResNet": ResNetConfig}
    architecture, shape = content["architecture"], dict(content["model"])
    if architecture not in kinds:
        raise BadInput(f"its architecture is {shorten(architecture)}; Vitrail has {' and '.join(kinds)}.")
    shape = without_gone(shape, [field.name for field in fields(kinds[architecture])])
    for name in ("resnet_blocks", "blocks"):
        if shape.get(name) is not None:
            shape[name] = tuple(shape[name])
    return kinds[architecture](**shape)
