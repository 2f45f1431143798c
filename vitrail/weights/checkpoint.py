"""Run folders: each file is written whole or not at all, describes itself, and holds no pickle.

recipe.yaml                  every setting, and who set it        written once
environment.json             versions, hardware, command          one entry each time the run is started or resumed
metrics.jsonl                a line an epoch
results.json                 the figures of the last weights
predictions.safetensors      what those say of each image of the evaluated split; reconstructions of pre-training
model/config.json            shape, class names, preprocessing    enough to use the weights beside it
model/model.safetensors
last/state.safetensors       all that resuming needs
progress.json                how far it is, for who watches       while it trains
report.html                  all of it as a page                  at each checkpoint, and at the end
results.png                  all of it in one picture             at the end
tracked.json                 its id and last step, by tracker     where it is sent to one
"""

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vitrail.errors import BadInput
from vitrail.recipes import Resolved
from vitrail.settings import Recipe
from vitrail.vit import models
from vitrail.vit.config import HALF, Colours, check_colours
from vitrail.vit.models import Config, Model

RENAMED = {"average": "ema_decay", "decay_share": "cooldown"}  # settings of run folders from before the first release


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Have `save` write a file beside `path`, then put it in its place in one step that cannot be interrupted.

    Raises:
        OSError: it could not be written (no space left, say); what stood at `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save(partial)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step."""
    write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_tensors(
    path: Path,
    tensors: dict[str, Tensor],
    about: dict[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write tensors in one step, with `about` as JSON in the header, or with the one key that `metadata` has. The same
    tensors give the same bytes."""
    # One key only: safetensors writes several in no fixed order.
    metadata = {"about": json.dumps(about, sort_keys=True)} if about is not None else metadata

    def save(partial: Path) -> None:
        partial.touch()
        mode = partial.stat().st_mode  # as the umask has it; safetensors gives its files to their owner alone
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial, metadata)
        except SafetensorError as error:  # its way of saying that the disk is full
            raise OSError(f"could not write {path}: {error}") from error
        partial.chmod(mode)

    write(path, save)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, and what was said `about` them.

    Raises:
        BadInput: there is no such file, or it is damaged.
    """
    try:
        # For PyTorch it would open the file a second time, which a running training may have replaced meanwhile.
        with safe_open(path, framework="np") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            names = file.keys()  # of something that is no dict
            return {name: torch.from_numpy(file.get_tensor(name)) for name in names}, about
    except FileNotFoundError:
        raise BadInput(f"{path} is missing.") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read as safetensors, it is damaged or something else: {error}") from None


def read_about(path: Path) -> dict[str, Any]:
    """What was said `about` the tensors of a file, which are not read.

    Raises:
        BadInput: the file is damaged.
    """
    try:
        with safe_open(path, framework="np") as file:
            return json.loads((file.metadata() or {})["about"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise BadInput(f"{path} is damaged: {error}.") from None


@dataclass(frozen=True)
class Run:
    """A run folder. `create` makes one, `open` takes up an existing one."""

    path: Path

    @classmethod
    def create(cls, wanted: Path) -> "Run":
        """A new folder: `wanted`, or, where that exists, `wanted-2`, `wanted-3` and so on."""
        wanted.parent.mkdir(parents=True, exist_ok=True)
        path, number = wanted, 1
        while True:
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                return cls(path)
            number += 1
            path = wanted.with_name(f"{wanted.name}-{number}")

    @classmethod
    def open(cls, path: Path | str) -> "Run":
        """An existing run.

        Raises:
            BadInput: there is no folder of that name, or it is no run folder.
        """
        path = Path(path)
        if path.is_file():
            raise BadInput(f"{path} is a file, not a run folder.")
        if not path.is_dir():
            raise BadInput(f"there is no run folder {path}.")
        if not (path / "recipe.yaml").is_file() and not (path / "model" / "config.json").is_file():
            raise BadInput(f"{path} is no run folder: it has neither a recipe.yaml nor a model/config.json.")
        return cls(path)

    @property
    def trained(self) -> bool:
        """Whether the weights were trained here; if not, they were imported, and there is no recipe."""
        return (self.path / "recipe.yaml").is_file()

    @property
    def ended(self) -> bool:
        """Whether it was trained to its end, or to where it was to stop."""
        return (self.path / "results.json").is_file()

    def write_recipe(self, resolved: Resolved) -> None:
        """Keep every setting, and who set it, and which weights the run began with."""
        settings = {
            name: {"value": value, "set_by": resolved.set_by[name]} for name, value in asdict(resolved.recipe).items()
        }
        content: dict[str, Any] = {"recipe": resolved.name}
        if resolved.weights is not None:
            content["from"] = {"value": resolved.weights, "set_by": "command line", "digest": resolved.digest}
        content["settings"] = settings
        # Not as JSON, though that is nearly YAML: YAML 1.1 takes JSON's 1e-05 for a string.
        write_text(self.path / "recipe.yaml", yaml.safe_dump(content, sort_keys=False, default_flow_style=None))

    def recipe(self) -> Resolved:
        """The recipe of the run.

        Raises:
            BadInput: it is missing, damaged, or of another version of Vitrail.
        """
        path = self.path / "recipe.yaml"
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            settings = {RENAMED.get(name, name): setting for name, setting in content["settings"].items()}
            recipe = Recipe(**{name: setting["value"] for name, setting in settings.items()})
            begun = content.get("from", {"value": None, "digest": ""})
            set_by = {name: setting["set_by"] for name, setting in settings.items()}
            return Resolved(content["recipe"], recipe, set_by, begun["value"], begun["digest"])
        except FileNotFoundError:
            raise BadInput(f"{self.path} has no recipe.yaml: it is no training run.") from None
        except (yaml.YAMLError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise BadInput(f"{path} is damaged or of another version of Vitrail: {error}.") from None

    def known_recipe(self) -> Recipe | None:
        """The settings of the run; None where it has none, or those of another version of Vitrail."""
        with contextlib.suppress(BadInput):
            return self.recipe().recipe if self.trained else None
        return None

    def note_launch(self, entry: dict[str, Any]) -> None:
        """Add to `environment.json` what the run is started, or goes on, with."""
        content = {"launches": [*self.launches(), entry]}
        write_text(self.path / "environment.json", json.dumps(content, indent=2) + "\n")

    def launches(self) -> list[dict[str, Any]]:
        """What the run was started, and gone on, with; nothing for a run that is new.

        Raises:
            BadInput: `environment.json` is damaged.
        """
        path = self.path / "environment.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))["launches"]
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{path} is damaged: {error}.") from None

    def add_metrics(self, metrics: dict[str, float]) -> None:
        """Add a line to `metrics.jsonl`."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(metrics) + "\n")

    def go_back(self, step: int) -> None:
        """Drop what is of work behind a step, which was lost and is done again: lines of `metrics.jsonl`, figures and
        picture of later weights, and files that were being written when the run was killed.

        Raises:
            BadInput: `metrics.jsonl` is damaged.
        """
        later = ("results.json", "results.png", "progress.json", "predictions.safetensors",
                 "reconstructions.safetensors")  # fmt: skip
        for path in [*map(self.path.joinpath, later), *filter(Path.is_file, self.path.rglob(".*"))]:
            path.unlink(missing_ok=True)
        path = self.path / "metrics.jsonl"
        if path.is_file():
            try:
                # The last line may have been cut off; it is of work that is done again, like those after `step`.
                lines = [line for line in path.read_text(encoding="utf-8").splitlines(True) if line.endswith("\n")]
                kept = [line for line in lines if json.loads(line)["step"] <= step]
            except (ValueError, KeyError, TypeError) as error:
                raise BadInput(f"{path} is damaged: {error}.") from None
            write_text(path, "".join(kept))

    def save_model(self, model: Model, classes: tuple[str, ...], mean: Colours = HALF, std: Colours = HALF) -> None:
        """Write the weights to ship, and beside them all that is needed to use them: images are to have `mean`
        subtracted from them, of pixels from 0 to 1, and to be divided by `std`."""
        config = {
            **models.to_json(model.config),
            "classes": list(classes),
            "preprocessing": {"image_size": model.config.image_size, "mean": list(mean), "std": list(std)},
        }
        write_text(self.path / "model" / "config.json", json.dumps(config, indent=2) + "\n")
        write_tensors(self.path / "model" / "model.safetensors", model.state_dict())

    def config(self) -> tuple[Config, tuple[str, ...]]:
        """The model's shape and its class names.

        Raises:
            BadInput: `model/config.json` is missing or damaged.
        """
        return self._read_config()[:2]

    def preprocessing(self) -> tuple[Colours, Colours]:
        """What the model's images are normalised by: the mean that is subtracted from pixels of 0 to 1, and the
        standard deviation that the result is divided by.

        Raises:
            BadInput: `model/config.json` is missing or damaged.
        """
        return self._read_config()[2:]

    def _read_config(self) -> tuple[Config, tuple[str, ...], Colours, Colours]:
        path = self.path / "model" / "config.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            config = models.from_json(content)
            seen = content.get("preprocessing", {})
            colours = check_colours(seen.get("mean", HALF), seen.get("std", HALF))
            return config, tuple(map(str, content["classes"])), *colours
        except FileNotFoundError:
            raise BadInput(f"{self.path} holds no model: {path} is missing.") from None
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadInput(f"{path} is damaged: {error}.") from None

    def load_model(self) -> tuple[Model, tuple[str, ...]]:
        """The model with its weights, and its class names.

        Raises:
            BadInput: a file is missing or damaged, or the weights are not of the shape that the config says.
        """
        config, classes = self.config()
        path = self.path / "model" / "model.safetensors"
        tensors, _ = read_tensors(path)
        with torch.device("meta"):
            model = models.build(config)
        if len(classes) != config.num_classes:
            raise BadInput(f"{self.path}/model/config.json names {len(classes)} classes of {config.num_classes}.")
        check_shapes(model.state_dict(), tensors, path)
        model.load_state_dict(tensors, assign=True)
        return model, classes

    def save_state(self, state: dict[str, Tensor], progress: dict[str, Any]) -> None:
        """Write all that resuming needs: the `state`, whole, and `progress` as JSON."""
        write_tensors(self.path / "last" / "state.safetensors", state, progress)

    def read_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The saved state, and `progress`.

        Raises:
            BadInput: there is no state, or it is damaged.
        """
        path = self.path / "last" / "state.safetensors"
        if not path.is_file():
            raise BadInput(f"{self.path} cannot be resumed: it was ended before its first checkpoint. Train anew.")
        return read_tensors(path)


def check_shapes(expected: dict[str, Tensor], found: dict[str, Tensor], path: Path) -> None:
    """Compare the names and shapes of weights.

    Raises:
        BadInput: some are missing, unexpected or misshapen; the message lists them.
    """
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unexpected" for name in found if name not in expected]
    problems += [
        f"{name} has shape {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise BadInput(f"the weights of {path} are not this model's: {'; '.join(problems[:8])}{more}.")
