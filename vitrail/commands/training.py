"""The commands around one run: train, pretrain, evaluate, predict, report."""

import argparse
import contextlib
import dataclasses
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from vitrail.commands.arguments import (
    Parser,
    add_data,
    add_json,
    add_run,
    add_setting,
    add_weights,
    at_least_one,
    one_of,
    real,
    shown,
)
from vitrail.commands.tables import as_json, table
from vitrail.errors import BadInput, Partial
from vitrail.recipes import DEFAULT, FINE_TUNE, PRETRAINING, RECIPES, Resolved, default_recipe, resolve
from vitrail.settings import OF_WEIGHTS, Recipe, Tracking

if TYPE_CHECKING:
    from vitrail.data.cache import Dataset

HEADINGS = {
    "data": "images", "architecture": "model", "epochs": "optimisation", "objective": "pre-training",
    "seed": "where and how",
}  # fmt: skip
WORST = 20  # classes that evaluate shows


def take_train(parser: Parser, argv: Sequence[str]) -> None:
    """Weights to begin with, and the flags of a run."""
    parser.usage = "vitrail train [RECIPE] [--from WEIGHTS] [--output RUN] [--resume] [SETTING ...]"
    weights = "begin with these and a new head: a run folder, or anything that vitrail import takes"
    parser.add_argument(
        "--from", dest="from_weights", type=Path, metavar="WEIGHTS", default=argparse.SUPPRESS, help=weights
    )
    default = default_recipe(any(word.partition("=")[0] == "--from" for word in argv))
    take_run(parser, argv, default, f"{DEFAULT}; with --from, {FINE_TUNE}", "runs/RECIPE", {})


def take_pretrain(parser: Parser, argv: Sequence[str]) -> None:
    """The flags of a run."""
    parser.usage = "vitrail pretrain [RECIPE] [--objective patches] [--output RUN] [--resume] [SETTING ...]"
    take_run(parser, argv, DEFAULT, DEFAULT, "runs/RECIPE-pretrained", PRETRAINING)


def take_run(
    parser: Parser, argv: Sequence[str], default: str, said: str, output: str, settings: dict[str, Any]
) -> None:
    """One flag for each field of Recipe; the help shows the values of the recipe that is named, or of the default, with
    these settings. Which recipe and which run folder are the defaults is said in the words given."""
    parser.argument_default = argparse.SUPPRESS  # what is not given must not count as set by the command line
    parser.no_flags = {"--num-classes": ": the images say how many classes there are, a folder for each."}
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help=f"{', '.join(RECIPES)} ({said})")
    parser.add_argument("--output", type=Path, metavar="RUN", help=f"the run folder, never overwritten ({output})")
    parser.add_argument("--resume", action="store_true", help="go on with RUN (the latest) where it was left")
    parser.add_argument("--stop-after", type=at_least_one, metavar="EPOCHS", help="stop there; --resume goes on")
    parser.add_argument("--checkpoint-every", type=real, metavar="SECONDS", help="how often the state is saved (60)")
    there_too = "show figures and pictures there too, as TensorBoard always has them"
    parser.add_argument("--track", type=one_of(get_args(Tracking)), metavar="{wandb,mlflow}", help=there_too)
    kinds = get_type_hints(Recipe)
    actions, groups = {}, []
    for setting in dataclasses.fields(Recipe):
        if setting.name in HEADINGS:
            groups.append(parser.add_argument_group(HEADINGS[setting.name]))
        actions[setting.name] = add_setting(groups[-1], setting, kinds[setting.name])
    # Only now is it known which words stand behind flags, `--data digits` for one, and which is the recipe.
    word = parser.first_name(argv)
    named = word if word in RECIPES else default
    recipe = resolve(named, **settings).recipe
    for group in groups:
        group.title = f"{group.title} (in brackets: what {named} has)"
    for name, action in actions.items():
        usual = shown(getattr(recipe, name))
        if named == FINE_TUNE and name == "image_size":
            usual = f"12/7 of what the weights were trained with, {usual} at most"
        if named == FINE_TUNE and name in OF_WEIGHTS:
            usual = "as the weights have it"
        action.help = f"{action.help} ({usual})"


def do_pretrain(args: argparse.Namespace) -> str:
    """Train without labels, and say how well it went and where to look."""
    return do_train(args, pretrained=True)


def do_train(args: argparse.Namespace, *, pretrained: bool = False) -> str:
    """Train, and say how well it went and where to look."""
    given = dict(vars(args))
    name = given.pop("recipe", None)
    if "resume" not in given:
        settings = {f.name: given[f.name] for f in dataclasses.fields(Recipe) if f.name in given}
        settings = (PRETRAINING if pretrained else {}) | settings
        # What is wrong with them is said at once, before torch is imported.
        resolved = resolve(name or default_recipe("from_weights" in given), **settings)
    if streams(given):  # torch reads it when it is imported: else threads that wait spin on cores that decode
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from vitrail.environment import launcher, program
    from vitrail.progress import counted, duration, say
    from vitrail.training.train import pretrain, train

    if "resume" not in given and mirrors_digits(resolved):
        say(f"{resolved.name} mirrors images, and a mirrored digit is none: --flip none leaves that out")
    result = pretrain(name, **given) if pretrained else train(name, **given)
    figures, run = result.results, shlex.quote(str(result.run))
    done, planned = figures["epochs"], figures["epochs_planned"]
    epochs = f"{done} of {planned} epochs" if done < planned else counted(planned, "epoch")
    lines = [
        headline(figures),
        f"{epochs} in {duration(figures['train_seconds'])} of training, "
        f"{figures['images_per_second']:,.0f} images/s ({figures['device']}, {figures['precision']}), "
        f"{figures['input_share']:.1%} of it for input; at most {figures['peak_memory'] / 1e9:.1f} GB of memory",
        "",
        f"look at  {result.run / 'report.html'}",
    ]
    if "top1" in figures:
        then = [f"{program()} evaluate {run}", f"{program()} predict {run} IMAGE"]
    else:
        then = [f"{launcher()} train {learning_from(result.run)}", f"{program()} probe {run}"]
    if done < planned:
        track = f" --track {given['track']}" if "track" in given else ""
        then.append(f"{launcher()} {'pretrain' if pretrained else 'train'} --resume{track} --output {run}")
    lines += [f"{'' if place else 'then':9}{words}" for place, words in enumerate(then)]
    return "\n".join(lines)


def streams(given: Mapping[str, Any]) -> bool:
    """Whether the run that is asked for decodes images as they are needed. One that is resumed says so itself, if
    nobody does now; where it is not named, the latest that has not ended, and is of the recipe that is, is taken for
    it, for nothing is imported yet that knows better."""
    if "stream" in given or "resume" not in given:
        return bool(given.get("stream"))
    states = sorted(Path("runs").glob("*/last/state.safetensors"), key=lambda state: -state.stat().st_mtime)
    runs = [run for run in (state.parent.parent for state in states) if not (run / "results.json").exists()]
    for run in [given["output"]] if "output" in given else runs:
        with contextlib.suppress(OSError, UnicodeDecodeError):  # what is wrong with it is said by what opens it
            lines = (run / "recipe.yaml").read_text("utf-8").splitlines()
            if "recipe" not in given or f"recipe: {given['recipe']}" in lines:
                return any(re.match(r" +stream: .*value: true", line) for line in lines)
    return False


def mirrors_digits(resolved: Resolved) -> bool:
    """Whether a recipe for other images would mirror the built-in digits, without anybody having asked for that."""
    recipe = resolved.recipe
    return (recipe.data, resolved.set_by["flip"]) == ("digits", "recipe") and recipe.flip != "none"


def learning_from(run: Path) -> str:
    """What follows `vitrail train` to go on from a pre-trained run, with labels and on the same images."""
    from vitrail.weights.checkpoint import Run

    resolved = Run.open(run).recipe()
    same = [name for name in ("data", "image_size") if resolved.set_by[name] == "command line"]
    flags = [f"--{name.replace('_', '-')}={getattr(resolved.recipe, name)}" for name in same]
    return shlex.join([resolved.name, "--from", str(run), *flags])


def take_evaluate(parser: Parser, argv: Sequence[str]) -> None:
    """The run, what it is measured on, and how."""
    add_weights(parser)
    add_data(parser)
    parser.add_argument("--mirror", action="store_true", help="measure it by each image and its mirror image too")
    add_json(parser)


def do_evaluate(args: argparse.Namespace) -> str:
    """Measure a run's weights: the figures in all, and the classes they do worst on."""
    from vitrail.evaluation.evaluate import evaluate_run

    figures = evaluate_run(args.run, args.data, mirror=args.mirror)
    if args.json:
        return as_json(figures)
    seen = [row for row in figures["per_class"] if row["count"]]
    worst = sorted(seen, key=lambda row: row["top1"])[:WORST]
    title = "classes, worst first" if len(worst) == len(seen) else f"the {WORST} worst of {len(seen)} classes"
    rows = [(row["name"], f"{row['count']:,}", f"{row['top1']:.3f}") for row in worst]
    both = figures.get("mirrored")
    mirrored = (
        f"\nby each image and its mirror image: top-1 {both['top1']:.3f}, loss {both['loss']:.3f}" if both else ""
    )
    return f"{headline(figures)}{mirrored}\n\n{table((title, '>images', '>top-1'), rows)}"


def take_predict(parser: Parser, argv: Sequence[str]) -> None:
    """The run, and the images that it is to name."""
    add_weights(parser)
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="a file that Pillow reads")
    parser.add_argument("--top", type=at_least_one, metavar="K", default=5, help="classes for each image (5)")
    add_json(parser)


def do_predict(args: argparse.Namespace) -> str:
    """Name what is in images; of those that can be read, where others cannot."""
    from vitrail.evaluation.evaluate import predict_files

    try:
        return named(predict_files(args.run, args.images, args.top), args.json)
    except Partial as some:
        raise Partial(str(some), named(some.result, args.json)) from None


def named(answers: Sequence[dict[str, Any]], json: bool) -> str:
    """What `predict_files` says."""
    if json:
        return as_json(answers)
    rows = [
        ("" if place else answer["image"], guess["class"], f"{guess['probability']:.3f}")
        for answer in answers
        for place, guess in enumerate(answer["predictions"])
    ]
    return table(("image", "class", ">probability"), rows)


def take_explain(parser: Parser, argv: Sequence[str]) -> None:
    """The weights, the images, and where the page goes."""
    add_weights(parser)
    eight = "a file that Pillow reads (eight of the images that the run is judged by)"
    parser.add_argument("images", type=Path, nargs="*", metavar="IMAGE", help=eight)
    folder = "where page and pictures go (RUN/explain, or ./NAME-explain for other weights; then …-2, …-3)"
    parser.add_argument("--output", type=Path, metavar="FOLDER", help=folder)
    target = "show what speaks for this class (for the one that the model predicts)"
    parser.add_argument("--class", dest="target", metavar="NAME", help=target)
    resized = "have it see images of this size (of that which it was made for)"
    parser.add_argument("--image-size", type=at_least_one, metavar="N", help=resized)
    add_data(parser)


def do_explain(args: argparse.Namespace) -> str:
    """Write a page, and pictures to share, of what a model looks at."""
    from vitrail.pages.explainpage import explain_run

    page = explain_run(
        args.run, args.images, args.output, target=args.target, data=args.data, image_size=args.image_size
    )
    return str(page)


def take_report(parser: Parser, argv: Sequence[str]) -> None:
    """The run, and where its images are."""
    add_run(parser)
    add_data(parser)


def do_report(args: argparse.Namespace) -> str:
    """Write a run's page anew. Without the images, it is one without pictures, which takes the place of no other."""
    from vitrail.pages.report import write_report
    from vitrail.progress import say

    dataset, why = images_to_show(args.run, args.data)
    page = write_report(args.run, dataset, why)
    if why:
        say(f"vitrail: the page is without pictures: {why}")
    return str(page)


def take_watch(parser: Parser, argv: Sequence[str]) -> None:
    """The run, where its images are, and where its page is served."""
    take_report(parser, argv)
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="H", help="0.0.0.0 shows it to other machines (127.0.0.1)"
    )
    port = "or the next that is free (8500)"
    parser.add_argument("--port", type=at_least_one, default=8500, metavar="P", help=port)


def do_watch(args: argparse.Namespace) -> str:
    """Serve a run's page until Ctrl-C, moving while the run goes on."""
    from vitrail.pages.watch import watch

    watch(args.run, *images_to_show(args.run, args.data), args.host, args.port)
    return str(args.run)


def images_to_show(path: Path, data: str | None) -> tuple["Dataset | None", str]:
    """The data set of a run's page: `data`, or the run's own; where that is gone, None and why there is none."""
    from vitrail.data import cache
    from vitrail.evaluation.classifier import own_images
    from vitrail.weights.checkpoint import Run

    run = Run.open(path)
    recipe = run.recipe().recipe if run.trained else None
    if recipe:
        size, holdout, stream = recipe.image_size, recipe.holdout, recipe.stream
    else:
        size, holdout, stream = run.config()[0].image_size, 0.0, False
    try:
        return cache.load(data or own_images(run), size, holdout=holdout, stream=stream), ""
    except BadInput as error:
        if data:
            raise
        return None, str(error)


def headline(figures: dict[str, Any]) -> str:
    """The figures of a split in one line; top-5 only where there are more classes than that."""
    from vitrail.progress import counted

    images = counted(figures["count"], "image")
    if "top1" not in figures:
        what = {"pixels": "hidden pixels", "patches": "mean colours of hidden patches"}[figures["objective"]]
        return (
            f"loss {figures['loss']:.3f} in predicting {what}, of {images} ({figures['dataset']}, {figures['split']})"
        )
    top5 = f"top-5 {figures['top5']:.3f}, " if len(figures["per_class"]) > 5 else ""
    return (
        f"top-1 {figures['top1']:.3f}, {top5}loss {figures['loss']:.3f}, calibration error "
        f"{figures['calibration_error']:.3f} on {images} ({figures['dataset']}, {figures['split']})"
    )
