"""What a run folder says, of a run that still goes on too; and logs of runs from elsewhere."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from vitrail.errors import BadInput
from vitrail.settings import Recipe
from vitrail.weights.checkpoint import Run

LAUNCH: dict[str, Any] = dict.fromkeys((
    "started", "command", "commit", "step", "vitrail", "python", "torch", "numpy", "pillow", "platform", "cpu",
    "cores", "threads", "device", "gpu",
))  # fmt: skip


@dataclass(frozen=True)
class Record:
    """What a run folder says. `results` and `predictions` are None while the run goes on."""

    name: str  # of the recipe; of the folder, where the weights were not trained here
    settings: dict[str, dict[str, Any]]  # with who set them
    recipe: Recipe | None  # None where the weights were not trained here
    launches: list[dict[str, Any]]
    epochs: list[dict[str, Any]]
    results: dict[str, Any] | None
    predictions: dict[str, NDArray[Any]] | None
    classes: tuple[str, ...] | None
    reconstructions: dict[str, NDArray[Any]] | None = None  # of pre-training, which has no predictions
    path: Path | None = None  # the folder; None of a log

    @property
    def dataset(self) -> str:
        """The name of the data set, as far as it is known."""
        if self.results:
            return str(self.results["dataset"])
        return Path(str(self.settings.get("data", {}).get("value", ""))).name

    @property
    def objective(self) -> str:
        """What it learns."""
        return self.recipe.objective if self.recipe else "classes"


def read(run: Path) -> Record:
    """The files of a run folder, those of a run that still goes on included.

    Raises:
        BadInput: it is no run folder, or a file in it is damaged.
    """
    opened = Run.open(run)
    resolved = opened.recipe() if opened.trained else None
    recipe = _parsed(run / "recipe.yaml", yaml.safe_load) or {"recipe": run.resolve().name, "settings": {}}
    begun_with = {"from": recipe["from"]} if "from" in recipe else {}  # weights, shown like a setting
    config = _parsed(run / "model" / "config.json", json.loads)
    results = _parsed(run / "results.json", json.loads)
    predictions, reconstructions = (
        _arrays(path) if results and path.is_file() else None
        for path in (run / "predictions.safetensors", run / "reconstructions.safetensors")
    )
    return Record(
        recipe["recipe"], begun_with | recipe["settings"], resolved.recipe if resolved else None,
        [LAUNCH | launch for launch in (_parsed(run / "environment.json", json.loads) or {}).get("launches", [])],
        _epochs(run / "metrics.jsonl"), results, predictions, tuple(config["classes"]) if config else None,
        reconstructions, run,
    )  # fmt: skip


def _parsed(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (ValueError, yaml.YAMLError) as error:
        raise BadInput(f"{path} is damaged: {error}") from None


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise BadInput(f"{path} is damaged: {error}") from None


def _epochs(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, one for each epoch; a last line that is still being written is left for later."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    try:
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return list({row["epoch"]: row for row in rows}.values())
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is damaged: {error}.") from None


def read_log(path: Path) -> Record:
    """A log such as `results/original-vit-12.json`: JSON whose lists `val_accuracy`, `train_loss` and `val_loss` have a
    value for each epoch.

    Raises:
        BadInput: it is none.
    """
    try:
        log = json.loads(path.read_text(encoding="utf-8"))
        curves = {key: [float(value) for value in log[key]] for key in ("val_accuracy", "train_loss", "val_loss")}
        epochs = [
            {"epoch": place + 1, "val_top1": top1, "train_loss": train_loss, "val_loss": val_loss}
            for place, (top1, train_loss, val_loss) in enumerate(zip(*curves.values(), strict=True))
        ]
    except (ValueError, KeyError, TypeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise BadInput(
            f"{path} is neither a run folder nor a log like results/original-vit-12.json, "
            f"with lists val_accuracy, train_loss and val_loss of the same length: {what}."
        ) from None
    if not epochs:
        raise BadInput(f"{path} is a log of no epoch.")
    return Record(str(log.get("experiment", path.stem)), {}, None, [], epochs, None, None, None)
