"""Runs, whole and interrupted: what they leave behind, that they end with the same bits, and how they fail."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import vitrail
from vitrail.data import cache
from vitrail.errors import BadInput, Diverged
from vitrail.evaluation.evaluate import evaluate_run, predict_files, predict_split
from vitrail.input.pixels import pixels_of
from vitrail.recipes import RECIPES, resolve
from vitrail.training import session, step
from vitrail.training.resume import alone
from vitrail.training.session import Result
from vitrail.training.train import build_model
from vitrail.vit.floor import faster_precision
from vitrail.vit.model import VisionTransformer
from vitrail.weights.checkpoint import Run
from vitrail.weights.files import read_about, read_tensors, write_tensors

# A small model, with all that draws random numbers: order, augmentation, and dropout of each kind
TINY: dict[str, Any] = {
    "hidden_size": 16, "mlp_dim": 32, "num_heads": 2, "num_layers": 1, "epochs": 3, "batch_size": 64, "accumulate": 2,
    "dropout": 0.1, "stochastic_depth": 0.1, "patch_dropout": 0.1, "crop": 1, "rotate": 10.0, "lr": 3e-3, "clip": 1.0,
}  # fmt: skip
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
PATIENCE = 300  # seconds for what hangs, not for what is slow on a busy machine
WEIGHTS = Path("model/model.safetensors")
PARTS = ["recipe.yaml", "environment.json", "model/config.json", "model/model.safetensors", "last/state.safetensors"]


def train(output: Path, **settings: Any) -> Result:
    return vitrail.train("digits", output=output, **TINY | settings)


def start(*words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "vitrail", "train", *words]
    return subprocess.Popen(command, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE)


def end_at(process: "subprocess.Popen[str]", run: Path, step: int, number: signal.Signals) -> tuple[int, str]:
    """Send a signal as soon as the run has a checkpoint of that step or a later one; exit status and stderr."""
    state = run / "last" / "state.safetensors"
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and not (state.is_file() and read_about(state)["step"] >= step):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, errors


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    return train(tmp_path_factory.mktemp("runs") / "whole").run


# What a run leaves behind


def test_a_run_folder_describes_itself(whole: Path) -> None:
    expected = {"recipe.yaml", "environment.json", "metrics.jsonl", "results.json", "predictions.safetensors", "model",
                "last", "report.html"}  # fmt: skip
    assert expected <= {path.name for path in whole.iterdir()}
    assert len(list(whole.glob("events.*"))) == 1
    assert not [path for path in whole.rglob("*") if path.name.startswith(".")]  # nothing half-written
    modes = {path.stat().st_mode for path in whole.rglob("*") if path.is_file()}
    assert len(modes) == 1  # whoever may read one of the files may read them all


def test_results_are_complete_and_true(whole: Path) -> None:
    results = json.loads((whole / "results.json").read_text())
    assert {"dataset", "split", "count", "top1", "top5", "loss", "parameters", "epochs", "samples_seen",
            "train_seconds", "wall_seconds", "images_per_second", "input_share", "peak_memory", "device", "precision",
            "seed"} <= set(results)  # fmt: skip
    model = vitrail.load(whole)
    train_images = 1797 - results["count"]
    assert results["dataset"] == "digits"
    assert results["split"] == "test"
    assert results["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert results["samples_seen"] == math.ceil(3 * train_images / 64) * 64
    assert (results["epochs"], results["epochs_planned"]) == (3, 3)
    assert results["images_per_second"] == pytest.approx(results["samples_seen"] / results["train_seconds"], rel=0.1)
    assert 0 < results["input_share"] < 1
    assert results["train_seconds"] < results["wall_seconds"] < 600
    assert 50e6 < results["peak_memory"] < 24e9  # bytes: Python and torch alone take 200 MB
    assert sum(row["count"] for row in results["per_class"]) == results["count"]
    predictions = load_file(whole / "predictions.safetensors")
    right = predictions["predicted"][:, 0] == predictions["label"]
    assert results["top1"] == pytest.approx(right.float().mean().item())
    assert results["loss"] == pytest.approx(predictions["loss"].mean().item(), rel=1e-5)


def test_metrics_have_a_line_an_epoch(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((whole / "results.json").read_text())
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert lines[-1]["val_top1"] == results["top1"]
    assert lines[0]["train_loss"] > lines[-1]["train_loss"]
    assert lines[-1]["step"] * 64 == lines[-1]["samples_seen"] == results["samples_seen"]
    for before, line in itertools.pairwise([{"step": 0, "train_seconds": 0.0}, *lines]):  # each epoch's own rate
        images = 64 * (line["step"] - before["step"])
        assert line["images_per_second"] == pytest.approx(images / (line["train_seconds"] - before["train_seconds"]))


def test_settings_say_who_set_them(tmp_path: Path) -> None:
    resolved = resolve("digits", lr=0.5)
    run = Run.create(tmp_path / "run")
    run.write_recipe(resolved)
    content = yaml.safe_load((run.path / "recipe.yaml").read_text())
    assert content["recipe"] == "digits"
    assert content["settings"]["lr"] == {"value": 0.5, "set_by": "command line"}
    assert content["settings"]["image_size"] == {"value": 16, "set_by": "recipe"}
    assert content["settings"]["accumulate"] == {"value": 1, "set_by": "default"}
    assert run.recipe() == resolved


def test_small_numbers_stay_numbers(tmp_path: Path) -> None:
    resolved = resolve("digits", lr=1e-5, weight_decay=1e30, clip=None)
    run = Run.create(tmp_path / "run")
    run.write_recipe(resolved)
    assert run.recipe() == resolved


def test_the_environment_is_kept(whole: Path) -> None:
    (launch,) = json.loads((whole / "environment.json").read_text())["launches"]
    assert launch["torch"] == torch.__version__
    assert launch["vitrail"] == vitrail.__version__
    assert launch["threads"] == torch.get_num_threads()
    assert launch["step"] == 0


def test_a_run_folder_is_never_overwritten(tmp_path: Path) -> None:
    names = [Run.create(tmp_path / "deep" / "vit").path.name for _ in range(3)]
    assert names == ["vit", "vit-2", "vit-3"]


def test_what_is_saved_says_what_the_model_said(whole: Path) -> None:
    results = json.loads((whole / "results.json").read_text())
    found = evaluate_run(whole)
    for name in ("count", "top1", "top5", "loss", "calibration_error", "split", "dataset"):
        assert found[name] == results[name], name


def test_predictions_of_files(whole: Path, tmp_path: Path) -> None:
    files = []
    for number, size in enumerate([(8, 8), (30, 20)]):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(np.full((*size, 3), 100 * number, np.uint8)).save(files[-1])
    answers = predict_files(whole, files, top=3)
    assert [answer["image"] for answer in answers] == list(map(str, files))
    for answer in answers:
        probabilities = [guess["probability"] for guess in answer["predictions"]]
        assert len(probabilities) == 3
        assert probabilities == sorted(probabilities, reverse=True)
    every = predict_files(whole, files, top=99)[0]["predictions"]
    assert {guess["class"] for guess in every} == set(map(str, range(10)))
    assert sum(guess["probability"] for guess in every) == pytest.approx(1)
    (tmp_path / "2.png").write_text("no image")
    for bad in (tmp_path / "2.png", tmp_path / "none.png"):
        with pytest.raises(BadInput, match=bad.name):
            predict_files(whole, [files[0], bad])


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds(name: str) -> None:
    with torch.device("meta"):
        model = build_model(RECIPES[name], 200)
    assert model(torch.empty(2, 3, *2 * [RECIPES[name].image_size], device="meta")).shape == (2, 200)


# The same bits


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(whole: Path, tmp_path: Path) -> None:
    again, other = train(tmp_path / "again").run, train(tmp_path / "other", seed=1).run
    assert (again / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert (other / WEIGHTS).read_bytes() != (whole / WEIGHTS).read_bytes()


def test_a_run_killed_at_random_steps_ends_with_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "killed"
    random, steps = np.random.default_rng(), [0]
    process = start("digits", "--output", str(run), "--checkpoint-every", "0.02", *FLAGS)
    for _ in range(3):  # of 68 steps; an epoch is 22 or 23
        status, _ = end_at(process, run, steps[-1] + int(random.integers(1, 18)), signal.SIGKILL)
        assert status == -signal.SIGKILL
        steps.append(read_about(run / "last" / "state.safetensors")["step"])
        process = start("--resume", "--output", str(run), "--checkpoint-every", "0.02")
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert (run / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes(), f"killed after steps {steps}"
    assert [launch["step"] for launch in json.loads((run / "environment.json").read_text())["launches"]] == steps
    ours, theirs = ([json.loads(line) for line in (r / "metrics.jsonl").read_text().splitlines()] for r in (run, whole))
    for line in (*ours, *theirs):
        del line["train_seconds"], line["images_per_second"], line["input_share"]
    assert ours == theirs


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_ends_in_the_middle_of_an_epoch(
    number: signal.Signals, status: int, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "stopped"
    ended, errors = end_at(start("digits", "--output", str(run), "--checkpoint-every", "0.02", *FLAGS), run, 30, number)
    assert ended == status
    assert f"go on with: vitrail train --resume --output {run}" in errors
    assert "Traceback" not in errors
    train_again = vitrail.train(output=run, resume=True)
    assert (train_again.run / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_stopping_after_an_epoch_and_going_on_is_one_run(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train(tmp_path / "run", stop_after=1)
    assert (first.results["epochs"], first.results["epochs_planned"]) == (1, 3)
    assert (first.run / "report.html").is_file()
    second = vitrail.train(output=first.run, resume=True)
    assert second.run == first.run
    assert (second.run / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert "nothing is trained" not in capsys.readouterr().err
    third = vitrail.train(output=first.run, resume=True)
    assert "its 3 epochs are done: nothing is trained, its figures and page are written anew" in capsys.readouterr().err
    assert third.results["top1"] == second.results["top1"]
    assert len((second.run / "metrics.jsonl").read_text().splitlines()) == 3
    # Each start writes a file of its own, named by the second of its start and a counter, which is no order
    # for starts within one second: read each by itself.
    files = [EventAccumulator(str(path)).Reload() for path in first.run.glob("events.out.tfevents.*")]
    written = [file.Scalars("val_top1") for file in files if "val_top1" in file.Tags()["scalars"]]
    assert sorted(event.step for events in written for event in events) == [23, 45, 68]


def test_a_run_with_all_there_is_to_optimise_by_ends_with_the_same_bytes(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "optimizer": "muon", "weight_decay": 0.05, "layer_decay": 0.8, "cooldown": 0.5, "ema_decay": 0.9,
        "first_size": 8, "first_share": 0.6, "epochs": 2,
    }  # fmt: skip
    straight = train(tmp_path / "straight", **settings)
    assert straight.results["loss"] < 2.25  # less than chance, ln 10
    first = train(tmp_path / "run", stop_after=1, **settings)
    second = vitrail.train(output=first.run, resume=True)
    assert (second.run / WEIGHTS).read_bytes() == (straight.run / WEIGHTS).read_bytes()
    # The average is evaluated and shipped; what it is an average of is what training goes on with.
    shipped, kept = load_file(second.run / WEIGHTS), load_file(second.run / "last" / "state.safetensors")
    assert all(torch.equal(weight, kept[f"average.{name}"]) for name, weight in shipped.items())
    assert not torch.equal(shipped["norm.weight"], kept["model.norm.weight"])
    assert evaluate_run(second.run)["loss"] == second.results["loss"]


def test_what_batch_norm_measured_is_kept_averaged_and_shipped(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "stem": "convolutions", "stem_units": 1, "crop": 2, "crop_size": 12, "last_share": 0.2, "ema_decay": 0.9,
        "epochs": 2,
    }  # fmt: skip
    straight = train(tmp_path / "straight", **settings)
    first = train(tmp_path / "run", stop_after=1, **settings)
    second = vitrail.train(output=first.run, resume=True)
    assert (second.run / WEIGHTS).read_bytes() == (straight.run / WEIGHTS).read_bytes()
    shipped, kept = load_file(second.run / WEIGHTS), load_file(second.run / "last" / "state.safetensors")
    measured = [name for name in shipped if name.endswith(("running_mean", "running_var"))]
    assert len(measured) == 6
    for name in measured:
        assert torch.equal(shipped[name], kept[f"average.{name}"])
        assert not torch.equal(shipped[name], kept[f"model.{name}"])
    assert evaluate_run(second.run)["loss"] == second.results["loss"]
    # Squares are trained on, and whole images judge each epoch, as they judge what is reported.
    assert json.loads((first.run / "metrics.jsonl").read_text().splitlines()[0])["val_loss"] == first.results["loss"]


def test_epochs_of_small_images_are_judged_by_small_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings: dict[str, Any] = {"first_size": 8, "first_share": 0.6, "epochs": 2}
    whole = train(tmp_path / "whole", **settings)
    lines = [json.loads(line) for line in (whole.run / "metrics.jsonl").read_text().splitlines()]
    assert [line["val_image_size"] for line in lines] == [8, 16]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch ")]
    assert [re.findall("top-1 [0-9.]+ at ([0-9]+) pixels", line) for line in said] == [["8"], ["16"]]
    first = train(tmp_path / "first", stop_after=1, **settings)  # the same weights as behind the other's first epoch
    kept = json.loads((first.run / "metrics.jsonl").read_text())
    assert all(kept[name] == lines[0][name] for name in kept if name.startswith("val_"))
    model, digits = vitrail.load(first.run), cache.load("digits", 16)
    model.accepts_smaller = True
    pixels = pixels_of(digits.splits["test"], 16, torch.device("cpu"))
    assert predict_split(model, pixels, side=8).loss.mean() == pytest.approx(lines[0]["val_loss"], rel=1e-4)
    # What is reported is of whole images, wherever a run stops.
    assert first.results["loss"] == pytest.approx(predict_split(model, pixels).loss.mean(), rel=1e-4)
    assert first.results["loss"] != pytest.approx(lines[0]["val_loss"], rel=1e-2)


def test_auto_precision_is_that_of_the_machine_and_stays(tmp_path: Path) -> None:
    first = train(tmp_path / "run", precision="auto", stop_after=1)
    here = faster_precision(torch.device("cpu"))
    assert first.results["precision"] == here
    kept = Run.open(first.run).recipe()
    assert (kept.recipe.precision, kept.set_by["precision"]) == (here, "machine")
    assert vitrail.train(output=first.run, resume=True, precision="auto").results["precision"] == here


def test_batches_that_memory_has_divided_stay_so_when_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, sizes = VisionTransformer.forward, []

    def cramped(model: VisionTransformer, images: Tensor) -> Tensor:
        if model.training and len(images) > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(model, images)

    def roomy(model: VisionTransformer, images: Tensor) -> Tensor:
        if model.training:
            sizes.append(len(images))
        return plain(model, images)

    monkeypatch.setattr(VisionTransformer, "forward", cramped)
    run = train(tmp_path / "run", epochs=2, stop_after=1).run
    monkeypatch.setattr(VisionTransformer, "forward", roomy)
    vitrail.train(output=run, resume=True)
    assert set(sizes) == {16}


def test_a_kill_between_an_epochs_line_and_its_checkpoint_leaves_one_line(whole: Path, tmp_path: Path) -> None:
    script = """
import os, signal, sys, vitrail
from vitrail.weights.checkpoint import Run
add = Run.add_metrics
def killed(self, metrics):
    add(self, metrics)
    os.kill(os.getpid(), signal.SIGKILL)
Run.add_metrics = killed
vitrail.train("digits", output=sys.argv[1], checkpoint_every=0.0, **eval(sys.argv[2]))
"""
    run = tmp_path / "run"
    done = subprocess.run([sys.executable, "-c", script, str(run), repr(TINY)], timeout=PATIENCE)
    assert done.returncode == -signal.SIGKILL
    (run / "last" / ".state.safetensors.1").write_text("what a kill in the middle of writing leaves")
    vitrail.train(output=run, resume=True)
    assert [json.loads(line)["epoch"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    assert (run / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert not [path for path in run.rglob(".*") if path.is_file()]


def test_the_latest_run_of_a_recipe_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = TINY | {"epochs": 2}
    assert vitrail.train("digits", stop_after=1, **settings).run == Path("runs/digits")
    assert vitrail.train("digits", stop_after=1, **settings).run == Path("runs/digits-2")
    (foreign := Path("runs/foreign")).mkdir()  # of another version, say
    shutil.copytree("runs/digits/last", foreign / "last")
    (foreign / "recipe.yaml").write_text("recipe: digits\nsettings: {of_later: {value: 1.0, set_by: default}}\n")
    assert vitrail.train("digits", resume=True).run == Path("runs/digits-2")
    assert vitrail.train(resume=True).run == Path("runs/digits-2")
    Path("runs/digits/results.json").unlink()  # as of a run that is not finished
    assert vitrail.train(resume=True).run == Path("runs/digits")
    with pytest.raises(BadInput, match="no run of vit-12"):
        vitrail.train("vit-12", resume=True)
    with pytest.raises(BadInput, match="is a run of digits, not of vit-12"):
        vitrail.train("vit-12", resume=True, output="runs/digits")
    with pytest.raises(BadInput, match="did you mean 'digits'"):
        vitrail.train("digts", resume=True)


def test_a_batch_in_parts_gives_the_same_step_to_rounding(tmp_path: Path) -> None:
    noiseless = dict.fromkeys(("dropout", "stochastic_depth", "patch_dropout"), 0.0)
    settings = {**noiseless, "epochs": 1, "optimizer": "sgd", "lr": 0.1}
    runs = [train(tmp_path / f"{parts}", accumulate=parts, **settings).run for parts in (1, 4)]
    one, four = (load_file(run / WEIGHTS) for run in runs)
    for name, weight in one.items():
        torch.testing.assert_close(four[name], weight, atol=1e-5, rtol=1e-4)


def test_bf16_learns_too(tmp_path: Path) -> None:
    results = train(tmp_path / "run", precision="bf16", epochs=2).results
    assert results["precision"] == "bf16"
    assert results["loss"] < 2.3  # less than chance, ln 10
    with safe_open(tmp_path / "run" / WEIGHTS, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}  # noqa: SIM118


# A folder of images of many sizes


def save_photos(folder: Path, colours: dict[str, int], count: int) -> Path:
    """Noise of many sizes, with more of one colour: class → channel."""
    random = np.random.default_rng(0)
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 80, (*random.integers(14, 40, 2).tolist(), 3), dtype=np.uint8)
            pixels[..., colour] += 120
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def test_a_folder_of_photos_trains_and_evaluates(tmp_path: Path) -> None:
    photos = save_photos(tmp_path / "photos", {"red": 0, "green": 1, "blue": 2}, 12)
    result = train(tmp_path / "run", data=str(photos), image_size=16, patch_size=4, epochs=80, batch_size=16, crop=2)
    assert result.results["top1"] == 1
    answers = predict_files(result.run, sorted((photos / "blue").iterdir()), top=1)
    assert {answer["predictions"][0]["class"] for answer in answers} == {"blue"}
    with pytest.raises(BadInput, match="3 classes"):
        evaluate_run(result.run, "digits")


@pytest.mark.parametrize(("epochs", "batch_size"), [(3, 32), (7, 64), (1, 200)])
def test_a_batch_may_hold_more_images_than_there_are(epochs: int, batch_size: int, tmp_path: Path) -> None:
    photos = save_photos(tmp_path / "photos", {"red": 0, "blue": 2}, 12)  # 20 to train on
    result = train(tmp_path / "run", data=str(photos), image_size=16, epochs=epochs, batch_size=batch_size)
    assert result.results["epochs"] == epochs
    assert result.results["samples_seen"] == math.ceil(epochs * 20 / batch_size) * batch_size
    assert vitrail.train(output=result.run, resume=True).results["loss"] == result.results["loss"]


def test_what_is_reported_is_of_whole_images_though_no_epoch_was_judged_by_them(tmp_path: Path) -> None:
    photos = save_photos(tmp_path / "photos", {"red": 0, "blue": 2}, 12)  # 20 to train on: one step, in the first epoch
    settings: dict[str, Any] = {"image_size": 16, "batch_size": 60, "first_size": 8, "first_share": 0.6}
    result = train(tmp_path / "run", data=str(photos), **settings)
    (line,) = (json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines())
    assert (line["epoch"], line["val_image_size"]) == (1, 8)
    assert result.results["loss"] == evaluate_run(result.run)["loss"]
    assert result.results["loss"] != line["val_loss"]


# What goes wrong


def test_a_run_does_not_go_on_with_other_images(tmp_path: Path) -> None:
    photos = save_photos(tmp_path / "photos", {"red": 0, "blue": 2}, 6)
    run = train(tmp_path / "run", data=str(photos), image_size=16, stop_after=1, batch_size=4).run
    vitrail.train(output=run, resume=True, stop_after=2, data=str(photos.rename(tmp_path / "moved")))  # the same images
    save_photos(tmp_path / "moved" / "more", {"x": 1}, 1)
    for other in (tmp_path / "moved", save_photos(tmp_path / "other", {"green": 1, "blue": 2}, 6), "digits"):
        with pytest.raises(BadInput, match=r"the images are not those that|the weights of .* are not this model's"):
            vitrail.train(output=run, resume=True, data=str(other))


def test_what_is_trained_is_said_at_the_start(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path / "run", stop_after=1).run
    said = capfd.readouterr().err
    assert f"1,438 training and 359 test images of 10 classes, cpu, fp32 → {run}" in said
    vitrail.train(output=run, resume=True, stop_after=2)
    assert f"going on with {run} at step 23 of 68" in capfd.readouterr().err
    photos = save_photos(tmp_path / "photos", {"red": 0, "blue": 2}, 6)
    train(tmp_path / "few", data=str(photos), image_size=16, batch_size=64, epochs=2)
    assert "a batch of 64 is more than the 10 images there are: 1 step in 2 epochs" in capfd.readouterr().err


def test_other_threads_are_said_to_give_other_bits(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path / "run", stop_after=1).run
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        vitrail.train(output=run, resume=True, stop_after=2)
    finally:
        torch.set_num_threads(before)
    assert f"threads is {before + 1}, and was {before}: the run goes on, but" in capfd.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Diverged, match=r"training diverged: .* step \d+.* checkpoint of step \d+ is kept"):
        train(run, optimizer="sgd", lr=1e30, clip=None, warmup=0.0, schedule="constant")
    kept = load_file(run / "last" / "state.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())
    done = start("--resume", "--output", str(run))
    _, errors = done.communicate(timeout=PATIENCE)
    assert done.returncode == 3
    assert "Traceback" not in errors


def test_what_batch_norm_measured_is_not_saved_unless_it_is_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train_step(model: VisionTransformer, optimizer: torch.optim.Optimizer, batches: Any, number: int) -> Tensor:
        outcome = of_session(model, optimizer, batches, number)
        model.get_buffer("patch_embedding.layers.1.running_var")[0] = torch.inf  # as activations beyond 1e19 leave it
        return outcome

    of_session = step.train_step
    monkeypatch.setattr(session, "train_step", train_step)
    with pytest.raises(Diverged, match=r"layers\.1\.running_var is no longer finite"):
        train(tmp_path / "run", stem="convolutions", epochs=1)


def test_settings_that_are_no_more_are_passed_over_where_they_say_what_is_so(whole: Path, tmp_path: Path) -> None:
    run = Run(shutil.copytree(whole, tmp_path / "run"))
    content = yaml.safe_load((run.path / "recipe.yaml").read_text("utf-8"))
    for positions in ("learnt", "rotary"):
        content["settings"]["positions"] = {"value": positions, "set_by": "recipe"}
        (run.path / "recipe.yaml").write_text(yaml.safe_dump(content))
        if positions == "learnt":
            assert run.recipe() == Run(whole).recipe()
    with pytest.raises(BadInput, match=r"recipe\.yaml: settings that this version of Vitrail lacks: positions\."):
        run.recipe()


def test_a_run_whose_kernels_adamw_had_does_not_go_on_by_muon(tmp_path: Path) -> None:
    """As runs with a stem of convolutions were before Muon had its kernels."""
    settings: dict[str, Any] = {
        "optimizer": "muon", "stem": "convolutions", "num_layers": 1, "epochs": 2, "batch_size": 500,
    }  # fmt: skip
    vitrail.train("digits", output=tmp_path / "run", stop_after=1, device="cpu", **settings)
    run = Run.open(tmp_path / "run")
    tensors, progress = run.read_state()
    name = "optimizer.patch_embedding.layers.0.weight"
    tensors[f"{name}.exp_avg"] = tensors.pop(f"{name}.momentum_buffer")
    run.save_state(tensors, progress)
    with pytest.raises(BadInput, match=r"had AdamW for patch_embedding\.layers\.0\.weight; train anew"):
        vitrail.train(output=run.path, resume=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 18}, "take images of 16 or 20, or patches of 1, 2, 3, 6, 9, 18"),
        ({"epochs": "2"}, "epochs is '2'; it must be of type int"),
        ({"clip": "1"}, "clip is '1'; it must be of type float or NoneType"),
        ({"precision": "fp16"}, "it must be one of auto, fp32, bf16; did you mean"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"seed": 2**70}, r"below 2\^63"),
        ({"first_size": 10}, "with patches of 4 and images of 16 pixels it may be 4, 8, 12"),
        ({"first_size": 16}, "it may be 4, 8, 12"),
        ({"crop_size": 16}, "crop_size is 16; with patches of 4 and images of 16 pixels it may be 4, 8, 12"),
        ({"crop_size": 12, "last_share": 1.0}, "no step is left for it: last_share is all of them"),
        ({"crop_size": 12, "cutmix": 1.0}, "cuts away some of what cutmix pastes"),
        ({"crop_size": 12, "first_size": 8, "first_share": 0.9}, "first_share and last_share are all of them"),
        ({"cooldown": 0.0}, "cooldown is 0.0; it must be above 0 and at most 1"),
        ({"layer_decay": 1.1}, "layer_decay is 1.1; it must be above 0"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0; it must be at least 0 and below 1"),
        ({"num_heads": 3}, "take 1, 2, 4, 8, 16 heads"),
        ({"accumulate": 3}, "accumulate may be 1, 2, 4"),
        ({"batch_sise": 3}, "no setting 'batch_sise'; did you mean 'batch_size'"),
        ({"stop_after": 0}, "stop-after is 0; it must be from 1 to 3"),
        ({"stop_after": 4}, "stop-after is 4; it must be from 1 to 3"),
        ({"rotate": 400.0}, "rotate is 400.0; it must be from 0 to 180 degrees"),
        ({"first_share": 0.3}, "first_share does nothing unless first_size is set"),
        ({"last_share": 0.3}, "last_share does nothing unless crop_size is set"),
        ({"muon_lr": 0.01}, "muon_lr does nothing unless optimizer is muon"),
        ({"stem_units": 2}, "stem_units is 2; it does nothing unless stem is convolutions"),
        ({"stem_rate": 2.0, "stem": "convolutions"}, "stem_rate does nothing unless optimizer is muon"),
        ({"stem_rate": 2.0, "optimizer": "muon"}, "stem_rate does nothing unless stem is convolutions"),
        ({"stem_rate": -1.0}, "stem_rate is -1.0; it must not be negative"),
        ({"schedule": "constant", "cooldown": 0.3}, "cooldown does nothing unless schedule is linear or cosine"),
        ({"data": "digit"}, "did you mean 'digits'"),
        pytest.param({"device": "cuda"}, "there is no cuda device here",
                     marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")),
    ],
)  # fmt: skip
def test_bad_input_leaves_no_run_folder(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        train(tmp_path / "run", **settings)
    assert not list(tmp_path.iterdir())


def test_a_folder_named_as_a_recipe_gets_the_flag_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    with pytest.raises(BadInput, match=r"no recipe 'photos'.* vitrail train --data photos"):
        vitrail.train("photos")


def test_a_resumed_run_keeps_its_settings(whole: Path) -> None:
    with pytest.raises(BadInput, match=r"started with lr = 0.003.*leave --lr out"):
        vitrail.train(output=whole, resume=True, lr=0.1)


def test_what_is_read_while_it_is_replaced_is_one_or_the_other(tmp_path: Path) -> None:
    path, ended = tmp_path / "state.safetensors", threading.Event()

    def keep_writing() -> None:
        for number in itertools.count():
            write_tensors(path, {"a": torch.full((1000 + number % 7,), float(number))}, {"step": 10 ** (number % 9)})
            if ended.is_set():
                return

    write_tensors(path, {"a": torch.zeros(3)}, {"step": 0})
    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        for _ in range(300):
            tensors, about = read_tensors(path)
            assert (tensors["a"] == tensors["a"][0]).all()
            assert read_about(path)["step"] in (0, *(10**power for power in range(9)))
            assert about.keys() == {"step"}
    finally:
        ended.set()
        writer.join()


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    for path, message in ((tmp_path, "is no run folder"), (tmp_path / "none", "there is no (run|file or) folder")):
        with pytest.raises(BadInput, match=message):
            vitrail.train(output=path, resume=True)
        with pytest.raises(BadInput, match=message):
            vitrail.load(path)


def test_weights_of_another_shape_are_listed_by_name(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "model" / "config.json").write_bytes((whole / "model" / "config.json").read_bytes())
    weights = load_file(whole / WEIGHTS)
    weights["norm.weight"] = torch.ones(3)
    weights["extra"] = weights.pop("head.bias")
    write_tensors(run / WEIGHTS, weights)
    with pytest.raises(BadInput) as error:
        vitrail.load(run)
    for part in ("head.bias is missing", "extra is unexpected", "norm.weight has shape (3,) instead of (16,)"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "name",
    ["recipe.yaml", "environment.json", "model/config.json", "model/model.safetensors", "last/state.safetensors"],
)
@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_damaged_files_are_named(name: str, damage: str, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for part in PARTS:
        (run / part).parent.mkdir(parents=True, exist_ok=True)
        (run / part).write_bytes((whole / part).read_bytes())
    content = (run / name).read_bytes()
    (run / name).write_bytes(content[: len(content) // 3] if damage == "cut" else b"\xff\x00[" + content)
    with pytest.raises(BadInput, match=name):
        evaluate_run(run) if name.startswith(("model", "recipe")) else vitrail.train(output=run, resume=True)


@pytest.fixture
def full_disk(tmp_path: Path) -> Path:
    """A file system of 100 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "none", disk]).returncode:
        pytest.skip("making a file system that is too small takes root and Linux's mount")
    return disk


def test_no_space_left_is_said_and_nothing_is_left_half_written(full_disk: Path) -> None:
    try:
        run = full_disk / "run"
        process = start("digits", "--output", str(run), *FLAGS, "--hidden-size=64")
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1
        assert "space" in errors.lower()
        assert "Traceback" not in errors
        assert not [path for path in run.rglob("*") if path.name.startswith(".")]
    finally:
        subprocess.run(["umount", full_disk], check=True)


# The default


def test_the_default_recipe_reads_digits(tmp_path: Path) -> None:
    """What `make train` does; how long it takes is in results/. The README has 0.98 from three seeds on one processor,
    of which one had 0.978; another processor rounds otherwise, which is like another seed, and each of the 359 images
    is 0.003."""
    results = vitrail.train(output=tmp_path / "run").results
    assert results["recipe"] == "digits"
    assert results["top1"] >= 0.97


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    vitrail.train("digits", stop_after=1, **TINY)
    run = Run(Path("runs/digits"))
    with alone(run):
        for output in (run.path, None):
            with pytest.raises(BadInput, match=r"is being trained by another process|there is no run in runs/"):
                vitrail.train(output=output, resume=True)
    assert vitrail.train(resume=True).results["epochs"] == TINY["epochs"]
