"""Schedules have the values that their formulas give, and decay falls on what it should."""

from typing import Literal

import pytest
import torch

from vitrail.config import ViTConfig
from vitrail.model import VisionTransformer
from vitrail.optimize import build_optimizer, learning_rate, parameter_groups
from vitrail.recipes import RECIPES, Recipe

MODEL = VisionTransformer(
    ViTConfig(image_size=8, patch_size=4, hidden_size=8, mlp_dim=16, num_heads=2, num_layers=1, num_classes=3)
)


def test_the_warm_up_ends_at_the_peak_and_linear_decay_at_zero() -> None:
    recipe = Recipe(lr=1.0, schedule="linear", warmup=0.1)
    rates = [learning_rate(recipe, step, 100) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert rates[10] == 1
    assert rates[55] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(1 / 90)
    assert rates[100] == 0


def test_cosine_and_constant() -> None:
    cosine = Recipe(lr=2.0, schedule="cosine", warmup=20)  # from 1 up, a number of steps
    assert learning_rate(cosine, 19, 120) == 2
    assert learning_rate(cosine, 20, 120) == 2
    assert learning_rate(cosine, 70, 120) == pytest.approx(1)
    assert learning_rate(cosine, 45, 120) == pytest.approx(1 + 2**0.5 / 2)
    assert learning_rate(cosine, 120, 120) == pytest.approx(0)
    constant = Recipe(lr=3.0, schedule="constant", warmup=0.0)
    assert {learning_rate(constant, step, 50) for step in range(50)} == {3.0}


def test_the_original_warms_up_over_two_percent_of_its_steps() -> None:
    steps = 150 * 500
    assert learning_rate(RECIPES["vit-12"], 1499, steps) == pytest.approx(1e-3)
    assert learning_rate(RECIPES["vit-12"], 749, steps) == pytest.approx(0.5e-3)


def test_decoupled_decay_spares_biases_norms_and_embeddings() -> None:
    decayed, spared = parameter_groups(MODEL, Recipe(optimizer="adamw", weight_decay=0.1))
    names = {id(weight): name for name, weight in MODEL.named_parameters()}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert {names[id(weight)] for weight in decayed["params"]} == {
        "patch_embedding.projection.weight", "blocks.0.attention.qkv.weight", "blocks.0.attention.out.weight",
        "blocks.0.mlp.hidden.weight", "blocks.0.mlp.out.weight", "head.weight",
    }  # fmt: skip
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_coupled_decay_falls_on_everything(optimizer: Literal["adam", "sgd"]) -> None:
    (group,) = parameter_groups(MODEL, Recipe(optimizer=optimizer, weight_decay=0.1))
    assert group["weight_decay"] == 0.1
    assert len(group["params"]) == len(list(MODEL.parameters()))


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)]
)
def test_optimizers_are_torchs(name: Literal["adamw", "adam", "sgd"], kind: type) -> None:
    built = build_optimizer(MODEL, Recipe(optimizer=name, lr=0.5))
    assert type(built) is kind
    assert built.param_groups[0]["lr"] == 0.5
    assert built.defaults.get("momentum", 0.9) == 0.9
    assert built.defaults.get("betas", (0.9, 0.999)) == (0.9, 0.999)
