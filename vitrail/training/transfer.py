"""What a run begins with where its weights are not random: the paper's transfer to other images, at a higher resolution
and with a new head (section 3.2, appendix B.1.1)."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from vitrail.errors import BadInput
from vitrail.recipes import FINE_TUNE, YOURS, Resolved
from vitrail.settings import Recipe
from vitrail.vit.config import HALF, Colours, ViTConfig
from vitrail.vit.models import Model
from vitrail.weights.checkpoint import Run
from vitrail.weights.formats import Imported
from vitrail.weights.load import build, digest, read

BASE = ViTConfig()  # has what recipes have no setting for, where weights say nothing of it
NOT_SHAPE = {"image_size", "dropout", "stochastic_depth", "patch_dropout"}  # which a recipe sets for any weights
DRAWN = ("initial_weights", "zero_residual")  # settings of weights that are drawn


@dataclass(frozen=True)
class Start:
    """What a run begins, or goes on, with.

    `base` has what recipes have no setting for, and weights from elsewhere may want: their epsilon and ResNet.
    Images are normalised by `mean` and `std`, in training and from then on. `imported` are the weights to begin with;
    None for random ones, and for those of a checkpoint.
    """

    resolved: Resolved
    base: ViTConfig = BASE
    mean: Colours = HALF
    std: Colours = HALF
    imported: Imported | None = None

    def __str__(self) -> str:
        """What it begins with, for people; nothing of random weights."""
        if self.imported is None:
            return ""
        before, after = self.imported.config.image_size, self.resolved.recipe.image_size
        size = f"for images of {before} pixels" if before == after else f"resized from {before} pixels to {after}"
        return f"begins with the weights of {self.resolved.weights}, {size}, and a new head"

    def fill(self, model: Model) -> None:
        """Put the weights to begin with, where there are any, into a model of their shape: position embeddings resized
        to its images, and a head of zeros in the place of the whole old one."""
        if self.imported is not None:
            size, classes = model.config.image_size, model.config.num_classes
            begun = build(self.imported, Path(self.resolved.weights or ""), image_size=size, num_classes=classes)
            model.load_state_dict(begun.state_dict())


def begin(resolved: Resolved, path: Path | str | None) -> Start:
    """What a new run begins with: the weights of `path`, what `weights.load.read` reads, or random ones if None.

    Raises:
        BadInput: the weights cannot be read, a setting that was given disagrees with them, or the recipe needs some.
    """
    if path is None and resolved.name == FINE_TUNE:
        raise BadInput(f"the recipe {FINE_TUNE} goes on from weights; say which with --from WEIGHTS (from_weights=…).")
    if resolved.recipe.data == YOURS:
        raise BadInput(f"the recipe {resolved.name} is for images of your own; say which with --data D (data=…).")
    if path is None:
        return Start(resolved)
    if resolved.recipe.architecture != "vit":
        raise BadInput(f"a {resolved.recipe.architecture} begins with random weights here; leave --from out.")
    imported = read(Path(path))
    resolved = replace(resolved, weights=str(path), digest=digest(imported.tensors))
    if resolved.name == FINE_TUNE and resolved.set_by["image_size"] == "recipe":
        resolved = _enlarged(resolved, imported.config)
    return Start(_shaped(resolved, imported.config), imported.config, imported.mean, imported.std, imported)


def _enlarged(resolved: Resolved, config: ViTConfig) -> Resolved:
    """The recipe with images as much larger than the weights' as the paper's are in fine-tuning (384 pixels after 224),
    where its own would be more than that: attention would cost weights for small images hundreds of times as much."""
    size = max(round(config.image_size * 384 / 224 / config.cell), 1) * config.cell
    if size >= resolved.recipe.image_size:
        return resolved
    recipe = replace(resolved.recipe, image_size=size)
    return replace(resolved, recipe=recipe, set_by=resolved.set_by | {"image_size": "weights"})


def go_on(run: Run, resolved: Resolved) -> Start:
    """What a run that is resumed goes on with: the weights that it began with are needed no more.

    Raises:
        BadInput: `model/config.json` is missing or damaged.
    """
    config = run.config()[0] if resolved.weights else None
    return Start(resolved, config, *run.preprocessing()) if isinstance(config, ViTConfig) else Start(resolved)


def _shaped(resolved: Resolved, config: ViTConfig) -> Resolved:
    """The recipe with the shape of the weights. Of the old head nothing stays, a layer before the logits neither.

    Raises:
        BadInput: a setting that was given disagrees with them.
    """
    given = {name for name, who in resolved.set_by.items() if who == "command line"}
    where = resolved.weights
    shape: dict[str, Any] = {
        field.name: getattr(config, field.name)
        for field in fields(ViTConfig)
        if field.name in resolved.set_by and field.name not in NOT_SHAPE
    }
    shape |= {"architecture": "vit", "representation_size": None}
    if config.stem == "patch" and resolved.set_by["stem_rate"] == "recipe":  # of a stem that is not there
        shape["stem_rate"] = Recipe.stem_rate
    for name in sorted(given & shape.keys()):
        if (value := getattr(resolved.recipe, name)) != shape[name]:
            raise BadInput(
                f"{name} is {value}, and with the weights of {where} it is {shape[name]}; {_leave_out(name)}."
            )
    for name in DRAWN:
        if name in given:
            raise BadInput(f"{name} is of weights that are drawn, and the run begins with {where}; {_leave_out(name)}.")
    shape |= {name: getattr(Recipe, name) for name in DRAWN}
    set_by = dict.fromkeys(shape.keys() - given, "weights")
    return replace(resolved, recipe=replace(resolved.recipe, **shape), set_by=resolved.set_by | set_by)


def _leave_out(name: str) -> str:
    return f"leave --{name.replace('_', '-')} out"
