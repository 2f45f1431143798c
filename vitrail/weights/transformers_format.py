"""Folders of transformers' ViT: `ViTForImageClassification`, or `ViTModel`, which has no head.

config.json                 shape, GELU, epsilon, class names (`id2label`)
preprocessor_config.json    how images are made ready
model.safetensors
"""

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from vitrail.errors import BadInput
from vitrail.progress import counted
from vitrail.vit.config import HALF, Colours, Gelu, ViTConfig, check_colours, shorten
from vitrail.weights.files import read_json, write_tensors, write_text
from vitrail.weights.formats import (
    Imported,
    compare,
    measure,
    read_weights,
    refuse,
    section,
    side,
    to_ours,
    to_theirs,
    unsaid,
)  # fmt: skip

MEND = "load it with transformers' from_pretrained, then save_pretrained it as one file of safetensors"
ENDS = {
    "patch_embedding.projection": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "head": "classifier",
}
TOKENS = {"class_token": "vit.embeddings.cls_token", "position_embedding": "vit.embeddings.position_embeddings"}
BLOCK = {
    "attention_norm": ("layernorm_before",),
    "attention.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attention.out": ("attention.output.dense",),
    "mlp_norm": ("layernorm_after",),
    "mlp.hidden": ("intermediate.dense",),
    "mlp.out": ("output.dense",),
}
# Transformers 5 has other names in memory than in its files, where it keeps those of versions 3 and 4: these → those.
RENAMED = {
    r"^(?=(embeddings|encoder|layers|layernorm|pooler)\.)": "vit.",  # of a ViTModel
    r"^vit\.layers\.": "vit.encoder.layer.",
    r"\.attention\.q_proj\.": ".attention.attention.query.",
    r"\.attention\.k_proj\.": ".attention.attention.key.",
    r"\.attention\.v_proj\.": ".attention.attention.value.",
    r"\.attention\.o_proj\.": ".attention.output.dense.",
    r"\.mlp\.fc1\.": ".intermediate.dense.",
    r"\.mlp\.fc2\.": ".output.dense.",
}
FOREIGN = {
    r"mask_token|^decoder\.": "a token for masked patches",
    r"distillation|^(cls|distillation)_classifier": "a distillation token",
    r"register": "register tokens",
    r"layer_scale|lambda_1|lambda_2": "LayerScale",
    r"(query|key|q|k)_norm": "norms of queries and keys",
    r"relative_position": "relative positions",
}
GELUS: dict[str, Gelu] = {
    "gelu": "exact", "gelu_python": "exact", "gelu_new": "tanh", "gelu_fast": "tanh", "gelu_accurate": "tanh",
    "gelu_pytorch_tanh": "tanh", "gelu_python_tanh": "tanh",
}  # fmt: skip
WRITTEN: dict[Gelu, str] = {"exact": "gelu", "tanh": "gelu_pytorch_tanh"}
BICUBIC = 3  # Pillow's number


def names(ours: str) -> tuple[str, ...]:
    """What transformers calls one of Vitrail's weights; query, key and value are apart there."""
    if ours in TOKENS:
        return (TOKENS[ours],)
    module, _, kind = ours.rpartition(".")
    if found := re.fullmatch(r"blocks\.(\d+)\.(.+)", module):
        return tuple(f"vit.encoder.layer.{found[1]}.{part}.{kind}" for part in BLOCK[found[2]])
    return (f"{ENDS[module]}.{kind}",)


def read_transformers(folder: Path) -> Imported:
    """The model of a folder that transformers wrote. A pooler, which has no part in the logits, is left out.

    Raises:
        BadInput: something is missing or damaged, config and weights disagree, or it is a model that Vitrail's cannot
            be.
    """
    at, weights_at = folder / "config.json", folder / "model.safetensors"
    config = read_json(at)
    gelu = _check_options(config, at)
    weights = _renamed(read_weights(folder, MEND), weights_at)
    refuse(weights, FOREIGN, weights_at)
    shape = measure(weights, names, weights_at)
    said = {
        "hidden_size": shape.hidden_size, "num_hidden_layers": shape.num_layers, "intermediate_size": shape.mlp_dim,
        "patch_size": shape.patch_size, "image_size": shape.image_size, "num_channels": shape.channels,
    }  # fmt: skip
    compare({key: (side(config.get(key)), found) for key, found in said.items()}, at, weights_at)
    ours = shape.config(
        at, num_heads=config.get("num_attention_heads", 12), gelu=gelu,
        layer_norm_eps=config.get("layer_norm_eps", 1e-12), dropout=config.get("hidden_dropout_prob", 0.0),
    )  # fmt: skip
    tensors = to_ours(weights, names, ours, weights_at)
    classes = _classes(config, shape.num_classes, at)
    seen_at = folder / "preprocessor_config.json"
    seen = read_json(seen_at) if seen_at.exists() else {}
    return Imported(ours, tensors, classes, *_colours(seen, seen_at), _shorter_side(seen, ours.image_size))


def _renamed(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights under the names that transformers' files have, without those of a pooler."""
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        for pattern, text in RENAMED.items():
            name = re.sub(pattern, text, name)
        if name in found:
            raise BadInput(f"{path} has {name} twice, under names of different versions of transformers.")
        found[name] = tensor
    return {name: tensor for name, tensor in found.items() if not name.startswith("vit.pooler.")}


def _check_options(config: dict[str, Any], path: Path) -> Gelu:
    """Which GELU the config asks for, if it asks for nothing that Vitrail's model lacks.

    Raises:
        BadInput: it does; the message names the option.
    """
    if config.get("qkv_bias", True) is not True:
        raise BadInput(f"{path} has qkv_bias = {shorten(config['qkv_bias'])}; in Vitrail's model they have biases.")
    if config.get("num_channels", 3) != 3:
        raise BadInput(f"{path} has num_channels = {shorten(config['num_channels'])}; Vitrail's images have 3.")
    activation = config.get("hidden_act", "gelu")
    if not isinstance(activation, str) or activation not in GELUS:
        raise BadInput(f"{path} has hidden_act = {shorten(activation)}; Vitrail's model has {', '.join(GELUS)}.")
    return GELUS[activation]


def _classes(config: dict[str, Any], count: int | None, path: Path) -> tuple[str, ...]:
    """The names of the classes, in order; their numbers where the config has none; none where there is no head.

    Raises:
        BadInput: it names others than the head has.
    """
    if count is None:
        return ()
    found = section(config, "id2label", path)
    if found and set(found) != set(map(str, range(count))):
        named = counted(len(found), "class", "classes")
        raise BadInput(f"{path} names {named} in id2label, and not the 0 to {count - 1} of the head.")
    return tuple(str(found.get(number, number)) for number in map(str, range(count)))


def _colours(seen: dict[str, Any], path: Path) -> tuple[Colours, Colours]:
    """Mean and standard deviation that images are normalised by; transformers' defaults, where nothing says it.

    Raises:
        BadInput: what the file says cannot be.
    """
    factor = seen.get("rescale_factor", 1 / 255) if seen.get("do_rescale", True) else 1
    if not isinstance(factor, int | float) or not 0 < factor < 1e6:
        raise BadInput(f"{path} has rescale_factor = {shorten(factor)}; it must be above 0.")
    asked = seen.get("do_normalize", True)
    mean, std = (seen.get("image_mean", HALF), seen.get("image_std", HALF)) if asked else (0.0, 1.0)
    try:
        mean, std = check_colours(mean, std)
        # Of pixels from 0 to 1: theirs are from 0 to 255 · factor.
        return check_colours(*([value / (255 * factor) for value in row] for row in (mean, std)))
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


def _shorter_side(seen: dict[str, Any], image_size: int) -> int | None:
    """What an image's is to be resized to; None where nothing says it, or it is what Vitrail does not do."""
    size = seen.get("size")
    side = size.get("shortest_edge") if isinstance(size, dict) else None
    return side if isinstance(side, int) and image_size <= side <= 10 * image_size else None


def unsaid_by_transformers(config: ViTConfig) -> dict[str, Any]:
    """The options of a model that transformers' ViTForImageClassification has not."""
    return unsaid(config, {"classifier": "token", "representation_size": None, "resnet_blocks": None})


def write_transformers(folder: Path, model: Imported, card: str) -> None:
    """Write a model, none of whose options are unsaid, into a folder, as `ViTForImageClassification.from_pretrained`
    loads it; `card` is its README."""
    weights = to_theirs(model.tensors, names)
    write_tensors(folder / "model.safetensors", weights, metadata={"format": "pt"})  # without it, none are loaded
    write_text(folder / "config.json", json.dumps(_written_config(model), indent=2) + "\n")
    write_text(folder / "preprocessor_config.json", json.dumps(_written_processor(model), indent=2) + "\n")
    # Class names come from anywhere, and may have halves of characters in them, which UTF-8 cannot say.
    write_text(folder / "README.md", card)


def _written_config(model: Imported) -> dict[str, Any]:
    """What config.json is to say."""
    config = model.config
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_dim,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "hidden_act": WRITTEN[config.gelu],
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "qkv_bias": True,
        "id2label": {str(number): name for number, name in enumerate(model.classes)},
        "label2id": {name: number for number, name in enumerate(model.classes)},
    }


def _written_processor(model: Imported) -> dict[str, Any]:
    """What preprocessor_config.json is to say: a resize that keeps the aspect, and the square in the middle, as Vitrail
    does it. ViTImageProcessor would distort what is no square; that of BiT is the one with these steps."""
    size = model.config.image_size
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": model.resized_to},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(model.mean),
        "image_std": list(model.std),
    }
