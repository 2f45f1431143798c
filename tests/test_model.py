"""The model is the official one: its numbers, its sizes, its initial weights; and says what is wrong with a shape."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from scipy import ndimage  # type: ignore[import-untyped]
from torch.utils.flop_counter import FlopCounterMode

import vitrail
from vitrail.errors import BadInput
from vitrail.vit import fused
from vitrail.vit.config import Gelu, ViTConfig
from vitrail.vit.fused import attend
from vitrail.vit.model import (
    MLP,
    Attention,
    Dropout,
    TransformerEncoderBlock,
    VisionTransformer,
)  # fmt: skip
from vitrail.vit.positions import resize_position_embedding
from vitrail.vit.variants import VARIANTS, flops

GOLDEN = Path(__file__).parent / "golden"
SMALL = ViTConfig(image_size=16, patch_size=4, hidden_size=32, mlp_dim=64, num_heads=4, num_layers=2, num_classes=5)


def official(case: str) -> dict[str, torch.Tensor]:
    """What the official JAX model was fed and gave; images as ours are, channels first."""
    with np.load(GOLDEN / f"{case}.expected.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    return {name: array.permute(0, 3, 1, 2) if name.startswith("image") else array for name, array in arrays.items()}


@pytest.mark.parametrize("case", ["token", "gap", "pre-logits"])
def test_logits_are_the_official_ones(case: str) -> None:
    expected = official(case)
    logits = vitrail.load(GOLDEN / f"{case}.npz")(expected["image"])
    torch.testing.assert_close(logits, expected["logits"], atol=1e-5, rtol=0)


def test_logits_of_the_hybrid_are_the_official_ones() -> None:
    expected = official("hybrid")
    torch.testing.assert_close(
        vitrail.load(GOLDEN / "hybrid.npz")(expected["image"]), expected["logits"], atol=1e-5, rtol=0
    )
    model = vitrail.load(GOLDEN / "hybrid.npz", image_size=96)
    torch.testing.assert_close(model.position_embedding, expected["pos_embedding_bigger"], atol=1e-5, rtol=0)
    torch.testing.assert_close(model(expected["image_bigger"]), expected["logits_bigger"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", ["token", "gap"])
def test_logits_at_a_larger_image_size_are_the_official_ones(case: str) -> None:
    expected = official(case)
    model = vitrail.load(GOLDEN / f"{case}.npz", image_size=expected["image_bigger"].shape[-1])
    torch.testing.assert_close(model.position_embedding, expected["pos_embedding_bigger"], atol=1e-5, rtol=0)
    torch.testing.assert_close(model(expected["image_bigger"]), expected["logits_bigger"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", ["token", "gap", "pre-logits"])
def test_both_ways_to_attend_give_the_official_logits(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitrail.vit.fused.PLAIN_ATTENTION_TOKENS", 0)  # torch's fused kernel, as on a GPU
    test_logits_are_the_official_ones(case)


@pytest.mark.parametrize("case", ["token", "gap", "pre-logits"])
def test_logits_in_inference_are_the_official_ones(case: str) -> None:
    expected = official(case)
    with torch.inference_mode(), products() as seen:
        logits = vitrail.load(GOLDEN / f"{case}.npz")(expected["image"])
    torch.testing.assert_close(logits, expected["logits"], atol=1e-5, rtol=0)
    if torch.backends.mkldnn.is_available():
        assert "mkldnn::_linear_pointwise" in seen
        assert "aten::gelu" not in seen


@contextmanager
def products() -> Iterator[set[str]]:
    """The names of the operators that run within."""
    seen: set[str] = set()
    with torch.profiler.profile() as profile:
        yield seen
    seen.update(event.key for event in profile.key_averages())


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")
@pytest.mark.parametrize("gelu", get_args(Gelu))
def test_what_computes_gelu_in_one_step_is_as_near_to_it_in_bf16(gelu: Gelu) -> None:
    torch.manual_seed(1)
    mlp, x = MLP(64, 256, dropout=0.0, gelu=gelu), torch.randn(5, 7, 64)
    exact = mlp(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with products() as seen:
            fused = mlp(x)
        assert "mkldnn::_linear_pointwise" in seen
    with torch.autocast("cpu", torch.bfloat16):
        apart = mlp(x)
    assert fused.dtype == apart.dtype == torch.bfloat16
    assert (fused - exact).abs().max() < 1.2 * (apart - exact).abs().max()


def test_what_hangs_on_a_layer_is_not_passed_by_in_inference() -> None:
    mlp, x = MLP(8, 16, dropout=0.0, gelu="tanh"), torch.randn(2, 3, 8)
    called = []
    mlp.hidden.register_forward_hook(lambda module, inputs, output: called.append(output.shape))
    with torch.no_grad():
        mlp(x)
        assert called == [(2, 3, 16)]
        plain = MLP(8, 16, dropout=0.0, gelu="tanh")
        plain.load_state_dict(mlp.state_dict())

        class Doubled(torch.nn.Linear):  # as an adapter's layer would stand in the place of the model's
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return 2 * super().forward(x)

        plain.hidden.__class__ = Doubled
        hidden = torch.nn.functional.gelu(2 * mlp.hidden(x), approximate="tanh")
        torch.testing.assert_close(plain(x), mlp.out(hidden))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("representation_size", [None, 24])
def test_what_the_head_does_not_read_is_not_computed_and_changes_nothing(
    fused: bool, representation_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fused:
        monkeypatch.setattr("vitrail.vit.fused.PLAIN_ATTENTION_TOKENS", 0)
    torch.manual_seed(4)
    model = VisionTransformer(replace(SMALL, num_layers=6, mlp_dim=128, representation_size=representation_size))
    torch.nn.init.normal_(model.head.weight)
    images = torch.randn(3, 3, 16, 16)
    found = []
    for forward in (model, lambda images: model.forward_head(model.forward_encoder(model.embed(images)))):
        model.zero_grad()
        with FlopCounterMode(display=False) as counter:
            logits = forward(images)
            logits.square().sum().backward()
        found.append((logits, [weight.grad for weight in model.parameters()], counter.get_total_flops()))
    (logits, gradients, flops), (all_logits, all_gradients, all_flops) = found
    torch.testing.assert_close(logits, all_logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(gradients, all_gradients, atol=1e-4, rtol=1e-4)
    assert flops < 0.9 * all_flops


def counts() -> dict[str, int]:
    """The exact parameter counts of the official code, by Vitrail's names."""
    variants = json.loads((GOLDEN / "variants.json").read_text())
    return {
        name.replace("_", "/").replace("-gap-norep", "-gap"): variant["parameters"]
        for name, variant in variants.items()
    }


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_parameters_are_counted_as_in_the_official_code(name: str) -> None:
    with torch.device("meta"):
        model = vitrail.create(name)
    assert sum(weight.numel() for weight in model.parameters()) == counts()[name]


def test_every_variant_is_there() -> None:
    assert set(VARIANTS) == set(counts())


def test_initial_weights_are_the_official_ones() -> None:
    torch.manual_seed(0)
    width, mlp_dim = 192, 768
    model = vitrail.create("ViT-Ti/16", image_size=64, num_classes=10)
    state = model.state_dict()
    for name in ("head.weight", "head.bias", "class_token", "patch_embedding.projection.bias",
                 "blocks.0.attention.qkv.bias", "blocks.0.attention.out.bias"):  # fmt: skip
        assert not state[name].any(), name
    # Xavier uniform: ± sqrt(6 / (fan in + fan out)), for q, k and v each with a fan out of its own
    for name, bound in (
        ("blocks.0.attention.qkv.weight", (6 / (width + width)) ** 0.5),
        ("blocks.3.attention.out.weight", (6 / (width + width)) ** 0.5),
        ("blocks.0.mlp.hidden.weight", (6 / (width + mlp_dim)) ** 0.5),
        ("blocks.0.mlp.out.weight", (6 / (width + mlp_dim)) ** 0.5),
    ):
        assert 0.99 * bound < state[name].abs().max() <= bound, name
        assert state[name].std().item() == pytest.approx(bound / 3**0.5, rel=0.02), name
    assert state["blocks.0.mlp.hidden.bias"].std().item() == pytest.approx(1e-6, rel=0.2)
    assert state["position_embedding"].std().item() == pytest.approx(0.02, rel=0.05)
    patches = state["patch_embedding.projection.weight"]  # LeCun normal: variance 1 / fan in, cut at two deviations
    assert patches.std().item() == pytest.approx((3 * 16 * 16) ** -0.5, rel=0.02)
    assert patches.abs().max() <= 2 * (3 * 16 * 16) ** -0.5 / 0.8796
    assert (state["norm.weight"] == 1).all()


def test_a_new_model_favours_no_class() -> None:
    logits = VisionTransformer(SMALL)(torch.randn(2, 3, 16, 16))
    assert logits.shape == (2, 5)
    assert not logits.any()


def test_patches_are_projected_as_the_convolution_that_they_are() -> None:
    embedding = VisionTransformer(SMALL).patch_embedding
    images = torch.randn(2, 3, 16, 16)
    expected = embedding.projection(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embedding(images), expected)


def test_attention_weights_are_what_the_forward_pass_uses() -> None:
    torch.manual_seed(1)
    attention = Attention(32, 4)
    x = torch.randn(2, 7, 32)
    weights = attention.weights(x)
    assert weights.shape == (2, 4, 7, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 7))
    values = attention.project(x)[2]
    torch.testing.assert_close(attention(x), attention.out((weights @ values).transpose(1, 2).flatten(2)))


def test_attention_of_the_layers_asked_for() -> None:
    torch.manual_seed(2)
    model = VisionTransformer(SMALL).eval()
    images = torch.randn(2, 3, 16, 16)
    found = model.attention(images)
    assert {layer: weights.shape for layer, weights in found.items()} == {0: (2, 4, 17, 17), 1: (2, 4, 17, 17)}
    torch.testing.assert_close(model.attention(images, layers=[1])[1], found[1])
    with pytest.raises(BadInput, match="layers 0 to 1, and no layer 2"):
        model.attention(images, layers=[2])


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    torch.manual_seed(3)
    dropout, ones = Dropout(0.3), torch.ones(1001, 999)  # an odd count: the last draw decides for three
    dropped = dropout(ones)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=2e-3)
    assert dropped.mean().item() == pytest.approx(1, abs=3e-3)
    assert torch.equal(dropout.eval()(ones), ones)


def test_dropout_is_gone_in_evaluation() -> None:
    model = VisionTransformer(ViTConfig(**{**vars(SMALL), "dropout": 0.5}))
    torch.nn.init.normal_(model.head.weight)
    images = torch.randn(2, 3, 16, 16)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_one_batch_is_learnt_by_heart() -> None:
    torch.manual_seed(4)
    model = VisionTransformer(SMALL)
    images, labels = torch.randn(20, 3, 16, 16), torch.arange(20) % 5
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(130):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01
    assert torch.equal(model(images).argmax(1), labels)


def test_position_embeddings_resize_to_rectangles() -> None:
    # Along an axis on which it is linear, a resize with aligned corners is linear too, and keeps both ends.
    rows = torch.linspace(0, 1, 4)[:, None, None].expand(4, 3, 2).reshape(1, 12, 2)
    resized = resize_position_embedding(rows, (4, 3), (7, 5)).reshape(7, 5, 2)
    torch.testing.assert_close(resized, torch.linspace(0, 1, 7)[:, None, None].expand(7, 5, 2))


@pytest.mark.parametrize("classes", [0, 1])
@pytest.mark.parametrize(("grid", "new"), [((4, 3), (7, 5)), ((6, 9), (5, 14)), ((7, 2), (3, 3)), ((2, 2), (9, 4))])
def test_rectangular_position_embeddings_resize_as_in_the_official_code(
    grid: tuple[int, int], new: tuple[int, int], classes: int
) -> None:
    """Its checkpoint.py: SciPy's zoom of order 1, of the grid alone."""
    embedding = torch.randn(1, classes + grid[0] * grid[1], 5, generator=torch.Generator().manual_seed(0))
    cells = embedding[0, classes:].reshape(*grid, 5).numpy()
    expected = ndimage.zoom(cells, (new[0] / grid[0], new[1] / grid[1], 1), order=1)
    resized = resize_position_embedding(embedding, grid, new)
    assert torch.equal(resized[:, :classes], embedding[:, :classes])
    np.testing.assert_allclose(resized[0, classes:].reshape(*new, 5), expected, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):  # as in a training step on smaller images
        assert torch.equal(resize_position_embedding(embedding, grid, new), resized)


def test_gelu_and_epsilon_are_the_configs() -> None:
    x = torch.randn(1, 50, 1) * 3
    expected = {"exact": x * (1 + torch.erf(x / 2**0.5)) / 2, "tanh": official_gelu(x)}
    for gelu in get_args(Gelu):
        mlp = MLP(1, 1, 0.0, gelu)
        for layer in (mlp.hidden, mlp.out):
            torch.nn.init.ones_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
        torch.testing.assert_close(mlp(x), expected[gelu], atol=1e-6, rtol=0)
        block = VisionTransformer(replace(SMALL, gelu=gelu)).blocks[0]
        assert isinstance(block, TransformerEncoderBlock)
        assert block.mlp.approximate == mlp.approximate
    model = VisionTransformer(replace(SMALL, layer_norm_eps=0.25))
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {0.25}
    assert len(norms) == 2 * SMALL.num_layers + 1
    assert (ViTConfig().gelu, ViTConfig().layer_norm_eps) == ("tanh", 1e-6)


def official_gelu(x: torch.Tensor) -> torch.Tensor:
    """flax.linen.gelu, as the official code calls it."""
    return x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_flops_are_those_that_torch_counts(name: str) -> None:
    config = replace(VARIANTS[name], num_layers=2, num_classes=10, dropout=0.0)
    for size in (64, 224) if config.patch_size != 14 else (56, 224):
        shape = replace(config, image_size=size)
        with torch.device("meta"):
            model, images = VisionTransformer(shape), torch.empty(1, 3, size, size)
        with FlopCounterMode(display=False) as counter:
            model.forward_head(model.forward_encoder(model.embed(images)))
        assert flops(shape) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image_size": 18}, "take images of 16 or 20, or patches of 1, 2, 3, 6, 9, 18"),
        ({"image_size": 3}, "take images of 4, or patches of 1, 3"),
        ({"num_heads": 5}, "5 heads do not divide a width of 32: take 1, 2, 4, 8, 16, 32 heads"),
        ({"num_classes": 0}, "num_classes = 0 cannot be; it must be at least 1"),
        ({"num_heads": 0}, "num_heads = 0 cannot be"),
        ({"image_size": 0}, "image_size = 0 cannot be"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be at least 0 and below 1"),
        ({"num_layers": 2.0}, "num_layers = 2.0 cannot be; it must be a whole number"),
        ({"mlp_dim": 1 << 18}, "mlp_dim = 262144 cannot be; it must be at most 131,072"),
        ({"representation_size": -1}, "representation_size = -1 cannot be; it must be at least 1"),
        ({"classifier": "mean"}, "classifier is 'mean'; it must be one of token, gap"),
        ({"gelu": "fast"}, "gelu is 'fast'; it must be one of tanh, exact"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps is 0.0; it must be above 0"),
        ({"resnet_blocks": (3, "4")}, r"stages of \(3, '4'\) cannot be"),
        ({"resnet_blocks": (900, 900)}, "more than 1,000 layers"),
    ],
)
def test_shapes_that_cannot_be_are_refused_with_those_that_can(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        ViTConfig(**{**vars(SMALL), **changed})


@pytest.mark.parametrize("shape", [(2, 3, 20, 20), (2, 1, 16, 16), (2, 3, 16, 12)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(BadInput, match=r"takes images of shape \(batch, 3, 16, 16\), not \(" + str(shape)[1:-1]):
        VisionTransformer(SMALL)(torch.zeros(shape))


def test_in_training_images_may_be_smaller_and_position_embeddings_follow() -> None:
    model = VisionTransformer(replace(SMALL, dropout=0.0))
    torch.nn.init.normal_(model.head.weight)
    images, other = torch.randn(2, 3, 12, 12), copy.deepcopy(model)
    other.resize(12)
    logits = model(images)
    assert torch.equal(logits, other(images))
    logits.square().sum().backward()
    gradient = model.get_parameter("position_embedding").grad
    assert gradient is not None
    assert (gradient != 0).any(-1).all()
    for shape in [(2, 3, 8, 12), (2, 3, 10, 10), (2, 1, 8, 8), (2, 3, 0, 0)]:
        with pytest.raises(BadInput, match="takes images of shape"):
            model(torch.zeros(shape))
    with pytest.raises(BadInput, match="takes images of shape"):
        model.eval()(images)
    model.accepts_smaller = True
    assert torch.equal(model(images), other.eval()(images))
    with pytest.raises(BadInput, match="takes images of shape"):
        model(torch.zeros(2, 3, 20, 20))


def test_a_wrong_channel_count_is_not_answered_with_a_resize() -> None:
    with pytest.raises(BadInput, match="repeat a grey channel three times"):
        VisionTransformer(SMALL)(torch.zeros(2, 1, 16, 16))


def test_an_unknown_variant_gets_the_nearest() -> None:
    with pytest.raises(BadInput, match=r"no variant 'ViT-B/61'; did you mean 'ViT-B/16'\?"):
        vitrail.create("ViT-B/61")


def test_shapes_are_checked_where_they_are_written() -> None:
    """By the import hook of conftest.py, in modules of all folders; without it, the sum would be broadcast."""
    model = vitrail.create("ViT-Ti/16", image_size=32, num_classes=3)
    assert isinstance(model, VisionTransformer)
    with pytest.raises(TypeCheckError):
        model.blocks[0](torch.zeros(1, 5, 192, 1))


def test_attention_brings_its_own_gradient() -> None:
    """Of `fused.attend`, against differences, and against the operators that it stands for."""
    qkv = torch.randn(2, 5, 3 * 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: attend(x, 2), (qkv,))
    q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    by_torch = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attend(qkv, 2), by_torch, atol=1e-12, rtol=0)
    for shape in [(1, 1, 24), (0, 5, 24), (3, 1, 24)]:  # of one token there is nothing to bring into another layout
        small = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        before = small.detach().clone()
        assert (
            torch.autograd.gradcheck(lambda x: attend(x, 2), (small,)) if shape[0] else attend(small, 2).shape[0] == 0
        )
        assert torch.equal(small, before)


def test_attention_in_bf16_has_gradients_as_near_as_torch_s_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = Attention(64, 2)
    x, errors = torch.randn(3, 17, 64), {}

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        attention.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            attention(x).float().square().sum().backward()
        found = attention.qkv.weight.grad
        assert found is not None
        return found.clone()

    exact = gradient(torch.float32)
    for custom in (True, False):
        monkeypatch.setattr(fused, "CUSTOM_GRADIENTS", custom)
        errors[custom] = float((gradient(torch.bfloat16) - exact).norm() / exact.norm())
    assert errors[True] < 1.2 * errors[False] < 0.03


def test_second_derivatives_are_to_be_had_by_torch_s_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    model = VisionTransformer(replace(SMALL, dropout=0.0))
    torch.nn.init.normal_(model.head.weight)
    images = torch.randn(1, 3, 16, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"fused\.CUSTOM_GRADIENTS = False"):
        torch.autograd.grad(model(images).square().sum(), images, create_graph=True)
    monkeypatch.setattr(fused, "CUSTOM_GRADIENTS", False)
    (gradient,) = torch.autograd.grad(model(images).square().sum(), images, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), images)
    assert second.any()


def test_gradients_of_single_images_by_torch_s_transforms() -> None:
    """These know torch's own operators only, which is then what attention is made of."""
    model = VisionTransformer(replace(SMALL, dropout=0.0))
    torch.nn.init.normal_(model.head.weight)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    images = torch.randn(3, 3, 16, 16)

    def score(weights: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, weights, (image[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(score), in_dims=(None, 0))(weights, images)
    for n, image in enumerate(images):
        model.zero_grad()
        model(image[None]).square().sum().backward()
        for name, weight in model.named_parameters():
            torch.testing.assert_close(found[name][n], weight.grad, atol=1e-4, rtol=1e-3)
