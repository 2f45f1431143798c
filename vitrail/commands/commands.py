"""The commands: what each takes, and what it does with it. Each returns its result as text.

What does the work is imported when it is needed, so that help needs neither torch nor NumPy.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitrail.commands.arguments import Parser, add_json, at_least_one, one_of, real, shown
from vitrail.commands.show import (
    do_compare,
    do_data,
    do_draw,
    do_variants,
    take_compare,
    take_data,
    take_draw,
    take_variants,
)
from vitrail.commands.tables import as_json, table
from vitrail.commands.training import (
    do_evaluate,
    do_explain,
    do_predict,
    do_pretrain,
    do_report,
    do_train,
    do_watch,
    take_evaluate,
    take_explain,
    take_predict,
    take_pretrain,
    take_report,
    take_train,
    take_watch,
)
from vitrail.commands.weights import (
    do_export,
    do_import,
    do_probe,
    take_export,
    take_import,
    take_probe,
)
from vitrail.errors import BadInput
from vitrail.recipes import FINE_TUNE, RECIPES
from vitrail.settings import Recipe

BENCH_TASKS = ("training", "profile", "inference", "input", "memory", "start")


@dataclass(frozen=True)
class Command:
    """A word after `vitrail`: what it does, in words and as a function, and the arguments that it takes."""

    summary: str
    examples: tuple[str, ...]
    take: Callable[[Parser, Sequence[str]], None]
    do: Callable[[argparse.Namespace], str]


def take_recipes(parser: Parser, argv: Sequence[str]) -> None:
    """Nothing but the form."""
    add_json(parser)


def do_recipes(args: argparse.Namespace) -> str:
    """What there is to train."""
    if args.json:
        return as_json({name: dataclasses.asdict(recipe) for name, recipe in RECIPES.items()})
    rows = []
    for name, recipe in RECIPES.items():
        shape = f"{recipe.num_layers} × {recipe.hidden_size}, MLP {recipe.mlp_dim}, {recipe.num_heads} heads"
        pixels = f"{recipe.image_size} / {recipe.patch_size}"
        if recipe.architecture != "vit" or name == FINE_TUNE:
            shape = (
                "as the weights have it" if name == FINE_TUNE else f"{recipe.architecture}, {recipe.resnet_width} wide"
            )
            pixels = f"{recipe.image_size}"
        rows.append((name, recipe.data or "(yours)", pixels, shape, f"{recipe.epochs}", ", ".join(departures(recipe))))
    columns = ("recipe", "data", ">image / patch", "layers × width", ">epochs", "other than the defaults")
    return f"{table(columns, rows)}\n\n`vitrail train RECIPE -h` shows every value."


def departures(recipe: Recipe) -> list[str]:
    """The settings of a recipe, other than those with a column of their own, that are not the defaults."""
    columns = {"data", "image_size", "architecture", "patch_size", "hidden_size", "mlp_dim", "num_heads", "num_layers",
               "resnet_width", "epochs"}  # fmt: skip
    default = Recipe()
    changed = [f.name for f in dataclasses.fields(Recipe) if getattr(recipe, f.name) != getattr(default, f.name)]
    values = {name: getattr(recipe, name) for name in changed if name not in columns}
    return [name if value is True else f"{name} {shown(value)}" for name, value in values.items()]


def take_bench(parser: Parser, argv: Sequence[str]) -> None:
    """What is measured, how long, and where it goes."""
    tasks = f"{', '.join(BENCH_TASKS)} (all of them)"
    parser.add_argument("tasks", nargs="*", type=one_of(BENCH_TASKS), metavar="TASK", help=tasks)
    devices, precisions = ("auto", "cpu", "cuda"), ("fp32", "bf16")
    parser.add_argument("--device", type=one_of(devices), metavar="{auto,cpu,cuda}", default="auto", help="(auto)")
    by_device = "(bf16 on cuda; fp32 on cpu, and bf16 where its products are faster)"
    parser.add_argument("--precision", type=one_of(precisions), metavar="{fp32,bf16}", help=by_device)
    parser.add_argument("--rounds", type=at_least_one, metavar="N", default=5, help="turns of each contender (5)")
    parser.add_argument("--seconds", type=real, metavar="X", default=2.0, help="length of a turn, at least a step (2)")
    parser.add_argument("--data", type=Path, metavar="D", help="has train/CLASS/* of 64 × 64 pixels (some are made)")
    places = "its plot into images/ beside it, the rows into ../results/speed"
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"keep it in this page too, {places}")
    parser.add_argument("--toy", action="store_true", help="of a model that is next to nothing: does everything run?")
    parser.add_argument("--add", type=Path, metavar="ROWS", help="measure nothing: put rows kept elsewhere on the page")
    add_json(parser)


def do_bench(args: argparse.Namespace) -> str:
    """Measure speed beside peers; on the page, if one is named, it takes the place of what was found here before."""
    import torch

    from vitrail.environment import describe
    from vitrail.evaluation.evaluate import pick_device
    from vitrail.progress import counted
    from vitrail.speed.bench import measure
    from vitrail.speed.rounds import COMPILED, Setting, cases
    from vitrail.speed.speedpage import COLUMNS, add_record, check_page, notes, table_rows, write_page
    from vitrail.vit.floor import precisions

    if args.add is not None:
        if args.output is None:
            raise BadInput("--add needs --output PAGE, on which the rows go.")
        return f"{counted(add_record(args.output, args.add), 'row')} of {args.add} added to {args.output}"
    device = pick_device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if args.output is not None:
        check_page(args.output, describe(device))  # now, not when it has been measured
    sessions, tasks = [], list(dict.fromkeys(args.tasks)) or list(BENCH_TASKS)
    for precision in [args.precision] if args.precision else precisions(device):
        again = () if args.toy else COMPILED
        setting = Setting(
            device, precision, args.rounds, args.seconds, cases(device, args.toy), args.data, compiled=again
        )
        found = None
        for found in measure(tasks, setting):  # what there is so far, after each task
            if args.output is not None:
                write_page(args.output, found)
        sessions += [found] if found is not None else []
        tasks = [task for task in tasks if task not in ("input", "start")]  # which have no precision: once is enough
    if args.json:
        return as_json([dataclasses.asdict(session) for session in sessions])
    return "\n\n".join("\n".join([table(COLUMNS, table_rows(one)), "", *notes(one.rows)]) for one in sessions)


COMMANDS = {
    "train": Command(
        "train a model; without arguments, on the built-in digits, in under a minute",
        ("vitrail train", "vitrail train vit-12 --data tiny-imagenet --precision bf16",
         "vitrail train vit-12 --data photos.zip --epochs 50 --output runs/photos",
         "vitrail train --from ViT-B_16.npz --data photos --output runs/photos-384",
         "vitrail train --resume --output runs/photos"),
        take_train, do_train,
    ),
    "pretrain": Command(
        "train a model without labels: it predicts patches that are hidden from it",
        ("vitrail pretrain", "vitrail pretrain vit-12 --data photos.zip --output runs/photos-pretrained",
         "vitrail pretrain vit-12 --objective patches", "vitrail pretrain --resume --output runs/photos-pretrained"),
        take_pretrain, do_pretrain,
    ),
    "evaluate": Command(
        "top-1, top-5, loss and calibration of a run, and of each class",
        ("vitrail evaluate runs/digits", "vitrail evaluate runs/digits --json | jq .top1"),
        take_evaluate, do_evaluate,
    ),
    "predict": Command(
        "the classes of images, and their probabilities",
        ("vitrail predict runs/photos cat.jpg dog.jpg --top 3",),
        take_predict, do_predict,
    ),
    "explain": Command(
        "what a model looks at: attention over images, by layer and head, and the paper's figure 7",
        ("vitrail explain runs/digits", "vitrail explain runs/photos cat.jpg --class dog --output cat",
         "vitrail explain ViT-B_16.npz cat.jpg"),
        take_explain, do_explain,
    ),
    "report": Command("write the page of a run anew", ("vitrail report runs/digits",), take_report, do_report),
    "watch": Command(
        "serve the page of a run; its curves move while the run goes on",
        ("vitrail watch runs/digits", "vitrail watch runs/photos --host 0.0.0.0 --port 8600"),
        take_watch, do_watch,
    ),
    "data": Command(
        "what is in a data set, and what is wrong with it",
        ("vitrail data digits", "vitrail data photos.zip",
         "vitrail data tiny-imagenet --augmented --recipe vit-12 --policy 3-augment --cutmix 1"),
        take_data, do_data,
    ),
    "compare": Command(
        "runs side by side: a table as Markdown, and a page with their curves",
        ("vitrail compare runs/digits runs/digits-2", "vitrail compare runs/vit-12 results/original-vit-12.json"),
        take_compare, do_compare,
    ),
    "recipes": Command("what there is to train", ("vitrail recipes",), take_recipes, do_recipes),
    "variants": Command(
        "the models that have names: their shapes, parameters, FLOPs and memory",
        ("vitrail variants", "vitrail variants --image-size 384 --output variants.svg"),
        take_variants, do_variants,
    ),
    "draw": Command(
        "a model as the paper's figure 1 draws it, from the model itself",
        ("vitrail draw ViT-B/16 --output vit-b-16.svg", "vitrail draw runs/photos --image cat.jpg --output photos.svg"),
        take_draw, do_draw,
    ),
    "probe": Command(
        "how well classes can be told apart by what a model makes of images: few-shot linear evaluation",
        ("vitrail probe runs/digits", "vitrail probe ViT-B_16.npz --data photos --shots 1 5 10"),
        take_probe, do_probe,
    ),
    "import": Command(
        "weights from elsewhere, as a run folder",
        ("vitrail import ViT-B_16.npz --output runs/base",
         "vitrail import vit-base-patch16-224 --output runs/flowers --image-size 384 --num-classes 102"),
        take_import, do_import,
    ),
    "export": Command(
        "weights as transformers or timm loads them, with class names and preprocessing",
        ("vitrail export runs/digits --to timm --output digits-timm",
         "vitrail export runs/vit-12 --to transformers --output vit-12-transformers"),
        take_export, do_export,
    ),
    "bench": Command(
        "speed beside timm, vit-pytorch, transformers and torchvision, and beside what the hardware could do",
        ("vitrail bench", "vitrail bench training inference --precision bf16 --output docs/speed.md",
         "vitrail bench input --data tiny-imagenet-200 --json"),
        take_bench, do_bench,
    ),
}  # fmt: skip
