"""Learning without labels: what is hidden, what the model has of it, that it learns, and that it resumes to the bit."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import vitrail
from vitrail.cli import main
from vitrail.data import cache
from vitrail.errors import BadInput
from vitrail.evaluation.evaluate import evaluate_run, predict_files
from vitrail.input.batches import TrainingBatches, evaluation_batches, generator
from vitrail.input.pixels import Pixels, pixels_of
from vitrail.recipes import resolve
from vitrail.settings import Recipe
from vitrail.training.optimize import parameter_groups
from vitrail.training.pretraining import (
    MaskedAutoencoder,
    MaskedPatchPrediction,
    Masks,
    draw_masks,
    draw_pictures,
    judge_reconstruction,
    mean_colours,
)
from vitrail.training.resume import latest
from vitrail.training.step import gradient
from vitrail.training.train import build_model, to_train
from vitrail.vit.model import VisionTransformer
from vitrail.weights.checkpoint import Run
from vitrail.weights.exchange import export_model
from vitrail.weights.files import read_tensors

Objective = Literal["patches", "pixels"]
OBJECTIVES: tuple[Objective, ...] = ("patches", "pixels")
SMALL: dict[str, Any] = {
    "image_size": 16, "patch_size": 4, "hidden_size": 32, "mlp_dim": 64, "num_heads": 2, "num_layers": 2,
    "decoder_layers": 1, "decoder_hidden_size": 32,
}  # fmt: skip
# With all that draws random numbers, or has a state of its own
NOISY: dict[str, Any] = {
    **{name: size for name, size in SMALL.items() if not name.startswith("decoder")}, "epochs": 3, "batch_size": 32,
    "lr": 6e-3, "dropout": 0.02, "stochastic_depth": 0.02, "ema_decay": 0.8, "classifier": "token",
}  # fmt: skip


def small(objective: Objective, **settings: Any) -> Recipe:
    return Recipe(objective=objective, **SMALL | settings)


def trainee(recipe: Recipe) -> Any:
    """Of random weights, the last layer's included."""
    model = to_train(build_model(recipe, 10), recipe)
    last = "decoder_prediction" if recipe.objective == "pixels" else "prediction"
    torch.nn.init.normal_(model.get_parameter(f"{last}.weight"), std=0.1)
    return model


@pytest.fixture(scope="module")
def scans() -> Pixels:
    """The digits that are not trained on."""
    return pixels_of(cache.load("digits", 16).splits["test"], 16, torch.device("cpu"))


@pytest.fixture(scope="module")
def images(scans: Pixels) -> Tensor:
    """Six of them, each another digit."""
    return next(evaluation_batches(scans, len(scans)))[0][::60]


def draw(recipe: Recipe, images: int = 6) -> Masks:
    return draw_masks(recipe, images, 16, generator(0, "masks", 0))


# What is hidden


def test_corruption_is_that_of_appendix_b() -> None:
    masks = draw_masks(Recipe(objective="patches"), 4000, 64, generator(0, "masks", 0))
    own, there = torch.arange(64), masks.source.gather(1, masks.masked)
    assert masks.masked.shape == (4000, 32)  # half of the patches of every image
    assert torch.equal(torch.cat([masks.masked, masks.visible], 1).sort(1).values, own.repeat(4000, 1))
    assert torch.equal(masks.source.gather(1, masks.visible), masks.visible)  # nothing happens to the others
    shares = torch.stack([there == -1, (there >= 0) & (there != masks.masked), there == masks.masked])
    # Of 128,000 patches, so that 0.4% are three standard deviations.
    np.testing.assert_allclose(shares.double().mean((1, 2)), [0.8, 0.1, 0.1], atol=0.004)
    others, places = there[shares[1]], masks.masked[shares[1]]
    distances = torch.bincount((others - places) % 64, minlength=64)
    assert distances[0] == 0
    assert distances[1:].min() > 0.6 * distances[1:].double().mean()  # any other patch is as likely
    assert torch.bincount(masks.masked.flatten()).double().div(2000).sub(1).abs().max() < 0.1  # any place is


def test_three_quarters_are_dropped_for_pixels() -> None:
    masks = draw_masks(Recipe(objective="pixels"), 100, 64, generator(0, "masks", 0))
    assert masks.masked.shape == (100, 48)
    assert torch.equal((masks.source == -1).sum(1), torch.full((100,), 48))
    assert torch.equal(masks.source.gather(1, masks.visible), masks.visible)


def test_shares_may_be_set_and_something_is_always_hidden_and_shown() -> None:
    for share, hidden in ((0.25, 4), (0.001, 1), (0.999, 15)):
        assert draw(small("pixels", mask_ratio=share)).masked.shape == (6, hidden)


def test_masks_are_of_the_seed_and_the_step() -> None:
    recipe, again = small("patches"), generator(1, "masks", 0)
    first, other = draw(recipe), draw_masks(recipe, 6, 16, again)
    assert torch.equal(first.source, draw(recipe).source)
    assert not torch.equal(first.source, other.source)


# What the model has of it


@pytest.mark.parametrize("classifier", ["token", "gap"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_with_nothing_hidden_the_encoder_is_the_plain_model(
    objective: Objective, classifier: Any, images: Tensor
) -> None:
    recipe = small(objective, classifier=classifier)
    model = trainee(recipe)
    plain = build_model(replace(recipe, objective="classes"), 10)
    assert isinstance(plain, VisionTransformer)
    assert all(torch.equal(weight, model.encoder.state_dict()[name]) for name, weight in plain.state_dict().items())
    everything = torch.arange(16).expand(len(images), -1)
    expected = plain.forward_encoder(plain.embed(images))
    found = model.encode(images, Masks(everything[:, :0], everything, everything))
    front = plain.config.num_prefix_tokens if objective == "patches" else 0
    assert torch.equal(found, expected[:, front:])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_predictions_do_not_see_what_is_hidden(objective: Objective, images: Tensor) -> None:
    recipe = small(objective)
    model, masks = trainee(recipe).eval(), draw(recipe)
    used = torch.zeros(6, 17, dtype=torch.bool).scatter(1, masks.source + 1, True)[:, 1:]  # as itself or elsewhere
    before = model.predict(images, masks)
    for visible in (False, True):
        patches = torch.where((used == visible)[..., None], 0.3, model.patchify(images))
        cells = patches.unflatten(2, (4, 4, 3)).unflatten(1, (4, 4)).permute(0, 5, 1, 3, 2, 4)
        after = model.predict(cells.flatten(4, 5).flatten(2, 3), masks)
        assert torch.equal(after, before) is not visible


def test_the_decoder_has_each_patch_in_its_place(images: Tensor) -> None:
    recipe = small("pixels")
    model, masks = trainee(recipe).eval(), draw(recipe)
    other = Masks(masks.masked.flip(1), masks.visible.flip(1), masks.source)  # the same in another order
    torch.testing.assert_close(model.predict(images, other).flip(1), model.predict(images, masks))


# What it is to predict


def test_colours_are_the_three_highest_bits_of_the_mean(scans: Pixels) -> None:
    index = torch.arange(len(scans))
    pixels = scans.cut(index, torch.full((len(scans), 2), 0.5))
    cells = pixels.permute(0, 2, 3, 1).reshape(-1, 4, 4, 4, 4, 3).transpose(2, 3).reshape(len(scans), 16, 16, 3)
    red, green, blue = np.moveaxis(cells.long().sum(2).numpy() // 16 // 32, -1, 0)  # whole numbers throughout
    model = trainee(small("patches"))
    found = mean_colours(model.patchify(pixels / 127.5 - 1))
    assert np.array_equal(found, 64 * red + 8 * green + blue)
    assert len(np.unique(found)) > 5


def test_losses_are_those_of_the_papers(images: Tensor) -> None:
    recipe = small("patches")
    model, masks = trainee(recipe), draw(recipe)
    logits, colours = model.predict(images, masks), mean_colours(model.patchify(images))
    for row, loss in enumerate(model(images, masks)):
        expected = F.cross_entropy(logits[row], colours[row, masks.masked[row]])
        torch.testing.assert_close(loss, expected)
    recipe = small("pixels")
    model, masks = trainee(recipe), draw(recipe)
    predicted, patches = model.predict(images, masks).double(), model.patchify(images).double()
    for row, loss in enumerate(model(images, masks)):
        true = patches[row, masks.masked[row]]
        wanted = (true - true.mean(1, keepdim=True)) / (true.var(1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(loss.double(), ((predicted[row] - wanted) ** 2).mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_pictures_show_what_was_seen_predicted_and_there(objective: Objective, scans: Pixels) -> None:
    recipe = small(objective)
    drawn = {name: of.long() for name, of in draw_pictures(trainee(recipe).eval(), scans, recipe).items()}
    masks = draw_masks(recipe, 8, 16, generator(recipe.seed, "judged masks", 1))
    hidden = torch.zeros(8, 16, dtype=torch.bool).scatter(1, masks.masked, True)
    where = hidden.view(8, 4, 1, 4, 1).expand(-1, -1, 4, -1, 4).reshape(8, 16, 16)
    index = np.linspace(0, len(scans) - 1, 8).astype(int)
    original = scans.cut(torch.from_numpy(index), torch.full((8, 2), 0.5)).permute(0, 2, 3, 1)
    assert torch.equal(drawn["original"], original.long())
    assert torch.equal(drawn["seen"][~where], drawn["original"][~where])
    assert torch.equal(drawn["predicted"][~where], drawn["original"][~where])
    grey = (masks.source < 0).view(8, 4, 1, 4, 1).expand(-1, -1, 4, -1, 4).reshape(8, 16, 16)
    assert (drawn["seen"][grey] == 128).all()
    assert not torch.equal(drawn["predicted"][where], drawn["original"][where])


# Steps and their weights


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_parts_of_a_batch_add_up(objective: Objective) -> None:
    found = []
    for parts in (1, 3):
        recipe = small(objective, batch_size=12, accumulate=parts, first_size=8, first_share=0.5, epochs=2)
        model = trainee(recipe)
        train = pixels_of(cache.load("digits", 16).splits["train"], 16, torch.device("cpu"))
        for step in (0, 200):  # of small images, and of large ones
            loss, correct = gradient(model, TrainingBatches(train, recipe), step)
            assert correct == 0
            found.append(loss)
        found.append(torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]))
        assert model.encoder.head.weight.grad is None
    torch.testing.assert_close(found[:3], found[3:], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    ("settings", "tolerance"), [({"checkpoint_activations": True}, 1e-6), ({"precision": "bf16"}, 3e-2)]
)
def test_less_memory_and_bf16_have_the_same_gradient(
    objective: Objective, settings: dict[str, Any], tolerance: float
) -> None:
    train = pixels_of(cache.load("digits", 16).splits["train"], 16, torch.device("cpu"))
    found = []
    for more in ({}, settings):
        model = trainee(recipe := small(objective, batch_size=16, **more))
        gradient(model, TrainingBatches(train, recipe), 0)
        found.append(torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]))
    assert (found[1] - found[0]).norm() <= tolerance * found[0].norm()


def test_optimizers_know_the_encoder_and_the_decoder() -> None:
    recipe = small("pixels", optimizer="muon", weight_decay=0.1)
    model = trainee(recipe)
    names = {id(weight): name for name, weight in model.named_parameters()}
    groups = parameter_groups(model, recipe)
    assert sorted(names) == sorted(id(weight) for group in groups for weight in group["params"])
    hidden = {names[id(weight)] for group in groups if "parts" in group for weight in group["params"]}
    assert {"encoder.blocks.1.mlp.out.weight", "decoder_blocks.0.attention.qkv.weight"} <= hidden
    assert not {"decoder_prediction.weight", "decoder_embedding.weight", "encoder.head.weight"} & hidden
    spared = {names[id(weight)] for group in groups if not group["weight_decay"] for weight in group["params"]}
    assert {"mask_embedding", "encoder.position_embedding", "decoder_norm.weight"} <= spared


# Runs


@pytest.fixture(scope="module", params=OBJECTIVES)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    return pretrain(request.param, tmp_path_factory.mktemp("pretrained") / request.param)


def pretrain(objective: Objective, output: Path, **settings: Any) -> Path:
    decoder = {"decoder_layers": 1, "decoder_hidden_size": 32} if objective == "pixels" else {}
    return vitrail.pretrain("digits", output=output, objective=objective, **NOISY | decoder | settings).run


def test_it_learns_more_than_what_patches_are_like_anywhere(whole: Path, scans: Pixels) -> None:
    recipe = Run(whole).recipe().recipe
    loss = json.loads((whole / "results.json").read_text())["loss"]
    model = to_train(build_model(recipe, 10), recipe)
    if isinstance(model, MaskedAutoencoder):  # as it is of patches without a pattern
        torch.nn.init.zeros_(model.decoder_prediction.weight)
        assert loss < 0.9 * judge_reconstruction(model, scans, recipe).curves["loss"]
    else:  # as it is of colours that are guessed by how frequent they are
        assert isinstance(model, MaskedPatchPrediction)
        assert judge_reconstruction(model, scans, recipe).curves["loss"] == pytest.approx(math.log(512), rel=1e-5)
        images = next(evaluation_batches(scans, len(scans)))[0]
        shares = torch.bincount(mean_colours(model.patchify(images)).flatten()).double() / (16 * len(scans))
        assert loss < 0.9 * torch.special.entr(shares).sum()


def test_a_run_that_is_resumed_in_the_middle_of_an_epoch_ends_with_the_same_bits(
    whole: Path, tmp_path: Path, power_cut: Callable[[Callable[[], object], int], None]
) -> None:
    objective: Any = whole.name
    run = tmp_path / "cut"
    power_cut(lambda: pretrain(objective, run, checkpoint_every=0.0), 5)
    assert vitrail.pretrain(output=run, resume=True).run == run
    for file in ("model/model.safetensors", "reconstructions.safetensors"):
        assert (run / file).read_bytes() == (whole / file).read_bytes()
    (found, _), (expected, _) = (read_tensors(path / "last/state.safetensors") for path in (run, whole))
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    losses = [
        [
            (row["train_loss"], row["val_loss"])
            for row in map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
        ]
        for path in (run, whole)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_epochs_of_small_images_are_judged_by_small_images(
    objective: Objective, scans: Pixels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"epochs": 2, "first_size": 8, "first_share": 0.6}
    run, first = pretrain(objective, tmp_path / "run", **settings), tmp_path / "first"
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch ")]
    assert [re.findall("loss [0-9.]+ at ([0-9]+) pixels", line) for line in said] == [["8"], ["16"]]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["val_image_size"] for line in lines] == [8, 16]
    pretrain(objective, first, stop_after=1, **settings)  # the same weights as behind the other's first epoch
    whole = json.loads((first / "results.json").read_text())["loss"]
    kept, _ = read_tensors(first / "last/state.safetensors")
    model = trainee(recipe := Run.open(first).recipe().recipe)
    model.load_state_dict({name.removeprefix("average."): kept[name] for name in kept if name.startswith("average.")})
    assert judge_reconstruction(model, scans, recipe, side=8).curves["loss"] == pytest.approx(lines[0]["val_loss"])
    assert judge_reconstruction(model, scans, recipe).curves["loss"] == pytest.approx(whole)
    assert whole != pytest.approx(lines[0]["val_loss"], rel=1e-3)


def test_the_folder_is_that_of_an_ordinary_model(whole: Path) -> None:
    results = json.loads((whole / "results.json").read_text())
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert not {"top1", "top5", "per_class"} & set(results)
    assert results["objective"] == whole.name
    assert results["loss"] == rows[-1]["val_loss"]
    assert not {"train_accuracy", "val_top1"} & set(rows[-1])
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    model = vitrail.load(whole)
    weights = load_file(whole / "model/model.safetensors")
    kept, _ = read_tensors(whole / "last/state.safetensors")
    assert results["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert weights.keys() == model.state_dict().keys()
    assert not model.head.weight.any()
    assert torch.equal(weights["norm.weight"], kept["average.encoder.norm.weight"])
    assert torch.equal(model(torch.zeros(1, 3, 16, 16)), torch.zeros(1, 10))
    page = (whole / "report.html").read_text()
    assert page.count("what it made</figcaption>") == 8
    assert "top-1" not in page.partition('id="settings"')[0].lower()


def test_training_goes_on_from_it(whole: Path, tmp_path: Path) -> None:
    run = vitrail.train("digits", from_weights=whole, output=tmp_path / "on", epochs=1, lr=0.0).run
    begun, ended = (load_file(path / "model/model.safetensors") for path in (whole, run))
    assert begun.keys() == ended.keys()
    assert all(torch.equal(weight, ended[name]) for name, weight in begun.items())


def test_it_cannot_be_asked_for_classes(whole: Path) -> None:
    for ask in (lambda: evaluate_run(whole), lambda: predict_files(whole, [Path("digit.png")])):
        with pytest.raises(BadInput, match=r"has learnt no classes\. Train it on: vitrail train digits --from "):
            ask()
    with pytest.raises(BadInput, match="has learnt no classes to export"):
        export_model(whole, "timm", whole / "exported")


def test_only_pretraining_is_resumed_as_such(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(whole)
    assert latest("digits", pretrained=True) == Path("runs/digits")
    with pytest.raises(BadInput, match="there is no run of digits in runs/"):
        vitrail.train("digits", resume=True)
    Run.create(tmp_path / "taught").write_recipe(resolve("digits"))
    with pytest.raises(BadInput, match="learns classes; go on with it by train"):
        vitrail.pretrain(resume=True, output=tmp_path / "taught")


def test_the_command_says_how_well_it_went_and_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", "--epochs=1", "--batch-size=128", "--num-layers=1", "--decoder-layers=1"]) == 0
    said = capsys.readouterr().out
    assert "in predicting hidden pixels, of 359 images (digits, test)" in said
    assert "vitrail train digits --from runs/digits-pretrained\n" in said
    assert main(["pretrain", "-h"]) == 0
    assert "their pixels (pixels)" in " ".join(capsys.readouterr().out.split())


# Settings


def test_what_needs_labels_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    taught = Recipe(label_smoothing=0.1, mixup=0.5, layer_decay=0.7, patch_dropout=0.5)
    monkeypatch.setitem(vitrail.recipes.RECIPES, "taught", taught)
    resolved = resolve("taught", objective="pixels", lr=0.1)
    assert (resolved.recipe.label_smoothing, resolved.recipe.mixup, resolved.recipe.layer_decay) == (0, 0, 1)
    assert {name for name, by in resolved.set_by.items() if by == "objective"} == {
        "label_smoothing", "mixup", "layer_decay", "patch_dropout",
    }  # fmt: skip
    assert resolved.set_by["lr"] == "command line"
    assert resolve("taught").recipe == taught
    stemmed = resolve("laptop", objective="pixels")
    stem = {name: getattr(stemmed.recipe, name) for name in ("stem", "stem_units", "stem_rate")}
    assert stem == {"stem": "patch", "stem_units": 0, "stem_rate": 1}
    assert {stemmed.set_by[name] for name in stem} == {"objective"}
    plain = resolve("laptop", stem="patch")
    assert {name: getattr(plain.recipe, name) for name in stem} == stem
    assert {plain.set_by[name] for name in ("stem_units", "stem_rate")} == {"stem"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 0.1, "layer_decay": 0.7}, "no use for label_smoothing, layer_decay; leave it out, or set"),
        ({"stem": "convolutions"}, "needs stem = patch"),
        ({"stem_units": 2}, "no use for stem_units; leave it out, or set stem_units = 0"),
        ({"representation_size": 8}, "leave representation_size out"),
        ({"mask_ratio": 1.0}, "mask_ratio is 1.0; it must be above 0 and below 1"),
        ({"decoder_hidden_size": 40}, "decoder_hidden_size is 40; it must be a multiple of 32"),
        ({"patch_size": 16}, "take a smaller patch_size"),
        ({"objective": "classes"}, "pre-training has no labels"),
        ({"objective": "patches", "decoder_layers": 1}, "decoder_layers does nothing unless objective is pixels"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        vitrail.pretrain("digits", output=tmp_path / "run", **settings)
    with pytest.raises(BadInput, match="mask_ratio does nothing unless objective is patches or pixels"):
        vitrail.train("digits", output=tmp_path / "run", mask_ratio=0.5)
    assert not list(tmp_path.iterdir())
