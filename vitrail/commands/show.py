"""The commands that show what is there: data sets, runs side by side, a model drawn, and the table of variants."""

import argparse
import dataclasses
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

from vitrail.commands.arguments import Parser, add_json, add_setting, at_least_one, one_of, shown
from vitrail.commands.tables import as_json, markdown, rendered, table
from vitrail.errors import BadInput
from vitrail.recipes import RECIPES, resolve
from vitrail.settings import Recipe

IMAGES, VIEWS = 8, 8  # on the picture of what augmentation makes of them
# What decides how training shows an image: the settings of the images, and some of those that follow.
SHOWING = (
    *(setting.name for setting in itertools.takewhile(lambda s: s.name != "patch_size", dataclasses.fields(Recipe))),
    "first_size", "first_share", "crop_size", "last_share", "seed",
)  # fmt: skip


def take_data(parser: Parser, argv: Sequence[str]) -> None:
    """The data set, and how its images are augmented."""
    parser.argument_default = argparse.SUPPRESS  # what is not given must not count as set by the command line
    parser.add_argument("data", metavar="D", help="digits, tiny-imagenet, a folder, a .zip / .tar archive, or hf:NAME")
    add_json(parser)
    what = "with --augmented: training images as they are shown by a recipe, or with other settings than it has"
    group = parser.add_argument_group(what)
    group.add_argument("--augmented", action="store_true", help="write that picture, and look for nothing else")
    group.add_argument("--output", type=Path, metavar="FILE", help="the picture, a PNG (NAME-augmented.png)")
    group.add_argument("--recipe", type=one_of(tuple(RECIPES)), metavar="RECIPE", help=f"{', '.join(RECIPES)} (digits)")
    kinds = get_type_hints(Recipe)
    for setting in dataclasses.fields(Recipe):
        if setting.name in SHOWING and setting.name != "data":
            add_setting(group, setting, kinds[setting.name])


def do_data(args: argparse.Namespace) -> str:
    """Say what is in a data set, and what is wrong with it; or draw how a recipe augments its images."""
    given = dict(vars(args))
    data, json = given.pop("data"), given.pop("json", False)
    if given.pop("augmented", False):
        if json:
            raise BadInput("--augmented draws a picture, and has nothing to say in JSON; leave one of them out.")
        return draw_augmented(data, given.pop("recipe", "digits"), given.pop("output", None), given)
    if given:
        flag = "--" + next(iter(given)).replace("_", "-")
        raise BadInput(f"{flag} is for the picture that --augmented draws; add that.")
    from vitrail.data.survey import inspect, show

    found = inspect(data)
    return as_json(found.to_dict()) if json else rendered(lambda console: show(found, console))


def draw_augmented(data: str, name: str, output: Path | None, settings: dict[str, Any]) -> str:
    """Write a picture of training images as a recipe shows them, and say where it is."""
    recipe = resolve(name, data=data, **settings).recipe
    from PIL.PngImagePlugin import PngInfo

    from vitrail.data import cache
    from vitrail.pages.views import samples, sheet
    from vitrail.progress import counted
    from vitrail.weights.files import write

    mark = "vitrail data --augmented"
    if output is not None:
        check_output(output, mark, "augmented.png")
    dataset = cache.load(data, recipe.image_size, holdout=recipe.holdout, stream=recipe.stream)
    if output is None:
        output = Path(re.sub(r"[^\w.-]", "_", dataset.name) + "-augmented.png")
        check_output(output, mark, "augmented.png")
    default = Recipe()
    changed = [key for key in SHOWING[1:-1] if getattr(recipe, key) != getattr(default, key)]
    said = ", ".join(f"{key} {shown(getattr(recipe, key))}" for key in changed if key not in ("image_size", "stream"))
    size = f"{recipe.image_size} × {recipe.image_size} pixels"
    title = f"{dataset.name} at {size} by the recipe {name}, seed {recipe.seed}: {said or 'no augmentation'}"
    rows = samples(dataset.splits["train"], recipe, IMAGES, VIEWS)
    about = PngInfo()
    about.add_text("Software", mark)
    picture = sheet(title, rows, dataset.classes)
    write(output, lambda file: picture.save(file, "PNG", pnginfo=about))
    others = "" if settings.get("image_size") else " (--recipe and --image-size choose others)"
    return f"{output}\n{counted(len(rows), 'training image')}, and {VIEWS} views of each{others}. {title}"


def take_compare(parser: Parser, argv: Sequence[str]) -> None:
    """The runs, and where the page goes."""
    what = "a run folder, with or without weights, or results/original-vit-12.json"
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=what)
    page = Path("compare.html")
    parser.add_argument("--output", type=Path, metavar="PAGE", default=page, help=f"where the page goes ({page})")


def do_compare(args: argparse.Namespace) -> str:
    """Say as Markdown how runs compare, and write a page with their curves."""
    from vitrail.pages.compare import COLUMNS, MARK, cells, differences, remarks, write_page
    from vitrail.pages.runs import load
    from vitrail.progress import say

    check_output(args.output, MARK, "compare.html")
    rows = load(args.runs)
    write_page(args.output, rows)
    said = [*remarks(rows), markdown(COLUMNS, [cells(row) for row in rows])]
    having, differing = differences(rows)
    if differing:
        values = [(f"`{name}`", *values) for name, values in differing.items()]
        said.append(markdown(("setting that differs", *(f"`{row.name}`" for row in having)), values))
    say(f"look at  {args.output}")
    return "\n\n".join(said)


def take_draw(parser: Parser, argv: Sequence[str]) -> None:
    """What is drawn, and where it goes."""
    what = "a name from vitrail variants, a run folder, or anything else that vitrail import takes"
    parser.add_argument("model", metavar="MODEL", help=what)
    parser.add_argument("--output", type=Path, metavar="FILE", help="where it goes, an SVG (NAME.svg)")
    parser.add_argument("--image", type=Path, metavar="IMAGE", help="what is cut into patches (a stained-glass window)")
    size = "side of the images, in pixels (the run's; 224 for a name)"
    parser.add_argument("--image-size", type=at_least_one, metavar="N", help=size)


def do_draw(args: argparse.Namespace) -> str:
    """Draw a model as the paper's figure 1 does."""
    from vitrail.evaluation.evaluate import read_files
    from vitrail.pages.drawing import MARK, draw, named
    from vitrail.weights.files import write_text

    model, name, classes = named(args.model, args.image_size)
    output = args.output or Path(re.sub(r"[^\w.-]", "-", name) + ".svg")
    check_svg(output)
    check_output(output, MARK, "model.svg")
    image = read_files([args.image], model.config.image_size, None).image(0) if args.image else None
    write_text(output, draw(model, name, classes, image))
    return str(output)


def take_variants(parser: Parser, argv: Sequence[str]) -> None:
    """The size of the images, and where a picture goes."""
    parser.add_argument("--image-size", type=at_least_one, metavar="N", default=224, help="side in pixels (224)")
    picture = "write them as a picture, such as variants.svg"
    parser.add_argument("--output", type=Path, metavar="FILE", help=picture)
    add_json(parser)


def do_variants(args: argparse.Namespace) -> str:
    """The models that have names, and what each takes, as a table or as a picture."""
    if args.output is not None and args.json:
        raise BadInput("--output draws a picture, and has nothing to say in JSON; leave one of them out.")
    from vitrail.vit.variants import VARIANTS, sizes

    if args.output is not None:
        return draw_variants(args.output, args.image_size)
    found = sizes(args.image_size)
    activations = [trained_bytes(size.name, args.image_size) for size in found]
    if args.json:
        more = [{"activation_bytes": taken, "image_size": args.image_size} for taken in activations]
        return as_json([dataclasses.asdict(size) | others for size, others in zip(found, more, strict=True)])
    columns = (
        "variant", ">layers", ">width", ">MLP", ">heads", ">parameters", ">GFLOP/image", ">weights, MB",
        ">activations, MB/image",
    )  # fmt: skip
    rows = [
        (size.name, f"{size.num_layers}", f"{size.hidden_size}", f"{size.mlp_dim}", f"{size.num_heads}",
         f"{size.parameters:,}", f"{size.flops / 1e9:,.1f}", f"{size.bytes / 1e6:,.0f}",
         "–" if taken is None else f"{taken / 1e6:,.0f}")
        for size, taken in zip(found, activations, strict=True)
    ]  # fmt: skip
    notes = [
        f"At {args.image_size} × {args.image_size} pixels and 1,000 classes; weights and activations in float32. FLOP "
        "are those of one image's",
        "logits, every token computed, 2 for each multiply-add: papers that count these as one quote half. Activations "
        "are what a training",
        "step on a CPU has of each image, beside weights, gradients and the optimizer's state; of hybrids they are not "
        "counted.",
        "In Python: vitrail.create(VARIANT).",
    ]
    if left := [name for name in VARIANTS if name not in {size.name for size in found}]:
        notes.append(f"Images of {args.image_size} pixels do not divide into the patches of {', '.join(left)}.")
    return "\n".join([table(columns, rows), "", *notes])


def trained_bytes(name: str, image_size: int) -> int | None:
    """What a training step in float32 has of one image of that size, as `activation_bytes` counts it; None for a
    hybrid, whose ResNet is not counted."""
    from vitrail.input.memory import activation_bytes
    from vitrail.vit.variants import VARIANTS

    config = dataclasses.replace(VARIANTS[name], image_size=image_size)
    return activation_bytes(config, Recipe()) if config.resnet_blocks is None else None


def draw_variants(output: Path, image_size: int) -> str:
    """Write the picture of all variants, and say where it is."""
    check_svg(output)
    from vitrail.pages.lineup import MARK, line_up
    from vitrail.vit.variants import sizes
    from vitrail.weights.files import write_text

    check_output(output, MARK, "variants.svg")
    write_text(output, line_up(sizes(image_size), image_size))
    return str(output)


def check_svg(path: Path) -> None:
    """Make sure that what is to be an SVG is called one.

    Raises:
        BadInput: it is not.
    """
    if path.suffix.lower() != ".svg":
        raise BadInput(f"{path} would be an SVG; call it {path.with_suffix('.svg')}.")


def check_output(path: Path, mark: str, example: str) -> None:
    """Make sure that a file can be written there. One with `mark` in it was written by the same command, and gives way.

    Raises:
        BadInput: there is a folder, or a file that is something else.
    """
    if path.is_dir():
        raise BadInput(f"{path} is a folder; name a file, such as {path / example}.")
    if path.exists() and mark.encode() not in path.read_bytes()[:4000]:
        raise BadInput(f"{path} is there, and was not written by this command; name another with --output.")
