"""Few-shot linear evaluation: the closed form, what is drawn, and that a trained model's features are worth more than
pixels; and the drawing of a model."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from folders import SMALL, imported, written
from sklearn.linear_model import Ridge

import vitrail
from vitrail import probe as probing
from vitrail.cli import main
from vitrail.config import ViTConfig
from vitrail.drawing import draw, shown_patches, window
from vitrail.errors import BadInput
from vitrail.model import VisionTransformer
from vitrail.probe import CONSTANT, PENALTY, choose_shots, fit, probe


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "trained"
    sizes: dict[str, Any] = {"hidden_size": 32, "mlp_dim": 64, "num_heads": 2, "num_layers": 2}
    return vitrail.train("digits", output=run, epochs=8, lr=5e-3, rotate=0.0, crop=0, **sizes).run


# The closed form


@pytest.mark.parametrize(("images", "width"), [(60, 12), (12, 60), (30, 29)])
def test_the_closed_form_is_ridge_regression(images: int, width: int) -> None:
    noise = torch.Generator().manual_seed(images)
    features, labels = torch.randn(images, width, generator=noise) * 3 + 1, torch.arange(images) % 4
    fitted = fit(features, labels, 4)
    x = features.double().numpy()
    x = (x - x.mean(0)) / (x.std(0) + 1e-5)
    x = np.concatenate([x, np.full((images, 1), CONSTANT)], axis=1)
    y = np.where(np.arange(4) == labels.numpy()[:, None], 1.0, -1.0)
    ridge = Ridge(alpha=PENALTY, fit_intercept=False, solver="svd").fit(x, y)
    np.testing.assert_allclose(fitted.weight.T.numpy(), ridge.coef_, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(fitted(features).numpy(), ridge.predict(x), rtol=1e-9, atol=1e-9)


def test_a_feature_that_never_changes_does_no_harm() -> None:
    scores = fit(torch.zeros(6, 3), torch.arange(6) % 2, 2)(torch.ones(2, 3))
    assert scores.isfinite().all()


# What is drawn


def test_draws_have_as_many_of_each_class_and_fewer_are_the_first_of_more() -> None:
    labels = np.random.default_rng(0).integers(0, 3, 100)
    drawn = probing.draw(labels, 3, 5, seed=1)
    assert (labels[drawn] == np.arange(3)[:, None]).all()
    assert len(np.unique(drawn)) == 15
    assert (probing.draw(labels, 3, 2, seed=1) == drawn[:, :2]).all()
    assert (probing.draw(labels, 3, 5, seed=2) != drawn).any()


def test_more_shots_than_a_class_has_images_are_refused_by_name() -> None:
    labels = np.array([0] * 30 + [1] * 7)
    assert choose_shots(None, labels, ("cat", "dog"), "pets") == [1, 5]
    assert choose_shots([3, 1, 3], labels, ("cat", "dog"), "pets") == [1, 3]
    with pytest.raises(BadInput, match="pets has 7 training images of the class dog, and --shots 10 takes as many"):
        choose_shots([10], labels, ("cat", "dog"), "pets")


# The whole


def test_features_of_a_trained_run_beat_raw_pixels(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = probe(trained, shots=[1, 5])
    assert (found["dataset"], found["split"], found["count"], found["classes"]) == ("digits", "test", 359, 10)
    assert (found["features"]["size"], found["pixels"]["size"]) == (32, 16 * 16 * 3)
    rows = list(zip(found["features"]["shots"], found["pixels"]["shots"], strict=True))
    assert [ours["shots"] for ours, _ in rows] == [1, 5]
    for ours, raw in rows:
        assert ours["top1"] > raw["top1"] + 0.02
    assert rows[0][0]["top1_std"] > 0

    def extract(*_: Any) -> Any:
        raise AssertionError("the features were there")

    monkeypatch.setattr(probing, "evaluation_batches", extract)  # raw pixels are not kept
    with pytest.raises(AssertionError, match="were there"):
        probe(trained, shots=[1, 5])
    kept = probing.kept
    monkeypatch.setattr(probing, "kept", lambda path, make: kept(path, extract))  # features are
    monkeypatch.setattr(probing.Extractor, "features", lambda self, images, size: torch.ones(len(images), 2))
    assert probe(trained, shots=[1, 5])["features"] == found["features"]


def test_features_that_were_cut_off_are_made_again(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "features.safetensors"
    path.write_bytes(b"cut off")
    made = torch.ones(2, 3)
    assert probing.kept(path, lambda: made) is made
    assert torch.equal(probing.kept(path, lambda: torch.zeros(1)), made)


def test_weights_without_a_run_need_data_and_no_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written(tmp_path / "theirs", "transformers", imported(SMALL))
    assert main(["probe", str(folder)]) == 2
    assert "has no images of its own. Say with --data D" in capsys.readouterr().err
    assert main(["probe", str(folder), "--data", "digits", "--shots", "2", "--json"]) == 0
    assert [row["shots"] for row in json.loads(capsys.readouterr().out)["features"]["shots"]] == [2]


def test_typed(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", str(trained), "--shots", "1", "5"]) == 0
    out = capsys.readouterr().out
    assert "359 images (digits, test); mean ± standard deviation over 5 draws" in out
    assert "images a class" in out
    assert "32 features" in out
    assert main(["probe", str(trained), "--shots", "9999"]) == 2
    assert "take at most" in capsys.readouterr().err


# The drawing


def text_of(svg: str) -> str:
    return " ".join(ElementTree.fromstring(svg).itertext())


@pytest.mark.parametrize("name", ["ViT-B/16", "ViT-H/14", "ViT-S/16-gap", "R+ViT-Ti/16", "R50+ViT-L/32"])
def test_a_drawing_has_the_numbers_of_its_model(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["draw", name, "--output", str(tmp_path / "model.svg")]) == 0
    text = text_of((tmp_path / "model.svg").read_text("utf-8"))
    with torch.device("meta"):
        model = vitrail.create(name)
    config = model.config
    parameters = sum(weight.numel() for weight in model.parameters())
    assert f"{parameters:,} parameters, images of 224 × 224 pixels, 1,000 classes" in text
    assert f"{config.num_layers} ×" in text
    assert f"{config.num_heads} heads of {config.hidden_size // config.num_heads}" in text
    assert ("Mean of all patches" in text) == (config.classifier == "gap")
    assert ("* learnt class token" in text) == (config.classifier == "token")
    assert ("ResNet" in text) == (config.resnet_blocks is not None)


def test_what_later_papers_add_is_drawn() -> None:
    config = ViTConfig(
        16, 4, 24, 48, 3, 2, 5, representation_size=8, positions="rotary", stem="convolutions", registers=2,
        qk_norm=True, layer_scale=0.1,
    )  # fmt: skip
    with torch.device("meta"):
        model = VisionTransformer(config)
    text = text_of(draw(model, "a <model> & more", ("cat", "dog & mouse")))
    for said in ("a <model> & more", "class: cat, dog & mouse", "R 2 learnt registers", "Layer with tanh",
                 "× scale: 24", "Convolutions of stride 2", "keys normalised, turned by position"):  # fmt: skip
        assert said in text


def test_a_run_is_drawn_with_its_classes_and_an_image(trained: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    output = tmp_path / "run.svg"
    words = ["draw", str(trained), "--image", str(tmp_path / "red.png"), "--output", str(output)]
    assert main(words) == 0
    assert "class: 0, 1, 2, …" in text_of(output.read_text("utf-8"))
    assert main(words) == 0  # its own file gives way


def test_what_cannot_be_drawn_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.svg").write_text("<svg/>")
    for words, says in (
        (["ViT-B16", "--output", "a.svg"], "did you mean 'ViT-B/16'?"),
        (["ViT-B/16", "--output", "a.png"], "call it a.svg"),
        (["ViT-B/16", "--output", str(tmp_path / "mine.svg")], "was not written by this command"),
        (["ViT-B/16", "--image-size", "30", "--output", "a.svg"], "images of 30 pixels do not divide"),
    ):
        assert main(["draw", *words]) == 2
        assert says in capsys.readouterr().err


def test_patches_and_window() -> None:
    assert shown_patches(3) == list(range(9))
    assert shown_patches(4) == [0, 1, None, 8, 9, 10, 11, None, 14, 15]
    assert shown_patches(14)[-1] == 195
    pixels = window(64)
    assert pixels.shape == (64, 64, 3)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
