"""Weights in and out: anything that `weights.load.read` reads → a run folder; a run → a folder of another library."""

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.environment import describe
from vitrail.errors import BadInput
from vitrail.vit.model import VisionTransformer
from vitrail.weights.card import Record, model_card
from vitrail.weights.checkpoint import Run
from vitrail.weights.files import read_json
from vitrail.weights.formats import HEAD, Imported
from vitrail.weights.load import build, read
from vitrail.weights.timm_format import check_timm, write_timm
from vitrail.weights.transformers_format import check_transformers, write_transformers

Library = Literal["transformers", "timm"]

CHECK = {"transformers": check_transformers, "timm": check_timm}
WRITE = {"transformers": write_transformers, "timm": write_timm}
COMPARED = 2  # random images
TOLERANCE = 1e-4  # between outputs of the run and of what was written
NOT_TOLD = ("data", "device", "seed")  # settings that the card has no room for, or elsewhere


@dataclass(frozen=True)
class Exported:
    """What was written, and the largest difference, on `images` random images, between the logits of the run and those
    of what was written: read back, and as the other library itself loads it, None where that cannot be imported."""

    path: Path
    difference: float
    theirs: float | None
    images: int


def import_run(
    source: Path, output: Path, *, image_size: int | None = None, num_classes: int | None = None
) -> tuple[Run, VisionTransformer]:
    """Make a run folder of weights from elsewhere: `model/` and `environment.json`. Where `output` exists, the folder
    is `output-2`, and so on.

    Args:
        source: anything that `weights.load.read` reads.
        output: the run folder.
        image_size: resizes the position embeddings to images of that size.
        num_classes: puts a new head of zeros on; its classes are named by their numbers.

    Raises:
        BadInput: as `vitrail.load`; nothing is written.
    """
    imported = read(source)
    model = build(imported, source, image_size=image_size, num_classes=num_classes)
    classes = imported.classes if num_classes is None else tuple(map(str, range(num_classes)))
    run = Run.create(output)
    try:
        side = imported.shorter_side if model.config.image_size == imported.config.image_size else None
        run.save_model(model, classes, imported.mean, imported.std, side)
        run.note_launch({"imported": str(source), **describe(torch.device("cpu"))})
    except BaseException:
        shutil.rmtree(run.path, ignore_errors=True)
        raise
    return run, model


def export_model(source: Path, library: Library, output: Path) -> Exported:
    """Write weights as another library loads them, with class names, preprocessing and a model card; then read them
    back, and compare what both models say of random images.

    Args:
        source: a run folder, or anything else that `weights.load.read` reads.
        library: whose format.
        output: the folder, which must not exist.

    Raises:
        BadInput: the source will not do, the library has no such model, or `output` exists; nothing is written.
        OSError: the folder cannot be written; nothing of it stays.
    """
    imported = read(source)
    if HEAD[0] not in imported.tensors:
        raise BadInput(f"{source} has no head, and so no classes; vitrail import --num-classes N puts one on.")
    recipe = Run(source).known_recipe()
    if recipe is not None and recipe.self_supervised:
        raise BadInput(f"{source} was pre-trained, and has learnt no classes to export; train it first, with --from.")
    CHECK[library](imported.config)
    if output.exists() or output.is_symlink():
        raise BadInput(f"{output} exists, and is not overwritten; name another folder with --output.")
    card, model = _card(imported, library, output.name, source), build(imported, source)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        partial.mkdir()
        WRITE[library](partial, imported, card)
        difference, theirs = (
            compare_outputs(model, build(read(partial), partial)),
            compare_theirs(model, library, partial),
        )
        if math.isnan(difference):
            raise BadInput(f"{source} gives outputs that are no numbers: its weights are broken.")
        if (most := max(difference, theirs or 0)) > TOLERANCE:
            raise RuntimeError(f"what was written for {output} gives other outputs than {source}, by {most:g}")
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(output, difference, theirs, COMPARED)


def random_images(model: VisionTransformer) -> Float[Tensor, "B 3 S S"]:
    """What models are compared on."""
    size = model.config.image_size
    return torch.rand(COMPARED, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.inference_mode()
def compare_theirs(model: VisionTransformer, library: Library, folder: Path) -> float | None:
    """The largest difference between a model's logits and those of the model that the library itself makes of a folder:
    names that Vitrail writes and reads in the same wrong way show there alone. None where it cannot be imported."""
    try:  # they import much, and torchvision, which fails beside a build of torch that it was not made for
        if library == "timm":
            from timm import create_model
        else:
            from transformers import ViTForImageClassification, logging
    except (ImportError, RuntimeError):
        return None
    if library == "timm":
        theirs = create_model(f"local-dir:{folder}", pretrained=True)
    else:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        theirs = ViTForImageClassification.from_pretrained(folder)
    images = random_images(model)
    logits = theirs.eval()(images)
    return float((getattr(logits, "logits", logits) - model(images)).abs().max())


@torch.inference_mode()
def compare_outputs(model: VisionTransformer, other: VisionTransformer) -> float:
    """The largest difference, on the same random images, between the logits of two models, and between the tokens that
    their heads read: a head that is still zero would hide any other."""
    images, pairs = random_images(model), []
    for each in (model, other):
        tokens = each.forward_encoder(each.embed(images))
        pairs.append((tokens, each.forward_head(tokens)))
    differences = [(ours - theirs).abs().max() for ours, theirs in zip(*pairs, strict=True)]
    return float(torch.stack(differences).max())


def _card(imported: Imported, library: Library, name: str, source: Path) -> str:
    try:
        return model_card(imported, library, name, _record(source))
    except (KeyError, TypeError, ValueError) as error:
        path = source / "results.json"
        raise BadInput(f"{path} is damaged or of another version of Vitrail: {error!r}.") from None


def _record(source: Path) -> Record | None:
    """What a run measured; None where there is no run that was trained to its end.

    Raises:
        BadInput: the files that say it are damaged.
    """
    run = Run(source)
    if not run.trained or not run.ended:
        return None
    resolved = run.recipe()
    # Not where the data was: its name is in the results, and its path is nobody else's business.
    changed = [name for name, who in resolved.set_by.items() if who == "command line" and name not in NOT_TOLD]
    values = {name: getattr(resolved.recipe, name) for name in changed}
    began = Path(resolved.weights).name if resolved.weights else ""
    return Record(read_json(source / "results.json"), next(reversed(run.launches()), {}), values, began)
