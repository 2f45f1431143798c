"""What to train: one frozen dataclass whose fields are the settings, and the table of recipes.

Every field is also a flag of `vitrail train` (`num_layers` is `--num-layers`), so that what can be set, its
type, its default and its help stand here and nowhere else. Nothing here imports torch: help must be instant.
"""

import dataclasses
import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from vitrail.errors import BadInput


def setting(default: Any, help: str) -> Any:
    """A field of `Recipe`: its default, and the sentence that `vitrail train -h` shows."""
    return field(default=default, metadata={"help": help})


# What numbers may be: settings, what fits, and the words for it. A NaN fits nowhere.
RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("image_size patch_size hidden_size mlp_dim num_heads num_layers epochs batch_size accumulate repeats",
     lambda value: value >= 1, "be at least 1"),
    ("lr muon_lr weight_decay warmup crop mixup cutmix", lambda value: value >= 0, "not be negative"),
    ("rotate", lambda value: 0 <= value <= 180, "be from 0 to 180 degrees"),
    ("seed", lambda value: 0 <= value < 2**63, "not be negative, and be below 2^63"),
    ("resized_crop jitter erase first_share", lambda value: 0 <= value <= 1, "be from 0 to 1"),
    ("dropout stochastic_depth patch_dropout holdout label_smoothing average",
     lambda value: 0 <= value < 1, "be at least 0 and below 1"),
    ("layer_decay decay_share", lambda value: 0 < value <= 1, "be above 0 and at most 1"),
    ("clip", lambda value: value is None or value > 0, "be above 0, or left out"),
)  # fmt: skip

# Settings that do nothing unless another is set, and how that is to be.
NEEDS: tuple[tuple[str, Callable[["Recipe"], bool], str], ...] = (
    ("first_share", lambda recipe: recipe.first_size is not None, "first_size is set"),
    ("muon_lr", lambda recipe: recipe.optimizer == "muon", "optimizer is muon"),
    ("decay_share", lambda recipe: recipe.schedule != "constant", "schedule is linear or cosine"),
)

# Of the model's shape; `ViTConfig` has them too.
Classifier = Literal["token", "gap"]
Positions = Literal["learnt", "sincos", "rotary"]
Stem = Literal["patch", "convolutions"]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a training run computes. Checked once, on construction.

    Raises:
        BadInput: a value is out of range, or two values do not go together.
    """

    # The images
    data: str = setting("digits", "digits, tiny-imagenet, a folder, or a .zip / .tar archive")
    holdout: float = setting(0.0, "tune on this share of the training images, held out, instead of the real split")
    image_size: int = setting(64, "side of the square that the model sees, in pixels")
    # The papers: 2404.00498 (flip alternate), 1409.4842 (resized_crop), 2204.07118, 1909.13719 and 2103.10158 (policy),
    # 1708.04896 (erase), 1710.09412 (mixup), 1905.04899 (cutmix), 1901.09335 (repeats). augment.py and batches.py say
    # where their code does otherwise.
    flip: Literal["none", "random", "alternate"] = setting(
        "none", "mirror a random half of the training images; alternate: each image every other time that it comes"
    )
    rotate: float = setting(0.0, "rotate each training image by up to this many degrees either way")
    crop: int = setting(0, "shift each training image by up to this many pixels, edges reflected")
    resized_crop: float = setting(
        0.0, "enlarge a random rectangle of each training image, of this share of its area or more"
    )
    policy: Literal["none", "3-augment", "rand-augment", "trivial-augment"] = setting(
        "none", "operations drawn for each training image, as in the paper of that name"
    )
    jitter: float = setting(
        0.0, "change brightness, contrast and colour by up to this share (3-augment: by 0.3 unless set)"
    )
    erase: float = setting(0.0, "fill a random rectangle with noise in this share of the training images")
    mixup: float = setting(0.0, "blend pairs of training images, in shares from Beta(X, X)")
    cutmix: float = setting(
        0.0,
        "paste rectangles between pairs of training images, areas from Beta(X, X); with mixup, each batch has either",
    )
    repeats: int = setting(1, "how often each image comes in a batch, augmented anew each time")

    # The model, in the paper's words
    patch_size: int = setting(8, "side of a patch, in pixels")
    hidden_size: int = setting(384, "width of a token")
    mlp_dim: int = setting(1536, "width of the MLP's hidden layer")
    num_heads: int = setting(6, "attention heads")
    num_layers: int = setting(6, "encoder blocks")
    classifier: Classifier = setting("token", "the head reads the class token, or the mean of all patches")
    representation_size: int | None = setting(None, "width of a tanh layer before the head (none: a linear head)")
    dropout: float = setting(0.0, "share of activations dropped")
    # What later papers add: 2205.01580 and 2403.13298 (positions), 2106.14881 (stem), 2309.16588 (registers),
    # 2302.05442 (qk_norm), 2103.17239 (layer_scale), 1603.09382 (stochastic_depth), 2208.07220 (patch_dropout)
    positions: Positions = setting(
        "learnt", "learnt embeddings, fixed sines and cosines, or queries and keys rotated by row and column"
    )
    stem: Stem = setting("patch", "one projection of each patch, or convolutions of stride 2 down to it")
    registers: int = setting(0, "extra tokens that no patch stands behind, and that the head does not read")
    qk_norm: bool = setting(False, "normalise each head's queries and keys")
    layer_scale: float | None = setting(None, "learn a scale of each channel of a residual, which begins at this")
    initial_weights: Literal["official", "torch"] = setting(
        "official", "as in the official code, or as torch draws them: smaller, and the head not zero"
    )
    zero_residual: bool = setting(False, "begin with blocks that add nothing: their last projections are zero")
    stochastic_depth: float = setting(
        0.0, "share of the images for which a residual is left out in the last block; in those before it, less"
    )
    patch_dropout: float = setting(0.0, "share of each training image's patches that is left out: faster steps")

    # The optimisation
    epochs: int = setting(100, "passes over the training images")
    batch_size: int = setting(200, "images a step")
    accumulate: int = setting(1, "work through each batch in this many parts, to save memory (cuda finds it by itself)")
    checkpoint_activations: bool = setting(
        False, "keep only what enters each block, and compute the rest again: less memory, a third more time"
    )
    optimizer: Literal["adamw", "adam", "sgd", "muon"] = setting(
        "adamw", "adam: its weight decay is coupled (L2); muon: for the matrices of the blocks, adamw for the rest"
    )
    lr: float = setting(1e-3, "peak learning rate")
    muon_lr: float = setting(0.02, "peak learning rate of what muon has")
    layer_decay: float = setting(1.0, "multiply the learning rate by this for each layer between a weight and the head")
    weight_decay: float = setting(0.0, "weight decay (adamw, muon: decoupled, and not on biases, norms and embeddings)")
    label_smoothing: float = setting(0.0, "share of each label that is spread evenly over all classes")  # 1512.00567
    schedule: Literal["constant", "linear", "cosine"] = setting(
        "cosine", "of the learning rate, after the warm-up, to 0"
    )
    decay_share: float = setting(1.0, "the schedule takes this last share of the steps after the warm-up")
    warmup: float = setting(0.02, "linear warm-up: a share of all steps, or, from 1 up, a number of steps")
    clip: float | None = setting(None, "clip the gradient's global norm to this")
    average: float = setting(
        0.0, "evaluate and keep a running average of the weights, of which each step leaves this share (0: none)"
    )
    # 2104.00298, section 4, without its growing augmentation
    first_size: int | None = setting(None, "shrink the training images to this side at first: faster steps")
    first_share: float = setting(0.5, "the share of all steps that first_size is for")

    # Where and how
    seed: int = setting(0, "decides initial weights, order, augmentation and dropout")
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "auto: cuda, else mps, else cpu")
    compile: bool = setting(False, "have torch compile the model: a slow start, then faster steps on a GPU")
    precision: Literal["fp32", "bf16"] = setting("fp32", "of the matrix products; weights and sums stay fp32")

    @property
    def mixes(self) -> bool:
        """Whether training images are mixed with one another."""
        return self.mixup > 0 or self.cutmix > 0

    def __post_init__(self) -> None:
        flip = vars(self)["flip"]
        if isinstance(flip, bool):  # what the first run folders have
            object.__setattr__(self, "flip", "random" if flip else "none")
        self._check_types()
        for names, fits, must in RANGES:
            for name in names.split():
                if not fits(getattr(self, name)):
                    raise BadInput(f"{name} is {getattr(self, name)}; it must {must}.")
        self._check_sizes()
        self._check_batch()

    def _check_types(self) -> None:
        for name, kind in get_type_hints(Recipe).items():
            value, choices = getattr(self, name), get_args(kind)
            if get_origin(kind) is Literal and value not in choices:
                near = nearest(str(value), choices)
                raise BadInput(f"{name} is {value!r}; it must be one of {', '.join(choices)}{near}")
            types = tuple(part for part in choices or (kind,) if isinstance(part, type))
            if types and not isinstance(value, (*types, int) if float in types else types):
                raise BadInput(
                    f"{name} is {value!r}; it must be of type {' or '.join(part.__name__ for part in types)}."
                )

    def _check_sizes(self) -> None:
        smaller = range(self.patch_size, self.image_size, self.patch_size)
        if self.first_size is not None and self.first_size not in smaller:
            raise BadInput(
                f"first_size is {self.first_size}; with patches of {self.patch_size} and images of {self.image_size} "
                f"pixels it may be {', '.join(map(str, smaller)) or 'nothing, so leave it out'}."
            )
        if self.crop >= self.image_size:
            raise BadInput(f"crop is {self.crop}, as large as the image ({self.image_size} pixels); take less.")

    def _check_batch(self) -> None:
        if self.batch_size % self.accumulate:
            parts = [n for n in range(1, self.batch_size + 1) if self.batch_size % n == 0]
            raise BadInput(
                f"a batch of {self.batch_size} does not divide into {self.accumulate} equal parts; "
                f"accumulate may be {', '.join(map(str, parts))}."
            )
        if self.batch_size % self.repeats:
            raise BadInput(
                f"a batch of {self.batch_size} does not hold each image {self.repeats} times; "
                f"take a multiple of {self.repeats} for batch_size."
            )
        each = self.batch_size // self.accumulate
        if self.mixes and each % 2:
            raise BadInput(
                f"mixup and cutmix mix pairs of images, and a batch of {self.batch_size} in {self.accumulate} parts "
                f"has {each} in each; take a multiple of {2 * self.accumulate} for batch_size."
            )


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

RECIPES: dict[str, Recipe] = {
    # vitrail train: 46 s on two cores of a Xeon, top-1 0.981 ± 0.003 of the 359 test scans over seeds 0 to 2
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
}  # fmt: skip


@dataclass(frozen=True)
class Resolved:
    """A recipe with all its values, and for each of them who set it: `default`, `recipe` or `command line`."""

    name: str
    recipe: Recipe
    set_by: dict[str, str]


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
    recipe = dataclasses.replace(RECIPES[name], **overrides)
    for key, met, how in NEEDS:  # asked for here, where a recipe's own may be left without what it is for
        if key in overrides and not met(recipe):
            raise BadInput(f"{key} does nothing unless {how}.")
    set_by = {key: "default" if getattr(RECIPES[name], key) == default else "recipe" for key, default in known.items()}
    return Resolved(name, recipe, set_by | dict.fromkeys(overrides, "command line"))


def nearest(word: str, words: Any) -> str:
    """`; did you mean 'X'?` for the known word nearest to a mistyped one, or a full stop."""
    close = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {close[0]!r}?" if close else "."
