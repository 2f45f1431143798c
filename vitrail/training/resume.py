"""Going on with a run: which one, from where, and whether it is still the same run."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.errors import BadInput
from vitrail.progress import say
from vitrail.recipes import Resolved, resolve
from vitrail.training.parallel import like
from vitrail.weights.checkpoint import Run
from vitrail.weights.files import check_shapes
from vitrail.world import World, job

# Settings that may be others from one stretch to the next: where the images and the processors are, and how these share
# the work, which changes how sums are rounded and what parts of a batch BatchNorm normalises by. Nothing else may.
MAY_CHANGE = {"data", "device", "parallel", "stream", "accumulate", "checkpoint_activations"}


@dataclass
class Progress:
    """How far a run is: with the weights and the optimizer's state, all that resuming needs."""

    images: str  # a digest of what it trains on and is judged by, as `Dataset.digest` gives it
    step: int = 0  # steps done
    train_seconds: float = 0.0  # spent in steps, input included; evaluation and saving left out
    input_seconds: float = 0.0  # of these, spent on making batches
    loss: float = 0.0  # sum over this epoch's steps
    correct: int = 0  # images of this epoch
    counted: int = 0  # steps of this epoch
    epoch_seconds: float = 0.0  # of `train_seconds`, those of this epoch
    parts: int = 1  # that each batch is worked through in since memory ran out
    peak_memory: int = 0  # bytes, the most of any stretch
    wall_seconds: float = 0.0  # of all stretches up to their last checkpoint: images, evaluation and saving included

    def spend(self, seconds: float) -> None:
        """Count seconds that steps took."""
        self.train_seconds += seconds
        self.epoch_seconds += seconds

    def begin_epoch(self) -> None:
        """Start the count of another epoch."""
        self.loss, self.correct, self.counted, self.epoch_seconds = 0.0, 0, 0, 0.0

    def as_dict(self) -> dict[str, Any]:
        """As it is kept in the checkpoint."""
        return asdict(self)


def take_up(name: str | None, output: Path | str | None, settings: dict[str, Any]) -> tuple[Run, Resolved]:
    """The run to resume, and its own settings.

    Args:
        name: the recipe that the run must be of; any if None.
        output: the run folder; if None, the `latest`.
        settings: what is set now, which must agree with the run.

    Raises:
        BadInput: there is no such run, or a setting now given is another than the run's.
    """
    if name is not None:
        resolve(name)  # a mistyped name is answered with the nearest, not with an absence of runs
    if output is None:
        output = latest(name, pretrained=settings.get("objective", "classes") != "classes")
    run = Run.open(output)
    resolved = run.recipe()
    if name is not None and resolved.name != name:
        raise BadInput(f"{run.path} is a run of {resolved.name}, not of {name}.")
    for setting, value in settings.items():
        was = getattr(resolved.recipe, setting, None)
        if resolved.set_by.get(setting) == "machine" and value == "auto":
            continue
        if setting not in MAY_CHANGE and was != value:
            raise BadInput(
                f"{run.path} was started with {setting} = {was}, and a resumed run keeps its settings; "
                f"leave --{setting.replace('_', '-')} out, or train anew."
            )
    now = {name: settings[name] for name in MAY_CHANGE & settings.keys() if name not in ("data", "device")}
    return run, replace(resolved, recipe=replace(resolved.recipe, **now))


def latest(name: str | None, *, pretrained: bool) -> Path:
    """The folder in `runs/` with the latest checkpoint among those without results, or among all of them; of the recipe
    of that name, if it is not None, and only of runs that learn labels, or only of runs without (`pretrained`).

    Raises:
        BadInput: there is none.
    """
    states = sorted(Path("runs").glob("*/last/state.safetensors"), key=lambda state: state.stat().st_mtime)
    runs = []
    for run in (Run(state.parent.parent) for state in states):
        with contextlib.suppress(BadInput):  # damaged, or of another version: named, it says so
            of = run.recipe()
            if name in (None, of.name) and pretrained == of.recipe.self_supervised and not in_use(run):
                runs.append(run.path)
    if not runs:
        what = f"{'pre-training ' if pretrained else ''}run{f' of {name}' if name else ''}"
        raise BadInput(f"there is no {what} in runs/; say which with --output RUN.")
    return next((path for path in reversed(runs) if not Run(path).ended), runs[-1])


def begun_by_job(wanted: Path, resolved: Resolved, world: World) -> Path | None:
    """The run with these settings that this job of torchrun has begun in `wanted`, or with a number behind that name,
    and not ended: torchrun starts the processes of a job again where one of them was lost, and a batch system the whole
    job."""
    found = ""
    if world.first and (name := job()) is not None:
        states = sorted(
            wanted.parent.glob(f"{wanted.name}*/last/state.safetensors"), key=lambda state: state.stat().st_mtime
        )
        runs = [run for run in (Run(state.parent.parent) for state in states) if not run.ended]
        of_job = [run for run in runs if (run.launches() or [{}])[-1].get("job") == name]
        found = next((str(run.path) for run in reversed(of_job) if same(run, resolved)), "")
    found = world.told(found)
    return Path(found) if found else None


def same(run: Run, resolved: Resolved) -> bool:
    """Whether a run was begun with these settings, whatever the machine and the images decided of them."""
    then = run.recipe()
    asked = {name for name, who in resolved.set_by.items() if who == "command line"}
    settings = {name for name, who in then.set_by.items() if who != "machine" and (who != "images" or name in asked)}
    return (then.name, then.weights) == (resolved.name, resolved.weights) and all(
        getattr(then.recipe, name) == getattr(resolved.recipe, name) for name in settings
    )


@contextlib.contextmanager
def alone(run: Run, *, only_asked: bool = False) -> Iterator[None]:
    """The block has the run folder to itself: no other process trains in it. Several may ask at once.

    Raises:
        BadInput: one does.
    """
    folder = os.open(run.path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            try:
                fcntl.flock(folder, (fcntl.LOCK_SH if only_asked else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BadInput(f"{run.path} is being trained by another process; vitrail watch shows it.") from None
        yield
    finally:
        os.close(folder)


def in_use(run: Run) -> bool:
    """Whether some process trains in the run folder."""
    try:
        with alone(run, only_asked=True):
            return False
    except BadInput:
        return True


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is saved of what is trained: the weights, the optimizer's state, and the running average of the weights by
    their names (empty if there is none)."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"average.{name}": tensor for name, tensor in average.items()}
    for name, weight in model.named_parameters():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[weight].items()}
    return tensors


def restore(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor]) -> Progress:
    """Put the saved state of a run into a model, its optimizer and the average of its weights.

    Raises:
        BadInput: there is no state, it is damaged, or it is of a model of another shape, or another optimizer.
    """
    tensors, progress = run.read_state()
    of_muon = {weight for group in optimizer.param_groups if "parts" in group for weight in group["params"]}
    for prefix, own in (("model.", model.state_dict()), ("average.", average)):
        found = {name.removeprefix(prefix): saved for name, saved in tensors.items() if name.startswith(prefix)}
        check_shapes(own, found, run.path / "last" / "state.safetensors")
        for name, tensor in own.items():
            tensor.copy_(like(found[name], tensor))
    for name, weight in model.named_parameters():
        prefix = f"optimizer.{name}."
        if weight in of_muon and f"{prefix}exp_avg" in tensors:
            raise BadInput(f"{run.path} was begun by a version of Vitrail that had AdamW for {name}; train anew.")
        for key, value in tensors.items():
            if key.startswith(prefix):
                # Adam counts its steps in a tensor without dimensions, which fused kernels want on the device too.
                part = like(value, weight) if value.shape == weight.shape else value.to(weight.device)
                optimizer.state[weight][key.removeprefix(prefix)] = part
    return Progress(**progress)


def check_images(run: Run, then: Progress, now: str) -> None:
    """Compare the images that a run was started with to those that are there.

    Raises:
        BadInput: they are not the same, so that the run would end as neither had.
    """
    if then.images != now:
        raise BadInput(
            f"the images are not those that {run.path} was started with: some were added, removed, renamed or given "
            f"another class. Restore them, say with --data where they are, or train anew."
        )


def compare_launches(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Say what has changed since a run's last stretch, if it may change the last bits of sums."""
    for what in ("cpu", "gpu", "threads", "processes", "torch", "vitrail", "compiler"):
        if before.get(what, now.get(what)) != now.get(what):  # what older versions did not note is no change
            say(
                f"{what} is {now.get(what)}, and was {before.get(what)}: "
                f"the run goes on, but may not end with the bits that it would have had."
            )
