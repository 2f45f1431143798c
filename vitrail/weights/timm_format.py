"""Folders of timm's VisionTransformer and its hybrids, as `timm.models.save_for_hf` writes them and
`create_model("local-dir:FOLDER")` loads them.

    config.json          architecture, what was changed in it (`model_args`), preprocessing (`pretrained_cfg`)
    model.safetensors
"""

import json
import math
import re
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from vitrail.errors import BadInput
from vitrail.settings import Classifier
from vitrail.vit.config import Colours, Gelu, ViTConfig, check_colours, shorten
from vitrail.vit.resnet import stride
from vitrail.weights import timm_hybrid
from vitrail.weights.files import read_json, write_tensors, write_text
from vitrail.weights.formats import (
    Imported,
    Shape,
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

MEND = (
    "load it with timm's create_model(…, pretrained=True), then timm.models.save_for_hf(model, FOLDER, "
    "safe_serialization=True)"
)
ENDS = {"patch_embedding.projection": "patch_embed.proj", "norm": "norm", "head": "head"}
TOKENS = {"class_token": "cls_token", "position_embedding": "pos_embed"}
BLOCK = {
    "attention_norm": "norm1", "attention.qkv": "attn.qkv", "attention.out": "attn.proj", "mlp_norm": "norm2",
    "mlp.hidden": "mlp.fc1", "mlp.out": "mlp.fc2",
}  # fmt: skip
FOREIGN = {
    r"^(dist_token|head_dist)": "a distillation token",
    r"^reg_token": "register tokens",
    r"\.(ls\d?|gamma_\d)(\.|$)": "LayerScale",
    r"\.attn\.(q_norm|k_norm|q_bias|rel_pos|scale_norm|norm)": "attention of another kind",
    r"^norm_pre": "a norm before the first block",
    r"^attn_pool": "pooling by attention",
    r"^patch_embed\.norm": "a norm behind the patches",
    r"^mask_token": "a token for masked patches",
    r"\.(attns|ffns)\.": "parallel parts in each block",
    r"\.mlp\.(norm|fc1_g|fc1_x|w12|w3|gate)": "an MLP of another kind",
}
# The architectures whose details are Vitrail's, where `model_args` says nothing else, and their heads: the number does
# not show in the weights.
ARCHITECTURE = r"(?:vit|deit)_(tiny|small|base|large|huge|giant|gigantic)_patch\d+_(?:gap_)?\d+"
HEADS = {"tiny": 3, "small": 6, "base": 12, "large": 16, "huge": 16, "giant": 16, "gigantic": 16}
OTHER_HEADS = {"vit_base_patch16_gap_224": 16}
# What `model_args` may say: anything of these, that of those, and nothing of all that timm's model could be besides.
FREE = {
    "img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth", "num_heads", "mlp_ratio",
    "act_layer", "class_token", "fc_norm", "dynamic_img_size", "dynamic_img_pad", "strict_img_size", "drop_rate",
    "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate", "weight_init", "fix_init",
}  # fmt: skip
PLAIN = {"qkv_bias": True, "proj_bias": True, "final_norm": True, "pos_embed": "learn", "norm_layer": "layernorm"}
GELUS: dict[Any, Gelu] = {None: "exact", "gelu": "exact", "gelu_tanh": "tanh"}
WRITTEN: dict[Gelu, str] = {"exact": "gelu", "tanh": "gelu_tanh"}
EPSILON = 1e-6  # of timm's LayerNorm, whatever a config says
IMAGENET: tuple[Colours, Colours] = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # timm's, where a config has none
# Names that timm has for the paper's shapes; each can be changed into every other.
SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}
KNOWN = {
    "vit_tiny_patch16_224", "vit_small_patch16_224", "vit_small_patch32_224", "vit_base_patch8_224",
    "vit_base_patch16_224", "vit_base_patch32_224", "vit_large_patch16_224", "vit_large_patch32_224",
    "vit_huge_patch14_224",
}  # fmt: skip


def names(ours: str, stages: timm_hybrid.Stages | None = None) -> tuple[str, ...]:
    """What timm calls one of Vitrail's weights; `stages` are those of the ResNet in front."""
    if ours.startswith("resnet."):
        return (timm_hybrid.name(ours, stages),)
    if ours in TOKENS:
        return (TOKENS[ours],)
    module, _, kind = ours.rpartition(".")
    if found := re.fullmatch(r"blocks\.(\d+)\.(.+)", module):
        return (f"blocks.{found[1]}.{BLOCK[found[2]]}.{kind}",)
    return (f"{ENDS[module]}.{kind}",)


def read_timm(folder: Path) -> Imported:
    """The model of a folder that timm wrote.

    Raises:
        BadInput: something is missing or damaged, config and weights disagree, or it is a model that Vitrail's cannot
            be.
    """
    at, weights_at = folder / "config.json", folder / "model.safetensors"
    config = read_json(at)
    seen = section(config, "pretrained_cfg", at) if "pretrained_cfg" in config else config  # older ones are one list
    options = section(config, "model_args", at)
    architecture = _architecture(config, at)  # first: of another model, nothing else that is said would help
    weights = read_weights(folder, MEND)
    refuse(weights, FOREIGN, weights_at)
    _check_options(options, at)
    blocks = timm_hybrid.read_stages(architecture, weights, at, weights_at)
    heads = options.get("num_heads", OTHER_HEADS.get(architecture, HEADS[architecture.split("_")[1]]))
    classifier = _classifier(config, options, weights, at)
    if "norm.weight" not in weights:  # it is behind the pooling, of the class token: that comes to the same
        weights = {re.sub(r"^fc_norm\.", "norm.", name): tensor for name, tensor in weights.items()}
    named = partial(names, stages=blocks)
    shape = measure(weights, named, weights_at)
    if blocks is not None:  # patches are of the feature map, and so are the channels that are projected
        sides = shape.image_size * stride(blocks)
        shape = replace(shape, image_size=sides, channels=timm_hybrid.channels(weights, blocks))
    compare(_said(config, options, seen, shape), at, weights_at)
    ours = shape.config(
        at, num_heads=heads, classifier=classifier, gelu=_gelu(options, at),
        layer_norm_eps=EPSILON, dropout=options.get("proj_drop_rate", 0.0), resnet_blocks=blocks,
    )  # fmt: skip
    tensors = to_ours(weights, named, ours, weights_at)
    classes = _classes(config, seen, shape.num_classes, at)
    return Imported(ours, tensors, classes, *_colours(seen, at), _shorter_side(seen, ours.image_size))


def _said(
    config: dict[str, Any], options: dict[str, Any], seen: dict[str, Any], shape: Shape
) -> dict[str, tuple[Any, Any]]:
    """What the config says of the shape, and what that is. As timm reads it, `model_args` comes before what else says
    the same, which may be of the weights that a model was trained from."""
    size = seen.get("input_size")
    channels, *sides = size if isinstance(size, list) and size else [None]
    said = {
        "embed_dim": (options.get("embed_dim"), shape.hidden_size),
        "num_features": (config.get("num_features"), shape.hidden_size),
        "depth": (options.get("depth"), shape.num_layers),
        "patch_size": (side(options.get("patch_size")), shape.patch_size),
        "in_chans": (options.get("in_chans", channels), shape.channels),
        "img_size": (side(options.get("img_size", sides or None)), shape.image_size),
    }
    if shape.num_classes is not None:
        said["num_classes"] = (_first(options, config, seen, key="num_classes"), shape.num_classes)
    if isinstance(ratio := options.get("mlp_ratio"), int | float) and abs(ratio) < 1e6:
        said["mlp_ratio · embed_dim"] = (int(shape.hidden_size * ratio), shape.mlp_dim)
    return said


def _first(*places: dict[str, Any], key: str) -> Any:
    """What the first of them says that says anything."""
    return next((place[key] for place in places if place.get(key) is not None), None)


def _check_options(options: dict[str, Any], path: Path) -> None:
    """See to it that `model_args` asks for nothing that Vitrail's model lacks.

    Raises:
        BadInput: it does; the message names the option.
    """
    for key, value in options.items():
        if key in FREE or value is None or value == PLAIN.get(key, False) or (key not in PLAIN and value in (0, "")):
            continue
        raise BadInput(f"{path} has model_args with {key:.60} = {shorten(value)}, which Vitrail's model has not.")


def _classifier(config: dict[str, Any], options: dict[str, Any], weights: Collection[str], path: Path) -> Classifier:
    """What the head reads.

    Raises:
        BadInput: something else than the class token, or the mean of all tokens behind a norm where there is none.
    """
    default = "avg" if "_gap_" in str(config.get("architecture")) else "token"
    pool = _first(options, config, key="global_pool") or default
    if pool == "token" and "cls_token" in weights:
        return "token"
    if pool == "avg" and "cls_token" not in weights and "fc_norm.weight" not in weights:
        return "gap"
    token = "and a class token" if "cls_token" in weights else "without a class token"
    norm = ", its norm behind the pooling (fc_norm)" if "fc_norm.weight" in weights else ""
    raise BadInput(
        f"{path} is of a model with global_pool = {shorten(pool)} {token}{norm}. Vitrail's reads the class token, or "
        "has none and reads the mean of all tokens, behind their norm."
    )


def _architecture(config: dict[str, Any], path: Path) -> str:
    """Which one it is.

    Raises:
        BadInput: it is none that is known to be like Vitrail's model.
    """
    name = config.get("architecture")
    if isinstance(name, str) and (re.fullmatch(ARCHITECTURE, name) or timm_hybrid.stages_named(name) is not None):
        return name
    raise BadInput(
        f"{path} is of the architecture {shorten(name)}. Vitrail reads those of timm that differ from its own "
        "model in nothing: vit_SIZE_patchP_S and deit_SIZE_patchP_S, of size tiny to gigantic; and the hybrids of the "
        f"official code, vit_SIZE_R_S, with {', '.join(timm_hybrid.STAGES)} for R."
    )


def _gelu(options: dict[str, Any], path: Path) -> Gelu:
    """Which GELU it has.

    Raises:
        BadInput: another activation.
    """
    activation = options.get("act_layer")
    if activation is not None and (not isinstance(activation, str) or activation.lower() not in GELUS):
        raise BadInput(f"{path} has act_layer = {shorten(activation)}; Vitrail's model has gelu and gelu_tanh.")
    return GELUS[activation and activation.lower()]


def _classes(config: dict[str, Any], seen: dict[str, Any], count: int | None, path: Path) -> tuple[str, ...]:
    """The names of the classes; their numbers where the config has none; none where there is no head.

    Raises:
        BadInput: it has more or fewer than the head.
    """
    found = _first(config, seen, key="label_names") or _first(config, seen, key="labels")
    if count is None or not found:
        return tuple(map(str, range(count or 0)))
    if not isinstance(found, list) or len(found) != count:
        raise BadInput(f"{path} has label_names = {shorten(found)}, and not the names of the head's {count} classes.")
    return tuple(map(str, found))


def _colours(seen: dict[str, Any], path: Path) -> tuple[Colours, Colours]:
    """Mean and standard deviation that images are normalised by.

    Raises:
        BadInput: they cannot be.
    """
    try:
        return check_colours(seen.get("mean", IMAGENET[0]), seen.get("std", IMAGENET[1]))
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


def _shorter_side(seen: dict[str, Any], size: int) -> int | None:
    """What an image's is to be resized to; None where the config does not say, or says what Vitrail does not do."""
    share = seen.get("crop_pct")
    return math.floor(size / share) if isinstance(share, int | float) and 0.1 <= share <= 1 else None


def unsaid_by_timm(config: ViTConfig) -> dict[str, Any]:
    """The options of a model that timm's VisionTransformer has not."""
    stages = config.resnet_blocks if config.resnet_blocks in timm_hybrid.STAGES.values() else None
    return unsaid(config, {"representation_size": None, "layer_norm_eps": EPSILON, "resnet_blocks": stages})


def write_timm(folder: Path, model: Imported, card: str) -> None:
    """Write a model, none of whose options are unsaid, into a folder, as
    `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it; `card` is its README.

    Raises:
        BadInput: it is a hybrid, and has other logits in timm.
    """
    if model.config.resnet_blocks is not None:
        timm_hybrid.check_epsilons(model)
    weights = to_theirs(model.tensors, partial(names, stages=model.config.resnet_blocks))
    write_tensors(folder / "model.safetensors", weights, metadata={"format": "pt"})
    write_text(folder / "config.json", json.dumps(_written_config(model), indent=2) + "\n")
    # Class names come from anywhere, and may have halves of characters in them, which UTF-8 cannot say.
    write_text(folder / "README.md", card)


def _written_config(model: Imported) -> dict[str, Any]:
    """What config.json is to say: all of the shape, so that nothing hangs on what the architecture's name brings."""
    config, size = model.config, model.config.image_size
    named, first = f"vit_{SIZES.get(config.hidden_size)}_patch{config.patch_size}_224", "patch_embed.proj"
    named = named if named in KNOWN else "vit_base_patch16_224"
    if (stages := config.resnet_blocks) is not None:
        named = timm_hybrid.architecture(stages, SIZES.get(config.hidden_size))
        first = timm_hybrid.name("resnet.root.weight", stages).removesuffix(".weight")
    pool = "token" if config.classifier == "token" else "avg"
    return {
        "architecture": named,
        "num_classes": config.num_classes,
        "num_features": config.hidden_size,
        "global_pool": pool,
        "label_names": list(model.classes),
        "model_args": {
            "img_size": size,
            "patch_size": config.patch_size,
            "num_classes": config.num_classes,
            "embed_dim": config.hidden_size,
            "depth": config.num_layers,
            "num_heads": config.num_heads,
            "mlp_ratio": mlp_ratio(config.hidden_size, config.mlp_dim),
            "act_layer": WRITTEN[config.gelu],
            "class_token": config.classifier == "token",
            "global_pool": pool,
            "fc_norm": False,
            "pos_drop_rate": config.dropout,
            "proj_drop_rate": config.dropout,
        },
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, size, size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": crop_share(size, model.resized_to),
            "crop_mode": "center",
            "mean": list(model.mean),
            "std": list(model.std),
            "num_classes": config.num_classes,
            "pool_size": None,
            "first_conv": first,
            "classifier": "head",
        },
    }


def mlp_ratio(hidden_size: int, mlp_dim: int) -> float:
    """The factor by which timm, which rounds down, comes from the one to the other."""
    ratio = mlp_dim / hidden_size
    return ratio if int(hidden_size * ratio) == mlp_dim else (mlp_dim + 0.5) / hidden_size


def crop_share(size: int, shorter_side: int) -> float:
    """The share `crop_pct` by which timm, which rounds down, comes from a square of that size to an image's side."""
    share = size / shorter_side
    return share if math.floor(size / share) == shorter_side else size / (shorter_side + 0.5)
