"""Vitrail trains Vision Transformers from scratch on the images that you have.

    import vitrail
    model = vitrail.create("ViT-B/16", image_size=224, num_classes=10)   # random weights
    model = vitrail.load("runs/vit-12")
    logits = model(images)      # (batch, 3, height, width), normalised → (batch, classes)
    result = vitrail.train("vit-12", data="tiny-imagenet", epochs=10)

The names below are imported when they are first used (PEP 562), for torch alone takes seconds to import and
`vitrail -h` may take 0.3 s in all.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitrail.explanation.explain import attention
    from vitrail.training.train import pretrain, train
    from vitrail.vit.model import VisionTransformer
    from vitrail.vit.variants import create
    from vitrail.weights.load import load

__all__ = ["VisionTransformer", "__version__", "attention", "create", "load", "pretrain", "train"]
__version__ = "0.1.0"

_HOMES = {
    "VisionTransformer": "vitrail.vit.model",
    "attention": "vitrail.explanation.explain",
    "create": "vitrail.vit.variants",
    "load": "vitrail.weights.load",
    "pretrain": "vitrail.training.train",
    "train": "vitrail.training.train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vitrail' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
