"""The command line as it is typed: help, mistyped words, exit statuses. Training itself is tested elsewhere."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

import vitrail
from vitrail.arguments import Parser
from vitrail.cli import main
from vitrail.commands import COMMANDS
from vitrail.errors import BadInput, Diverged, Stopped
from vitrail.recipes import RECIPES, Recipe, resolve

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
    assert "mirror half of the training images (yes)" in text
    for setting in dataclasses.fields(Recipe):
        assert f"--{setting.name.replace('_', '-')}" in text
        assert setting.metadata["help"] in text


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
        (["train", "--no-flp"], "no flag --no-flp; did you mean '--no-flip'?"),
        (["train", "--optimizer", "adamm"], "'adamm' is not one of adamw, adam, sgd; did you mean"),
        (["train", "--precision", "x"], "'x' is not one of fp32, bf16. "),
        (["train", "--epochs", "3.5"], "--epochs: '3.5' is no whole number"),
        (["train", "--epochs"], "--epochs: expected one argument"),
        (["train", "--epochs", "0"], "epochs is 0; it must be at least 1"),
        (["train", "--lr", "nan"], "--lr: 'nan' is not finite"),
        (["train", "--lr", "-1"], "lr is -1.0; it must not be negative"),
        (["train", "--stop-after", "0"], "--stop-after: it is 0, and must be at least 1"),
        (["train", "digits", "vit-12"], "there is no place for vit-12"),
        (["evaluate"], "required: RUN"),
        (["evaluate", "--jsn"], "did you mean '--json'?"),
        (["evaluate", "no-such-run"], "no run folder no-such-run"),
        (["predict", "no-such-run"], "required: IMAGE"),
        (["predict", "no-such-run", "a.png"], "no run folder no-such-run"),
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


# The Python names


def test_import_is_instant_and_names_are_there() -> None:
    script = """
import sys, vitrail
assert "torch" not in sys.modules
assert set(vitrail.__all__) <= set(dir(vitrail))
import vitrail.training
from vitrail import train
assert vitrail.train is train is vitrail.training.train
assert all(callable(getattr(vitrail, name)) for name in vitrail.__all__ if name != "__version__")
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        vitrail.trian  # noqa: B018
