"""The schedule, a pure function of the step; parameter groups, optimizers, and the running average of the weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.settings import Recipe
from vitrail.training.muon import Muon

EMBEDDINGS = ("class_token", "position_embedding", "mask_embedding")

# What the encoder consists of: blocks, and what stands before them in a ResNet, or as a stem.
BLOCKS = ("blocks.", "patch_embedding.layers.", "resnet.stages.", "decoder_blocks.")


def warmup_steps(recipe: Recipe, steps: int) -> int:
    """Length of the warm-up: a share of all steps where the recipe gives one below 1, else that many, but a tenth of
    all at most: a number is meant for runs as long as it was found with, and would be all of a short one."""
    return round(recipe.warmup * steps) if recipe.warmup < 1 else min(round(recipe.warmup), steps // 10)


def learning_rate(recipe: Recipe, step: int, steps: int, peak: float | None = None) -> float:
    """The learning rate of a step, counted from 0: linear from 0 up to its peak (the recipe's `lr` if None), there
    until the last `cooldown` of the steps behind the warm-up, then as the schedule goes, to 0."""
    peak, warmup = recipe.lr if peak is None else peak, warmup_steps(recipe, steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    fall = recipe.cooldown * (steps - warmup)  # steps that it takes
    left = min(1.0, (steps - step) / max(1.0, fall))  # from 1 down to just above 0
    match recipe.schedule:
        case "constant":
            return peak
        case "linear":
            return peak * left
        case "cosine":
            return peak * 0.5 * (1 - math.cos(math.pi * left))


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """The parameters, by what is to be done to them: how they decay, at which `peak` learning rate they are trained,
    and, where Muon has them, of how many `parts` each consists.

    Decoupled decay (AdamW, Muon) spares biases, norms, scales and embeddings; Adam's and SGD's is L2 on everything, as
    in the experiments that used it. Muon has the matrices of the encoder blocks, and the kernels of a ResNet's and of a
    convolutional stem, these at `stem_rate` times its rate; in pre-training, where what is trained has the model for
    its `encoder`, also those of a decoder's blocks.
    """
    groups: dict[tuple[tuple[str, float], ...], dict[str, Any]] = {}
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        name = name.removeprefix("encoder.")
        decoupled = recipe.optimizer in ("adamw", "muon")
        spared = decoupled and (weight.ndim == 1 or name in EMBEDDINGS)
        hidden = recipe.optimizer == "muon" and name.startswith(BLOCKS) and weight.ndim > 1
        peak = (recipe.muon_lr if hidden else recipe.lr) * rate_scale(name, recipe)
        peak *= recipe.stem_rate if hidden and name.startswith("patch_embedding.") else 1.0
        common = {"lr": peak, "peak": peak, "weight_decay": 0.0 if spared else recipe.weight_decay}
        if hidden:
            common["parts"] = 3 if name.endswith(".qkv.weight") else 1
        groups.setdefault(tuple(common.items()), {**common, "params": []})["params"].append(weight)
    return list(groups.values())


def rate_scale(name: str, recipe: Recipe) -> float:
    """What `layer_decay` leaves of a parameter's learning rate: nothing is taken from what follows the blocks, a factor
    for each layer that it lies further in front; embeddings lie before the first block (2106.08254, its code)."""
    if name.startswith(("norm.", "pre_logits.", "head.")):
        layer = recipe.num_layers + 1
    else:
        layer = 1 + int(name.split(".")[1]) if name.startswith("blocks.") else 0
    return recipe.layer_decay ** (recipe.num_layers + 1 - layer)


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over the model's parameters. Momenta are the official code's: 0.9, and (0.9, 0.999); Muon
    has its own, and so has AdamW in masked autoencoding (2111.06377, table 8)."""
    groups = parameter_groups(model, recipe)
    match recipe.optimizer:
        case "adamw":
            second = 0.95 if recipe.objective == "pixels" else 0.999
            return torch.optim.AdamW(groups, betas=(0.9, second), fused=True)
        case "adam":
            return torch.optim.Adam(groups, betas=(0.9, 0.999), fused=True)
        case "sgd":
            return torch.optim.SGD(groups, momentum=0.9, fused=True)
        case "muon":
            return Muon(groups, torch.bfloat16 if recipe.precision == "bf16" else torch.float32)


class RunningAverage:
    """The exponential moving average of a model's weights over the steps, and of what its BatchNorm measured, which is
    evaluated and shipped in place of what is trained.

    Args:
        model: whose weights, as they are now, it starts from.
        decay: what a step leaves of it; 0 for no average. It is less at first, lest the initial weights stay for long:
            (1 + t) / (10 + t) behind step t, as TensorFlow's ExponentialMovingAverage does.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = model
        self.decay = decay
        self.weights = {name: tensor.detach().clone() for name, tensor in averaged(model).items()} if decay else {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights behind a step, counted from 0."""
        if self.weights:
            share = 1 - min(self.decay, (1 + step) / (10 + step))
            # Apart, for with fsdp weights are parts, and what is measured is whole.
            for now in (dict(self.model.named_parameters()), measured(self.model)):
                if now:
                    torch._foreach_lerp_([self.weights[name] for name in now], list(now.values()), share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the average for its weights while the block runs."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        # By copying: a compiled model may hold on to where its weights lie.
        now = averaged(self.model)
        for name, average in self.weights.items():
            trained = now[name].clone()
            now[name].copy_(average)
            average.copy_(trained)


def averaged(model: nn.Module) -> dict[str, Tensor]:
    """What a running average is of: the weights, and what BatchNorm has measured."""
    return {**dict(model.named_parameters()), **measured(model)}


def measured(model: nn.Module) -> dict[str, Tensor]:
    """The means and variances by which BatchNorm normalises in evaluation."""
    return {name: tensor for name, tensor in model.named_buffers() if tensor.is_floating_point()}
