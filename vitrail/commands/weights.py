"""The commands for weights as such: import, export and probe."""

import argparse
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from vitrail.commands.arguments import Parser, add_data, add_json, add_weights, at_least_one, one_of
from vitrail.commands.tables import as_json, table

LIBRARIES = ("transformers", "timm")


def take_import(parser: Parser, argv: Sequence[str]) -> None:
    """The weights, and what becomes of them."""
    what = "an official checkpoint (.npz), a folder of transformers or timm, or a run folder"
    parser.add_argument("source", type=Path, metavar="SOURCE", help=what)
    parser.add_argument("--output", type=Path, metavar="RUN", required=True, help="the run folder, never overwritten")
    resized = "resize its position embeddings to images of this size"
    parser.add_argument("--image-size", type=at_least_one, metavar="N", help=resized)
    headed = "put a new head of zeros on, for this many classes"
    parser.add_argument("--num-classes", type=at_least_one, metavar="N", help=headed)


def do_import(args: argparse.Namespace) -> str:
    """Make a run folder of weights from elsewhere."""
    from vitrail.progress import counted
    from vitrail.weights.exchange import import_run

    run, model = import_run(args.source, args.output, image_size=args.image_size, num_classes=args.num_classes)
    config, name = model.config, shlex.quote(str(run.path))
    parameters = sum(weight.numel() for weight in model.parameters())
    lines = [
        f"{run.path}: {parameters:,} parameters, {counted(config.num_layers, 'layer')} of {config.hidden_size}, "
        f"patches of {config.patch_size}, images of {config.image_size}, "
        f"{counted(config.num_classes, 'class', 'classes')}",
    ]
    if not model.head.weight.any():
        lines += ["", "Its head is zero: it gives each class the same probability until it is trained."]
    else:
        lines += ["", f"then  vitrail evaluate {name} --data D", f"      vitrail predict {name} IMAGE"]
    return "\n".join(lines)


def take_export(parser: Parser, argv: Sequence[str]) -> None:
    """The run, and the library that is to load it."""
    add_weights(parser)
    metavar = "{" + ",".join(LIBRARIES) + "}"
    parser.add_argument("--to", type=one_of(LIBRARIES), metavar=metavar, required=True, help="whose format")
    parser.add_argument("--output", type=Path, metavar="FOLDER", required=True, help="must not exist")


def do_export(args: argparse.Namespace) -> str:
    """Write a run's weights as another library loads them, and say how close what was written comes."""
    from vitrail.weights.exchange import export_model

    done = export_model(args.run, args.to, args.output)
    files = sorted(file.name for file in done.path.iterdir())
    folder = repr(str(done.path))
    loaded = {
        "transformers": f"transformers.ViTForImageClassification.from_pretrained({folder})",
        "timm": f"timm.create_model({'local-dir:' + str(done.path)!r}, pretrained=True).eval()",
    }
    resized = []
    if done.resized_to is not None:
        taken = f"vitrail predict {args.run} takes smaller ones nearly as they are"
        resized = [f"images: there, all are resized to {done.resized_to} pixels; {taken} (README.md there)"]
    return "\n".join(
        [
            f"{done.path}: {', '.join(files)}",
            f"parity: read back, its outputs on {done.images} random images differ from those of {args.run} by at most "
            f"{done.difference:.2g}",
            f"        {args.to} is not installed here, or cannot be imported, and was not asked"
            if done.theirs is None
            else f"        those of {args.to} itself, by at most {done.theirs:.2g}",
            "        each as a share of the largest output, where that is above 1",
            *resized,
            "",
            f"in Python  {loaded[args.to]}",
        ]
    )


def take_probe(parser: Parser, argv: Sequence[str]) -> None:
    """The weights, the images, and how many of them."""
    add_weights(parser)
    add_data(parser)
    shots = "training images of each class (1 5 10 25, as far as there are so many)"
    parser.add_argument("--shots", type=at_least_one, nargs="+", metavar="N", help=shots)
    add_json(parser)


def do_probe(args: argparse.Namespace) -> str:
    """Say how well few images tell classes apart by what a model makes of them, and by their pixels."""
    from vitrail.evaluation.probe import probe

    found = probe(args.run, args.data, args.shots)
    if args.json:
        return as_json(found)
    said = [
        [f"{row['top1']:.3f} ± {row['top1_std']:.3f}" for row in found[what]["shots"]]
        for what in ("features", "pixels")
    ]
    shots = [f"{row['shots']}" for row in found["features"]["shots"]]
    sizes = [found[what]["size"] for what in ("features", "pixels")]
    side = math.isqrt(sizes[1] // 3)
    columns = (">images a class", f">{sizes[0]:,} features", f">raw pixels, {side} × {side}")
    return (
        f"top-1 of a linear map fitted to a few images of each of {found['classes']:,} classes, on {found['count']:,} "
        f"images ({found['dataset']}, {found['split']}); mean ± standard deviation over {found['draws']} draws\n\n"
        f"{table(columns, list(zip(shots, *said, strict=True)))}"
    )
