"""Few-shot linear evaluation: the closed form, what is drawn, and that a trained model's features are worth more than
pixels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import SMALL, imported, written
from sklearn.linear_model import Ridge

import vitrail
from vitrail.cli import main
from vitrail.data import cache
from vitrail.errors import BadInput
from vitrail.evaluation import probe as probing
from vitrail.evaluation.evaluate import pick_device
from vitrail.evaluation.probe import CONSTANT, PENALTY, Extractor, choose_shots, fit, probe
from vitrail.vit import floor


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
    monkeypatch.setattr(probing, "commit", lambda: "0" * 40)  # whatever has changed here since the last one
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


def test_nothing_is_kept_of_a_program_with_changes(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(*_: Any) -> Any:
        raise AssertionError("another program may have kept them")

    monkeypatch.setattr(probing, "kept", keep)
    monkeypatch.setattr(probing, "commit", lambda: "0" * 40 + "+changes")
    assert probe(trained, shots=[1])["features"] == probe(trained, shots=[1])["features"]
    monkeypatch.setattr(probing, "commit", lambda: "0" * 40)
    with pytest.raises(AssertionError, match="another program"):
        probe(trained, shots=[1])


def test_no_stopwatch_decides_the_precision(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(*_: Any) -> Any:
        raise AssertionError("it was timed")

    monkeypatch.setattr(floor, "median_seconds", timed)
    assert probe(trained, shots=[1])["precision"] == floor.native_precision(pick_device("auto"))


def test_features_in_bf16_lie_near_those_in_float32_and_tell_as_much(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As near as a number of 8 bits to one of 24 behind two blocks; of 359 images, three more or fewer are known."""
    model, mean, std = probing.headless(trained)
    images, cpu = cache.load("digits", 16).splits["test"], torch.device("cpu")
    found, features = [], []
    for precision in ("fp32", "bf16"):
        features.append(Extractor(model.eval(), cpu, precision, mean, std).features(images, 16))
        monkeypatch.setattr(probing, "native_precision", lambda device, chosen=precision: chosen)
        found.append(probe(trained, shots=[1, 5, 10]))
    assert [each["precision"] for each in found] == ["fp32", "bf16"]
    exact, half = features
    assert 0 < float(((half - exact).norm(dim=1) / exact.norm(dim=1)).max()) < 0.02
    for rows in zip(*(each["features"]["shots"] for each in found), strict=True):
        assert rows[0]["top1"] == pytest.approx(rows[1]["top1"], abs=0.01)


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
