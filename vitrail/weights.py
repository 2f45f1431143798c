"""Weights from elsewhere: the official checkpoints (`.npz`) and Vitrail's own run folders, by one `load`."""

from pathlib import Path

import torch

from vitrail.checkpoint import Run, check_shapes
from vitrail.model import VisionTransformer
from vitrail.official import read_official


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
