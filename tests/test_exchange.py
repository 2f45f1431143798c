"""Weights in and out, as they are typed: import, export, and the table of variants; and what is done with an imported
run. The formats themselves are tested in test_formats.py."""

import contextlib
import copy
import dataclasses
import errno
import importlib.util
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import SMALL, change, change_weights, imported, written
from PIL import Image
from safetensors.torch import load_file

import vitrail
from vitrail.cli import main
from vitrail.data.archives import cache_root
from vitrail.data.images import to_pixels
from vitrail.errors import BadInput
from vitrail.evaluation.evaluate import predict_files
from vitrail.input import memory
from vitrail.recipes import resolve
from vitrail.settings import Recipe
from vitrail.vit.config import ViTConfig
from vitrail.vit.model import VisionTransformer
from vitrail.vit.variants import VARIANTS
from vitrail.weights import exchange, timm_hybrid
from vitrail.weights.card import model_card
from vitrail.weights.checkpoint import Run
from vitrail.weights.exchange import Library, export_model, import_run
from vitrail.weights.formats import random_images
from vitrail.weights.load import read

GOLDEN = Path(__file__).parent / "golden"
SHAPE = ViTConfig(image_size=16, patch_size=8, hidden_size=16, mlp_dim=32, num_heads=2, num_layers=1, num_classes=10)
DIGITS = tuple("0123456789")
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
# What timm calls them, in the order of the variants.
HYBRIDS = dict(
    zip((name for name, config in VARIANTS.items() if config.resnet_blocks is not None), timm_hybrid.KNOWN, strict=True)
)


def typed(*words: object) -> str:
    """What a command that succeeds prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main([str(word) for word in words]) == 0
    return out.getvalue()


def refused(capsys: pytest.CaptureFixture[str], *words: object, status: int = 2) -> str:
    """What a command that fails says, in a line."""
    assert main([str(word) for word in words]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vitrail: ")
    assert err.count("\n") == 1
    return err


def saved(folder: Path, config: ViTConfig = SHAPE, **normalisation: Any) -> VisionTransformer:
    """A run folder with nothing but a model, whose weights are all random."""
    torch.manual_seed(0)
    model = VisionTransformer(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    classes = DIGITS if config.num_classes == 10 else tuple(map(str, range(config.num_classes)))
    Run.create(folder).save_model(model, classes, **normalisation)
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the digits, short, with a class token."""
    folder = tmp_path_factory.mktemp("place") / "runs" / "digits"
    shape = {field.name: getattr(SHAPE, field.name) for field in dataclasses.fields(SHAPE)}
    names = ("image_size", "patch_size", "hidden_size", "mlp_dim", "num_heads", "num_layers", "classifier")
    settings = {name: shape[name] for name in names}
    vitrail.train("digits", output=folder, epochs=1, batch_size=128, device="cpu", **settings)
    return folder


# import


@pytest.mark.parametrize("case", ["token", "gap", "pre-logits", "hybrid"])
def test_import_of_official_checkpoints(case: str, tmp_path: Path) -> None:
    run = tmp_path / "runs" / case
    with np.load(GOLDEN / f"{case}.expected.npz") as file:
        image, expected = (torch.from_numpy(file[name]) for name in ("image", "logits"))
    text = typed("import", GOLDEN / f"{case}.npz", "--output", run)
    assert text.startswith(f"{run}: ")
    assert f"vitrail predict {run} IMAGE" in text
    assert sorted(path.name for path in run.rglob("*")) == [
        "config.json",
        "environment.json",
        "model",
        "model.safetensors",
    ]
    logits = vitrail.load(run)(image.permute(0, 3, 1, 2))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    (launch,) = Run.open(run).launches()
    assert launch["imported"] == str(GOLDEN / f"{case}.npz")


def test_import_at_another_size_with_another_head(tmp_path: Path) -> None:
    text = typed(
        "import", GOLDEN / "pre-logits.npz", "--output", tmp_path / "run", "--image-size", 48, "--num-classes", 5
    )
    assert "Its head is zero" in text
    model, classes = Run.open(tmp_path / "run").load_model()
    before = vitrail.load(GOLDEN / "pre-logits.npz", image_size=48)
    assert isinstance(model, VisionTransformer)
    assert (model.config.image_size, model.config.representation_size, classes) == (48, None, tuple("01234"))
    assert not model(torch.randn(2, 3, 48, 48)).any()
    for name, weight in before.state_dict().items():
        if not name.startswith(("head", "pre_logits")):
            assert torch.equal(model.state_dict()[name], weight), name


def test_import_never_overwrites(tmp_path: Path) -> None:
    for expected in ("run", "run-2", "run-3"):
        run, _ = import_run(GOLDEN / "token.npz", tmp_path / "run")
        assert run.path == tmp_path / expected


def test_import_that_fails_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.npz").write_bytes((GOLDEN / "token.npz").read_bytes()[:5000])
    before = sorted(tmp_path.rglob("*"))
    for words, says in (
        ([tmp_path / "cut.npz"], "cut.npz cannot be read as a NumPy archive"),
        ([tmp_path / "gone.npz"], "there is no file"),
        ([tmp_path / "empty"], "nothing else that is understood: it is empty"),
        ([tmp_path / "gone"], "there is no file or folder"),
        ([GOLDEN / "token.npz", "--image-size", 33], "images of 33 pixels do not divide into patches"),
        ([GOLDEN / "token.npz", "--num-classes", 10**9], "num_classes = 1000000000 cannot be"),
        ([GOLDEN / "token.npz", "--num-classes", 0], "must be at least 1"),
    ):
        assert says in refused(capsys, "import", *words, "--output", tmp_path / "run")
    assert "the following arguments are required: --output" in refused(capsys, "import", GOLDEN / "token.npz")
    below = tmp_path / "cut.npz" / "deep" / "run"
    assert "cut.npz is a file, and nothing can lie in it" in refused(
        capsys, "import", GOLDEN / "token.npz", "--output", below
    )

    def full(self: Run, *args: Any) -> None:
        (self.path / "model").mkdir()
        raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")

    monkeypatch.setattr(Run, "save_model", full)
    for output in (tmp_path / "run", tmp_path / "far" / "away" / "run"):
        assert "no space left" in refused(capsys, "import", GOLDEN / "token.npz", "--output", output, status=1)
    assert sorted(tmp_path.rglob("*")) == before


# What is done with an imported run


@pytest.fixture
def shifted(tmp_path: Path) -> tuple[Path, VisionTransformer]:
    """An imported run whose images are normalised by another mean and deviation."""
    model = saved(tmp_path / "made", mean=MEAN, std=STD)
    run, _ = import_run(tmp_path / "made", tmp_path / "imported")
    assert run.preprocessing() == (MEAN, STD)
    return run.path, model


@torch.no_grad()
def test_predictions_are_of_images_that_are_normalised_as_the_weights_want(
    shifted: tuple[Path, VisionTransformer], tmp_path: Path
) -> None:
    run, model = shifted
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    pixels = torch.from_numpy(to_pixels(Image.fromarray(noise), 16)).permute(2, 0, 1) / 255
    images = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    expected = torch.softmax(model(images[None]), 1)[0]
    (answer,) = predict_files(run, [tmp_path / "noise.png"], top=10)
    found = {guess["class"]: guess["probability"] for guess in answer["predictions"]}
    assert [found[name] for name in DIGITS] == pytest.approx(expected.tolist(), abs=1e-5)
    assert "noise.png" in typed("predict", run, tmp_path / "noise.png")


@torch.no_grad()
def test_large_images_are_made_ready_as_what_is_exported_says(trained: Path, tmp_path: Path) -> None:
    """The shorter side to that of the images that were learnt from, 16 pixels, and not to 18: by `predict` of a run and
    of what was exported of it, and by `evaluate`."""
    noise = np.random.default_rng(0).integers(0, 256, (90, 64, 3), np.uint8)
    for name in DIGITS[:2]:
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.fromarray(noise).save(tmp_path / "photos" / name / "large.png")
    files = [tmp_path / "photos" / name / "large.png" for name in DIGITS[:2]]
    square = np.array(Image.fromarray(noise).resize((16, 22), Image.Resampling.BICUBIC))[3:19]
    expected = torch.softmax(vitrail.load(trained)(torch.from_numpy(square).permute(2, 0, 1)[None] / 127.5 - 1), 1)[0]
    for library in ("timm", "transformers"):
        export_model(trained, library, tmp_path / library)
    for source in (trained, tmp_path / "timm", tmp_path / "transformers"):
        answer, _ = predict_files(source, files, top=10)
        found = {guess["class"]: guess["probability"] for guess in answer["predictions"]}
        assert [found[name] for name in DIGITS] == pytest.approx(expected.tolist(), abs=1e-5)
        for _ in range(2):  # the second time from the cache
            figures = json.loads(typed("evaluate", source, "--data", tmp_path / "photos", "--json"))
            assert figures["loss"] == pytest.approx(-float(expected[:2].log().mean()), abs=1e-4)
    # Where they are of that size already, they are not decoded anew.
    before = len(list(cache_root().iterdir()))
    for data in (None, "digits"):
        typed("evaluate", trained, *(() if data is None else ("--data", data)))
    assert len(list(cache_root().iterdir())) == before


def test_weights_from_elsewhere_are_used_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = GOLDEN / "token.npz"
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    (answer,) = json.loads(typed("predict", checkpoint, tmp_path / "red.png", "--json"))
    run, _ = import_run(checkpoint, tmp_path / "run")
    assert json.loads(typed("predict", run.path, tmp_path / "red.png", "--json")) == [answer]
    (tmp_path / "photos" / answer["predictions"][0]["class"]).mkdir(parents=True)
    shutil.copy(tmp_path / "red.png", tmp_path / "photos" / answer["predictions"][0]["class"])
    figures = json.loads(typed("evaluate", checkpoint, "--data", tmp_path / "photos", "--json"))
    assert (figures["recipe"], figures["count"], figures["top1"]) == ("token.npz", 1, 1.0)
    assert "has no images of its own. Say with --data D" in refused(capsys, "evaluate", checkpoint)
    with np.load(checkpoint) as file:
        np.savez(tmp_path / "headless.npz", **{name: file[name] for name in file if not name.startswith("head/")})
    said = refused(capsys, "predict", tmp_path / "headless.npz", tmp_path / "red.png")
    assert "headless.npz has no head, and so no classes. Train it on images of yours: vitrail train --from" in said


def test_names_that_utf8_cannot_say_are_escaped_in_json(tmp_path: Path) -> None:
    saved(tmp_path / "run", replace(SHAPE, num_classes=2))
    change(tmp_path / "run" / "model" / "config.json", classes=["\ud800", "b"])
    Image.new("RGB", (16, 16)).save(tmp_path / "black.png")
    process = subprocess.run(
        [sys.executable, "-m", "vitrail", "predict", tmp_path / "run", tmp_path / "black.png", "--json"],
        stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    (answer,) = json.loads(process.stdout)
    assert {guess["class"] for guess in answer["predictions"]} == {"\ud800", "b"}


def test_an_imported_run_is_evaluated_on_data_that_is_named(
    shifted: tuple[Path, VisionTransformer], capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = shifted
    found = json.loads(typed("evaluate", run, "--data", "digits", "--json"))
    assert (found["recipe"], found["dataset"], found["split"], found["count"]) == ("imported", "digits", "test", 359)
    assert "was not trained here, and has no images of its own. Say with --data D" in refused(capsys, "evaluate", run)


def test_evaluation_honours_what_the_weights_want(trained: Path, tmp_path: Path) -> None:
    """The same function of the images, written with another normalisation, has the same figures."""
    model, classes = Run.open(trained).load_model()
    mean, std = (0.3, 0.4, 0.6), (0.2, 0.7, 0.5)
    assert isinstance(model, VisionTransformer)
    weight, bias = model.patch_embedding.projection.weight, model.patch_embedding.projection.bias
    assert bias is not None
    with torch.no_grad():  # ours = 2 x - 1 = 2 (std · theirs + mean) - 1
        bias += (weight * (2 * torch.tensor(mean) - 1)[:, None, None]).sum((1, 2, 3))
        weight *= 2 * torch.tensor(std)[:, None, None]
    Run.create(tmp_path / "run").save_model(model, classes, mean, std)
    found, expected = (
        json.loads(typed("evaluate", run, "--data", "digits", "--json")) for run in (tmp_path / "run", trained)
    )
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert found["top1"] == expected["top1"]


def test_an_imported_run_has_a_page(
    shifted: tuple[Path, VisionTransformer], capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = shifted
    assert typed("report", run) == f"{run / 'report.html'}\n"
    assert "the page is without pictures" in capsys.readouterr().err
    assert typed("report", run, "--data", "digits") == f"{run / 'report.html'}\n"
    assert "imported" in (run / "report.html").read_text("utf-8")


def test_an_imported_run_cannot_be_resumed(
    shifted: tuple[Path, VisionTransformer], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "has no recipe.yaml" in refused(capsys, "train", "--resume", "--output", shifted[0])


def test_preprocessing_that_cannot_be_is_refused_by_name(shifted: tuple[Path, VisionTransformer]) -> None:
    path = shifted[0] / "model" / "config.json"
    content = json.loads(path.read_text("utf-8"))
    for value in ("grey", [0.5, 0.5], [0.5, 0.5, 0], None):
        path.write_text(json.dumps(content | {"preprocessing": {"mean": [0.5] * 3, "std": value}}))
        with pytest.raises(BadInput, match=r"config.json: its std of"):
            Run.open(shifted[0]).preprocessing()


# export


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_export(library: str, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "digits-vit"
    files, parity, theirs, share, empty, how = typed(
        "export", trained, "--to", library, "--output", folder
    ).splitlines()
    for name in ("README.md", "config.json", "model.safetensors"):
        assert name in files
    assert parity.startswith("parity: read back, its outputs on 2 random images differ from those of ")
    assert float(parity.split()[-1]) <= 1e-5
    if importlib.util.find_spec(library) is None:
        assert theirs == f"        {library} is not installed here, or cannot be imported, and was not asked"
    else:
        assert theirs.startswith(f"        those of {library} itself, by at most ")
        assert float(theirs.split()[-1]) <= 1e-5
    assert share == "        each as a share of the largest output, where that is above 1"
    assert empty == ""
    assert str(folder) in how
    assert [path.name for path in folder.parent.iterdir()] == ["digits-vit"]
    back, model = vitrail.load(folder), vitrail.load(trained)
    assert all(torch.equal(back.state_dict()[name], weight) for name, weight in model.state_dict().items())


def test_the_card_has_what_was_measured(trained: Path, tmp_path: Path) -> None:
    results = json.loads((trained / "results.json").read_text("utf-8"))
    export_model(trained, "timm", tmp_path / "folder")
    card = (tmp_path / "folder" / "README.md").read_text("utf-8")
    assert card.startswith("---\nlibrary_name: timm\n")
    for text in (
        f"| top-1 | {results['top1']:.4f} |", "| measured on | 359 images: digits, test |", "epochs 1", "seed 0",
        "The shorter side is resized to 16 pixels", "10 classes: `0`, `1`",
    ):  # fmt: skip
        assert text in card
    assert str(trained.parent) not in card
    assert "One run, the weights of its last step." in card
    recipe = Run(trained).recipe().recipe
    pattern = r"^\| settings \| (.*); all others are the defaults of that version \|$"
    (row,) = re.findall(pattern, card, flags=re.MULTILINE)
    expected = {name: value for name, value in vars(recipe).items() if value != getattr(Recipe, name)}
    assert {"epochs", "batch_size", "hidden_size", "rotate", "lr"} <= expected.keys()
    said = [f"{name} {value}" for name, value in expected.items() if name not in exchange.NOT_TOLD]
    assert row.split(", ") == said


def test_the_card_says_that_the_weights_are_an_average(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    recipe = run / "recipe.yaml"
    recipe.write_text(re.sub(r"(ema_decay: {value: )0.0", r"\g<1>0.9", recipe.read_text()))
    export_model(run, "timm", tmp_path / "folder")
    card = (tmp_path / "folder" / "README.md").read_text("utf-8")
    assert "One run, the running average of its weights over the steps." in card
    assert "ema_decay 0.9" in card


def test_a_card_can_be_written_whatever_classes_are_called() -> None:
    model = imported(SMALL)
    card = model_card(replace(model, classes=("\ud800", os.fsdecode(b"caf\xe9"), "café")), "timm", "folder", None)
    assert "3 classes: `\\ud800`, `caf\\udce9`, `café`" in card
    card.encode("utf-8")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("environment.json", {"launches": ["x"]}),
        ("environment.json", {"launches": 5}),
        ("environment.json", {"launches": {"step": 0}}),
        ("environment.json", {"launches": [{"threads": "two"}]}),
        ("environment.json", {"launches": [{"cpu": ["x"]}]}),
        ("results.json", {"train_seconds": math.inf}),
        ("results.json", {"train_seconds": math.nan}),
        ("results.json", {"top1": "high"}),
        ("results.json", {"top1": 10**400}),
        ("results.json", {"count": [1]}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_damaged_is_named(
    file: str, content: dict[str, Any], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    change(run / file, **content)
    said = refused(capsys, "export", run, "--to", "timm", "--output", tmp_path / "deep" / "folder")
    assert f"{run / file} is damaged or of another version of Vitrail: " in said
    assert "Where the file is missing, weights are exported without what it says." in said
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    (run / file).unlink()
    export_model(run, "timm", tmp_path / "deep" / "folder")


def test_images_of_exported_runs_are_as_large_as_those_that_were_measured(trained: Path, tmp_path: Path) -> None:
    saved(tmp_path / "photos")
    for source, side in ((trained, 16), (tmp_path / "photos", 18)):
        done = export_model(source, "transformers", tmp_path / source.name / "vit")
        assert done.resized_to == (18 if side == 18 else None)
        said = json.loads((tmp_path / source.name / "vit" / "preprocessor_config.json").read_text("utf-8"))
        assert said["size"] == {"shortest_edge": side}
        card = (tmp_path / source.name / "vit" / "README.md").read_text("utf-8")
        assert ("`vitrail predict` and `evaluate` do the same" in card) == (side == 16)
        assert ("enlarges smaller images to 16 only" in card) == (side == 18)


def test_export_says_where_images_are_made_ready_otherwise(trained: Path, tmp_path: Path) -> None:
    assert "images: there, all" not in typed("export", trained, "--to", "timm", "--output", tmp_path / "known")
    saved(tmp_path / "photos")
    text = typed("export", tmp_path / "photos", "--to", "timm", "--output", tmp_path / "not")
    assert "images: there, all are resized to 18 pixels; vitrail predict" in text


def test_how_large_images_were_is_kept_by_an_import_but_for_another_size(trained: Path, tmp_path: Path) -> None:
    assert Run.open(trained).shorter_side() == 16
    sources = [trained]
    for library in ("timm", "transformers"):
        export_model(trained, library, tmp_path / library)
        sources.append(tmp_path / library)
    for source in sources:
        for size, side in ((None, 16), (32, None)):
            run, _ = exchange.import_run(source, tmp_path / "run", image_size=size)
            assert run.shorter_side() == side


def test_weights_from_elsewhere_go_on(tmp_path: Path) -> None:
    """Official → timm → transformers, without a run between them."""
    export_model(GOLDEN / "token.npz", "timm", tmp_path / "timm")
    export_model(tmp_path / "timm", "transformers", tmp_path / "transformers")
    found, expected = (vitrail.load(path).state_dict() for path in (tmp_path / "transformers", GOLDEN / "token.npz"))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_export_that_fails_leaves_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "gap", replace(SHAPE, classifier="gap"))
    saved(tmp_path / "deep", replace(SHAPE, representation_size=8))
    saved(tmp_path / "broken")
    model, classes = Run.open(tmp_path / "broken").load_model()
    assert isinstance(model, VisionTransformer)
    torch.nn.init.constant_(model.norm.bias, 3e38)
    Run.open(tmp_path / "broken").save_model(model, classes)
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for source, library, output, says in (
        (tmp_path / "gap", "transformers", "new", "has no such model: it has classifier = gap. --to timm has it"),
        (tmp_path / "deep", "timm", "new", "has no such model: it has representation_size = 8"),
        (tmp_path / "gone", "timm", "new", "there is no file or folder"),
        (tmp_path / "broken", "timm", "far/away/new", "broken gives outputs that are no numbers"),
        (trained, "timm", "there", "there exists, and is not overwritten; name another folder with --output"),
        (trained, "tim", "new", "'tim' is not one of transformers, timm; did you mean 'timm'?"),
    ):
        assert says in refused(capsys, "export", source, "--to", library, "--output", tmp_path / output)
    assert "required: --to" in refused(capsys, "export", trained, "--output", tmp_path / "new")
    for name, found in (("compare_outputs", 1e-3), ("compare_theirs", 1e-3), ("compare_theirs", math.nan)):
        with monkeypatch.context() as patched:
            patched.setattr(exchange, name, lambda *_, found=found: found)
            with pytest.raises(RuntimeError, match="gives other outputs"):
                export_model(trained, "timm", tmp_path / "far" / "away" / "new")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_class_names_that_no_file_can_say_in_utf8_come_back(library: Library, tmp_path: Path) -> None:
    names = ("\ud800", "dög", "\U0001f431")  # the first is half a character, as JSON may have it
    model = replace(imported(replace(SHAPE, num_classes=3)), classes=names)
    typed("import", written(tmp_path / "theirs", library, model), "--output", tmp_path / "run")
    typed("export", tmp_path / "run", "--to", library, "--output", tmp_path / "folder")
    assert read(tmp_path / "folder").classes == names
    assert r"`\ud800`, `dög`" in (tmp_path / "folder" / "README.md").read_text("utf-8")


# Hybrids in timm, whose ResNet has other epsilons


@pytest.mark.parametrize(("variant", "architecture"), HYBRIDS.items())
def test_hybrids_come_back_from_timm(variant: str, architecture: str, tmp_path: Path) -> None:
    shape = VARIANTS[variant]
    shape = replace(shape, image_size=2 * shape.cell, num_layers=1, mlp_dim=32, num_classes=10)
    model = saved(tmp_path / "hybrid", shape)
    typed("export", tmp_path / "hybrid", "--to", "timm", "--output", tmp_path / "folder")
    said = json.loads((tmp_path / "folder" / "config.json").read_text("utf-8"))
    assert said["architecture"] == architecture
    weights = load_file(tmp_path / "folder" / "model.safetensors")
    assert f"{said['pretrained_cfg']['first_conv']}.weight" in weights
    back = vitrail.load(tmp_path / "folder")
    assert back.config == shape
    assert back.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(back.state_dict()[name], weight) for name, weight in model.state_dict().items())


def test_a_hybrid_that_would_have_other_logits_in_timm_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved(tmp_path / "hybrid", replace(SHAPE, image_size=64, resnet_blocks=()))
    assert model.resnet is not None
    with torch.no_grad():
        model.resnet.root.weight[::2] *= 1e-5
    Run.open(tmp_path / "hybrid").save_model(model, DIGITS)
    before = sorted(tmp_path.rglob("*"))
    says = refused(capsys, "export", tmp_path / "hybrid", "--to", "timm", "--output", tmp_path / "folder")
    assert "timm would give other logits for this hybrid, by " in says
    assert "adds 1e-05 to the standard deviation" in says
    assert "timm adds 1e-08 to the variance" in says
    assert sorted(tmp_path.rglob("*")) == before


def test_a_hybrid_that_is_not_its_architecture_is_refused(tmp_path: Path) -> None:
    hybrid, plain = replace(SHAPE, image_size=64, patch_size=1, resnet_blocks=(2, 2, 2, 2)), SHAPE
    for config, architecture, message in (
        (hybrid, "vit_base_r50_s16_224", r"has a ResNet with stages of \(3, 4, 9\) .* have .* \(2, 2, 2, 2\)"),
        (hybrid, "vit_tiny_r_s16_p8_224", "has the bare root of a ResNet in front, and the weights"),
        (hybrid, "vit_base_patch16_224", "has no ResNet in front, and the weights"),
        (plain, "vit_base_r50_s16_224", "have no ResNet in front"),
        (hybrid, "vit_small_resnet26d_224", "and the hybrids of the official code, vit_SIZE_R_S, with r_s16_p8, "),
    ):
        folder = tmp_path / f"{architecture}-{config.image_size}"
        change(written(folder, "timm", imported(config)) / "config.json", architecture=architecture)
        with pytest.raises(BadInput, match=f"config.json is of the architecture .*{message}"):
            vitrail.load(folder)


def test_weights_that_a_hybrid_lacks_or_has_besides_are_named(tmp_path: Path) -> None:
    config = replace(SHAPE, image_size=64, patch_size=1, resnet_blocks=(2, 2, 2, 2))
    folder = written(tmp_path / "folder", "timm", imported(config))
    at = "patch_embed.backbone"

    def spoil(weights: dict[str, torch.Tensor]) -> None:
        del weights[f"{at}.stem.norm.bias"]
        weights[f"{at}.stages.1.blocks.0.norm4.bias"] = torch.zeros(3)
        weights[f"{at}.stages.0.blocks.0.downsample.conv.weight"] = torch.zeros(3)

    change_weights(folder, spoil)
    for message in ("stem.norm.bias is missing", "blocks.0.norm4.bias is unexpected", r"conv.weight has shape \(3,\)"):
        with pytest.raises(BadInput, match=message):
            vitrail.load(folder)


def test_parity_sees_a_difference_that_a_head_of_zeros_would_hide() -> None:
    torch.manual_seed(0)
    model, other = VisionTransformer(SHAPE), VisionTransformer(SHAPE)
    assert exchange.compare_outputs(model, model) == 0
    assert not model(torch.randn(2, 3, 16, 16)).any()
    assert exchange.compare_outputs(model, other) > 0.01


@torch.no_grad()
def test_parity_with_another_library_sees_what_its_head_of_zeros_would_hide() -> None:
    torch.manual_seed(0)
    model, other = VisionTransformer(SHAPE).eval(), VisionTransformer(SHAPE).eval()
    images = random_images(model.config)
    assert torch.equal(model(images), other(images))
    assert exchange.compare_logits(model, model, "head") == 0
    assert exchange.compare_logits(model, other, "head") > 0.01
    assert not model.head.weight.any()
    again = copy.deepcopy(model)
    torch.nn.init.normal_(again.head.weight)  # a head that came out otherwise shows too
    assert exchange.compare_logits(model, again, "head") > 0.01


def test_differences_are_shares_of_outputs_above_1() -> None:
    large, small = torch.tensor([-1000.0, 2.0]), torch.tensor([0.5, 0.25])
    assert exchange.difference(large, large + 0.05) == pytest.approx(5e-5, rel=1e-3)
    assert exchange.difference(small, small + 0.05) == pytest.approx(0.05)
    assert math.isnan(exchange.largest([0.1, exchange.difference(small, small * math.nan), 0.2]))


def test_a_run_that_was_not_finished_has_no_figures(trained: Path, tmp_path: Path) -> None:
    saved(tmp_path / "run")
    Run(tmp_path / "run").write_recipe(resolve("digits"))
    export_model(tmp_path / "run", "timm", tmp_path / "folder")
    assert "No figures were measured" in (tmp_path / "folder" / "README.md").read_text("utf-8")
    (tmp_path / "run" / "results.json").write_text('{"top1": "high"}')
    with pytest.raises(BadInput, match=r"results\.json is damaged"):
        export_model(tmp_path / "run", "timm", tmp_path / "folder-2")


# variants


def test_variants() -> None:
    heading, *rows = typed("variants").splitlines()
    assert heading.split()[:2] == ["variant", "layers"]
    assert [row.split()[0] for row in rows[: len(VARIANTS)]] == list(VARIANTS)
    base = next(row for row in rows if row.startswith("ViT-B/16 "))
    assert heading.endswith("weights, MB  activations, MB/image")
    assert base.split() == ["ViT-B/16", "12", "768", "3072", "12", "86,567,656", "35.1", "346", "138"]
    hybrid = next(row for row in rows if row.startswith("R50+ViT-B/16 "))
    assert hybrid.split()[-1] == "–"
    assert "2 for each multiply-add" in "\n".join(rows)


def test_variants_say_what_images_of_a_size_take() -> None:
    small, large = (json.loads(typed("variants", "--image-size", size, "--json")) for size in (224, 1024))
    taken = [{row["name"]: row["activation_bytes"] for row in rows} for rows in (small, large)]
    config = replace(VARIANTS["ViT-B/16"], image_size=1024)
    assert taken[1]["ViT-B/16"] == memory.activation_bytes(config, Recipe()) > 10 * taken[0]["ViT-B/16"]
    assert {name for name, count in taken[0].items() if count is None} == {name for name in VARIANTS if name[0] == "R"}


def test_variants_at_a_size_that_some_cannot_have(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(typed("variants", "--image-size", 64, "--json"))
    assert {row["name"] for row in found} == set(VARIANTS) - {"ViT-H/14"}
    assert {row["image_size"] for row in found} == {64}
    assert "do not divide into the patches of ViT-H/14." in typed("variants", "--image-size=64")
    assert "take a multiple of 32" in refused(capsys, "variants", "--image-size", 7)
    assert "at least 1" in refused(capsys, "variants", "--image-size", 0)
    assert "cannot be; it must be at most" in refused(capsys, "variants", "--image-size", 3200000)


def test_paths_with_spaces_can_be_typed_again(tmp_path: Path) -> None:
    text = typed("import", GOLDEN / "token.npz", "--output", tmp_path / "my runs" / "a")
    line = next(line for line in text.splitlines() if "vitrail predict" in line)
    assert shlex.split(line)[-2] == str(tmp_path / "my runs" / "a")
