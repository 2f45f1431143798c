"""The CNN to compare the Vision Transformer with: what its block computes, how it is trained, and what takes it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

import vitrail
from vitrail.cli import main
from vitrail.errors import BadInput
from vitrail.evaluation.evaluate import evaluate_run, predict_files
from vitrail.pages.compare import differences
from vitrail.pages.runs import load
from vitrail.recipes import RECIPES, resolve
from vitrail.settings import Recipe
from vitrail.training.muon import orthogonalise
from vitrail.training.optimize import build_optimizer
from vitrail.vit.resnet import BasicBlock, ResNetClassifier, ResNetConfig
from vitrail.weights.checkpoint import Run
from vitrail.weights.exchange import export_model

Array = NDArray[np.float64]
SMALL = ResNetConfig(image_size=16, num_classes=5, width=32, blocks=(1, 2))
WEIGHTS = Path("model/model.safetensors")


def build(config: ResNetConfig = SMALL) -> ResNetClassifier:
    """With weights as those of a trained model, so that nothing is hidden by what begins at zero."""
    torch.manual_seed(0)
    model = ResNetClassifier(config)
    for weight in model.parameters():
        nn.init.normal_(weight, mean=float(weight.ndim == 1), std=0.3)
    return model


def images(count: int = 3, side: int = 16) -> Float[Tensor, "b 3 side side"]:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


# What it computes


def convolve(x: Array, kernel: Array, stride: int) -> Array:
    """A weight-standardised convolution, cell by cell, padded by TensorFlow's rule for "SAME"."""
    mean, std = kernel.mean((1, 2, 3), keepdims=True), kernel.std((1, 2, 3), keepdims=True)
    kernel = (kernel - mean) / (std + 1e-5)
    size, side = kernel.shape[-1], x.shape[-1]
    total = max(size - (side % stride or stride), 0)
    x = np.pad(x, [(0, 0), (0, 0), *2 * [(total // 2, total - total // 2)]])
    cells = range(0, -(-side // stride) * stride, stride)
    rows = [[np.einsum("bcij,wcij->bw", x[:, :, i : i + size, j : j + size], kernel) for j in cells] for i in cells]
    return np.moveaxis(np.array(rows), (0, 1), (2, 3))


def normalise(x: Array, weight: Array, bias: Array) -> Array:
    """GroupNorm of 32 groups."""
    groups = x.reshape(len(x), 32, -1)
    groups = (groups - groups.mean(2, keepdims=True)) / np.sqrt(groups.var(2, keepdims=True) + 1e-6)
    return groups.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]


@pytest.mark.parametrize(("width", "stride", "side"), [(64, 1, 5), (64, 2, 6), (64, 2, 7), (128, 1, 4), (128, 2, 8)])
def test_the_block_is_that_of_numpy(width: int, stride: int, side: int) -> None:
    torch.manual_seed(0)
    block = BasicBlock(64, width, stride).double()
    for weight in block.parameters():
        nn.init.normal_(weight, mean=float(weight.ndim == 1))
    its = {name: weight.detach().numpy() for name, weight in block.named_parameters()}
    images = torch.randn(2, 64, side, side, dtype=torch.float64)
    x = images.numpy()
    hidden = convolve(x, its["conv1.weight"], stride)
    hidden = np.maximum(normalise(hidden, its["norm1.weight"], its["norm1.bias"]), 0)
    hidden = normalise(convolve(hidden, its["conv2.weight"], 1), its["norm2.weight"], its["norm2.bias"])
    shortcut = x
    if (width, stride) != (64, 1):
        projected = convolve(x, its["projection.0.weight"], stride)
        shortcut = normalise(projected, its["projection.1.weight"], its["projection.1.bias"])
    np.testing.assert_allclose(block(images).detach().numpy(), np.maximum(shortcut + hidden, 0), atol=1e-9)


def test_it_has_the_weights_of_a_resnet_18() -> None:
    """11,689,512 are torchvision's, whose BatchNorm has as many as GroupNorm."""
    with torch.device("meta"):
        large, small = ResNetClassifier(ResNetConfig()), ResNetClassifier(ResNetConfig(64, 200))
    counts = [sum(weight.numel() for weight in model.parameters()) for model in (large, small)]
    assert counts == [11_689_512, 11_689_512 - 3 * 64 * (7**2 - 3**2) - 800 * 513]
    maps = [model.resnet(torch.empty(1, 3, side, side, device="meta")) for model, side in ((large, 224), (small, 64))]
    assert [tuple(found.shape) for found in maps] == [(1, 512, 7, 7), (1, 512, 8, 8)]


def test_it_begins_with_blocks_that_add_nothing_and_a_head_of_zeros() -> None:
    model = ResNetClassifier(replace(SMALL, blocks=(1,))).eval()
    assert not model(images()).any()
    x = model.resnet.norm(model.resnet.root(images())).relu()
    assert torch.equal(model.features(images()), x.mean(dim=(2, 3)))
    assert x.any()


def test_what_saves_memory_or_time_gives_the_same_gradient() -> None:
    model = build(replace(SMALL, image_size=8, blocks=(1, 1)))

    def step() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        logits = model(images(2, 8))
        (logits.float().softmax(-1) ** 2).sum().backward()
        return logits, torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])

    expected = step()
    model.checkpoint_activations = True
    torch.testing.assert_close(step(), expected)
    with torch.autocast("cpu", torch.bfloat16):
        logits, gradient = step()
    assert (logits - expected[0]).norm() < 0.05 * expected[0].norm()
    assert nn.functional.cosine_similarity(gradient, expected[1], dim=0) > 0.98


@pytest.mark.parametrize(
    ("shape", "says"),
    [((1, 3, 24, 24), "resize them"), ((1, 1, 16, 16), "repeat a grey channel"), ((1, 3, 16, 8), "resize them")],
)
def test_images_of_another_shape(shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(BadInput, match=rf"\(batch, 3, 16, 16\), not .*: {says}"):
        build()(torch.zeros(shape))


def test_smaller_images_are_for_training_unless_the_model_accepts_them() -> None:
    model = build()
    assert model(images(2, 8)).shape == (2, 5)
    with pytest.raises(BadInput, match=r"not \(2, 3, 8, 8\): resize them"):
        model.eval()(images(2, 8))
    model.accepts_smaller = True
    assert model(images(2, 8)).shape == (2, 5)
    with pytest.raises(BadInput, match=r"not \(2, 3, 24, 24\): resize them"):
        model(images(2, 24))


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ({"width": 48}, "norms need a multiple of 32"),
        ({"num_classes": 0}, "num_classes is 0; it must be a whole number from 1"),
        ({"blocks": ()}, "take 1 to 6 stages"),
        ({"blocks": (2, 0)}, "take 1 to 6 stages"),
    ],
)
def test_shapes_that_cannot_be(shape: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        replace(SMALL, **shape)


# Settings


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("resnet-18", {"patch_size": 4}, "patch_size does nothing unless architecture is vit"),
        ("resnet-18", {"num_layers": 4}, "num_layers does nothing unless architecture is vit"),
        ("resnet-18", {"layer_scale": 0.1, "stem": "convolutions"}, "set stem = patch, layer_scale = none"),
        ("vit-12", {"resnet_width": 32}, "resnet_width does nothing unless architecture is resnet-18"),
        ("vit-12", {"architecture": "resnet-18"}, "no dropout, initial_weights; leave it out, or set dropout = 0.0"),
        (
            "resnet-18",
            {"first_size": 60},
            "with a stride of 8 and images of 64 pixels it may be 8, 16, 24",
        ),
        ("resnet-18", {"architecture": "resnet"}, "did you mean 'resnet-18'"),
    ],
)
def test_settings_that_do_not_go_with_it(name: str, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        resolve(name, **settings)


def test_the_sizes_of_a_transformer_are_not_its() -> None:
    recipe = resolve("digits", architecture="resnet-18", image_size=17).recipe  # which patches of 4 do not divide
    assert recipe == replace(RECIPES["digits"], architecture="resnet-18", image_size=17)


def test_muon_has_the_kernels_of_the_stages() -> None:
    """As matrices with a row for each channel of the output; AdamW has the rest."""
    model = build()
    recipe = Recipe(architecture="resnet-18", optimizer="muon", lr=0.0, muon_lr=0.1)
    optimizer = build_optimizer(model, recipe)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    model(images()).square().sum().backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    optimizer.step()
    kernels = 0
    for name, weight in model.named_parameters():
        moved, gradient = weight.detach() - before[name], gradients[name]
        if weight.ndim == 4 and name != "resnet.root.weight":
            kernels += 1
            assert gradient is not None
            matrix = gradient.flatten(1)  # the first momentum is a share of the gradient, and only its direction counts
            wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
            update = orthogonalise(wide[None])[0]
            update = (update if wide is matrix else update.T) * max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5
            torch.testing.assert_close(moved.flatten(1), -0.1 * update, atol=1e-4, rtol=1e-3)
        else:
            assert not moved.any()
    assert kernels == 7


# A run


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some real digits of three classes."""
    folder = tmp_path_factory.mktemp("photos")
    digits = load_digits()
    for label in range(3):
        found = digits.images[digits.target == label]
        for split, some in (("train", found[:8]), ("val", found[8:12])):
            (place := folder / split / f"digit {label}").mkdir(parents=True)
            for number, image in enumerate(some):
                Image.fromarray((image * 15.9).astype(np.uint8)).save(place / f"{number}.png")
    return folder


def train(photos: Path, output: Path, **settings: Any) -> Path:
    shape: dict[str, Any] = {"data": str(photos), "image_size": 8, "epochs": 2, "batch_size": 12, "warmup": 0.0}
    return vitrail.train("resnet-18", output=output, **shape | {"crop": 1, "lr": 0.01} | settings).run


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(photos, tmp_path_factory.mktemp("runs") / "cnn")


def test_a_run_resumes_in_the_middle_of_an_epoch_to_the_same_bits(
    run: Path, photos: Path, tmp_path: Path, power_cut: Callable[[Callable[[], object], int], None]
) -> None:
    half = tmp_path / "half"
    power_cut(lambda: train(photos, half, checkpoint_every=0.0), 1)
    assert (half / WEIGHTS).read_bytes() != (run / WEIGHTS).read_bytes()
    vitrail.train(output=half, resume=True)
    assert (half / WEIGHTS).read_bytes() == (run / WEIGHTS).read_bytes()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["train_loss"] < rows[0]["train_loss"]


def test_a_narrower_one_is_trained_and_one_that_its_norms_do_not_divide_is_refused(
    photos: Path, tmp_path: Path
) -> None:
    narrow = json.loads((train(photos, tmp_path / "narrow", resnet_width=32) / "results.json").read_text())
    assert narrow["parameters"] == sum(w.numel() for w in ResNetClassifier(ResNetConfig(8, 3, 32)).parameters())
    with pytest.raises(BadInput, match="48 wide cannot be; its norms need a multiple of 32"):
        train(photos, tmp_path / "odd", resnet_width=48)
    assert not (tmp_path / "odd").exists()


def test_a_run_is_loaded_evaluated_and_compared(run: Path, photos: Path, tmp_path: Path) -> None:
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["architecture"] == "ResNet"
    assert config["model"] == {"image_size": 8, "num_classes": 3, "width": 64, "blocks": [2, 2, 2, 2]}
    results = json.loads((run / "results.json").read_text())
    assert results["parameters"] == 11_689_512 - 3 * 64 * (7**2 - 3**2) - 997 * 513
    assert evaluate_run(run)["loss"] == pytest.approx(results["loss"], rel=1e-4)
    file = photos / "val" / "digit 0" / "0.png"
    assert {guess["class"] for guess in predict_files(run, [file])[0]["predictions"]} == set(config["classes"])
    model = vitrail.load(run)
    assert isinstance(model, ResNetClassifier)
    assert model(images(2, 8)).any()
    other = vitrail.load(run, image_size=16, num_classes=7)
    assert isinstance(other, ResNetClassifier)
    assert other(images(2)).shape == (2, 7)
    assert not other(images(2)).any()
    assert torch.equal(other.train().features(images(2, 8)), model.features(images(2, 8)))
    with pytest.raises(BadInput, match="below 128 pixels has another root"):
        vitrail.load(run, image_size=224)
    assert main(["report", str(run)]) == 0
    _, differing = differences(load([run, Path(__file__).parent.parent / "results" / "digits-seed-0"]))
    assert differing["architecture"] == ["resnet-18", "vit"]
    assert differing["hidden_size"] == ["none", "64"]
    assert differing["resnet_width"] == ["64", "none"]
    assert "dropout" not in differing  # which no model here has
    _, differing = differences(
        load([Path(__file__).parent.parent / "results" / f"coffee{kind}-seed-0" for kind in ("-cnn", "-bf16")])
    )
    assert (differing["gelu"], differing["zero_residual"]) == (["none", "exact"], ["none", "true"])


def test_what_is_of_transformers_alone_refuses_it(run: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="a ResNet, which is there to be compared"):
        export_model(run, "timm", tmp_path / "out")
    with pytest.raises(BadInput, match="a part of a run folder; name the whole"):
        vitrail.load(run / "model")


def test_a_config_of_another_kind(run: Path, tmp_path: Path) -> None:
    content = json.loads((run / "model" / "config.json").read_text())
    (path := tmp_path / "run" / "model" / "config.json").parent.mkdir(parents=True)
    for changed, says in (
        ({"architecture": "VGG"}, "its architecture is 'VGG'; Vitrail has VisionTransformer and ResNet"),
        ({"model": content["model"] | {"depth": 3}}, "that this version of Vitrail lacks: depth"),
        ({"model": content["model"] | {"blocks": []}}, "take 1 to 6 stages"),
        ({"model": content["model"] | {"blocks": 4}}, "is damaged"),
    ):
        path.write_text(json.dumps(content | changed))
        with pytest.raises(BadInput, match=says):
            Run.open(tmp_path / "run").config()
