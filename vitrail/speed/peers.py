"""The same model, and the same input, in other libraries: what `vitrail bench` compares with. They are imported here
alone, and only when they are asked for.

Every model gets the official one's details (GELU by its tanh approximation, LayerNorm with an epsilon of 1e-6, a class
token, no dropout), and otherwise stays as its users get it, its attention among the rest.

    B batch    S side of the image, in pixels    C classes
"""

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, library, nn

from vitrail.errors import BadInput
from vitrail.vit.config import ViTConfig
from vitrail.vit.model import VisionTransformer

MODULES = {"timm": "timm", "vit-pytorch": "vit_pytorch", "transformers": "transformers", "torchvision": "torchvision"}
SHIFT = 6  # pixels either way, and degrees either way: how ImageFolder's images, and ours beside them, are augmented
ANGLE = 10
ENDLESS = 10**12  # images: each once before any comes again, as the sampler divides them
TOLERANCES = {"logits": 1e-4, "gradients": 1e-3}  # between Vitrail's model and timm's of the same weights, in float32

# What a peer's model has otherwise, whatever it is told.
DIFFERENCES = {"vit-pytorch": "no biases of query, key and value; LayerNorms before and after the patch projection"}


def require_peers() -> None:
    """Make sure that the libraries to compare with are there.

    Raises:
        BadInput: one is not; the message has the command that installs them.
    """
    missing = [name for name, module in MODULES.items() if importlib.util.find_spec(module) is None]
    if missing:
        *others, last = missing
        named = f"{', '.join(others)} and {last} are" if others else f"{last} is"
        raise BadInput(
            f"{named} not installed, with which Vitrail's speed is compared: pip install 'vitrail[bench]', or, in a "
            "checkout, make bench, which keeps them in an environment of their own."
        )


@cache
def declare_operators() -> None:
    """Have torchvision, which the others import too, import beside any build of torch.

    Torchvision's compiled operators load only beside the build that they were made for, such as one with CUDA; where
    they do not, importing it fails for want of two that it describes further. Declared, they may be missing: they have
    to do with boxes around objects.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return
    for compiled in Path(found.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(compiled)
        except OSError:
            for name in ("nms", "qnms"):
                library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def build_timm(config: ViTConfig) -> nn.Module:
    """timm's VisionTransformer."""
    declare_operators()
    from timm.models import VisionTransformer as Peer

    return with_official_details(
        Peer(
            img_size=config.image_size, patch_size=config.patch_size, num_classes=config.num_classes,
            embed_dim=config.hidden_size, depth=config.num_layers, num_heads=config.num_heads,
            mlp_ratio=config.mlp_dim / config.hidden_size,
        )
    )  # fmt: skip


def build_vit_pytorch(config: ViTConfig) -> nn.Module:
    """vit-pytorch's ViT; see DIFFERENCES."""
    declare_operators()
    from vit_pytorch import ViT

    return with_official_details(
        ViT(
            image_size=config.image_size, patch_size=config.patch_size, num_classes=config.num_classes,
            dim=config.hidden_size, depth=config.num_layers, heads=config.num_heads, mlp_dim=config.mlp_dim,
            dim_head=config.hidden_size // config.num_heads,
        )
    )  # fmt: skip


class Logits(nn.Module):
    """A model of transformers that gives its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B C"]:
        """Logits of normalised images."""
        return self.model(images).logits


def build_transformers(config: ViTConfig) -> nn.Module:
    """transformers' ViTForImageClassification."""
    declare_operators()
    from transformers import ViTConfig as Config
    from transformers import ViTForImageClassification

    shape = Config(
        image_size=config.image_size, patch_size=config.patch_size, num_labels=config.num_classes,
        hidden_size=config.hidden_size, num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
        intermediate_size=config.mlp_dim, hidden_act="gelu_pytorch_tanh", layer_norm_eps=config.layer_norm_eps,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return with_official_details(Logits(ViTForImageClassification(shape)))


def build_torchvision(config: ViTConfig) -> nn.Module:
    """torchvision's VisionTransformer."""
    declare_operators()
    from torchvision.models import VisionTransformer as Peer

    return with_official_details(
        Peer(
            image_size=config.image_size, patch_size=config.patch_size, num_classes=config.num_classes,
            hidden_dim=config.hidden_size, num_layers=config.num_layers, num_heads=config.num_heads,
            mlp_dim=config.mlp_dim,
        )
    )  # fmt: skip


# Each makes a model with a class token, random weights and the shape that it is given.
PEERS: dict[str, Callable[[ViTConfig], nn.Module]] = {
    "timm": build_timm,
    "vit-pytorch": build_vit_pytorch,
    "transformers": build_transformers,
    "torchvision": build_torchvision,
}


def with_official_details(model: nn.Module) -> nn.Module:
    """The model, with GELU and LayerNorm as the official code has them."""
    for module in model.modules():
        if isinstance(module, nn.GELU):
            module.approximate = "tanh"
        elif isinstance(module, nn.LayerNorm):
            module.eps = ViTConfig.layer_norm_eps
    return model


def timm_names(num_layers: int) -> dict[str, str]:
    """timm's name of each weight of a model of Vitrail's with this many layers."""
    names = {"patch_embedding.projection": "patch_embed.proj", "norm": "norm", "head": "head"}
    for block in range(num_layers):
        for ours, theirs in (
            ("attention_norm", "norm1"), ("attention.qkv", "attn.qkv"), ("attention.out", "attn.proj"),
            ("mlp_norm", "norm2"), ("mlp.hidden", "mlp.fc1"), ("mlp.out", "mlp.fc2"),
        ):  # fmt: skip
            names[f"blocks.{block}.{ours}"] = f"blocks.{block}.{theirs}"
    named = {"class_token": "cls_token", "position_embedding": "pos_embed"}
    return named | {
        f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in names.items() for kind in ("weight", "bias")
    }


@torch.no_grad()
def share_weights(model: VisionTransformer, peer: nn.Module) -> None:
    """Give a model of timm the weights of one of Vitrail's, of the same shape."""
    names = timm_names(model.config.num_layers)
    peer.load_state_dict({names[name]: weight for name, weight in model.state_dict().items()})


def same_outputs(config: ViTConfig, device: torch.device, batch: int) -> dict[str, float]:
    """The largest differences between Vitrail's model and timm's, of the same random weights and images, in float32:
    of the `logits` of inference and of training, which may take different ways, and of the `gradients`, as a share of
    the largest of each weight's. A head of zeros, as a new model has it, would hide any. The `batch` is to be the one
    that is timed, for how many there are decides by which way."""
    model, peer = VisionTransformer(config), build_timm(config)
    nn.init.normal_(model.head.weight, std=config.hidden_size**-0.5)
    share_weights(model, peer)
    images = torch.rand(batch, 3, config.image_size, config.image_size, device=device) * 2 - 1
    labels = torch.arange(batch, device=device) % config.num_classes
    outputs, gradients = [], []
    for each in (model, peer):
        each.to(device)
        with torch.inference_mode():
            inferred = each.eval()(images)
        trained = each.train()(images)
        F.cross_entropy(trained, labels).backward()
        outputs.append(torch.stack([inferred, trained.detach()]))
        gradients.append({name: weight.grad for name, weight in each.named_parameters() if weight.grad is not None})
    names = timm_names(config.num_layers)
    return {
        "logits": float((outputs[0] - outputs[1]).abs().max()),
        "gradients": max(
            float((gradient - gradients[1][names[name]]).abs().max() / gradient.abs().max())
            for name, gradient in gradients[0].items()
            if not name.endswith("qkv.bias")  # a third of it, the keys', has no effect: its gradient is rounding
        ),
    }


def image_folder_loader(
    folder: Path, image_size: int, batch_size: int, workers: int, rotate: bool
) -> "torch.utils.data.DataLoader[Any]":
    """torchvision's ImageFolder behind a DataLoader: normalised, augmented and shuffled batches without end, one epoch
    after another, so that none is cut short and no process waits for the next to begin.

    Args:
        folder: has CLASS/*, squares of `image_size`.
        image_size: S.
        batch_size: B.
        workers: processes that load; 0 loads in this one.
        rotate: flips and rotation by up to ANGLE degrees, bilinearly; else flips and shifts by up to SHIFT pixels.
    """
    declare_operators()
    from torchvision import datasets, transforms

    steps = [
        transforms.RandomHorizontalFlip(),
        transforms.RandomRotation(ANGLE, interpolation=transforms.InterpolationMode.BILINEAR)
        if rotate
        else transforms.RandomCrop(image_size, padding=SHIFT, padding_mode="reflect"),
        transforms.ToTensor(),
        transforms.Normalize([0.5] * 3, [0.5] * 3),
    ]
    dataset = datasets.ImageFolder(str(folder), transforms.Compose(steps))
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=torch.utils.data.RandomSampler(dataset, num_samples=ENDLESS),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )
