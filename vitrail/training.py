"""A whole training run, from a recipe to its page."""

import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from vitrail import cache
from vitrail.additions import initialise_as_torch, zero_residuals
from vitrail.checkpoint import Run
from vitrail.config import ViTConfig
from vitrail.environment import describe
from vitrail.errors import BadInput
from vitrail.evaluate import pick_device
from vitrail.model import VisionTransformer
from vitrail.optimize import RunningAverage, build_optimizer
from vitrail.process import deterministic, keep_freed_memory, stop_signals
from vitrail.recipes import Recipe, resolve
from vitrail.resume import Progress, check_images, compare_launches, take_up
from vitrail.session import Result, Session


def train(
    recipe: str | None = None,
    *,
    output: Path | str | None = None,
    resume: bool = False,
    stop_after: int | None = None,
    checkpoint_every: float = 60.0,
    **settings: Any,
) -> Result:
    """Train a Vision Transformer by a recipe, from images to a run folder with its weights, figures and report.

    Args:
        recipe: a name from `vitrail recipes`; `digits` if None.
        output: the run folder; `runs/RECIPE` if None. One that exists is left alone, and a number put behind the name.
        resume: go on with the run in `output` (the latest in `runs/`, of the recipe if one is named, if None) from its
            last checkpoint. On the same machine it ends with the bits that it would have had.
        stop_after: stop after this many epochs of the schedule, as if it were the end; `resume` goes on from there.
        checkpoint_every: seconds between two checkpoints. One is also made at the start and at the end.
        settings: fields of `Recipe` to set otherwise than the recipe does, such as `epochs=10`.

    Raises:
        BadInput: a setting, the data or the run folder will not do.
        Diverged: the loss is no longer finite. The last good checkpoint stays.
        Stopped: SIGINT or SIGTERM came; the state was saved before.
        OSError: the run folder cannot be written.
    """
    began = time.perf_counter()
    run, resolved = take_up(recipe, output, settings) if resume else (None, resolve(recipe or "digits", **settings))
    chosen = resolved.recipe
    if stop_after is not None and not 1 <= stop_after <= chosen.epochs:
        raise BadInput(
            f"stop-after is {stop_after}; it must be from 1 to {chosen.epochs}, the epochs of the run (--epochs)."
        )
    device = pick_device(settings.get("device", chosen.device))
    model_config(chosen, num_classes=1)  # what is wrong with it is said before images are fetched and decoded
    dataset = cache.load(settings.get("data", chosen.data), chosen.image_size, holdout=chosen.holdout)
    model = build_model(chosen, len(dataset.classes), device)
    optimizer, average = build_optimizer(model, chosen), RunningAverage(model, chosen.average)
    progress = Progress(images=dataset.digest())
    launch = describe(device)
    if run is None:  # only now: what is wrong with the input was said before anything was written
        run = Run.create(Path(output) if output is not None else Path("runs") / resolved.name)
        run.write_recipe(resolved)
    else:
        check_images(run, then := Progress(**run.load_state(model, optimizer, average.weights)), progress.images)
        compare_launches((run.launches() or [launch])[-1], launch)
        progress = then
    run.note_launch({"step": progress.step, **launch})
    if device.type == "cpu":
        keep_freed_memory()
    session = Session(run, resolved, dataset, model, optimizer, average, progress, device, checkpoint_every, began)
    session.announce()
    with deterministic(device), stop_signals() as stopped:
        return session.fit(min(chosen.epochs, stop_after or chosen.epochs), stopped)


def build_model(recipe: Recipe, num_classes: int, device: torch.device) -> VisionTransformer:
    """The model that a recipe trains, as it begins, on its device."""
    torch.manual_seed(recipe.seed)
    model = VisionTransformer(model_config(recipe, num_classes))
    if recipe.initial_weights == "torch":
        initialise_as_torch(model)
    if recipe.zero_residual:
        zero_residuals(model)
    model.checkpoint_activations = recipe.checkpoint_activations
    if recipe.compile:
        model.compile(dynamic=False)  # in place: the names of the weights stay
    return model.to(device)


def model_config(recipe: Recipe, num_classes: int) -> ViTConfig:
    """The shape of the model that a recipe trains."""
    shared = {setting.name for setting in fields(ViTConfig)} & vars(recipe).keys()
    return ViTConfig(num_classes=num_classes, **{name: getattr(recipe, name) for name in shared})
