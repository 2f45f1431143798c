"""The schedule, a pure function of the step, and the optimizers."""

import math
from typing import Any

import torch
from torch import nn

from vitrail.recipes import Recipe


def warmup_steps(recipe: Recipe, steps: int) -> int:
    """Length of the warm-up: a share of all steps where the recipe gives one below 1, else that many."""
    return round(recipe.warmup * steps) if recipe.warmup < 1 else round(recipe.warmup)


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0: linear from 0 up to the peak, then as the schedule goes, to 0."""
    warmup = warmup_steps(recipe, steps)
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    left = (steps - step) / max(1, steps - warmup)  # from 1 down to just above 0
    match recipe.schedule:
        case "constant":
            return recipe.lr
        case "linear":
            return recipe.lr * left
        case "cosine":
            return recipe.lr * 0.5 * (1 - math.cos(math.pi * left))


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """What decays and what does not. Decoupled decay spares biases, norms, the class token and position embeddings;
    Adam's and SGD's is L2 on everything, as in the experiments that used it."""
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    if recipe.optimizer != "adamw":
        return [{"params": [weight for _, weight in named], "weight_decay": recipe.weight_decay}]
    spared = {name for name, weight in named if weight.ndim == 1 or name in ("class_token", "position_embedding")}
    return [
        {"params": [weight for name, weight in named if name not in spared], "weight_decay": recipe.weight_decay},
        {"params": [weight for name, weight in named if name in spared], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over the model's parameters. Momenta are the official code's: 0.9, and (0.9, 0.999)."""
    groups = parameter_groups(model, recipe)
    match recipe.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.999), fused=True)
        case "adam":
            return torch.optim.Adam(groups, lr=recipe.lr, betas=(0.9, 0.999), fused=True)
        case "sgd":
            return torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9, fused=True)
