"""Weights & Biases and MLflow, by one interface. What is sent to them, and when, is in `track.py`."""

import contextlib
import importlib.util
import io
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from vitrail.errors import BadInput, nearest
from vitrail.progress import say
from vitrail.settings import Tracking

Status = Literal["FINISHED", "KILLED", "FAILED"]  # as MLflow calls them


@runtime_checkable  # types of arguments are checked in tests
class Tracker(Protocol):
    """A service that keeps figures of runs. Where it does not answer, its methods raise whatever its library does."""

    name: Tracking

    def connect(self) -> None:
        """See to it that it answers, and knows the user."""

    def begin(self, run: Path, settings: dict[str, Any], known: str | None) -> str:
        """Begin a run there with these settings, or go on with that of the id `known`; its id."""

    def scalars(self, metrics: dict[str, float], step: int) -> None:
        """Figures of the weights behind a step."""

    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """A picture (height, width, 3) of the same; it comes before the figures of its step."""

    def results(self, results: dict[str, Any], step: int) -> None:
        """Of the last weights, what `results.json` has: numbers and words."""

    def close(self, status: Status) -> None:
        """End this stretch."""


class Wandb:
    """Weights & Biases. `WANDB_MODE=offline` keeps all of it in the run folder, for `wandb sync`; `WANDB_PROJECT` says
    in which project, `vitrail` if it does not."""

    name: Tracking = "wandb"

    def __init__(self) -> None:
        import wandb

        self.api = wandb

    def connect(self) -> None:
        """See to it that it knows the user; on a terminal it asks."""
        if self.api.setup().settings.mode == "online":
            self.api.login()

    def begin(self, run: Path, settings: dict[str, Any], known: str | None) -> str:
        """Begin, or go on. A run of its own, also where a notebook has one open."""
        self.run = self.api.init(
            project=os.environ.get("WANDB_PROJECT", "vitrail"), name=run.resolve().name, dir=str(run), id=known,
            resume="allow" if known else None, reinit="create_new", config=settings,
            settings=self.api.Settings(console="off"),
        )  # fmt: skip
        return str(self.run.id)

    def scalars(self, metrics: dict[str, float], step: int) -> None:
        """Committed at once: else they would wait for the next step's, and be lost if the run is killed before."""
        self.run.log(metrics, step=step, commit=True)

    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Committed with the figures of its step."""
        self.run.log({name: self.api.Image(pixels)}, step=step, commit=False)

    def results(self, results: dict[str, Any], step: int) -> None:
        """Into the summary."""
        self.run.summary.update({f"results/{name}": value for name, value in results.items()})

    def close(self, status: Status) -> None:
        """Wait until all of it is sent."""
        self.run.finish(exit_code=0 if status == "FINISHED" else 1)


@contextlib.contextmanager
def _impatient() -> Iterator[None]:
    """MLflow gives up soon. By itself it tries for four minutes, in which nothing is trained; that can be set in the
    environment alone, which is the caller's, and so is put back."""
    ours = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    ours = {name: value for name, value in ours.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


class Mlflow:
    """MLflow. `MLFLOW_TRACKING_URI` says where it is (a file, `mlflow.db`, if it does not) and `MLFLOW_EXPERIMENT_NAME`
    in which experiment, `vitrail` if it does not."""

    name: Tracking = "mlflow"

    def __init__(self) -> None:
        import mlflow

        self.api = mlflow

    @_impatient()
    def connect(self) -> None:
        """Find the experiment, or make it."""
        self.client = self.api.MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "vitrail")
        found = self.client.get_experiment_by_name(name)
        self.experiment = found.experiment_id if found else self.client.create_experiment(name)

    @_impatient()
    def begin(self, run: Path, settings: dict[str, Any], known: str | None) -> str:
        """Begin, or go on, unless that run is another server's or was deleted, and say where."""
        there = self._find(known) if known else None
        if there is not None:
            self.client.update_run(there.run_id, status="RUNNING")
        else:
            there = self.client.create_run(self.experiment, run_name=run.resolve().name).info
            of = [self.api.entities.Param(name, str(value)) for name, value in settings.items()]
            self.client.log_batch(there.run_id, params=of)
        where = self.client.tracking_uri
        page = f"/#/experiments/{there.experiment_id}/runs/{there.run_id}" if where.startswith("http") else ""
        say(f"mlflow: {where.rstrip('/')}{page}")
        self.id: str = there.run_id
        return self.id

    def _find(self, known: str) -> Any:
        try:
            there = self.client.get_run(known).info
        except self.api.MlflowException as error:
            if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return there if there.lifecycle_stage == "active" else None

    @_impatient()
    def scalars(self, metrics: dict[str, float], step: int) -> None:
        """All with one request."""
        now, metric = int(time.time() * 1000), self.api.entities.Metric
        self.client.log_batch(self.id, [metric(name, float(value), now, step) for name, value in metrics.items()])

    @_impatient()
    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """As one of a row that its page lets one step through."""
        self.client.log_image(self.id, pixels, key=name, step=step)

    @_impatient()
    def results(self, results: dict[str, Any], step: int) -> None:
        """Numbers as metrics, words as tags."""
        told = {f"results/{name}": value for name, value in results.items()}
        words = {name: value for name, value in told.items() if isinstance(value, str)}
        self.scalars({name: told[name] for name in told if name not in words}, step)
        for name, value in words.items():
            self.client.set_tag(self.id, name, value)

    @_impatient()
    def close(self, status: Status) -> None:
        """Say how it ended."""
        with contextlib.redirect_stdout(io.StringIO()):  # it says there where the run is to be seen, as `begin` did
            self.client.set_terminated(self.id, status)


def connect(name: str | None) -> Tracker | None:
    """The tracker of that name, ready to take a run; None for None.

    Raises:
        BadInput: there is none of that name, its library is not installed, or it does not answer.
    """
    if name is None:
        return None
    if name not in get_args(Tracking):
        near = nearest(name, get_args(Tracking))
        raise BadInput(f"track is {name!r}; it must be one of {', '.join(get_args(Tracking))}{near}")
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:  # a folder of that name, as wandb makes one where it runs, is no library
        raise BadInput(
            f"{name} is not installed: pip install 'vitrail[{name}]', or, in a checkout, pip install -e '.[{name}]'."
        )
    tracker: Tracker = Wandb() if name == "wandb" else Mlflow()
    with answering(tracker):
        tracker.connect()
    return tracker


@contextlib.contextmanager
def answering(tracker: Tracker) -> Iterator[None]:
    """The block is of what must work at the start.

    Raises:
        BadInput: it does not.
    """
    try:
        yield
    except Exception as error:  # there is no knowing what a library raises
        mend = {
            "wandb": "`wandb login` says who you are; WANDB_MODE=offline keeps all in the run folder.",
            "mlflow": "MLFLOW_TRACKING_URI says where its server is.",
        }
        raise BadInput(f"{tracker.name} does not take the run: {first_line(error)}. {mend[tracker.name]}") from None


def first_line(error: Exception) -> str:
    """What went wrong, without what a library has to say beyond that."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(". ")
