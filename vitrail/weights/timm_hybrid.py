"""The hybrids of timm: what its weights of the ResNet are called, and what its epsilons make of the logits.

timm's ResNet is that of resnet.py, but for two numbers. It adds 1e-8 to the variance that a kernel is standardised by,
where the official code adds 1e-5 to the standard deviation, and its GroupNorm has an epsilon of 1e-5, not of 1e-6. With
kernels of a deviation of 0.2, logits of a deviation of 1 to 4 differ by 1e-5; with the official initialisation's, which
are of 0.015 to 0.13, by up to 2e-3 (R50+ViT-L/32, all norms at 1, two layers), for the first number mostly. So a
hybrid is exported if its own logits stay the same. Those of timm are read as they are: what it publishes are official
weights, and here they give the official logits.
"""

import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.errors import BadInput
from vitrail.vit.config import shorten
from vitrail.vit.model import VisionTransformer
from vitrail.vit.resnet import StdConv
from vitrail.weights.formats import TOLERANCE, Imported, random_images

Stages = tuple[int, ...]

BACKBONE = "patch_embed.backbone"
ROOT = {"resnet.root": "conv", "resnet.norm": "norm"}
PROJECTION = {"projection.0": "downsample.conv", "projection.1": "downsample.norm"}
# Bottlenecks of each stage, by what the name of an architecture has between the size of the model and that of images.
STAGES: dict[str, Stages] = {"r_s16_p8": (), "r26_s32": (2, 2, 2, 2), "r50_s16": (3, 4, 9), "r50_s32": (3, 4, 6, 3)}
ARCHITECTURE = rf"vit_(?:tiny|small|base|large)_({'|'.join(STAGES)})_\d+"
KNOWN = (
    "vit_tiny_r_s16_p8_224", "vit_small_r26_s32_224", "vit_base_r26_s32_224", "vit_base_r50_s16_224",
    "vit_large_r50_s32_224",
)  # fmt: skip
OURS, THEIRS = 1e-5, 1e-8  # added to a kernel's standard deviation, and to its variance
GROUP_NORM_EPS = 1e-5  # of timm's GroupNormAct


def name(ours: str, stages: Stages | None) -> str:
    """What timm calls one of the ResNet's weights. The bare root is not in a `stem` there."""
    module, _, kind = ours.rpartition(".")
    if module in ROOT:
        return f"{BACKBONE}.{'stem.' if stages else ''}{ROOT[module]}.{kind}"
    _, _, stage, unit, part = module.split(".", 4)
    return f"{BACKBONE}.stages.{stage}.blocks.{unit}.{PROJECTION.get(part, part)}.{kind}"


def architecture(stages: Stages, size: str | None) -> str:
    """A name that timm has for a hybrid with these stages: of that size, if there is one."""
    names = [known for known in KNOWN if stages_named(known) == stages]
    return next((known for known in names if known.startswith(f"vit_{size}_")), names[0])


def stages_named(architecture: str) -> Stages | None:
    """The stages of the ResNet that an architecture of this name has; None if it is no hybrid that Vitrail reads."""
    found = re.fullmatch(ARCHITECTURE, architecture)
    return STAGES[found[1]] if found else None


def stages_found(weights: Collection[str]) -> Stages | None:
    """The stages of the ResNet that has weights of these names; None where there is none."""
    if not any(each.startswith(f"{BACKBONE}.") for each in weights):
        return None
    found = (re.match(rf"{re.escape(BACKBONE)}\.stages\.(\d+)\.blocks\.(\d+)\.", each) for each in weights)
    blocks = {each.groups() for each in found if each}
    stages = Counter(stage for stage, _ in blocks)
    return tuple(stages[stage] for stage in sorted(stages))


def read_stages(architecture: str, weights: Collection[str], path: Path, weights_path: Path) -> Stages | None:
    """The stages of the ResNet that both the architecture and the weights have; None where neither has one.

    Raises:
        BadInput: they differ.
    """
    named, found = stages_named(architecture), stages_found(weights)
    if named != found:
        raise BadInput(
            f"{path} is of the architecture {shorten(architecture)}, which has {_said(named)}, and the weights in "
            f"{weights_path} have {_said(found)}."
        )
    return found


def _said(stages: Stages | None) -> str:
    if stages is None:
        return "no ResNet in front"
    return f"a ResNet with stages of {shorten(stages)} blocks" if stages else "the bare root of a ResNet in front"


def channels(weights: dict[str, Tensor], stages: Stages) -> int:
    """Those of the images that a hybrid takes; 3 where the weights are not such as tell it."""
    root = weights.get(name("resnet.root.weight", stages))
    return root.shape[1] if root is not None and root.ndim == 4 else 3


def check_epsilons(model: Imported) -> None:
    """See to it that a hybrid's logits are the same in timm, on random images.

    Raises:
        BadInput: some of its kernels are so small that timm's epsilons show.
    """
    images = random_images(model.config)
    with torch.inference_mode():
        difference = float((_built(model)(images) - as_timm_has_it(model)(images)).abs().max())
    if difference > TOLERANCE:
        raise BadInput(
            f"timm would give other logits for this hybrid, by {difference:.2g}, and {TOLERANCE:g} is the most that "
            f"Vitrail exports. Where the official code adds {OURS:g} to the standard deviation that the ResNet's "
            f"kernels are divided by, timm adds {THEIRS:g} to the variance, and these kernels are small enough for it "
            "to show. Such a model stays with Vitrail: vitrail.load takes it from where it is."
        )


def as_timm_has_it(model: Imported) -> VisionTransformer:
    """A hybrid that gives the logits that timm's does with the same weights."""
    vit = _built(model)
    for module in vit.modules():
        if isinstance(module, StdConv):
            module.weight = nn.Parameter(_as_theirs(module.weight.detach()))
        elif isinstance(module, nn.GroupNorm):
            module.eps = GROUP_NORM_EPS
    return vit


def _built(model: Imported) -> VisionTransformer:
    with torch.device("meta"):
        vit = VisionTransformer(model.config).eval()
    vit.load_state_dict(model.tensors, assign=True)
    return vit


def _as_theirs(kernel: Float[Tensor, "W C h w"]) -> Float[Tensor, "W C h w"]:
    """The kernel that Vitrail standardises to what timm makes of `kernel`.

    With s, the deviation of an output channel, timm divides by √(s² + 1e-8). A kernel a times as large is divided by
    a·s + 1e-5 here, and is the same then if a = 1e-5 / (√(s² + 1e-8) − s).
    """
    s = kernel.double().flatten(1).std(1, correction=0)
    factor = OURS / THEIRS * ((s.square() + THEIRS).sqrt() + s)  # the same, without the difference
    return kernel * factor.float()[:, None, None, None]
