"""Weights in and out: anything that `weights.load.read` reads → a run folder; a run → a folder of another library."""

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from vitrail.environment import describe
from vitrail.errors import BadInput
from vitrail.settings import Recipe
from vitrail.vit.config import ViTConfig, shorten
from vitrail.vit.model import VisionTransformer
from vitrail.weights.card import Record, model_card
from vitrail.weights.checkpoint import Run
from vitrail.weights.files import check_place, make_folder, read_json
from vitrail.weights.formats import COMPARED, TOLERANCE, Imported, random_images
from vitrail.weights.load import build, read, with_head
from vitrail.weights.timm_format import unsaid_by_timm, write_timm
from vitrail.weights.transformers_format import unsaid_by_transformers, write_transformers

Library = Literal["transformers", "timm"]

UNSAID = {"transformers": unsaid_by_transformers, "timm": unsaid_by_timm}
WRITE = {"transformers": write_transformers, "timm": write_timm}
NOT_TOLD = ("data", "device", "seed")  # settings that the card has no room for, or elsewhere
# What the card takes from an entry of `environment.json`, where that has it, and of which types it is.
LAUNCH: dict[str, tuple[type, ...]] = {
    "threads": (int,), "cpu": (str,), "gpu": (str, type(None)), "vitrail": (str,), "commit": (str, type(None)),
}  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """What was written, and the largest difference, on `images` random images, between the logits of the run and those
    of what was written, as `difference` has it: read back, and as the other library itself loads it, None where that
    cannot be imported."""

    path: Path
    difference: float
    theirs: float | None
    images: int
    resized_to: int | None  # the shorter side of all images, where Vitrail leaves some as they are


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
        OSError: the folder cannot be written; nothing of it stays.
    """
    check_place(output)
    imported = read(source)
    model = build(imported, source, image_size=image_size, num_classes=num_classes)
    classes = imported.classes if num_classes is None else tuple(map(str, range(num_classes)))
    with within(output.parent):
        run = Run.create(output)
        try:
            side = imported.shorter_side_at(model.config.image_size)
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
    check_place(output)
    imported = with_head(read(source), source)
    recipe = Run(source).known_recipe()
    if recipe is not None and recipe.self_supervised:
        raise BadInput(f"{source} was pre-trained, and has learnt no classes to export; train it first, with --from.")
    check_options(imported.config, library)
    if output.exists() or output.is_symlink():
        raise BadInput(f"{output} exists, and is not overwritten; name another folder with --output.")
    card, model = _card(imported, library, output.name, source), build(imported, source)
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    with within(output.parent):
        try:
            partial.mkdir()
            WRITE[library](partial, imported, card)
            back = compare_outputs(model, build(read(partial), partial))
            theirs = compare_theirs(model, library, partial)
            if math.isnan(back):
                raise BadInput(f"{source} gives outputs that are no numbers: its weights are broken.")
            for found in (back, theirs or 0.0):
                if not found <= TOLERANCE:  # NaN is not either
                    raise RuntimeError(f"what was written for {output} gives other outputs than {source}, by {found:g}")
            partial.rename(output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    smaller = imported.shorter_side is None and imported.resized_to > imported.config.image_size
    return Exported(output, back, theirs, COMPARED, imported.resized_to if smaller else None)


def check_options(config: ViTConfig, library: Library) -> None:
    """See to it that a library has a model with these options.

    Raises:
        BadInput: it has not; the message names all of those that stand in the way, and what would do.
    """
    if not (lacking := UNSAID[library](config)):
        return
    (other,) = (each for each in UNSAID if each != library)
    others = UNSAID[other](config)
    # Of hybrids, only the weights tell (timm_hybrid.py).
    mends = [] if others else [f"--to {other} {'has' if config.resnet_blocks is None else 'may have'} it"]
    drawn = {name: getattr(Recipe, name, None) for name in lacking}
    if drawn.keys() <= vars(Recipe()).keys():
        mends.append(f"a model that was trained with {_listed(drawn)} can go to {library}")
    mend = "; ".join(mends) or "such a model stays with Vitrail: vitrail.load takes it from where it is"
    raise BadInput(
        f"{library} has no such model: it has {_listed(lacking)}{f', and {other} has none either' * bool(others)}. "
        f"{mend[0].upper()}{mend[1:]}."
    )


def _listed(options: dict[str, Any]) -> str:
    """`stem = convolutions, layer_scale = 0.1`."""
    return ", ".join(f"{name} = {value}".lower() for name, value in options.items())


@contextmanager
def within(folder: Path) -> Iterator[None]:
    """Have a folder, and all that it lies in, for what the block writes there. Where the block fails, those that were
    not there before are gone again, but for what somebody else put something into."""
    lacking = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        make_folder(folder)
        yield
    except BaseException:
        for each in lacking:  # the innermost comes first
            with suppress(OSError):
                each.rmdir()
        raise


def difference(ours: Float[Tensor, "*shape"], theirs: Float[Tensor, "*shape"]) -> float:
    """The largest between two outputs, as a share of the largest number of ours where that is above 1: float32 has
    seven digits, however large a number is. NaN where either has one."""
    return float((ours - theirs).abs().max()) / max(1.0, float(ours.abs().max()))


def compare_theirs(model: VisionTransformer, library: Library, folder: Path) -> float | None:
    """The largest difference between a model's logits and those of the model that the library itself makes of a folder,
    as `compare_logits` has it: names that Vitrail writes and reads in the same wrong way show there alone. None where
    the library cannot be imported."""
    try:  # they import much, and torchvision, which fails beside a build of torch that it was not made for
        if library == "timm":
            from timm import create_model
        else:
            from transformers import ViTForImageClassification, logging
    except (ImportError, RuntimeError):
        return None
    if library == "timm":
        return compare_logits(model, create_model(f"local-dir:{folder}", pretrained=True).eval(), "head")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return compare_logits(model, ViTForImageClassification.from_pretrained(folder).eval(), "classifier")


@torch.inference_mode()
def compare_logits(model: VisionTransformer, theirs: nn.Module, head: str) -> float:
    """The largest difference, on the same random images, between the logits of a model and of another library's, which
    calls its head `head`: with the heads that they have, and with one random head on both, for one that is still zero
    gives the same logits whatever stands before it."""
    noise = torch.Generator().manual_seed(0)
    own: dict[str, Tensor] = {}
    random = {
        "weight": torch.randn(model.head.weight.shape, generator=noise) / math.sqrt(model.config.hidden_size),
        "bias": torch.randn(model.head.bias.shape, generator=noise),
    }
    images, differences = random_images(model.config), []
    for weights in (own, random):
        logits = []
        for each, name in ((model, "head"), (theirs, head)):
            given = functional_call(each, {f"{name}.{kind}": weight for kind, weight in weights.items()}, (images,))
            logits.append(getattr(given, "logits", given))
        differences.append(difference(*logits))
    return largest(differences)


@torch.inference_mode()
def compare_outputs(model: VisionTransformer, other: VisionTransformer) -> float:
    """The largest difference, on the same random images, between the logits of two models, and between the tokens that
    their heads read: a head that is still zero would hide any other."""
    images, pairs = random_images(model.config), []
    for each in (model, other):
        tokens = each.forward_encoder(each.embed(images))
        pairs.append((tokens, each.forward_head(tokens)))
    return largest([difference(ours, theirs) for ours, theirs in zip(*pairs, strict=True)])


def largest(differences: list[float]) -> float:
    """NaN if there is one, which Python's `max` passes over."""
    return float(torch.tensor(differences, dtype=torch.float64).max())


def _card(imported: Imported, library: Library, name: str, source: Path) -> str:
    measured = record(Run(source))
    try:
        return model_card(imported, library, name, measured)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if measured is None:
            raise
        raise _damaged(source / "results.json", repr(error)) from None


def record(run: Run) -> Record | None:
    """What a run measured; None where there is no run that was trained to its end.

    Raises:
        BadInput: the files that say it are damaged.
    """
    if not run.trained or not run.ended:
        return None
    resolved = run.recipe()
    # Not where data and weights were: the results name the data, and paths are nobody else's business.
    values = {name: value for name, value in vars(resolved.recipe).items() if name not in NOT_TOLD}
    return Record(
        results=read_json(run.path / "results.json"),
        launch=_last_launch(run),
        changed={name: value for name, value in values.items() if resolved.set_by.get(name) == "command line"},
        settings={name: value for name, value in values.items() if value != getattr(Recipe, name)},
        began=Path(str(resolved.weights)).name if resolved.weights else "",
        averaged=resolved.recipe.ema_decay > 0,
    )


def _last_launch(run: Run) -> dict[str, Any]:
    """What a run was last started with; nothing where that is not known.

    Raises:
        BadInput: `environment.json` is damaged.
    """
    path, launches = run.path / "environment.json", cast(Any, run.launches())  # as a file has it, it may be anything
    if not isinstance(launches, list) or not all(isinstance(each, dict) for each in launches):
        raise _damaged(path, f"its launches are {shorten(launches)}")
    last: dict[str, Any] = launches[-1] if launches else {}
    for name, kinds in LAUNCH.items():
        if name in last and not isinstance(last[name], kinds):
            raise _damaged(path, f"its last launch has {name} = {shorten(last[name])}")
    return last


def _damaged(path: Path, why: str) -> BadInput:
    return BadInput(
        f"{path} is damaged or of another version of Vitrail: {why}. Where the file is missing, weights are exported "
        "without what it says."
    )
