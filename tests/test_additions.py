"""What later papers add to the model: what each computes, that all go together, and that none is there unasked."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vitrail
from vitrail.errors import BadInput
from vitrail.vit.additions import ConvolutionalStem, ResidualScale, ResidualUnit, drop_patches, zero_residuals
from vitrail.vit.config import ADDITIONS, ViTConfig
from vitrail.vit.floor import forward_flops, training_flops
from vitrail.vit.model import VisionTransformer
from vitrail.vit.positions import sincos_positions
from vitrail.weights.checkpoint import Run
from vitrail.weights.exchange import UNSAID, Library, check_options

CPU = torch.device("cpu")
SMALL = ViTConfig(image_size=16, patch_size=4, hidden_size=32, mlp_dim=64, num_heads=4, num_layers=2, num_classes=5)
EACH: list[dict[str, Any]] = [
    {"stem": "convolutions"}, {"stem": "convolutions", "stem_units": 2}, {"layer_scale": 0.3},
    {"stochastic_depth": 0.4}, {"patch_dropout": 0.4},
]  # fmt: skip
ALL: dict[str, Any] = {name: value for addition in EACH for name, value in addition.items()}
CASES = [pytest.param(each, id="-".join(each)) for each in EACH]
CASES += [pytest.param(ALL, id="all"), pytest.param({**ALL, "classifier": "gap"}, id="all-gap")]
# Weights as those of a trained model, so that nothing is hidden by what begins at zero
SPREAD = 0.3


def build(added: dict[str, Any], **others: Any) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(replace(SMALL, **added | others))
    for weight in model.parameters():
        nn.init.normal_(weight, mean=float(weight.ndim == 1), std=SPREAD)
    return model


def images(count: int = 3, side: int = 16) -> Float[Tensor, "b 3 side side"]:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def step(model: VisionTransformer) -> tuple[Float[Tensor, "b classes"], Float[Tensor, " weights"]]:
    """Logits and the gradient of a loss by them, with the same noise each time."""
    model.zero_grad()
    torch.manual_seed(2)
    logits = model(images())
    (logits.float().softmax(-1) ** 2).sum().backward()
    return logits, torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


# None is there unasked


def test_the_plain_model_is_as_it_was(tmp_path: Path) -> None:
    block = ["attention_norm", "attention.qkv", "attention.out", "mlp_norm", "mlp.hidden", "mlp.out"]
    modules = ["patch_embedding.projection", *(f"blocks.{n}.{name}" for n in (0, 1) for name in block), "norm", "head"]
    weights = [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    model = build({})
    assert sorted(model.state_dict()) == sorted(["class_token", "position_embedding", *weights])
    run = Run.create(tmp_path / "run")
    run.save_model(model, tuple("abcde"))
    path = run.path / "model" / "config.json"
    content = json.loads(path.read_text("utf-8"))
    for name in ALL:  # older runs have none of them, and settings that are no more
        del content["model"][name]
    content["model"] |= {"positions": "learnt", "registers": 0, "qk_norm": False}
    path.write_text(json.dumps(content))
    back = vitrail.load(run.path)
    assert back.config == SMALL
    assert torch.equal(back(images()), model.eval()(images()))
    content["model"] |= {"positions": "rotary", "registers": 2}
    path.write_text(json.dumps(content))
    with pytest.raises(
        BadInput, match=r"config\.json: settings that this version of Vitrail lacks: positions, registers"
    ):
        vitrail.load(run.path)


@pytest.mark.parametrize("added", [{"stochastic_depth": 0.4}, {"patch_dropout": 0.4}])
def test_what_is_for_training_leaves_weights_and_evaluation_as_they_are(added: dict[str, Any]) -> None:
    model, plain = build(added), build({})
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(model.eval()(images()), plain.eval()(images()))
    assert not torch.equal(model.train()(images()), plain.train()(images()))


# All go together


@pytest.mark.parametrize("added", CASES)
def test_both_ways_to_attend_and_to_save_memory_agree(added: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(added)
    expected = step(model)
    monkeypatch.setattr("vitrail.vit.fused.PLAIN_ATTENTION_TOKENS", 0)  # torch's fused kernel, as on a GPU
    torch.testing.assert_close(step(model), expected, atol=1e-5, rtol=1e-5)
    for _ in range(2):  # fused, then plain
        with torch.autocast("cpu", torch.bfloat16):
            logits, gradient = step(model)
        assert (logits - expected[0]).norm() < 0.05 * expected[0].norm()
        assert nn.functional.cosine_similarity(gradient, expected[1], dim=0) > 0.98
        monkeypatch.undo()
    model.checkpoint_activations = True
    torch.testing.assert_close(step(model), expected, atol=1e-5, rtol=1e-5)
    model.eval()
    encoded = model.forward_encoder(model.embed(images()))
    torch.testing.assert_close(model(images()), model.forward_head(encoded), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("added", CASES)
def test_attention_is_what_the_blocks_pay(added: dict[str, Any]) -> None:
    """The last block's output, put together again from the weights that `attention` tells."""
    model = build(added).eval()
    weights = model.attention(images())[1]
    tokens = model.embed(images())
    assert weights.shape == (3, 4, model.config.num_tokens, model.config.num_tokens) == (3, 4, *2 * tokens.shape[1:2])
    block: Any = model.blocks[1]
    x = model.blocks[0](tokens)
    values = block.attention.project(block.attention_norm(x))[2]
    attended = block.attention.out((weights @ values).transpose(1, 2).flatten(2))
    x = x + block.attention_scale(attended)
    x = x + block.mlp_scale(block.mlp(block.mlp_norm(x)))
    torch.testing.assert_close(model.norm(x), model.forward_encoder(tokens), atol=1e-5, rtol=1e-5)


def test_saved_loaded_and_resized(tmp_path: Path) -> None:
    model = build(ALL)
    run = Run.create(tmp_path / "run")
    run.save_model(model, tuple("abcde"))
    back, larger = vitrail.load(run.path), vitrail.load(run.path, image_size=24)
    assert back.config == model.config
    assert torch.equal(back(images()), model.eval()(images()))
    names = [name for name in model.state_dict() if name != "position_embedding"]
    assert all(torch.equal(larger.state_dict()[name], model.state_dict()[name]) for name in names)
    assert isinstance(larger, VisionTransformer)
    assert larger.embed(images(2, 24)).shape == (2, 1 + 6**2, 32)
    assert larger.train().embed(images(2, 16)).shape == (2, 1 + 4**2, 32)  # as in the first steps of some recipes


@pytest.mark.parametrize("added", CASES)
def test_flops_are_those_that_torch_counts(added: dict[str, Any]) -> None:
    model = build(added)
    for flops, training in ((forward_flops, False), (training_flops, True)):
        model.train(training)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
            logits = model(images())
            if training:
                logits.sum().backward()
        assert counter.get_total_flops() == 3 * flops(model.config)


def test_each_setting_of_a_recipe_reaches_the_model(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        **ALL, "hidden_size": 16, "mlp_dim": 24, "num_heads": 2, "num_layers": 2, "dropout": 0.2,
    }  # fmt: skip
    run = vitrail.train(
        "digits", output=tmp_path / "run", epochs=1, batch_size=1000, lr=0.0, initial_weights="torch",
        zero_residual=True, **settings,
    ).run  # fmt: skip
    config = json.loads((run / "model" / "config.json").read_text("utf-8"))["model"]
    assert {name: config[name] for name in settings} == settings
    weights = vitrail.load(run).state_dict()
    zero = {name for name, weight in weights.items() if not weight.any()}
    outs = {name for name in weights if ".out." in name}
    assert len(outs) == 8
    norms = {name for name in weights if name.endswith("norm.bias")} | {
        f"patch_embedding.layers.{n}.bias" for n in ("1", "3.layers.1", "4.layers.1", "6")
    }
    assert zero == outs | norms  # and nothing else: the head is not, nor are the biases of queries, keys and values


@pytest.mark.parametrize("library", UNSAID)
def test_other_libraries_get_no_model_that_they_would_read_otherwise(library: Library) -> None:
    values: dict[str, Any] = {"stem": "convolutions", "layer_scale": 1.0}
    assert values.keys() == set(ADDITIONS)
    for name, value in values.items():
        with pytest.raises(BadInput, match=f"{library} has no such model: it has {name} = {value}".lower()):
            check_options(replace(SMALL, **{name: value}), library)
    check_options(replace(SMALL, stochastic_depth=0.1, patch_dropout=0.1), library)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"stem": "conv"}, "stem is 'conv'; it must be one of patch, convolutions"),
        ({"stem": "convolutions", "stem_units": -1}, "stem_units is -1; it must be a whole number from 0"),
        ({"stem": "convolutions", "stem_units": "2"}, "stem_units is '2'; it must be a whole number from 0"),
        ({"layer_scale": 0.0}, "layer_scale is 0.0; it must be above 0, or left out"),
        ({"stochastic_depth": 1.0}, "stochastic_depth is 1.0; it must be at least 0 and below 1"),
        ({"patch_dropout": -0.1}, "patch_dropout is -0.1; it must be at least 0 and below 1"),
        ({"stem_units": 1}, "stem_units is 1; it does nothing unless stem is convolutions"),
        ({"stem": "convolutions", "patch_size": 6, "image_size": 18}, "6 is no power of 2"),
        ({"stem": "convolutions", "patch_size": 1}, "1 is no power of 2"),
        ({"stem": "convolutions", "patch_size": 16, "hidden_size": 36}, "take a multiple of 8 for hidden_size"),
        ({"stem": "convolutions", "stem_units": 1, "patch_size": 2}, "one for patches of 2: take 0, or larger patches"),
        ({"stem": "convolutions", "resnet_blocks": ()}, "leave out stem = 'convolutions'"),
    ],
)
def test_additions_that_cannot_be_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        replace(SMALL, **changed)


def test_residuals_are_summed_in_float32() -> None:
    model = build({"classifier": "gap"})
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.embed(images())
        assert (tokens.dtype, model.blocks[0](tokens).dtype) == (torch.float32, torch.float32)


# Positions


def test_the_model_sees_where_patches_are() -> None:
    model = build({"classifier": "gap"}).eval()
    image = images(1)
    moved = torch.cat([image[..., 8:], image[..., :8]], dim=-1)  # the same patches, halves exchanged
    assert (model(moved) - model(image)).abs().max() > 1e-2


def test_sincos_positions_are_those_of_big_vision() -> None:
    """Its formula (models/vit.py, posemb_sincos_2d), in NumPy."""
    for side, width in ((3, 8), (4, 32), (1, 4)):
        y, x = np.mgrid[:side, :side]
        omega = 1 / 10_000 ** (np.arange(width // 4) / max(1, width // 4 - 1))
        columns, rows = (np.einsum("m,d->md", part.flatten(), omega) for part in (x, y))
        expected = np.concatenate([np.sin(columns), np.cos(columns), np.sin(rows), np.cos(rows)], axis=1)
        np.testing.assert_allclose(sincos_positions(side**2, width, CPU), expected, atol=1e-6)


# The rest, each


def test_stem_makes_a_token_of_each_patch_and_in_evaluation_looks_at_no_other_image() -> None:
    stem = ConvolutionalStem(replace(SMALL, patch_size=8, stem="convolutions"))
    convolutions = [layer for layer in stem.layers if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [8, 16, 32]
    assert [layer.num_features for layer in stem.layers if isinstance(layer, nn.BatchNorm2d)] == [8, 16, 32]
    batch = images(3, 32)
    together, alone = stem(batch), stem(batch[1:2])
    assert (together[1:2] - alone).abs().max() > 0.1  # in training, normalised with the others
    tokens = stem.eval()(batch)
    assert tokens.shape == (3, 16, 32)
    torch.testing.assert_close(stem(batch[1:2]), tokens[1:2])
    # Tokens lie row by row, each seeing 15 pixels a side around the first of its patch
    marked = batch.clone()
    marked[..., 5:12, 21:28] += 10
    changed = (stem(marked) - tokens).abs().sum(-1)[0]
    assert changed.argmax() == 7


def test_units_of_a_stem_add_to_its_last_map_but_one() -> None:
    """As torch's own convolution, norm and ReLU have it; without weights they change nothing."""
    config = replace(SMALL, patch_size=8, image_size=32, stem="convolutions")
    torch.manual_seed(0)
    plain, deep = ConvolutionalStem(config), ConvolutionalStem(replace(config, stem_units=2))
    of_plain, units = iter(plain.layers), [layer for layer in deep.layers if isinstance(layer, ResidualUnit)]
    assert [deep.layers[n] for n in (6, 7)] == units
    for layer in (layer for layer in deep.layers if layer not in units):
        layer.load_state_dict(next(of_plain).state_dict())
    deep.projection.load_state_dict(plain.projection.state_dict())
    batch = images(3, 32)
    kernels = [unit.get_parameter("layers.0.weight") for unit in units]
    assert {kernel.shape for kernel in kernels} == {(16, 16, 3, 3)}
    found, x = deep(batch), plain.layers[:6](batch)
    assert x.shape == (3, 16, 8, 8)  # half a patch's cells
    for kernel in kernels:
        x = x + F.relu(F.batch_norm(F.conv2d(x, kernel, padding=1), None, None, training=True))
    expected = plain.projection(plain.layers[6:](x).flatten(2).transpose(1, 2))
    torch.testing.assert_close(found, expected)
    assert (found - plain(batch)).abs().max() > 0.1
    for kernel in kernels:
        nn.init.zeros_(kernel)
    torch.testing.assert_close(deep(batch), plain(batch))


def test_layer_scale_begins_at_its_value_and_multiplies_the_residuals() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(replace(SMALL, layer_scale=0.25))
    scales = [weight for name, weight in model.named_parameters() if "_scale." in name]
    assert len(scales) == 2 * SMALL.num_layers
    assert all(torch.equal(scale, torch.full((32,), 0.25)) for scale in scales)
    scaled, plain = build({"layer_scale": 0.25}).eval(), build({}).eval()
    weights = {name: weight.clone() for name, weight in scaled.state_dict().items()}
    for name in [name for name in weights if "_scale." in name]:
        scale, out = weights.pop(name), name.replace("_scale.weight", ".out")
        weights[f"{out}.weight"] *= scale[:, None]
        weights[f"{out}.bias"] *= scale
    plain.load_state_dict(weights)
    torch.testing.assert_close(scaled(images()), plain(images()), atol=1e-4, rtol=1e-4)


def test_initial_weights_are_of_the_scale_of_the_plain_models() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(replace(SMALL, hidden_size=256, stem="convolutions", stem_units=1))
    state = model.state_dict()
    assert state["position_embedding"].std().item() == pytest.approx(0.02, rel=0.05)
    for name, fan_in in (
        ("layers.0", 27),
        ("layers.3.layers.0", 9 * 128),
        ("layers.4", 9 * 128),
        ("projection", 256),
    ):  # LeCun normal, as patches have
        weight = state[f"patch_embedding.{name}.weight"]
        assert weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.05)


def test_zero_residual_begins_with_blocks_that_add_nothing() -> None:
    model = VisionTransformer(SMALL)
    zero_residuals(model)
    tokens = model.embed(images())
    assert torch.equal(model.forward_encoder(tokens), model.norm(tokens))
    assert (VisionTransformer(SMALL).forward_encoder(tokens) - model.norm(tokens)).abs().max() > 0.1


def test_stochastic_depth_leaves_out_whole_residuals_at_a_rising_rate() -> None:
    torch.manual_seed(0)
    config = replace(SMALL, stochastic_depth=0.4)
    branches = [block.mlp_scale for block in VisionTransformer(config).blocks]
    ones = torch.ones(4000, 2, 32)
    for branch, rate in zip(branches, (0.2, 0.4), strict=True):
        assert isinstance(branch, ResidualScale)
        found = branch(ones)
        assert torch.equal(found, found[:, :1, :1].expand_as(found))  # all of an image's, or nothing
        assert found.unique().tolist() == [0, pytest.approx(1 / (1 - rate))]
        assert (found == 0).float().mean().item() == pytest.approx(rate, abs=0.03)
        assert branch.eval()(ones) is ones
    scaled = ResidualScale(replace(config, layer_scale=0.25), 2)
    assert scaled(ones).unique().tolist() == [0, pytest.approx(0.25 / (1 - 0.4))]
    model = build({"stochastic_depth": 0.4}, num_layers=1)  # both of its residuals
    tokens = model.embed(images(1)).expand(200, -1, -1)
    assert len(model.blocks[0](tokens)[:, 0, 0].round(decimals=3).unique()) == 4


def test_patch_dropout_shortens_the_sequence_and_keeps_what_is_in_front() -> None:
    torch.manual_seed(0)
    config = replace(SMALL, patch_dropout=0.4)
    tokens = torch.randn(50, 1 + 16, 32)
    left = drop_patches(tokens, config)
    assert left.shape == (50, 1 + 10, 32)
    assert torch.equal(left[:, 0], tokens[:, 0])
    same = (left[:, 1:, None] == tokens[:, None, 1:]).all(-1)  # (50, 10, 16)
    assert (same.sum(2) == 1).all()
    numbers = same.int().argmax(2)
    for image in range(50):
        assert len(numbers[image].unique()) == 10
    shares = torch.bincount(numbers.flatten(), minlength=16) / 50  # of the images that each patch is left in
    assert shares.min() > 0.35
    assert shares.max() < 0.9
    assert not torch.equal(numbers[0].sort()[0], numbers[1].sort()[0])
    assert replace(config, patch_dropout=0.99).kept_patches(16) == 1
    seen = []
    model = build({"patch_dropout": 0.5})
    model.blocks[1].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    model(images())
    model.eval()(images())
    assert seen == [1 + 8, 1 + 16]
