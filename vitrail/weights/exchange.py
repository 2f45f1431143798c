"""Weights in and out: anything that `weights.read` reads → a run folder; a run → a folder of another library."""

import math
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from vitrail.data.images import MARGIN
from vitrail.environment import describe
from vitrail.errors import BadInput
from vitrail.settings import Recipe
from vitrail.vit.model import VisionTransformer
from vitrail.weights.card import Record, model_card
from vitrail.weights.checkpoint import Run
from vitrail.weights.formats import HEAD, Imported, read_json
from vitrail.weights.load import build, read
from vitrail.weights.timm_format import check_timm, write_timm
from vitrail.weights.transformers_format import check_transformers, write_transformers

Library = Literal["transformers", "timm"]

CHECK = {"transformers": check_transformers, "timm": check_timm}
WRITE = {"transformers": write_transformers, "timm": write_timm}
COMPARED = 2  # random images
TOLERANCE = 1e-4  # between outputs of the run and of what was written
NOT_TOLD = ("data", "device", "seed")  # settings that the card has no room for, or elsewhere
SIDES = {
    "digits": 8,
    "tiny-imagenet": 64,
    "cifar-10": 32,
    "cifar-100": 32,
}  # pixels, of built-in images


@dataclass(frozen=True)
class Exported:
    """What was written, and the largest difference between its logits, read back, and those of the run on `images`
    random images."""

    path: Path
    difference: float
    images: int


def import_run(
    source: Path, output: Path, *, image_size: int | None = None, num_classes: int | None = None
) -> tuple[Run, VisionTransformer]:
    """Make a run folder of weights from elsewhere: `model/` and `environment.json`. Where `output` exists, the folder
    is `output-2`, and so on.

    Args:
        source: anything that `weights.read` reads.
        output: the run folder.
        image_size: resizes the position embeddings to images of that size.
        num_classes: puts a new head of zeros on; its classes are named by their numbers.

    Raises:
        BadInput: as `weights.load`; nothing is written.
    """
    imported = read(source)
    model = build(imported, source, image_size=image_size, num_classes=num_classes)
    classes = imported.classes if num_classes is None else tuple(map(str, range(num_classes)))
    run = Run.create(output)
    try:
        run.save_model(model, classes, imported.mean, imported.std)
        run.note_launch({"imported": str(source), **describe(torch.device("cpu"))})
    except BaseException:
        shutil.rmtree(run.path, ignore_errors=True)
        raise
    return run, model


def export_model(source: Path, library: Library, output: Path) -> Exported:
    """Write weights as another library loads them, with class names, preprocessing and a model card; then read them
    back, and compare what both models say of random images.

    Args:
        source: a run folder, or anything else that `weights.read` reads.
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
    imported = replace(imported, shorter_side=_shorter_side(recipe, imported.config.image_size))
    card = _card(imported, library, output.name, source)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        partial.mkdir()
        WRITE[library](partial, imported, card)
        difference = compare_outputs(build(imported, source), build(read(partial), partial))
        if math.isnan(difference):
            raise BadInput(f"{source} gives outputs that are no numbers: its weights are broken.")
        if difference > TOLERANCE:
            raise RuntimeError(f"what was written for {output} gives other outputs than {source}, by {difference:g}")
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(output, difference, COMPARED)


@torch.inference_mode()
def compare_outputs(model: VisionTransformer, other: VisionTransformer) -> float:
    """The largest difference, on the same random images, between the logits of two models, and between the tokens that
    their heads read: a head that is still zero would hide any other."""
    size = model.config.image_size
    images = torch.rand(COMPARED, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pairs = []
    for each in (model, other):
        tokens = each.forward_encoder(each.embed(images))
        pairs.append((tokens, each.forward_head(tokens)))
    differences = [(ours - theirs).abs().max() for ours, theirs in zip(*pairs, strict=True)]
    return float(torch.stack(differences).max())


def _shorter_side(recipe: Recipe | None, image_size: int) -> int | None:
    """What the shorter side of an image is to be resized to, where the images of a run were smaller than `to_pixels`
    makes large ones: then that is what its figures are of."""
    known = SIDES.get(recipe.data) if recipe else None
    return known and min(max(known, image_size), round(image_size * MARGIN))


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
    return Record(read_json(source / "results.json"), next(reversed(run.launches()), {}), values)
