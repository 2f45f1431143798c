"""Weights from elsewhere, by one `load`: official checkpoints (`.npz`), folders of transformers and timm, and Vitrail's
own run folders."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vitrail.errors import BadInput, nearest
from vitrail.vit.config import shorten
from vitrail.vit.model import VisionTransformer
from vitrail.vit.models import Model
from vitrail.vit.resnet import ResNetClassifier, ResNetConfig
from vitrail.vit.variants import VARIANTS
from vitrail.weights.checkpoint import Run
from vitrail.weights.files import check_weights, reachable, read_json
from vitrail.weights.formats import HEAD, PICKLES, Imported
from vitrail.weights.official import read_official
from vitrail.weights.timm_format import read_timm
from vitrail.weights.transformers_format import read_transformers

UNDERSTOOD = (
    "run folders, official checkpoints (.npz), and folders of transformers' ViT or of timm's VisionTransformer, which "
    "have a config.json and a model.safetensors"
)

__all__ = ["Imported", "build", "digest", "is_run", "load", "read", "with_head"]


def load(source: Path | str, *, image_size: int | None = None, num_classes: int | None = None) -> Model:
    """A model with the weights of a run folder, an official checkpoint (a file `.npz`), or a folder of transformers or
    timm, in evaluation mode. It is a Vision Transformer, unless the run trained a ResNet.

    Args:
        source: the file or folder.
        image_size: resizes the position embeddings to images of that size, as the official code does.
        num_classes: puts a new head of zeros on, in the place of the whole old one.

    Raises:
        BadInput: there is no such file or folder, it is damaged, its config disagrees with its weights, or they are of
            a model that Vitrail's cannot be.
    """
    source = Path(source)
    if is_run(source) and isinstance((run := Run.open(source)).config()[0], ResNetConfig):
        return _load_resnet(run, image_size, num_classes)
    return build(read(source), source, image_size=image_size, num_classes=num_classes)


def read(source: Path) -> Imported:
    """What a file or folder holds of a Vision Transformer, whatever wrote it.

    Raises:
        BadInput: as `load`, and if it is a run of a ResNet.
    """
    with reachable(source):
        return _read(source)


def _read(source: Path) -> Imported:
    if source.suffix == ".npz" and not source.is_dir():
        config, tensors = read_official(source)
        classes = range(config.num_classes if HEAD[0] in tensors else 0)
        return Imported(config, tensors, tuple(map(str, classes)))
    if source.is_file():
        pickled = ", a pickle by its name, which Vitrail never opens" if source.suffix in PICKLES else ""
        raise BadInput(f"{source} is a file{pickled}. Vitrail reads {UNDERSTOOD}.")
    if (source / "config.json").is_file():
        return _read_foreign(source)
    if not source.exists():
        raise BadInput(f"there is no file or folder {source}{_instead(source)}")
    if source.is_dir() and not is_run(source):
        names = sorted(entry.name for entry in source.iterdir())
        found = f"it has {', '.join(names[:5])}{' …' * (len(names) > 5)}" if names else "it is empty"
        raise BadInput(
            f"{source} is no run folder, and nothing else that is understood: {found}. Vitrail reads {UNDERSTOOD}."
        )
    return _read_run(Run.open(source))


def with_head(imported: Imported, source: Path) -> Imported:
    """The same, if it can tell classes apart.

    Raises:
        BadInput: it comes without a head.
    """
    if HEAD[0] in imported.tensors:
        return imported
    raise BadInput(
        f"{source} has no head, and so no classes. Train it on images of yours: vitrail train --from {source} --data "
        f"D; or measure what it sees: vitrail probe {source} --data D."
    )


def _instead(source: Path) -> str:
    """What somebody may have meant who named what is not there, behind the name."""
    if source.as_posix() in VARIANTS:
        return (
            f". That is the name of a shape: vitrail.create({source.as_posix()!r}) makes a model of it, with random "
            "weights. Trained ones are files and folders, such as the official ViT-B_16.npz; name yours."
        )
    address = re.sub(r"^(hf:|https:/|huggingface\.co/)+", "", source.as_posix())
    if address != source.as_posix() or (address.count("/") == 1 and not source.parent.exists()):
        name = address.rpartition("/")[2]
        return f". Vitrail fetches no weights: hf download {address} --local-dir {name} does, and {name} is read."
    there = sorted(entry.name for entry in source.parent.iterdir()) if source.parent.is_dir() else ()
    return nearest(source.name, there)


def _load_resnet(run: Run, image_size: int | None, num_classes: int | None) -> Model:
    model, _ = run.load_model()
    assert isinstance(model, ResNetClassifier)
    if num_classes is not None:
        model.replace_head(num_classes)
    if image_size is not None:
        model.resize(image_size)
    return model.eval()


def is_run(source: Path) -> bool:
    """Whether it is a folder that is read as a run's.

    Raises:
        BadInput: the system does not say what is in it.
    """
    with reachable(source):
        foreign = (source / "config.json").is_file()
        return not foreign and any((source / name).exists() for name in ("recipe.yaml", "model/config.json"))


def _read_run(run: Run) -> Imported:
    model, classes = run.load_model()
    if isinstance(model, ResNetClassifier):
        raise BadInput(
            f"{run.path} is a run of a ResNet, which is there to be compared: vitrail.load, evaluate, predict, report "
            f"and compare take it; import, export and training from weights take Vision Transformers alone."
        )
    return Imported(model.config, model.state_dict(), classes, *run.preprocessing(), run.shorter_side())


def _read_foreign(folder: Path) -> Imported:
    """The model of another library's folder."""
    path = folder / "config.json"
    config = read_json(path)
    if config.get("model_type") == "vit":
        return read_transformers(folder)
    if config.get("architecture") in ("VisionTransformer", "ResNet") and "preprocessing" in config:
        raise BadInput(f"{folder} is a part of a run folder; name the whole, {folder.resolve().parent}.")
    if "model_type" in config and "pretrained_cfg" not in config:
        raise BadInput(f"{path} is of the model type {shorten(config['model_type'])}. Vitrail reads {UNDERSTOOD}.")
    if "architecture" in config:
        return read_timm(folder)
    raise BadInput(
        f"{path} has no model_type, as transformers', and no architecture, as timm's. Vitrail reads {UNDERSTOOD}."
    )


def build(
    imported: Imported, source: Path, *, image_size: int | None = None, num_classes: int | None = None
) -> VisionTransformer:
    """The model, in evaluation mode; the arguments are those of `load`.

    Raises:
        BadInput: there is neither a head nor a number of classes to make one for, or the image size will not do.
    """
    config, tensors = imported.config, imported.tensors
    if num_classes is not None:
        # All of the old head goes, the layer before the logits too (appendix B.1.1).
        config = replace(config, num_classes=num_classes, representation_size=None)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(("head.", "pre_logits."))}
        tensors |= {"head.weight": torch.zeros(num_classes, config.hidden_size), "head.bias": torch.zeros(num_classes)}
    elif HEAD[0] not in tensors:
        raise BadInput(f"{source} has no head; say for how many classes to make one (--num-classes, num_classes=…).")
    with torch.device("meta"):
        model = VisionTransformer(config)
    check_weights(model.state_dict(), tensors, source)
    model.load_state_dict(tensors, assign=True)
    if image_size is not None and image_size != config.image_size:
        model.resize(image_size)
    return model.eval()


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A short text that changes with the weights: their names, shapes and values."""
    hashed = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        hashed.update(repr((name, tuple(tensor.shape))).encode())
        hashed.update(tensor.detach().cpu().contiguous().view(-1).numpy().data)
    return hashed.hexdigest()
