"""Runs that begin with weights: what they take from them, what they refuse, and that a larger image size is learnt."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from folders import MEAN, SMALL, STD, imported, written
from PIL import Image

import vitrail
from vitrail.cli import main
from vitrail.data import cache
from vitrail.errors import BadInput
from vitrail.evaluation.evaluate import figures, predict_split
from vitrail.input.batches import TrainingBatches, first_step
from vitrail.input.pixels import pixels_of
from vitrail.pages.runs import load as load_runs
from vitrail.recipes import FINE_TUNE, RECIPES, resolve
from vitrail.settings import OF_WEIGHTS, Recipe
from vitrail.training.optimize import warmup_steps
from vitrail.training.resume import same as is_of
from vitrail.training.session import Result
from vitrail.training.train import fewer_at_once, model_config
from vitrail.training.transfer import begin
from vitrail.vit.config import ViTConfig
from vitrail.vit.model import VisionTransformer
from vitrail.vit.positions import resize_position_embedding
from vitrail.weights.checkpoint import Run
from vitrail.world import World

GOLDEN = Path(__file__).parent / "golden"
MEASURED = "patch_embedding.layers.1.running_mean"
# For digits, and seconds, instead of the recipe's photographs
QUICK: dict[str, Any] = {
    "data": "digits", "image_size": 24, "flip": "none", "resized_crop": 0.0, "batch_size": 32, "warmup": 0.1,
}  # fmt: skip


def fine_tune(weights: Path, output: Path, **settings: Any) -> Result:
    return vitrail.train(from_weights=weights, output=output, **QUICK | settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on images of 16 pixels, whose dropout and initial weights are not the recipe fine-tune's."""
    run = tmp_path_factory.mktemp("runs") / "trained"
    sizes: dict[str, Any] = {"hidden_size": 32, "mlp_dim": 64, "num_heads": 2, "num_layers": 2, "dropout": 0.1}
    return vitrail.train("digits", output=run, epochs=5, initial_weights="torch", **sizes).run


@pytest.fixture(scope="module")
def tuned(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return fine_tune(trained, tmp_path_factory.mktemp("runs") / "tuned", epochs=3)


def test_fine_tuning_at_a_larger_size_beats_evaluating_there_without(trained: Path, tuned: Result) -> None:
    digits = cache.load("digits", 24)
    pixels = pixels_of(digits.splits["test"], 24, torch.device("cpu"))
    without = figures(predict_split(vitrail.load(trained, image_size=24), pixels), digits.classes)
    assert tuned.results["top1"] > without.top1 + 0.05


def test_the_recipe_says_where_the_weights_came_from_and_what_they_set(trained: Path, tuned: Result) -> None:
    content = yaml.safe_load((tuned.run / "recipe.yaml").read_text())
    assert (content["recipe"], content["from"]["value"]) == (FINE_TUNE, str(trained))
    settings = content["settings"]
    assert settings["hidden_size"] == {"value": 32, "set_by": "weights"}
    assert settings["classifier"] == {"value": "gap", "set_by": "weights"}
    assert settings["initial_weights"] == {"value": "official", "set_by": "weights"}
    assert settings["dropout"] == {"value": 0.0, "set_by": "default"}  # of training: the recipe's, not the weights'
    assert settings["image_size"] == {"value": 24, "set_by": "command line"}
    resolved = Run.open(tuned.run).recipe()
    assert (resolved.weights, len(resolved.digest)) == (str(trained), 32)
    assert str(trained) in (tuned.run / "report.html").read_text()


def test_the_recipe_is_the_official_one() -> None:
    recipe = RECIPES[FINE_TUNE]
    assert recipe == replace(
        recipe, optimizer="sgd", schedule="cosine", lr=0.03, warmup=500, clip=1.0, weight_decay=0.0, dropout=0.0,
        batch_size=512, image_size=384,
    )  # fmt: skip
    assert recipe.epochs * 50_000 // recipe.batch_size == pytest.approx(10_000, rel=0.01)


@pytest.mark.parametrize(("images", "steps"), [(50_000, 500), (1_281_167, 500), (2_000, 39)])
def test_the_recipe_warms_up_over_500_steps_or_a_tenth_of_all(images: int, steps: int) -> None:
    recipe = RECIPES[FINE_TUNE]
    assert warmup_steps(recipe, first_step(recipe.epochs, images, recipe.batch_size)) == steps


# What a run begins with


def test_a_recipe_says_which_gelu_random_weights_are_trained_with() -> None:
    for gelu in ("tanh", "exact"):
        config = model_config(Recipe(gelu=gelu), 10)
        assert isinstance(config, ViTConfig)
        assert config.gelu == gelu
    with pytest.raises(BadInput, match=r"gelu is exact, and with the weights of .* it is tanh; leave --gelu out"):
        begin(resolve(FINE_TUNE, data="digits", gelu="exact"), GOLDEN / "token.npz")


def test_images_grow_as_the_papers_do_and_no_further(foreign: Path) -> None:
    """384 pixels after 224: 28 after 16, in patches of 4. Other recipes keep the size that they name."""
    start = begin(resolve(FINE_TUNE, data="digits"), foreign)
    assert (start.resolved.recipe.image_size, start.resolved.set_by["image_size"]) == (28, "weights")
    assert str(start) == f"begins with the weights of {foreign}, resized from 16 pixels to 28, and a new head"
    for name, settings, size in ((FINE_TUNE, {"image_size": 384}, 384), ("digits", {"patch_size": 4}, 16)):
        start = begin(resolve(name, data="digits", **settings), foreign)
        assert start.resolved.recipe.image_size == size


def begun(weights: Path, num_classes: int = 10, **settings: Any) -> tuple[VisionTransformer, Any]:
    from vitrail.training.train import build_model

    start = begin(resolve(FINE_TUNE, **QUICK | settings), weights)
    model = build_model(start.resolved.recipe, num_classes, start.base)
    start.fill(model)
    assert isinstance(model, VisionTransformer)
    return model, start


@pytest.mark.parametrize("case", ["token", "gap", "pre-logits", "hybrid"])
def test_it_begins_with_the_weights_resized_and_a_head_of_zeros(case: str) -> None:
    path = GOLDEN / f"{case}.npz"
    there = vitrail.load(path)
    assert isinstance(there, VisionTransformer)
    size = 2 * there.config.image_size
    model, _ = begun(path, num_classes=7, image_size=size, dropout=0.1)
    grids = 2 * (there.config.grid,), 2 * (2 * there.config.grid,)
    expected = there.state_dict()
    expected["position_embedding"] = resize_position_embedding(expected["position_embedding"], *grids)
    shape = replace(there.config, image_size=size, num_classes=7, representation_size=None, dropout=0.1)
    assert model.config == shape
    assert model.head.weight.shape == (7, shape.hidden_size)
    assert not model.head.weight.any()
    assert not model.head.bias.any()
    for name, weight in model.state_dict().items():
        if not name.startswith("head."):
            torch.testing.assert_close(weight, expected[name], msg=name)


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder of transformers, with its GELU, its epsilon and another normalisation."""
    return written(tmp_path / "theirs", "transformers", imported(replace(SMALL, gelu="exact", layer_norm_eps=1e-12)))


def test_what_other_libraries_do_otherwise_is_kept_in_training_and_after(foreign: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"image_size": 16, "epochs": 2, "stop_after": 1, "seed": 3}
    straight = fine_tune(foreign, tmp_path / "straight", **settings | {"stop_after": None})
    config, _ = Run.open(straight.run).config()
    assert (config.gelu, config.layer_norm_eps) == ("exact", 1e-12)  # type: ignore[union-attr]
    assert Run.open(straight.run).preprocessing() == (MEAN, STD)
    # A run that goes on needs the weights no more, and ends with the same bits.
    fine_tune(foreign, tmp_path / "broken", **settings)
    shutil.rmtree(foreign)
    broken = vitrail.train(output=tmp_path / "broken", resume=True)
    weights = Path("model/model.safetensors")
    assert (broken.run / weights).read_bytes() == (straight.run / weights).read_bytes()
    with pytest.raises(BadInput, match="leave --from out"):
        vitrail.train(output=broken.run, resume=True, from_weights=foreign)


def test_training_images_are_normalised_as_the_weights_want() -> None:
    digits = cache.load("digits", 16)
    recipe = resolve("digits", rotate=0.0).recipe
    pixels = pixels_of(digits.splits["train"], 16, torch.device("cpu"))
    (ours, _), (theirs, _) = (
        next(TrainingBatches(pixels, recipe, *normal).parts(0)) for normal in ((), (MEAN, STD))
    )  # fmt: skip
    levels = (ours + 1) / 2
    expected = (levels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(theirs, expected)


def test_runs_from_different_weights_are_not_seeds_of_one(trained: Path, tuned: Result, tmp_path: Path) -> None:
    copies = [shutil.copytree(tuned.run, tmp_path / name) for name in ("same", "other")]
    for copy, digest in zip(copies, (None, "0" * 32), strict=True):
        path = copy / "recipe.yaml"
        content = yaml.safe_load(path.read_text())
        content["settings"]["seed"]["value"] = 1
        content["from"]["digest"] = digest or content["from"]["digest"]
        path.write_text(yaml.safe_dump(content, sort_keys=False))
    assert len(load_runs([tuned.run, copies[0]])) == 1
    assert len(load_runs([tuned.run, copies[1]])) == 2


# Refused


def test_a_stem_and_the_rate_of_its_kernels_go_with_the_weights(trained: Path, tmp_path: Path) -> None:
    plain = begin(resolve("laptop", data="digits"), trained).resolved
    assert (plain.recipe.stem, plain.recipe.stem_units, plain.recipe.stem_rate) == ("patch", 0, 1.0)
    assert plain.set_by["stem_rate"] == "weights"
    run = Run.create(tmp_path / "run")
    model = VisionTransformer(replace(SMALL, stem="convolutions", stem_units=1))
    model(torch.randn(4, 3, SMALL.image_size, SMALL.image_size))  # which BatchNorm measures
    run.save_model(model, tuple("abc"))
    given = {"data": "digits", "optimizer": "muon", "stem_rate": 3.0, "stem_units": 1}
    start = begin(resolve(FINE_TUNE, **given), run.path)
    stemmed = start.resolved.recipe
    assert (stemmed.stem, stemmed.stem_units, stemmed.stem_rate) == ("convolutions", 1, 3.0)
    filled = VisionTransformer(model.config)
    start.fill(filled)
    assert torch.equal(filled.get_buffer(MEASURED), model.get_buffer(MEASURED))
    assert model.get_buffer(MEASURED).abs().max() > 0
    with pytest.raises(BadInput, match=r"stem_units is 2, and with the weights of .* it is 1"):
        begin(resolve(FINE_TUNE, **given | {"stem_units": 2}), run.path)
    with pytest.raises(BadInput, match="stem_rate does nothing unless stem is convolutions"):
        fine_tune(trained, tmp_path / "other", optimizer="muon", stem_rate=3.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 64}, "hidden_size is 64, and with the weights of .* it is 32; leave --hidden-size out"),
        ({"patch_size": 8}, "patch_size is 8, .* it is 4; leave --patch-size out"),
        ({"classifier": "token"}, "classifier is token, .* it is gap"),
        ({"layer_scale": 0.1}, "layer_scale is 0.1, .* it is None"),
        ({"representation_size": 64}, "representation_size is 64, .* it is None"),
        ({"architecture": "resnet-18"}, "a resnet-18 begins with random weights here"),
        ({"initial_weights": "torch"}, "initial_weights is of weights that are drawn, .*leave --initial-weights out"),
        ({"image_size": 23}, "images of 23 pixels do not divide into patches of 4"),
    ],
)
def test_settings_that_disagree_with_the_weights_are_refused(
    settings: dict[str, Any], message: str, trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=message):
        fine_tune(trained, tmp_path / "run", epochs=1, **settings)
    assert not list(tmp_path.iterdir())


def test_what_help_says_that_weights_decide_they_do(foreign: Path) -> None:
    set_by = begin(resolve(FINE_TUNE, data="digits"), foreign).resolved.set_by
    decided = {name for name, who in set_by.items() if who == "weights"}
    others = {"image_size", "architecture", "representation_size", "initial_weights", "zero_residual"}
    assert decided - others == set(OF_WEIGHTS)


def test_what_agrees_may_be_said(trained: Path) -> None:
    _, start = begun(trained, hidden_size=32)
    assert start.resolved.set_by["hidden_size"] == "command line"


def test_the_recipe_needs_weights_and_weights_that_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, says in (
        (["train", FINE_TUNE], "goes on from weights; say which with --from WEIGHTS"),
        (["train", "--from", str(tmp_path / "gone"), "--data", "digits"], "gone"),
        (
            ["train", "--from", str(tmp_path / "gone")],
            "fine-tune is for images of your own; say which with --data D",
        ),
        (["train", "resnet-18", "--from", str(tmp_path / "gone")], "a resnet-18 begins with random weights here"),
        (["train", "--from", str(tmp_path / "gone"), "--epochs", "0"], "epochs is 0"),
    ):
        assert main(words) == 2
        assert says in capsys.readouterr().err


def test_help_is_of_the_recipe_that_weights_ask_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--from", "runs/x", "-h"]) == 0
    said = capsys.readouterr().out
    assert f"in brackets: what {FINE_TUNE} has" in said
    assert " ".join(said.split()).count("(as the weights have it)") == len(OF_WEIGHTS)
    assert "(12/7 of what the weights were trained with, 384 at most)" in " ".join(said.split())


@pytest.mark.parametrize(
    ("images", "processes", "settings", "batch"),
    [
        (24, 1, {}, 24),
        (31, 1, {"repeats": 2}, 30),  # 15 different ones, each twice
        (300, 1, {"repeats": 2}, 300),
        (600, 1, {"repeats": 2}, 512),
        (31, 1, {"accumulate": 4}, 28),
        (31, 2, {"accumulate": 2, "mixup": 0.8}, 24),  # in each of 4 parts, pairs
        (31, 3, {}, 30),
        (512, 1, {}, 512),
        (3, 4, {}, 512),  # nothing would do: what is wrong is said of the batch
        (24, 1, {"batch_size": 48}, 48),
    ],
)
def test_batches_are_no_larger_than_the_images_that_there_are(
    images: int, processes: int, settings: dict[str, Any], batch: int, foreign: Path
) -> None:
    start = begin(resolve(FINE_TUNE, data="digits", **settings), foreign)
    recipe = fewer_at_once(start, images, World(size=processes)).resolved.recipe
    assert recipe == replace(start.resolved.recipe, batch_size=batch)  # which is checked in being made


def test_a_batch_that_is_asked_for_is_that_of_another_run(foreign: Path, tmp_path: Path) -> None:
    """A job that torchrun starts again goes on with its run, whatever the images decided of it."""
    start = begin(resolve(FINE_TUNE, data="digits"), foreign)
    run = Run.create(tmp_path / "run")
    run.write_recipe(fewer_at_once(start, 24, World()).resolved)
    assert run.recipe().recipe.batch_size == 24
    assert is_of(run, start.resolved)
    asked = begin(resolve(FINE_TUNE, data="digits", batch_size=64), foreign).resolved
    assert not is_of(run, asked)


def test_few_images_are_not_repeated_in_each_batch(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two colours, 15 images each, of which a fifth are judged by: 24 are trained on, and the recipe has 512."""
    for colour in ("red", "blue"):
        (tmp_path / "photos" / colour).mkdir(parents=True)
        for number in range(15):
            Image.new("RGB", (16, 16), colour).save(tmp_path / "photos" / colour / f"{number}.png")
    data = str(tmp_path / "photos")
    result = vitrail.train(from_weights=trained, data=data, epochs=2, device="cpu", output=tmp_path / "few")
    assert "24 images are fewer than a batch of 512: 24 are taken at a time" in capsys.readouterr().err
    kept = Run.open(tmp_path / "few").recipe()
    assert (kept.recipe.batch_size, kept.set_by["batch_size"]) == (24, "images")
    assert result.results["samples_seen"] == 48
    asked = vitrail.train(
        from_weights=trained, data=data, epochs=2, batch_size=48, device="cpu", output=tmp_path / "asked"
    )
    assert asked.results["samples_seen"] == 48  # one batch
    assert "a smaller --batch-size would learn more" in capsys.readouterr().err
    assert "are taken at a time" not in (tmp_path / "asked" / "recipe.yaml").read_text("utf-8")
    assert Run.open(tmp_path / "asked").recipe().recipe.batch_size == 48


def test_typed(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in QUICK.items()]
    assert main(["train", "--from", str(trained), "--epochs", "1", "--output", str(tmp_path / "run"), *flags]) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["recipe"] == FINE_TUNE
