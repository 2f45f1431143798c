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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from vitrail.errors import BadInput
from vitrail.recipes import Resolved
from vitrail.settings import RENAMED, Recipe, without_gone
from vitrail.vit import models
from vitrail.vit.config import HALF, Colours, ViTConfig, check_colours, shorten
from vitrail.vit.models import Config, Model
from vitrail.weights.files import (
    check_weights,
    compare_shapes,
    make_folder,
    reachable,
    read_json,
    read_shapes,
    read_tensors,
    shapes_of,
    write_tensors,
    write_text,
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run folder. `create` makes one, `open` takes up an existing one."""

    path: Path

    @classmethod
    def create(cls, wanted: Path) -> "Run":
        """A new folder: `wanted`, or, where that exists, `wanted-2`, `wanted-3` and so on.

        Raises:
            BadInput: it would lie below a file.
        """
        make_folder(wanted.parent)
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
        with reachable(path):
            if path.is_file():
                raise BadInput(f"{path} is a file, not a run folder.")
            if not path.is_dir():
                raise BadInput(f"there is no run folder {path}.")
            if not (path / "recipe.yaml").is_file() and not (path / "model" / "config.json").is_file():
                mend = ""
                if (path / "config.json").is_file():
                    mend = f" vitrail import {path} --output runs/{path.resolve().name} makes one of its weights."
                raise BadInput(f"{path} is no run folder: it has neither a recipe.yaml nor a model/config.json.{mend}")
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
            values = without_gone({name: setting["value"] for name, setting in settings.items()}, vars(Recipe()))
            recipe = Recipe(**values)
            begun = content.get("from", {"value": None, "digest": ""})
            set_by = {name: settings[name]["set_by"] for name in values}
            return Resolved(content["recipe"], recipe, set_by, begun["value"], begun["digest"])
        except FileNotFoundError:
            raise BadInput(f"{self.path} has no recipe.yaml: it is no training run.") from None
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from None
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
        except (ValueError, KeyError, TypeError, RecursionError) as error:
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

    def save_model(
        self, model: Model, classes: tuple[str, ...], mean: Colours = HALF, std: Colours = HALF,
        shorter_side: int | None = None,
    ) -> None:  # fmt: skip
        """Write the weights to ship, and beside them all that is needed to use them: images are to have `mean`
        subtracted from them, of pixels from 0 to 1, and to be divided by `std`; `shorter_side` is what that of each
        image had been resized to, where it is known."""
        seen = {"image_size": model.config.image_size, "mean": list(mean), "std": list(std)}
        config = {
            **models.to_json(model.config),
            "classes": list(classes),
            "preprocessing": seen if shorter_side is None else {**seen, "shorter_side": shorter_side},
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
        return self._read_config()[2:4]

    def shorter_side(self) -> int | None:
        """What the shorter side of the images that it learnt from had been resized to, in pixels; None where that is
        not known, or they were not all the same.

        Raises:
            BadInput: `model/config.json` is missing or damaged.
        """
        return self._read_config()[4]

    def _read_config(self) -> tuple[Config, tuple[str, ...], Colours, Colours, int | None]:
        path = self.path / "model" / "config.json"
        if not path.is_file():
            raise BadInput(f"{self.path} holds no model: {path} is missing.")
        try:
            content = read_json(path)
            config = models.from_json(content)
            seen = content.get("preprocessing", {})
            colours = check_colours(seen.get("mean", HALF), seen.get("std", HALF))
            side = seen.get("shorter_side")
            size = config.image_size
            if side is not None and (not isinstance(side, int) or not size <= side <= 10 * size):
                raise BadInput(
                    f"shorter_side is {shorten(side)}; it must be a whole number from {size} to {10 * size}."
                )
            return config, tuple(map(str, content["classes"])), *colours, side
        except BadInput as error:
            raise (error if str(path) in str(error) else BadInput(f"{path}: {error}")) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{path} is damaged: {error}.") from None

    def load_model(self) -> tuple[Model, tuple[str, ...]]:
        """The model with its weights, and its class names.

        Raises:
            BadInput: a file is missing or damaged, or the weights are not of the shape that the config says.
        """
        config, classes = self.config()
        path = self.path / "model" / "model.safetensors"
        shapes = read_shapes(path)
        layers = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
        if isinstance(config, ViTConfig) and layers != config.num_layers:  # before a thousand of them are built
            says = self.path / "model" / "config.json"
            raise BadInput(f"{says} says num_layers = {config.num_layers}, and {path} has {layers}.")
        with torch.device("meta"):
            model = models.build(config)
        if len(classes) != config.num_classes:
            raise BadInput(f"{self.path}/model/config.json names {len(classes)} classes of {config.num_classes}.")
        # Before values are read: what has no place may be of any size.
        compare_shapes(shapes_of(model.state_dict()), shapes, path)
        tensors, _ = read_tensors(path)
        check_weights(model.state_dict(), tensors, path)
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
