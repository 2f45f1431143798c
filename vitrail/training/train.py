"""A whole training run, from a recipe to its page."""

import math
import time
from contextlib import closing, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from vitrail.data import cache
from vitrail.environment import describe
from vitrail.errors import BadInput
from vitrail.evaluation.evaluate import pick_device
from vitrail.input import memory
from vitrail.input.batches import first_step
from vitrail.process import deterministic, keep_freed_memory, stop_signals
from vitrail.progress import counted, say
from vitrail.recipes import PRETRAINING, Resolved, default_recipe, resolve
from vitrail.settings import Recipe, Tracking
from vitrail.training.optimize import RunningAverage, build_optimizer, warmup_steps
from vitrail.training.parallel import check_shares, shard
from vitrail.training.pretraining import Trainee, decoder_config, with_objective
from vitrail.training.resume import (
    Progress,
    alone,
    begun_by_job,
    check_images,
    compare_launches,
    latest,
    restore,
    take_up,
)  # fmt: skip
from vitrail.training.session import Result, Session
from vitrail.training.trackers import connect
from vitrail.training.transfer import BASE, Start, begin, go_on
from vitrail.vit.additions import initialise_as_torch, zero_residuals
from vitrail.vit.config import ViTConfig
from vitrail.vit.floor import faster_precision
from vitrail.vit.model import VisionTransformer
from vitrail.vit.models import Config, Model, build
from vitrail.vit.resnet import ResNetConfig
from vitrail.weights.checkpoint import Run
from vitrail.weights.files import check_place
from vitrail.world import World, join


def train(
    recipe: str | None = None,
    *,
    output: Path | str | None = None,
    resume: bool = False,
    from_weights: Path | str | None = None,
    stop_after: int | None = None,
    checkpoint_every: float = 60.0,
    track: Tracking | None = None,
    **settings: Any,
) -> Result:
    """Train a Vision Transformer by a recipe, from images to a run folder with its weights, figures and report.

    Args:
        recipe: a name from `vitrail recipes`; `digits` if None, and `fine-tune` with `from_weights`.
        output: the run folder; `runs/RECIPE` if None. One that exists is left alone, and a number put behind the name.
        resume: go on with the run in `output` (the latest in `runs/`, of the recipe if one is named, if None) from its
            last checkpoint. On the same machine it ends with the bits that it would have had.
        from_weights: begin with these weights and a new head: a run folder, or anything else that `vitrail.load`
            reads. They say the shape of the model, and what images are normalised by. A resumed run needs them no more.
        stop_after: stop after this many epochs of the schedule, as if it were the end; `resume` goes on from there.
        checkpoint_every: seconds between two checkpoints. One is also made at the start and at the end.
        track: show the figures to Weights & Biases or MLflow too, whose libraries are extras. A run that is resumed
            with it is the same run there, its earlier epochs included.
        settings: fields of `Recipe` to set otherwise than the recipe does, such as `epochs=10`.

    Raises:
        BadInput: a setting, the data or the run folder will not do.
        Diverged: the loss is no longer finite. The last good checkpoint stays.
        Stopped: SIGINT or SIGTERM came; the state was saved before.
        OSError: the run folder cannot be written.
    """
    began = time.perf_counter()
    if resume and from_weights is not None:
        raise BadInput("a run that is resumed goes on from its own weights; leave --from out, or --resume.")
    if resume:
        run, resolved = take_up(recipe, output, settings)
        start = go_on(run, resolved)
    else:
        run, start = None, begin(resolve(recipe or default_recipe(from_weights is not None), **settings), from_weights)
    check(start, stop_after)
    device = pick_device(settings.get("device", start.resolved.recipe.device))
    with join(device) as world:
        wanted = Path(output) if output is not None else Path("runs") / run_name(start.resolved)
        if run is None and (lost := begun_by_job(wanted, start.resolved, world)) is not None:
            run, resolved = take_up(None, lost, settings)
            start = go_on(run, resolved)
        check_place(wanted)
        tracker, chosen = connect(track) if world.first else None, start.resolved.recipe
        dataset = world.after_first_here(
            lambda: cache.load(
                settings.get("data", chosen.data), chosen.image_size, holdout=chosen.holdout, stream=chosen.stream
            )
        )
        if run is None:
            start = fewer_at_once(start, len(dataset.splits["train"]), world)
        start = settle(start, device, world)
        chosen = start.resolved.recipe
        check_shares(chosen, world)
        if world.first:
            say_warmup(chosen, len(dataset.splits["train"]))
        model = learner(start, len(dataset.classes), device, world)
        optimizer, average = build_optimizer(model, chosen), RunningAverage(model, chosen.ema_decay)
        if new := run is None:  # only now: what is wrong with the input was said before anything was written
            run = create(wanted, start.resolved, world)
        with (
            alone(run) if world.first else nullcontext(),
            closing(dataset),
            deterministic(device),
            stop_signals() as stopped,
        ):
            progress = Progress(images=dataset.digest())
            if not new:
                progress = go_back(run, model, optimizer, average, progress.images, device, world)
            if world.first:
                run.note_launch({"step": progress.step, **describe(device, world)})
            session = Session(
                run, start.resolved, dataset, model, optimizer, average, progress, device, checkpoint_every, began,
                start.mean, start.std, tracker, world,
            )  # fmt: skip
            session.batches.read_ahead(progress.step)  # what is streamed is decoded while the first state is written
            if new and (beginning := str(start)):
                say(beginning)
            session.announce()
            return session.fit(min(chosen.epochs, stop_after or chosen.epochs), stopped)


def run_name(resolved: Resolved) -> str:
    """What the folder of a run is called where nobody says."""
    return f"{resolved.name}-pretrained" if resolved.recipe.self_supervised else resolved.name


def create(wanted: Path, resolved: Resolved, world: World) -> Run:
    """A new run folder, by the first process, which tells the others where it is."""
    if world.first:
        run = Run.create(wanted)
        run.write_recipe(resolved)
    return Run(Path(world.told(str(run.path) if world.first else "")))


def fewer_at_once(start: Start, images: int, world: World) -> Start:
    """The recipe with batches of no more images than there are, so that each epoch has a step at least: more would come
    again in the same batch, which takes the time and memory of many, and teaches what few do. A batch that was asked
    for stays as it is."""
    resolved, recipe = start.resolved, start.resolved.recipe
    unit = math.lcm(world.size * recipe.accumulate * recipe.least_images, recipe.repeats)
    most = images // unit * unit
    if recipe.batch_size <= images or not most or resolved.set_by["batch_size"] == "command line":
        return start
    if world.first:
        say(f"{counted(images, 'image')} are fewer than a batch of {recipe.batch_size}: {most} are taken at a time")
    set_by = resolved.set_by | {"batch_size": "images"}
    return replace(start, resolved=replace(resolved, recipe=replace(recipe, batch_size=most), set_by=set_by))


def settle(start: Start, device: torch.device, world: World) -> Start:
    """The recipe with what hangs on the machine decided. That is kept: a run goes on with it wherever that may be, but
    for how many parts a batch is divided into, which may be more where there is less memory."""
    resolved, recipe = start.resolved, start.resolved.recipe
    if recipe.precision == "auto":
        half = world.told(faster_precision(device) if world.first else "") == "bf16"  # measured, so one says for all
        recipe = replace(recipe, precision="bf16" if half else "fp32")
    if device.type == "cpu" and world.size == 1:
        recipe = memory.fit(recipe, model_config(recipe, 1, start.base))
    decided = [name for name in ("precision", "accumulate") if vars(recipe)[name] != vars(resolved.recipe)[name]]
    set_by = resolved.set_by | dict.fromkeys(decided, "machine")
    return replace(start, resolved=replace(resolved, recipe=recipe, set_by=set_by))


def learner(start: Start, num_classes: int, device: torch.device, world: World) -> Trainee:
    """What is trained, as it begins, on the device; of it, where the processes share the weights, this one's part."""
    built = build_model(start.resolved.recipe, num_classes, start.base)
    start.fill(built)
    model = to_train(built, start.resolved.recipe)
    shard(model, start.resolved.recipe, world)  # before it is on a device that may not hold the whole
    model.to(device)
    if device.type == "cpu":
        keep_freed_memory(not start.resolved.recipe.checkpoint_activations)
    return model


def go_back(
    run: Run, model: Trainee, optimizer: torch.optim.Optimizer, average: RunningAverage, images: str,
    device: torch.device, world: World,
) -> Progress:  # fmt: skip
    """Have all that is trained be as at the run's last checkpoint.

    Raises:
        BadInput: there is none, it is damaged, or the `images` are not those that the run was started with.
    """
    progress = restore(run, model, optimizer, average.weights)
    check_images(run, progress, images)
    now = describe(device, world)
    compare_launches((run.launches() or [now])[-1], now)
    return progress


def check(start: Start, stop_after: int | None) -> None:
    """Say what is wrong with the settings before images are fetched and decoded.

    Raises:
        BadInput: there can be no such model, or no such run.
    """
    recipe = start.resolved.recipe
    if start.imported is not None and recipe.self_supervised:
        raise BadInput("pre-training begins with random weights; leave --from out.")
    if stop_after is not None and not 1 <= stop_after <= recipe.epochs:
        raise BadInput(
            f"stop-after is {stop_after}; it must be from 1 to {recipe.epochs}, the epochs of the run (--epochs)."
        )
    if recipe.stem == "patch" and recipe.stem_rate != Recipe.stem_rate:
        raise BadInput("stem_rate does nothing unless stem is convolutions.")
    model_config(recipe, 1, start.base)
    if recipe.self_supervised:
        decoder_config(recipe)


def pretrain(
    recipe: str | None = None, *, output: Path | str | None = None, resume: bool = False, **settings: Any
) -> Result:
    """Train a Vision Transformer by a recipe, as `train` does, but without labels: by predicting patches that are
    hidden from it. `objective` is "pixels", or "patches" if `settings` says so.

    The run folder, `runs/RECIPE-pretrained` if `output` is None, holds the model with a head of zeros, from which
    `train(from_weights=…)` goes on. All other arguments are those of `train`.

    Raises:
        as `train`.
    """
    if settings.get("objective") == "classes":
        raise BadInput("pre-training has no labels: objective may be pixels or patches. What learns classes is train.")
    if resume:
        output = latest(recipe, pretrained=True) if output is None else output
        if not Run.open(output).recipe().recipe.self_supervised:
            raise BadInput(f"{output} learns classes; go on with it by train, or name a run of pre-training.")
    else:
        settings = PRETRAINING | settings
    return train(recipe, output=output, resume=resume, **settings)


def say_warmup(recipe: Recipe, images: int) -> None:
    """Say so where a warm-up that was given in steps is shortened, as `warmup_steps` does in short runs."""
    steps = first_step(recipe.epochs, images, recipe.batch_size)
    taken = warmup_steps(recipe, steps)
    if taken < round(recipe.warmup):
        whole = counted(steps, "step")
        say(f"the run has {whole}: the warm-up takes a tenth of them, {taken:,} and not {recipe.warmup:g}")


def build_model(recipe: Recipe, num_classes: int, base: ViTConfig = BASE) -> Model:
    """The model that a recipe trains, as it begins where no weights are given."""
    torch.manual_seed(recipe.seed)
    model = build(model_config(recipe, num_classes, base))
    if recipe.initial_weights == "torch":
        initialise_as_torch(model)
    if recipe.zero_residual:
        zero_residuals(model)
    model.checkpoint_activations = recipe.checkpoint_activations
    model.accepts_smaller = recipe.first_size is not None  # epochs of small images are judged by such
    return model


def to_train(model: Model, recipe: Recipe) -> Trainee:
    """The model, compiled if the recipe says so; to be pre-trained, with what its objective needs beside it."""
    trainee: Trainee = model
    if recipe.self_supervised:
        assert isinstance(model, VisionTransformer)  # Recipe sees to it
        trainee = with_objective(model, recipe)
    if recipe.compile:
        trainee.compile(dynamic=False)  # in place: the names of the weights stay
    return trainee


def model_config(recipe: Recipe, num_classes: int, base: ViTConfig = BASE) -> Config:
    """The shape of the model that a recipe trains; what that has no setting for is as `base` has it."""
    if recipe.architecture != "vit":
        return ResNetConfig(recipe.image_size, num_classes, recipe.resnet_width)
    shared = {setting.name for setting in fields(ViTConfig)} & vars(recipe).keys()
    return replace(base, num_classes=num_classes, **{name: getattr(recipe, name) for name in shared})
