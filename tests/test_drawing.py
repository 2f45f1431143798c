"""Drawings have the model's own numbers, those in docs/images are of today, and what cannot be drawn is said."""

import base64
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

import vitrail
from vitrail.cli import main
from vitrail.pages.drawing import draw, shown_patches, window
from vitrail.vit.config import ViTConfig
from vitrail.vit.model import VisionTransformer
from vitrail.vit.variants import sizes

IMAGES = Path(__file__).parent.parent / "docs" / "images"


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


def test_a_hybrid_cuts_up_the_feature_map_and_not_the_image(tmp_path: Path) -> None:
    drawn = {}
    for name in ("ViT-B/16", "R50+ViT-B/16", "R+ViT-Ti/16"):
        assert main(["draw", name, "--output", str(tmp_path / "model.svg")]) == 0
        drawn[name] = (tmp_path / "model.svg").read_text("utf-8")
    assert {name: svg.count("<image ") for name, svg in drawn.items()} == {
        "ViT-B/16": 1 + 8, "R50+ViT-B/16": 1, "R+ViT-Ti/16": 1,
    }  # fmt: skip
    assert "14 × 14 patches of 16 × 16 × 3" in text_of(drawn["ViT-B/16"])
    assert "14 × 14 patches of 1 × 1 × 1,024 of the ResNet's feature map" in text_of(drawn["R50+ViT-B/16"])
    assert "7 × 7 patches of 8 × 8 × 64 of the ResNet's feature map" in text_of(drawn["R+ViT-Ti/16"])
    with torch.device("meta"):
        resnet = vitrail.create("R50+ViT-B/16").resnet
    assert resnet is not None
    parts = f"ResNet 3+4+9 {sum(weight.numel() for weight in resnet.parameters()):,} parameters"
    assert parts in " ".join(text_of(drawn["R50+ViT-B/16"]).split())


def test_what_later_papers_add_is_drawn() -> None:
    config = ViTConfig(
        16, 4, 24, 48, 3, 2, 5, representation_size=8, stem="convolutions", stem_units=3, layer_scale=0.1,
    )  # fmt: skip
    with torch.device("meta"):
        model = VisionTransformer(config)
    text = text_of(draw(model, "a <model> & more", ("cat", "dog & mouse")))
    for said in ("a <model> & more", "class: cat, dog & mouse", "Layer with tanh",
                 "× scale: 24", "Convolutions and linear projection",
                 "3 → 12 → 3 units → 24 → 24: "):  # fmt: skip
        assert said in text
    with torch.device("meta"):
        model = VisionTransformer(replace(config, stem_units=0))
    assert "3 → 12 → 24 → 24: " in text_of(draw(model, "without units", ("cat", "dog")))


def test_a_run_is_drawn_with_its_classes_and_an_image(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "mlp_dim": 64, "num_heads": 2, "num_layers": 2}
    run = vitrail.train("digits", output=tmp_path / "run", epochs=1, **sizes).run
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    output = tmp_path / "run.svg"
    words = ["draw", str(run), "--image", str(tmp_path / "red.png"), "--output", str(output)]
    assert main(words) == 0
    assert "class: 0, 1, 2, …" in text_of(output.read_text("utf-8"))
    assert main(words) == 0  # its own file gives way


def test_a_drawing_is_called_like_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["draw", "ViT-S/32"]) == 0
    assert capsys.readouterr().out == "ViT-S-32.svg\n"
    assert "ViT-S/32" in Path("ViT-S-32.svg").read_text("utf-8")


def test_what_cannot_be_drawn_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.svg").write_text("<svg/>")
    for words, says in (
        (["ViT-B16", "--output", "a.svg"], "did you mean 'ViT-B/16'?"),
        (["ViT-B16", "--output", "a.png"], "did you mean 'ViT-B/16'?"),
        (["vitb16"], "did you mean 'ViT-B/16'?"),
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


def test_the_variants_are_drawn_to_scale(tmp_path: Path) -> None:
    output = tmp_path / "variants.svg"
    words = ["variants", "--image-size", "384", "--output", str(output)]
    assert main(words) == 0
    assert main(words) == 0  # its own file gives way
    svg = output.read_text("utf-8")
    text, found = text_of(svg), sizes(384)
    assert "384 × 384 pixels" in text
    assert "ViT-H/14" not in text  # whose patches such images do not divide into
    for size in found:
        assert f"{size.name} " in text
        assert f" {size.parameters / 1e6:,.1f} M" in text
        assert f" {size.flops / 1e9:,.1f}" in text
    # A block is as high as it is wide, and there are as many as the model has; a bar is as long as its share.
    assert svg.count('fill="#c3e6c5"') == sum(size.num_layers for size in found)
    bars = [float(width) for width in re.findall(r'width="([\d.e-]+)" height="20" fill="#f7c8d4"', svg)]
    by_kind = sorted(found, key=lambda size: ("gap" in size.name) + 2 * size.name.startswith("R"))
    largest = max(size.parameters for size in found)
    assert bars == pytest.approx([130 * size.parameters / largest for size in by_kind], rel=1e-4)


def test_what_the_variants_are_not_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.svg").write_text("<svg/>")
    for words, says in (
        (["--output", "variants.png"], "call it variants.svg"),
        (["--output", "variants.svg", "--json"], "leave one of them out"),
        (["--output", str(tmp_path / "mine.svg")], "was not written by this command"),
    ):
        assert main(["variants", *words]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words"),
    [("vit-b-16.svg", ["draw", "ViT-B/16"]), ("variants.svg", ["variants"])],
    ids=lambda value: value[0],
)
def test_pictures_of_the_docs_are_those_of_today(name: str, words: list[str], tmp_path: Path) -> None:
    assert main([*words, "--output", str(tmp_path / name)]) == 0
    kept, drawn = ((folder / name).read_text("utf-8") for folder in (IMAGES, tmp_path))
    embedded = r"data:image/png;base64,([^\"]*)"
    assert re.sub(embedded, "", kept) == re.sub(embedded, "", drawn), (
        f"vitrail {' '.join(words)} --output {IMAGES / name}"
    )
    # Pixels, not bytes of the file: these are the compressor's, and another processor may round a colour otherwise.
    images = [
        [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), np.float64) for data in re.findall(embedded, svg)]
        for svg in (kept, drawn)
    ]
    for before, now in zip(*images, strict=True):
        np.testing.assert_allclose(before, now, atol=8)
