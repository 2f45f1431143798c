"""What can be set: one frozen dataclass whose fields are the settings of a recipe.

Every field is also a flag of `vitrail train` (`num_layers` is `--num-layers`), so that what can be set, its
type, its default and its help stand here and nowhere else. Nothing here imports torch: help must be instant.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from vitrail.errors import BadInput, nearest


def setting(default: Any, help: str) -> Any:
    """A field of `Recipe`: its default, and the sentence that `vitrail train -h` shows."""
    return field(default=default, metadata={"help": help})


# What numbers may be: settings, what fits, and the words for it. A NaN fits nowhere.
RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("image_size patch_size hidden_size mlp_dim num_heads num_layers resnet_width epochs batch_size accumulate repeats "
     "decoder_layers decoder_hidden_size", lambda value: value >= 1, "be at least 1"),
    ("lr muon_lr stem_rate weight_decay warmup crop mixup cutmix stem_units", lambda value: value >= 0,
     "not be negative"),
    ("rotate", lambda value: 0 <= value <= 180, "be from 0 to 180 degrees"),
    ("seed", lambda value: 0 <= value < 2**63, "not be negative, and be below 2^63"),
    ("resized_crop jitter erase first_share last_share", lambda value: 0 <= value <= 1, "be from 0 to 1"),
    ("dropout stochastic_depth patch_dropout holdout label_smoothing ema_decay",
     lambda value: 0 <= value < 1, "be at least 0 and below 1"),
    ("layer_decay cooldown", lambda value: 0 < value <= 1, "be above 0 and at most 1"),
    ("clip", lambda value: value is None or value > 0, "be above 0, or left out"),
    ("mask_ratio", lambda value: value is None or 0 < value < 1, "be above 0 and below 1, or left out"),
)  # fmt: skip

# The Vision Transformer's sizes, which a ResNet does not read, and what that cannot have beside them.
SIZES = ("patch_size", "hidden_size", "mlp_dim", "num_heads", "num_layers", "classifier")
# What weights decide where a run begins with some, beside what it sets back to the defaults (transfer.py).
OF_WEIGHTS = (*SIZES, "gelu", "stem", "stem_units", "layer_scale")
TRANSFORMER_ONLY = (
    "representation_size", "dropout", "gelu", "stem", "stem_units", "stem_rate", "layer_scale", "initial_weights",
    "zero_residual", "stochastic_depth", "patch_dropout", "layer_decay", "objective",
)  # fmt: skip

# What a stem of convolutions has, and what a model without one has instead.
OF_STEM: dict[str, Any] = {"stem_units": 0, "stem_rate": 1.0}

# Settings that do nothing unless another is set, and how that is to be.
NEEDS: tuple[tuple[str, Callable[["Recipe"], bool], str], ...] = (
    ("first_share", lambda recipe: recipe.first_size is not None, "first_size is set"),
    ("last_share", lambda recipe: recipe.crop_size is not None, "crop_size is set"),
    ("stem_rate", lambda recipe: recipe.stem_rate == 1 or recipe.optimizer == "muon", "optimizer is muon"),
    ("muon_lr", lambda recipe: recipe.optimizer == "muon", "optimizer is muon"),
    ("cooldown", lambda recipe: recipe.schedule != "constant", "schedule is linear or cosine"),
    ("mask_ratio", lambda recipe: recipe.self_supervised, "objective is patches or pixels"),
    ("decoder_layers", lambda recipe: recipe.objective == "pixels", "objective is pixels"),
    ("decoder_hidden_size", lambda recipe: recipe.objective == "pixels", "objective is pixels"),
    ("resnet_width", lambda recipe: recipe.architecture != "vit", "architecture is resnet-18"),
    *((name, lambda recipe: recipe.architecture == "vit", "architecture is vit") for name in SIZES),
)

# Settings of run folders from before the first release: what they are called now, and those that are no more, with the
# one value that says what is so without them.
RENAMED = {"average": "ema_decay", "decay_share": "cooldown"}
GONE: dict[str, Any] = {"positions": "learnt", "registers": 0, "qk_norm": False}


def without_gone(settings: dict[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Settings that were written down, but for those that are no more.

    Raises:
        BadInput: one of them is none of the `known`, and does not say what is so without it.
    """
    found = {name: value for name, value in settings.items() if name not in GONE or value != GONE[name]}
    if unknown := found.keys() - set(known):
        raise BadInput(f"settings that this version of Vitrail lacks: {', '.join(sorted(unknown))}.")
    return found


# What pre-training has no use for, or cannot have; what a recipe for classes has of it is set back to these.
CLASSES_ONLY: dict[str, Any] = {
    "mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0, "layer_decay": 1.0, "patch_dropout": 0.0, "stem": "patch",
    **OF_STEM,
}  # fmt: skip

Precision = Literal["auto", "fp32", "bf16"]
Tracking = Literal["wandb", "mlflow"]  # no setting of a recipe: where figures go, not what they are
# Of the model's shape; `ViTConfig` has them too.
Classifier = Literal["token", "gap"]
Gelu = Literal["tanh", "exact"]
Stem = Literal["patch", "convolutions"]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a training run computes. Checked once, on construction.

    Raises:
        BadInput: a value is out of range, or two values do not go together.
    """

    # The images
    data: str = setting("digits", "digits, tiny-imagenet, cifar-10, cifar-100, a folder, a .zip / .tar, or hf:NAME")
    holdout: float = setting(0.0, "tune on this share of the training images, held out, instead of the real split")
    stream: bool = setting(
        False, "decode images as they are needed instead of once: for more of them than the disk holds"
    )
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
    architecture: Literal["vit", "resnet-18"] = setting(
        "vit", "a Vision Transformer, or a CNN to compare it with, which has its own sizes: those below are not its"
    )
    patch_size: int = setting(8, "side of a patch, in pixels")
    hidden_size: int = setting(384, "width of a token")
    mlp_dim: int = setting(1536, "width of the MLP's hidden layer")
    num_heads: int = setting(6, "attention heads")
    num_layers: int = setting(6, "encoder blocks")
    classifier: Classifier = setting("token", "the head reads the class token, or the mean of all patches")
    representation_size: int | None = setting(None, "width of a tanh layer before the head (none: a linear head)")
    resnet_width: int = setting(64, "of resnet-18: channels of its first stage, a multiple of 32; the last has 8 times")
    dropout: float = setting(0.0, "share of activations dropped")
    gelu: Gelu = setting("tanh", "the official code's approximation, or exact: on a CPU, faster")
    # What later papers add: 2106.14881 (stem), 2103.17239 (layer_scale), 1603.09382 (stochastic_depth), 2208.07220
    # (patch_dropout)
    stem: Stem = setting("patch", "one projection of each patch, or convolutions of stride 2 down to it")
    stem_units: int = setting(0, "residual convolutions in a stem of convolutions, in front of its last")
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
    accumulate: int = setting(1, "work through each batch in this many parts, to save memory (cuda and cpu find it)")
    checkpoint_activations: bool = setting(
        False, "keep only what enters each block, and compute the rest again: less memory, a third more time"
    )
    optimizer: Literal["adamw", "adam", "sgd", "muon"] = setting(
        "adamw", "adam: its weight decay is coupled (L2); muon: for matrices of blocks and kernels, adamw for the rest"
    )
    lr: float = setting(1e-3, "peak learning rate")
    muon_lr: float = setting(0.02, "peak learning rate of what muon has")
    stem_rate: float = setting(1.0, "multiply muon_lr by this for the kernels of a stem of convolutions")
    layer_decay: float = setting(1.0, "multiply the learning rate by this for each layer between a weight and the head")
    weight_decay: float = setting(0.0, "weight decay (adamw, muon: decoupled, and not on biases, norms and embeddings)")
    label_smoothing: float = setting(0.0, "share of each label that is spread evenly over all classes")  # 1512.00567
    schedule: Literal["constant", "linear", "cosine"] = setting(
        "cosine", "of the learning rate, after the warm-up, to 0"
    )
    cooldown: float = setting(1.0, "the schedule takes this last share of the steps after the warm-up")
    warmup: float = setting(
        0.02, "linear warm-up: a share of all steps, or, from 1 up, a number of steps, a tenth of all at most"
    )
    clip: float | None = setting(None, "clip the gradient's global norm to this")
    ema_decay: float = setting(
        0.0, "evaluate and keep a moving average of the weights, of which each step leaves this share (0: none)"
    )
    # 2104.00298, section 4, without its growing augmentation
    first_size: int | None = setting(None, "shrink the training images to this side at first: faster steps")
    first_share: float = setting(0.5, "the share of all steps that first_size is for")
    # 1906.06423, whose last steps train nothing but the head and the norms
    crop_size: int | None = setting(
        None, "cut a square of this side out of the middle of each training image, shifted by crop before: faster steps"
    )
    last_share: float = setting(0.1, "the share of all steps, the last, that see whole images where crop_size is set")

    # Without labels: patches are the paper's (section 4.6, appendix B.1.2), pixels those of 2111.06377
    objective: Literal["classes", "patches", "pixels"] = setting(
        "classes", "learn the labels, or, without them, mean colours of hidden patches or their pixels"
    )
    mask_ratio: float | None = setting(None, "share of the patches that is hidden (none: 0.5; for pixels, 0.75)")
    decoder_layers: int = setting(2, "blocks of the decoder that predicts pixels")
    decoder_hidden_size: int = setting(
        128, "width of its tokens, 32 for each of its heads; its MLP is four times as wide"
    )

    # Where and how
    seed: int = setting(0, "decides initial weights, order, augmentation and dropout")
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "auto: cuda, else mps, else cpu")
    parallel: Literal["ddp", "fsdp"] = setting(
        "ddp", "each of the processes that torchrun started has the whole model, or, for large ones, a part of it"
    )
    compile: bool = setting(False, "have torch compile the model: a slow start, then faster steps on a GPU")
    precision: Precision = setting(
        "fp32", "of the matrix products; weights and sums stay fp32. auto: bf16 where its products are the faster ones"
    )

    @property
    def mixes(self) -> bool:
        """Whether training images are mixed with one another."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def least_images(self) -> int:
        """How many images a part of a batch has at least: pairs that are mixed stay together."""
        return 2 if self.mixes else 1

    @property
    def self_supervised(self) -> bool:
        """Whether it is a recipe of pre-training, which reads no labels."""
        return self.objective != "classes"

    def __post_init__(self) -> None:
        flip = vars(self)["flip"]
        if isinstance(flip, bool):  # what the first run folders have
            object.__setattr__(self, "flip", "random" if flip else "none")
        self._check_types()
        for names, fits, must in RANGES:
            for name in names.split():
                if not fits(getattr(self, name)):
                    raise BadInput(f"{name} is {getattr(self, name)}; it must {must}.")
        self._check_architecture()
        self._check_objective()
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

    def _check_architecture(self) -> None:
        if self.architecture == "vit":
            return
        if lacking := [name for name in TRANSFORMER_ONLY if getattr(self, name) != getattr(Recipe, name)]:
            mend = ", ".join(f"{name} = {getattr(Recipe, name)}".lower() for name in lacking)
            raise BadInput(f"{self.architecture} has no {', '.join(lacking)}; leave it out, or set {mend}.")

    def _check_objective(self) -> None:
        if not self.self_supervised:
            return
        if self.stem != "patch":
            raise BadInput("pre-training needs stem = patch: convolutions see what is hidden beside a patch.")
        if useless := [name for name, off in CLASSES_ONLY.items() if getattr(self, name) != off]:
            mend = ", ".join(f"{name} = {CLASSES_ONLY[name]:g}" for name in useless)
            raise BadInput(f"pre-training has no use for {', '.join(useless)}; leave it out, or set {mend}.")
        if self.representation_size is not None:
            raise BadInput("pre-training leaves the layer before the head untrained; leave representation_size out.")

    def _check_sizes(self) -> None:
        cell = self.patch_size if self.architecture == "vit" else 8  # a ResNet's stages halve an image three times
        smaller = range(cell, self.image_size, cell)
        for name in ("first_size", "crop_size"):
            if (side := getattr(self, name)) is not None and side not in smaller:
                cells = f"{'patches' if self.architecture == 'vit' else 'a stride'} of {cell}"
                raise BadInput(
                    f"{name} is {side}; with {cells} and images of {self.image_size} pixels it may be "
                    f"{', '.join(map(str, smaller)) or 'nothing, so leave it out'}."
                )
        before = self.first_share if self.first_size is not None else 0
        if self.crop_size is not None and before + self.last_share >= 1:
            shares = "first_share and last_share are" if before else "last_share is"
            raise BadInput(
                f"crop_size is {self.crop_size}, and no step is left for it: {shares} all of them; take less."
            )
        if self.crop_size is not None and self.cutmix:
            raise BadInput(
                "crop_size cuts away some of what cutmix pastes, which labels count; set crop_size none, or cutmix 0."
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
