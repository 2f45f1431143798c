"""Weights that tell classes apart, a run's or others, and the images that they are judged by."""

import re
from dataclasses import dataclass
from pathlib import Path

from vitrail.data import cache
from vitrail.data.cache import Split
from vitrail.data.hub import PREFIX
from vitrail.data.images import is_there
from vitrail.errors import BadInput
from vitrail.progress import counted, say
from vitrail.recipes import Resolved
from vitrail.settings import Recipe
from vitrail.vit.config import Colours
from vitrail.vit.models import Model
from vitrail.weights.checkpoint import Run
from vitrail.weights.files import read_about
from vitrail.weights.load import build, is_run, read, with_head


@dataclass(frozen=True)
class Classifier:
    """A model that has learnt classes, and how images are made ready for it: brought to `shorter_side` as `to_pixels`
    has it, cut to the model's square, and normalised by `mean` and `std`. `run` is its folder, and `resolved` the
    recipe that it was trained by; None of weights from elsewhere."""

    model: Model
    classes: tuple[str, ...]
    mean: Colours
    std: Colours
    shorter_side: int | None
    run: Run | None
    resolved: Resolved | None

    @property
    def image_size(self) -> int:
        """Side of the square that it sees, in pixels."""
        return self.model.config.image_size

    def say_if_unfinished(self) -> None:
        """Say so of a run that is not at its end."""
        if self.run is not None:
            say_if_unfinished(self.run, self.resolved)


def open_classifier(source: Path) -> Classifier:
    """The model of a run folder, or of anything else that `vitrail import` takes.

    Raises:
        BadInput: it cannot be read, or has learnt no classes: it was pre-trained, or comes without a head.
    """
    if is_run(source):
        run = Run.open(source)
        resolved = run.recipe() if run.trained else None
        if resolved is not None and resolved.recipe.self_supervised:
            raise BadInput(
                f"{source} was pre-trained, and has learnt no classes. Train it on: vitrail train {resolved.name} "
                f"--from {source}; or measure what it sees: vitrail probe {source}."
            )
        model, classes = run.load_model()
        return Classifier(model, classes, *run.preprocessing(), run.shorter_side(), run, resolved)
    found = with_head(read(source), source)
    return Classifier(build(found, source), found.classes, found.mean, found.std, found.shorter_side, None, None)


def so_far(run: Run, resolved: Resolved | None) -> tuple[int, int] | None:
    """How many epochs of how many a run that is not at its end has done; None of one that is, or that was not trained
    here."""
    path, planned = run.path / "metrics.jsonl", resolved.recipe.epochs if resolved else 0
    lines = path.read_text(encoding="utf-8") if path.is_file() else ""
    done = max(map(int, re.findall(r'^\{"epoch": (\d+),', lines, re.MULTILINE)), default=0)
    if done >= planned and (resolved is None or run.ended):
        return None
    return done, planned


def say_if_unfinished(run: Run, resolved: Resolved | None) -> tuple[int, int] | None:
    """Say what has to be known of a run that is not at its end; returns what `so_far` does."""
    if epochs := so_far(run, resolved):
        done = f"{epochs[0]} of its {counted(epochs[1], 'epoch')}"
        say(f"{run.path} is not finished: it has done {done}, and these weights are those of its last checkpoint")
    return epochs


def own_images(run: Run, recipe: Recipe | None = None) -> str:
    """The data set that a run was trained on. `recipe` is its, where that has been read already.

    Raises:
        BadInput: it is not where it was, or the run was not trained here.
    """
    if not run.trained:
        raise BadInput(_none_of_its_own(run.path))
    data = (recipe or run.recipe().recipe).data
    if is_there(data):
        return data
    why = "which is no longer there"
    if not Path(data.removeprefix(PREFIX)).expanduser().is_absolute():
        why = "a path from the folder in which that was started; there is no such thing in this one"
    raise BadInput(f"{run.path} was trained on {data}, {why}. Say with --data D where the images are now.")


def _none_of_its_own(source: Path) -> str:
    return f"{source} was not trained here, and has no images of its own. Say with --data D which to take."


def judged_images(
    source: Path, data: str | None, image_size: int, classes: tuple[str, ...], *, shorter_side: int | None = None,
    others: bool = False, recipe: Recipe | None = None,
) -> tuple[str, str, Split]:  # fmt: skip
    """The split that a run was judged by, or that it, or other weights, are to be judged by now, of `data`: the name of
    the data set and of the split, and the images, as `evaluate_run` takes them. `recipe` is the run's, where that has
    been read already; `data` is brought to `shorter_side`.

    Raises:
        BadInput: the data cannot be used, or has classes that the model does not know; with `others`, `data` may have.
    """
    if not is_run(source):
        if data is None:
            raise BadInput(_none_of_its_own(source))
        return cache.load_for_evaluation(data, image_size, classes, shorter_side=shorter_side, others=others)
    run = Run.open(source)
    recipe = recipe or (run.recipe().recipe if run.trained else None)
    holdout, stream = (recipe.holdout, recipe.stream) if recipe else (0.0, False)
    if data is not None:
        state = run.path / "last" / "state.safetensors"
        own = read_about(state)["images"] if state.is_file() else ""
        return cache.load_for_evaluation(
            data, image_size, classes, shorter_side=shorter_side, own=own, holdout=holdout, others=others, stream=stream
        )
    dataset = cache.load(own_images(run, recipe), image_size, holdout=holdout, stream=stream)
    if dataset.classes != classes:
        were = counted(len(classes), "class", "classes")
        raise BadInput(f"{dataset.name} no longer has the {were} that {run.path} was trained on.")
    return dataset.name, dataset.evaluation, dataset.splits[dataset.evaluation]
