"""The command line as it is typed: help, mistyped words, exit statuses, and what each command says of a real run.
Training itself is tested elsewhere."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image

import vitrail
from vitrail.cli import main
from vitrail.commands.arguments import Parser
from vitrail.commands.commands import COMMANDS
from vitrail.data import cache
from vitrail.errors import BadInput, Diverged, Stopped
from vitrail.evaluation.evaluate import predict_files
from vitrail.recipes import RECIPES, resolve
from vitrail.settings import Recipe
from vitrail.weights.checkpoint import Run

HELPS = [["-h"], *([command, "-h"] for command in COMMANDS)]


def vitrail_process(*words: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "vitrail", *words], text=True, stderr=subprocess.PIPE, **options)


def read(command: str, *words: str) -> dict[str, Any]:
    parser = Parser(f"vitrail {command}", "", ())
    COMMANDS[command].take(parser, words)
    return vars(parser.read(words))


# Help


@pytest.mark.parametrize("words", HELPS, ids=" ".join)
def test_help_answers_at_once(words: list[str]) -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        done = vitrail_process(*words, stdout=subprocess.PIPE)
        seconds.append(time.perf_counter() - start)
        assert (done.returncode, done.stderr) == (0, "")
        assert "examples:" in done.stdout
        assert "\x1b" not in done.stdout
    assert statistics.median(seconds) < 0.3


def test_help_imports_nothing_heavy() -> None:
    script = f"""
import sys
from vitrail.cli import main
assert not any(map(main, {HELPS}))
print("heavy:", {{"torch", "numpy", "rich", "PIL", "yaml"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("heavy: set()\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_understood(command: str) -> None:
    for example in COMMANDS[command].examples:
        words = example.split(" | ")[0].split()
        assert words[:2] == ["vitrail", command]
        read(command, *words[2:])


def test_help_shows_every_setting_with_the_value_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "vit-12", "-h"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "passes over the training images (150)" in text
    assert "every other time that it comes (random)" in text
    for setting in dataclasses.fields(Recipe):
        assert f"--{setting.name.replace('_', '-')}" in text
        assert setting.metadata["help"] in text


@pytest.mark.parametrize(
    ("words", "recipe"),
    [
        (["--data", "digits", "vit-12"], "vit-12"),
        (["--resume", "--compile", "vit-12", "--output", "digits"], "vit-12"),
        (["--data=vit-12"], "digits"),
        (["--output", "vit-12"], "digits"),
        (["vit-12", "--epochs", "many"], "vit-12"),
        (["--", "vit-12"], "vit-12"),
        (["vit-13"], "digits"),
    ],
)
def test_help_is_of_the_recipe_and_not_of_another_word(
    words: list[str], recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *words, "-h"]) == 0
    out = capsys.readouterr().out
    assert f"(in brackets: what {recipe} has)" in out
    assert f"passes over the training images ({RECIPES[recipe].epochs})" in " ".join(out.split())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vitrail {vitrail.__version__}\n"


# Flags of train


def test_nothing_typed_sets_nothing() -> None:
    assert read("train") == {}


@pytest.mark.parametrize("setting", dataclasses.fields(Recipe), ids=lambda setting: setting.name)
def test_each_setting_has_a_flag(setting: "dataclasses.Field[Any]") -> None:
    flag, kind = "--" + setting.name.replace("_", "-"), get_type_hints(Recipe)[setting.name]
    typed: dict[str, Any] = {"7": 7}
    if kind is bool:
        assert read("train", flag) == {setting.name: True}
        assert read("train", flag.replace("--", "--no-")) == {setting.name: False}
        return
    if get_origin(kind) is Literal:
        typed = {choice: choice for choice in get_args(kind)}
    elif kind is str:
        typed = {"a b": "a b"}
    elif type(None) in get_args(kind):
        typed["none"] = None
    for text, value in typed.items():
        assert read("train", flag, text) == {setting.name: value}
        assert read("train", f"{flag}={text}") == {setting.name: value}


def test_what_is_typed_counts_as_set_by_the_command_line_even_if_it_changes_nothing() -> None:
    given = read("train", "--epochs", "150", "vit-12", "--lr", "1e-4", "--clip", "none")
    resolved = resolve(given.pop("recipe"), **given)
    assert [name for name, by in resolved.set_by.items() if by == "command line"] == ["epochs", "lr", "clip"]
    assert resolved.recipe == dataclasses.replace(RECIPES["vit-12"], lr=1e-4)


def test_options_of_the_run() -> None:
    assert read("train", "--resume", "--output", "runs/a", "--stop-after", "3", "--checkpoint-every", "0.5") == {
        "resume": True, "output": Path("runs/a"), "stop_after": 3, "checkpoint_every": 0.5,
    }  # fmt: skip


def test_files_and_flags_in_any_order() -> None:
    given = read("predict", "runs/a", "1.png", "--top", "3", "2.png", "--", "-3.png")
    assert given["images"] == [Path("1.png"), Path("2.png"), Path("-3.png")]
    assert (given["run"], given["top"]) == (Path("runs/a"), 3)


# Bad usage


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "which command?"),
        (["trian"], "no command 'trian'; did you mean 'train'?"),
        (["-x"], "no command '-x'"),
        (["train", "vit12"], "no recipe 'vit12'; did you mean 'vit-12'?"),
        (["train", "--epoch", "3"], "no flag --epoch; did you mean '--epochs'?"),
        (["train", "--epoch=3"], "no flag --epoch; did you mean '--epochs'?"),
        (["train", "--no-compil"], "no flag --no-compil; did you mean '--no-compile'?"),
        (["train", "--num-classes", "3"], "no flag --num-classes: the images say how many classes there are"),
        (["train", "--output", ""], ". is no name for a new folder; name one with --output"),
        (["import", str(Path(__file__).parent / "golden" / "token.npz"), "--output", ".."], ".. is no name for a new"),
        (["train", "--output", __file__ + "/run"], "test_cli.py is a file, and nothing can lie in it"),
        (["train", "--optimizer", "adamm"], "'adamm' is not one of adamw, adam, sgd, muon; did you mean"),
        (["train", "--precision", "x"], "'x' is not one of auto, fp32, bf16. "),
        (["train", "--epochs", "3.5"], "--epochs: '3.5' is no whole number"),
        (["train", "--epochs"], "--epochs: expected one argument"),
        (["train", "--epochs", "0"], "epochs is 0; it must be at least 1"),
        (["train", "--lr", "nan"], "--lr: 'nan' is not finite"),
        (["train", "--lr", "-1"], "lr is -1.0; it must not be negative"),
        (["train", "--stop-after", "0"], "--stop-after: it is 0, and must be at least 1"),
        (["train", "digits", "vit-12"], "there is no place for vit-12"),
        (["evaluate"], "required: RUN"),
        (["evaluate", "--jsn"], "did you mean '--json'?"),
        (["evaluate", "no-such-run"], "no file or folder no-such-run"),
        (["predict", "no-such-run"], "required: IMAGE"),
        (["predict", "no-such-run", "a.png"], "no file or folder no-such-run"),
        (["import", "ViT-B/16", "--output", "run"], "That is the name of a shape: vitrail.create('ViT-B/16') makes"),
        (["report", "no-such-run"], "no run folder no-such-run"),
        (["data", "no-such-folder"], "no-such-folder"),
        (["recipes", "digits"], "there is no place for digits"),
    ],
)
def test_bad_usage(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vitrail: ")
    assert err.count("\n") == 1
    assert says in err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for command in (["evaluate"], ["report"], ["predict", "x.png"]):
        assert main([command[0], str(tmp_path), *command[1:]]) == 2
        assert "is no run folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# Exit statuses


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (BadInput("the name is wrong."), 2, "the name is wrong."),
        (Diverged("the loss is nan at step 7."), 3, "the loss is nan at step 7."),
        (Stopped("terminated, after saving.", 143), 143, "terminated, after saving."),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "runs/a/x"), 1, "no space left for runs/a/x."),
        (OSError(28, "no space left for the cache in /c; make room there"), 1, "in /c; make room there."),
        (OSError("could not write x: No space left on device"), 1, "could not write x: No space left on device."),
        (PermissionError(13, "Permission denied", "runs"), 1, "permission denied for runs."),
        (ChildProcessError("a process was ended; make memory free."), 1, "a process was ended; make memory free."),
        (MemoryError(), 1, "memory is full. In training, a smaller --batch-size"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9.06 GB)"), 1, "memory is full."),
    ],
    ids=lambda value: type(value).__name__,
)
def test_statuses(
    error: BaseException, status: int, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(error, monkeypatch)
    assert main(["recipes"]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vitrail: ")
    assert says in err
    assert err.count("\n") == 1


def test_torch_out_of_memory(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def ask(args: Namespace) -> str:
        return str(torch.empty(1 << 60, dtype=torch.uint8).shape)

    monkeypatch.setitem(COMMANDS, "recipes", dataclasses.replace(COMMANDS["recipes"], do=ask))
    assert main(["recipes"]) == 1
    assert capsys.readouterr().err.startswith("vitrail: memory is full. ")


def test_windows_is_told_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert main(["recipes"]) == 1
    assert "not on Windows" in capsys.readouterr().err


def test_a_mistake_of_our_own_shows_its_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(ZeroDivisionError("by zero"), monkeypatch)
    assert main(["recipes"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "mistake in Vitrail" in err


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: Namespace) -> str:
        raise error

    monkeypatch.setitem(COMMANDS, "recipes", dataclasses.replace(COMMANDS["recipes"], do=fail))


def test_a_reader_that_has_had_enough() -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    done = vitrail_process("recipes", stdout=theirs)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_stdout() -> None:
    with Path("/dev/full").open("w") as full:
        done = vitrail_process("recipes", stdout=full)
    assert done.returncode == 1
    assert done.stderr.startswith("vitrail: no space left")
    assert done.stderr.count("\n") == 1


# Commands that need no run


def test_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(RECIPES)]] == list(RECIPES)
    assert "optimizer adam, schedule linear" in next(line for line in lines if line.startswith("vit-12"))


def test_recipes_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {name: dataclasses.asdict(r) for name, r in RECIPES.items()}


# Commands on real runs: of the digits, and of a folder that is trained on under a relative name

TINY = (
    "--image-size=16", "--patch-size=8", "--hidden-size=16", "--mlp-dim=32", "--num-heads=2", "--num-layers=1",
    "--device=cpu",
)  # fmt: skip


def typed(*words: object) -> str:
    """What a command that succeeds prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main([str(word) for word in words]) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where training was started: has `photos`, `runs/digits`, `runs/my photos`, and what training them said."""
    place = tmp_path_factory.mktemp("place")
    for label, colour in (("green", (0, 200, 0)), ("red", (200, 0, 0))):
        (place / "photos" / label).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (20, 20 + i), colour).save(place / "photos" / label / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        (place / "digits.txt").write_text(typed("train", "--epochs=1", "--batch-size=128", *TINY))
        photos = ("--data=photos", "--epochs=2", "--batch-size=4", "--stop-after=1", "--output=runs/my photos")
        (place / "photos.txt").write_text(typed("train", "vit-12", *photos, *TINY))
    return place


def test_train_says_how_well_it_went_and_where_to_look(place: Path) -> None:
    results = json.loads((place / "runs" / "digits" / "results.json").read_text())
    figures, training, empty, *then = (place / "digits.txt").read_text().splitlines()
    assert figures.startswith(f"top-1 {results['top1']:.3f}, top-5 {results['top5']:.3f}, loss {results['loss']:.3f}, ")
    assert figures.endswith(" on 359 images (digits, test)")
    assert re.fullmatch(
        r"1 epoch in \d+\.\d s of training, [\d,]+ images/s \(cpu, fp32\), \d+\.\d% of it for input; "
        r"at most \d\.\d GB of memory",
        training,
    )
    assert [empty, *then] == [
        "",
        "look at  runs/digits/report.html",
        "then     vitrail evaluate runs/digits",
        "         vitrail predict runs/digits IMAGE",
    ]


def test_train_says_how_to_go_on_with_what_was_stopped(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (place / "photos.txt").read_text().splitlines()
    assert lines[1].startswith("1 of 2 epochs in ")
    assert lines[-1] == "         vitrail train --resume --output 'runs/my photos'"
    copy = shutil.copytree(place, place.parent / "copy")
    monkeypatch.chdir(copy)
    text = typed(*shlex.split(lines[-1])[1:])  # the recipe need not be named again
    assert text.splitlines()[1].startswith("2 epochs in ")
    assert "--resume" not in text


def test_evaluate(place: Path) -> None:
    found = json.loads(typed("evaluate", place / "runs" / "digits", "--json"))
    results = json.loads((place / "runs" / "digits" / "results.json").read_text())
    assert found["per_class"] == results["per_class"]
    for figure in ("count", "top1", "top5", "loss", "calibration_error"):
        assert found[figure] == pytest.approx(results[figure])
    headline, empty, headings, *rows = typed("evaluate", place / "runs" / "digits").splitlines()
    assert f"top-1 {found['top1']:.3f}" in headline
    assert (empty, headings.split()) == ("", ["classes,", "worst", "first", "images", "top-1"])
    of = {row["name"]: (f"{row['count']}", f"{row['top1']:.3f}") for row in found["per_class"]}
    assert {name: (count, top1) for name, count, top1 in map(str.split, rows)} == of
    shares = [float(row.split()[2]) for row in rows]
    assert shares == sorted(shares)


def test_evaluate_by_mirror_images_too(place: Path) -> None:
    run = place / "runs" / "digits"
    found, plain = (json.loads(typed("evaluate", run, *more, "--json")) for more in (["--mirror"], []))
    mirrored = found.pop("mirrored")
    assert found == plain  # whose figures stay the ones that are reported
    test = cache.load("digits", 16).splits["test"]
    pixels = np.stack([test.image(place) for place in range(len(test))])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    model, labels = vitrail.load(run), torch.from_numpy(test.labels)
    with torch.inference_mode():
        logits = (model(images) + model(torch.flip(images, [-1]))) / 2
    assert mirrored["top1"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert mirrored["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)
    assert f"by each image and its mirror image: top-1 {mirrored['top1']:.3f}" in typed("evaluate", run, "--mirror")


def test_predict(place: Path) -> None:
    files = [place / "photos" / label / "0.png" for label in ("red", "green")]
    answers = json.loads(typed("predict", place / "runs" / "digits", *files, "--json"))
    assert [answer["image"] for answer in answers] == list(map(str, files))
    for answer in answers:
        shares = [guess["probability"] for guess in answer["predictions"]]
        assert len(shares) == 5
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) <= 1
    headings, *rows = [
        line.split() for line in typed("predict", place / "runs" / "digits", *files, "--top=2").splitlines()
    ]
    assert headings == ["image", "class", "probability"]
    expected = []
    for answer in answers:
        first, second = ([guess["class"], f"{guess['probability']:.3f}"] for guess in answer["predictions"][:2])
        expected += [[answer["image"], *first], second]
    assert rows == expected


def test_predict_names_the_files_that_are_no_images_and_answers_for_the_others(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (bad := tmp_path / "bad.png").write_bytes(b"no image")
    good, run = place / "photos" / "red" / "0.png", place / "runs" / "digits"
    alone = typed("predict", run, good, good)
    capsys.readouterr()
    for more in ([], ["--json"]):
        assert main(["predict", *map(str, (run, bad, good, tmp_path / "bda.png", good)), *more]) == 2
        out, err = capsys.readouterr()
        assert out == (typed("predict", run, good, good, "--json") if more else alone)
        assert err.startswith(f"vitrail: {bad}: it is no image")
        gone = f"; {tmp_path / 'bda.png'}: there is no such file; did you mean 'bad.png'? "
        assert err.endswith(f"{gone}The other 2 files could be read.\n")
    with pytest.raises(BadInput):  # nothing is left out without a word in Python either
        predict_files(run, [bad, good])
    for words, says in (
        ([place / "photos" / "red"], f"it is a folder; name the images in it: {place / 'photos' / 'red'}/*.png."),
        ([place / "runs"], "it is a folder; name the images in it, of which there is none."),
        ([tmp_path / "x" / "y.png"], f"there is no such file in {tmp_path / 'x'}."),
    ):
        assert main(["predict", str(run), *map(str, words)]) == 2
        out, err = capsys.readouterr()
        assert (out, err) == ("", f"vitrail: {words[0]}: {says}\n")


def test_what_is_said_of_a_run_that_is_not_finished(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, run = place / "photos" / "red" / "0.png", place / "runs" / "my photos"
    for words in (["evaluate", run, "--data", place / "photos"], ["predict", run, good]):
        typed(*words)
        said = (
            f"{run} is not finished: it has done 1 of its 2 epochs, and these weights are those of its last checkpoint"
        )
        assert capsys.readouterr().err == f"{said}\n"
    typed("predict", place / "runs" / "digits", good)
    assert capsys.readouterr().err == ""


def test_a_run_is_judged_by_its_recipe_read_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Run] = []
    recipe = Run.recipe

    def counting(run: Run) -> Any:
        read.append(run)
        return recipe(run)

    monkeypatch.setattr(Run, "recipe", counting)
    typed("evaluate", place / "runs" / "digits")
    assert len(read) == 1


def test_a_recipe_that_would_mirror_digits_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = "mirrors images, and a mirrored digit is none: --flip none leaves that out\n"
    for words, mirrored in (
        (["resnet-18", "--data", "digits"], True),
        (["vit-12", "--data", "digits", "--flip", "random"], False),
        (["vit-12", "--data", "digits", "--flip", "none"], False),
        (["digits"], False),
        (["vit-12", "--data", "nowhere"], False),
    ):
        assert main(["train", *words, "--epochs=1", "--stop-after=2"]) == 2  # before anything is trained
        assert (said in capsys.readouterr().err) == mirrored


def test_report(place: Path) -> None:
    page = place / "runs" / "digits" / "report.html"
    page.unlink()
    assert typed("report", place / "runs" / "digits") == f"{page}\n"
    assert "<img" in page.read_text()


def test_where_the_data_set_is_gone(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, page = place / "runs" / "my photos", place / "runs" / "my photos" / "report.html"
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(run)]) == 2
    err = capsys.readouterr().err
    assert err == (
        f"vitrail: {run} was trained on photos, a path from the folder in which that was started; there is no such "
        "thing in this one. Say with --data D where the images are now.\n"
    )
    why, before = err.removeprefix("vitrail: "), page.read_bytes()
    assert main(["report", str(run)]) == 2
    assert capsys.readouterr().err == (
        f"vitrail: {page} has pictures that a new page would be without, and is left as it is; delete it to have one "
        f"all the same. {why}"
    )
    assert page.read_bytes() == before
    page.unlink()
    assert typed("report", run) == f"{page}\n"
    assert capsys.readouterr().err == f"vitrail: the page is without pictures: {why}"
    assert "written without the data set" in page.read_text()
    assert typed("report", run, "--data", place / "photos") == f"{page}\n"
    assert "<img" in page.read_text()
    assert "on 2 images (photos, test)" in typed("evaluate", run, "--data", place / "photos")
    assert main(["report", str(run), "--data", "nowhere"]) == 2
    monkeypatch.chdir(place)
    assert "on 2 images (photos, test)" in typed("evaluate", run)


def test_data(place: Path) -> None:
    lines = typed("data", place / "photos").splitlines()
    assert lines[0] == "photos: 12 images of 2 classes"
    assert ["test", "2", "2", "1", "1", "1"] in [line.split() for line in lines]
    found = json.loads(typed("data", place / "photos", "--json"))
    assert (found["name"], found["classes"], found["splits"]["train"]["images"]) == ("photos", ["green", "red"], 10)


# The Python names


def test_import_is_instant_and_names_are_there() -> None:
    script = """
import sys, vitrail
assert "torch" not in sys.modules
assert set(vitrail.__all__) <= set(dir(vitrail))
import vitrail.training.train
from vitrail import train
assert vitrail.train is train is vitrail.training.train.train
assert all(callable(getattr(vitrail, name)) for name in vitrail.__all__ if name != "__version__")
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_models_are_there_without_the_compiler(tmp_path: Path) -> None:
    """To load torch's takes a second, which drawing weights on the meta device would cost every command."""
    script = f"""
import sys
from vitrail.cli import main
assert main(["draw", "models/laptop", "--output", {str(tmp_path / "laptop.svg")!r}]) == main(["variants"]) == 0
assert "torch" in sys.modules and "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, cwd=Path(__file__).parent.parent)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        vitrail.trian  # noqa: B018
