"""What to train: the table of recipes, and a recipe with what is set otherwise."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitrail.errors import BadInput, nearest
from vitrail.settings import CLASSES_ONLY, NEEDS, OF_STEM, Recipe

# The three experiments that Vitrail started from share all but these settings: Adam with coupled weight decay,
# batches of 200 at a peak of 1e-3, rotation by up to 10 degrees and flips, float32, no clipping, no smoothing. With
# the official initial weights, attention collapses at that rate, and the curve is not the original's (docs/log.md).
_ORIGINAL: dict[str, Any] = {
    "data": "tiny-imagenet", "image_size": 64, "flip": "random", "rotate": 10.0,
    "optimizer": "adam", "lr": 1e-3, "batch_size": 200, "schedule": "linear", "warmup": 0.02,
    "initial_weights": "torch",
}  # fmt: skip
_BASE_8: dict[str, Any] = {
    "patch_size": 16, "hidden_size": 512, "mlp_dim": 2048, "num_heads": 8, "num_layers": 8, "dropout": 0.1,
}  # fmt: skip

YOURS = ""  # data that has to be named

# Small images and few epochs.
_FEW: dict[str, Any] = {
    "data": YOURS, "image_size": 64, "flip": "random", "crop": 6,
    "batch_size": 250, "optimizer": "muon", "lr": 2e-3, "muon_lr": 0.01, "weight_decay": 0.05,
    "label_smoothing": 0.1, "schedule": "linear", "cooldown": 0.7, "warmup": 0.05, "precision": "auto",
}  # fmt: skip
# A plain ViT for them.
_SMALL: dict[str, Any] = _FEW | {
    "patch_size": 8, "hidden_size": 256, "mlp_dim": 1024, "num_heads": 4, "num_layers": 6, "classifier": "gap",
    "zero_residual": True,
}  # fmt: skip
# For processors. In little time, images seen count for more than the width of a model (docs/experiments.md): a narrow
# one, and most of its steps on images of a quarter of the patches.
_HOUR: dict[str, Any] = _SMALL | {
    "data": "tiny-imagenet", "hidden_size": 128, "mlp_dim": 512, "num_heads": 2, "first_size": 32, "first_share": 0.6,
    "gelu": "exact",
}  # fmt: skip
# Minutes of one H100: twice as deep, and what keeps a model that sees each image for the hundredth time from learning
# it by heart.
_H100: dict[str, Any] = _SMALL | {
    "data": "tiny-imagenet", "hidden_size": 384, "mlp_dim": 1536, "num_heads": 6, "num_layers": 12,
    "batch_size": 500, "policy": "3-augment", "mixup": 0.8, "cutmix": 1.0, "stochastic_depth": 0.1,
}  # fmt: skip

DEFAULT = "digits"
_CIFAR: dict[str, Any] = {"image_size": 32, "patch_size": 4, "crop": 4, "epochs": 50}

FINE_TUNE = "fine-tune"  # the recipe that goes on from weights
PRETRAINING: dict[str, Any] = {"objective": "pixels"}  # what pre-training has where nothing else is said

RECIPES: dict[str, Recipe] = {
    # vitrail train: 51 s on two cores of a Xeon, top-1 0.981 ± 0.003 of the 359 test scans over seeds 0 to 2
    # (results/digits-seed-*; docs/log.md has what was tried).
    "digits": Recipe(
        data="digits", image_size=16, rotate=15.0, crop=1,  # the scans are 8 × 8: half a pixel is all they bear
        patch_size=4, hidden_size=64, mlp_dim=256, num_heads=4, num_layers=4, classifier="gap",
        epochs=80, batch_size=32, lr=3e-3, weight_decay=0.05, warmup=0.1, clip=1.0,
    ),
    # vitrail train initial: the original ended below 0.06 of Tiny ImageNet's 10,000 validation images. It does not say
    # after how many epochs, or at what learning rate.
    "initial": Recipe(**_ORIGINAL | _BASE_8 | {"weight_decay": 0.03, "schedule": "constant", "warmup": 0.0}),
    # vitrail train vit-10: the original reached 0.25.
    "vit-10": Recipe(**_ORIGINAL | _BASE_8 | {"weight_decay": 0.001, "epochs": 100}),
    # vitrail train vit-12: the original reached 0.383, 0.385 at best (results/original-vit-12.json).
    "vit-12": Recipe(
        **_ORIGINAL, patch_size=8, hidden_size=384, mlp_dim=1536, num_heads=6, num_layers=6, dropout=0.05, epochs=150,
    ),
    # vitrail train laptop: 59 minutes of two cores of a Zen 4 EPYC, top-1 0.580 (results/laptop-seed-0); with 20 epochs
    # 0.570 in 55 (results/laptop-20-epochs-seed-0). GroupNorm in its stem, whole images behind the small ones, no
    # jitter and 18 epochs came to 0.553 in 52 (results/laptop-group-norm-seed-0); the same with 21 epochs, a sixth
    # layer and a stem without units, at the blocks' rate, to 0.538 in 54 (results/laptop-stem-seed-0). No other
    # library's format says a stem; stem=patch, epochs=16 and no stochastic depth came to 0.489 in 52 minutes of two
    # cores of a Xeon without bf16 (results/laptop-128-wide-seed-0). coffee, a plain ViT: 9 minutes of the EPYC, 0.397
    # (results/coffee-bf16-seed-0); 12.7 of the Xeon, 0.399 (results/coffee-tanh-seed-0).
    "laptop": Recipe(
        **_HOUR | {"num_layers": 5}, stem="convolutions", stem_units=4, stem_rate=2.0, stochastic_depth=0.1,
        jitter=0.3, crop_size=56, epochs=21,
    ),
    "coffee": Recipe(**_HOUR | {"hidden_size": 96, "mlp_dim": 384, "num_heads": 2}, epochs=6),
    # vitrail train coffee-cnn: a ResNet-18 half as wide on the same images for the same time, by the same optimizer:
    # 0.175 (results/coffee-cnn-seed-0).
    "coffee-cnn": Recipe(
        **_FEW | {"data": "tiny-imagenet", "muon_lr": 0.1}, architecture="resnet-18", resnet_width=32, first_size=32,
        first_share=0.8, epochs=1,
    ),
    # For seconds and minutes of an H100. Not measured: none was at hand. Both of tiny-imagenet go on from `vitrail
    # pretrain` by the same recipe (bench/h100.sh does both), of as many epochs, which see a quarter of the patches. At
    # 22.9% of its peak, the best share that has been published for such a model (docs/scale.md), an epoch of each takes
    # 4.8 s together, so that 100 leave two of ten minutes for the rest.
    "speedrun": Recipe(**_SMALL | {"data": "tiny-imagenet"}, first_size=32, first_share=0.6, epochs=8),
    "tiny-imagenet": Recipe(**_H100, epochs=100),
    "tiny-imagenet-20": Recipe(**_H100, epochs=200),
    # vitrail train small --data D: for any folder of small images. Larger ones are shrunk to 64 pixels. Not measured.
    "small": Recipe(**_SMALL, epochs=50),
    # vitrail train cifar-10, cifar-100: the same model on as many patches. Not measured: no copy was at hand.
    "cifar-10": Recipe(**_SMALL | _CIFAR | {"data": "cifar-10"}),
    "cifar-100": Recipe(**_SMALL | _CIFAR | {"data": "cifar-100"}),
    # vitrail train resnet-18: the CNN to compare with. SGD, its rate for a batch of 256, decay and epochs are BiT's
    # (1912.11370, section 3.3), which steps its rate down where this falls along a cosine, and whose activations come
    # first, where these come last, like the hybrid's.
    "resnet-18": Recipe(
        data="tiny-imagenet", image_size=64, flip="random", crop=6, architecture="resnet-18",
        epochs=90, batch_size=256, optimizer="sgd", lr=0.03, weight_decay=1e-4, warmup=0.05,
    ),
    # vitrail train --from WEIGHTS, which say the shape. The paper's fine-tuning (table 4): its 10,000 steps over CIFAR
    # are these epochs. Rate, warm-up (500 steps) and augmentation: the official code's (configs/common.py,
    # input_pipeline.py).
    "fine-tune": Recipe(
        data=YOURS, image_size=384, flip="random", resized_crop=0.05, patch_size=16,
        epochs=102, batch_size=512, optimizer="sgd", lr=0.03, warmup=500, clip=1.0,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Resolved:
    """A recipe with all its values, and for each who set it: `default`, `recipe`, `command line`, the `weights` that it
    begins with, the `objective` that has no use for it, the `stem` that it is left out with, the `images` that are
    fewer, or the `machine`."""

    name: str
    recipe: Recipe
    set_by: dict[str, str]
    weights: str | None = None  # that the run begins with, as they were named; None for random ones
    digest: str = ""  # of these


def default_recipe(from_weights: bool) -> str:
    """The recipe that is trained where none is named."""
    return FINE_TUNE if from_weights else DEFAULT


def resolve(name: str, **overrides: Any) -> Resolved:
    """The named recipe with `overrides` on top.

    Raises:
        BadInput: no recipe or field has that name (the nearest is offered), or a value does not do, or does nothing.
    """
    if name not in RECIPES:
        there = f" To train on {name}: vitrail train --data {name}" if Path(name).exists() else ""
        raise BadInput(f"there is no recipe {name!r}{nearest(name, RECIPES)} There are: {', '.join(RECIPES)}.{there}")
    known = {f.name: f.default for f in dataclasses.fields(Recipe)}
    for key in overrides:
        if key not in known:
            raise BadInput(f"a recipe has no setting {key!r}{nearest(key, known)}")
    own = RECIPES[name]
    pretrained = overrides.get("objective", own.objective) != "classes"
    unused = dict.fromkeys(OF_STEM, "stem") if overrides.get("stem") == "patch" else {}
    unused |= dict.fromkeys(CLASSES_ONLY, "objective") if pretrained else {}
    unused = {key: by for key, by in unused.items() if getattr(own, key) != CLASSES_ONLY[key]}
    recipe = dataclasses.replace(own, **{key: CLASSES_ONLY[key] for key in unused} | overrides)
    for key, met, how in NEEDS:  # asked for here, where a recipe's own may be left without what it is for
        if key in overrides and not met(recipe):
            raise BadInput(f"{key} does nothing unless {how}.")
    set_by = {key: "default" if getattr(own, key) == default else "recipe" for key, default in known.items()}
    set_by |= unused | dict.fromkeys(overrides, "command line")
    return Resolved(name, recipe, set_by)
