"""A model card: the README of exported weights, with the figures that were measured and how to load them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitrail import __version__
from vitrail.progress import counted, duration
from vitrail.vit.config import HALF
from vitrail.weights.formats import Imported

SHOWN = 20  # classes that are named
LOADED = {
    "transformers": """\
from PIL import Image
from transformers import AutoImageProcessor, ViTForImageClassification

processor = AutoImageProcessor.from_pretrained("FOLDER")
model = ViTForImageClassification.from_pretrained("FOLDER")
pixels = processor(Image.open("image.png").convert("RGB"), return_tensors="pt")
logits = model(**pixels).logits
print(model.config.id2label[int(logits.argmax())])""",
    "timm": """\
import timm
from PIL import Image

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(Image.open("image.png").convert("RGB"))[None])
print(model.pretrained_cfg["label_names"][int(logits.argmax())])""",
}


@dataclass(frozen=True)
class Record:
    """What a run measured: `results.json`, the last entry of `environment.json`, the settings of the recipe that were
    changed for it, the name of the weights that it began with, if these were not random, and whether those that it
    keeps are a running average.

    Recipes change from one version to the next, and their names stay: `settings` are all that the run had otherwise
    than a recipe has that says nothing."""

    results: Mapping[str, Any]
    launch: Mapping[str, Any]
    changed: Mapping[str, Any]
    settings: Mapping[str, Any]
    began: str = ""
    averaged: bool = False


def model_card(model: Imported, library: str, name: str, record: Record | None) -> str:
    """The card of a model, as Markdown with the head that model hubs read.

    Args:
        model: what is exported.
        library: `transformers` or `timm`, which is to load it.
        name: of the folder.
        record: what the run measured, if it was trained to its end.

    Raises:
        ArithmeticError, AttributeError, LookupError, TypeError, ValueError: the results in the record are not as
            Vitrail wrote them.
    """
    parts = [_head(library), f"# {name}", _model(model)]
    parts.append(measured(record) if record else "No figures were measured by Vitrail for these weights.")
    parts += [_images(model), "## Use", f"```python\n{LOADED[library].replace('FOLDER', name)}\n```"]
    parts.append(f"In Vitrail: `vitrail.load({name!r})`, or `vitrail import {name} --output RUN`.")
    parts += ["## License", "None is stated here: whoever passes the weights on says so, in the head of this file too."]
    # Names may have what UTF-8 has not: halves of characters, and bytes of file names that are no text.
    text = "\n\n".join(parts) + "\n"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _head(library: str) -> str:
    tags = "\n".join(f"- {tag}" for tag in ("image-classification", "vision-transformer", "vitrail"))
    return f"---\nlibrary_name: {library}\npipeline_tag: image-classification\ntags:\n{tags}\n---"


def _model(model: Imported) -> str:
    """What it is, and what it tells apart."""
    config, classes = model.config, model.classes
    parameters = sum(tensor.numel() for tensor in model.tensors.values())
    reads = "the class token" if config.classifier == "token" else "the mean of all tokens"
    gelu = "GELU by its tanh approximation" if config.gelu == "tanh" else "exact GELU"
    named = ", ".join(f"`{name}`" for name in classes[:SHOWN]) + " …" * (len(classes) > SHOWN)
    return (
        "A Vision Transformer ([2010.11929](https://arxiv.org/abs/2010.11929)): "
        f"{counted(config.num_layers, 'layer')} of {config.hidden_size}, MLP {config.mlp_dim}, "
        f"{counted(config.num_heads, 'head')}, "
        f"patches of {config.patch_size} × {config.patch_size}, images of {config.image_size} × {config.image_size}; "
        f"{parameters:,} parameters. The head reads {reads}; {gelu}, LayerNorm with an epsilon of "
        f"{config.layer_norm_eps:g}. Exported by Vitrail {__version__}.\n\n"
        f"{counted(len(classes), 'class', 'classes')}: {named}"
    )


def measured(record: Record) -> str:
    """What came out, on what, how it was trained, and what that cost: a section of the card. It raises what
    `model_card` does."""
    results, launch = record.results, record.launch
    changed = f", with {_listed(record.changed)}" if record.changed else ""
    settings = f"{_listed(record.settings)}; " if record.settings else ""
    program = f"Vitrail {launch['vitrail']}" if "vitrail" in launch else "Vitrail"
    recipe = f"`{results['recipe']}`, as {program} then had it{changed}"
    threads = f", {counted(launch['threads'], 'thread')}" if "threads" in launch else ""
    hardware = launch.get("gpu") or f"{launch.get('cpu', 'a processor')}{threads}"
    rows = {
        "top-1": f"{results['top1']:.4f}", "top-5": f"{results['top5']:.4f}", "loss": f"{results['loss']:.4f}",
        "measured on": f"{counted(results['count'], 'image')}: {results['dataset']}, {results['split']}",
        "recipe": f"{recipe}, seed {results['seed']}",
        **({"began with": f"the weights of `{record.began}`"} if record.began else {}),
        "settings": f"{settings}all others are the defaults of that version",
        "epochs": f"{results['epochs']} of {results['epochs_planned']}; {results['samples_seen']:,} images seen",
        "training time": f"{duration(results['train_seconds'])} on {hardware}, {results['precision']}",
        "commit": launch.get("commit") or "not known",
    }  # fmt: skip
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    weights = "the running average of its weights over the steps" if record.averaged else "the weights of its last step"
    return f"## Measured\n\nOne run, {weights}.\n\n| | |\n| --- | --- |\n{table}"


def _listed(settings: Mapping[str, Any]) -> str:
    """`crop 6, hidden_size 128`."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _images(model: Imported) -> str:
    """How images are made ready, and where Vitrail does otherwise, for it is not known what it learnt from."""
    size, side = model.config.image_size, model.resized_to
    colours = "to -1…1" if (model.mean, model.std) == (HALF, HALF) else f"by mean {model.mean}, deviation {model.std}"
    text = (
        f"## Images\n\nThe shorter side is resized to {side} pixels (bicubic), the {size} × {size} in the middle are "
        f"taken, and pixels are normalised {colours}."
    )
    if model.shorter_side is not None:
        text += " `vitrail predict` and `evaluate` do the same."
    elif side > size:
        text += (
            f" In the run that it was exported from, `vitrail predict` enlarges smaller images to {size} only, and "
            "takes those in between as they are."
        )
    return text
