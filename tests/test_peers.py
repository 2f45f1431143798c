"""Folders that Vitrail writes are loaded by transformers and timm to the same logits and images, and Vitrail reads what
they write, or says what it cannot. Where they are not installed, all this is skipped: `make bench` installs them, in
another environment."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import pytest
import torch
from folders import CLASSES, LIBRARIES, MEAN, SMALL, STD, change, images, imported, sayable, written
from PIL import Image
from safetensors.torch import save_file

import vitrail
from vitrail.data.images import to_pixels
from vitrail.errors import BadInput
from vitrail.speed.peers import declare_operators
from vitrail.vit.config import HALF, ViTConfig
from vitrail.vit.model import VisionTransformer
from vitrail.weights import timm_hybrid
from vitrail.weights.exchange import Library, compare_theirs
from vitrail.weights.formats import HEAD
from vitrail.weights.load import build, read


def peer(name: str) -> ModuleType:
    """timm or transformers."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: make peers tests with it")
    declare_operators()
    return importlib.import_module(name)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


# Their libraries load what is written


def logits_of_transformers(folder: Path, x: torch.Tensor) -> torch.Tensor:
    model = peer("transformers").ViTForImageClassification.from_pretrained(folder).eval()
    return torch.as_tensor(model(x).logits)


def logits_of_timm(folder: Path, x: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(peer("timm").create_model(f"local-dir:{folder}", pretrained=True).eval()(x))


LOGITS = {"transformers": logits_of_transformers, "timm": logits_of_timm}


@torch.no_grad()
@pytest.mark.parametrize("gelu", ["tanh", "exact"])
@pytest.mark.parametrize(("library", "config"), list(sayable()))
def test_their_classes_give_our_logits(library: Library, config: ViTConfig, gelu: Any, tmp_path: Path) -> None:
    config = replace(config, image_size=config.cell * 3, gelu=gelu, num_classes=7)
    model = imported(config)
    logits = LOGITS[library](written(tmp_path / "folder", library, model), images(config))
    expected = build(model, tmp_path)(images(config))
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("library", LIBRARIES)
def test_exports_compare_what_a_head_of_zeros_would_hide(library: Library, tmp_path: Path) -> None:
    peer(library)
    random = imported(SMALL)
    head = {name: torch.zeros_like(random.tensors[name]) for name in HEAD}
    model = replace(random, tensors=random.tensors | head)
    other = replace(model, tensors={name: weight * 1.5 for name, weight in model.tensors.items()})
    folder = written(tmp_path / "folder", library, model)
    assert cast(float, compare_theirs(build(model, folder), library, folder)) <= 1e-5
    assert cast(float, compare_theirs(build(other, folder), library, folder)) > 0.01


@torch.no_grad()
def test_a_hybrid_has_the_logits_in_timm_that_its_other_epsilons_are_said_to_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SMALL, image_size=96, patch_size=1, resnet_blocks=(2, 2, 2, 2))
    model = imported(config)
    for name, tensor in model.tensors.items():
        if name.startswith("resnet.") and tensor.ndim == 4:
            tensor *= torch.logspace(-5, 0, len(tensor))[:, None, None, None]
    monkeypatch.setattr(timm_hybrid, "check_epsilons", lambda model: None)
    logits = logits_of_timm(written(tmp_path / "folder", "timm", model), images(config))
    torch.testing.assert_close(logits, timm_hybrid.as_timm_has_it(model)(images(config)), atol=1e-4, rtol=0)
    assert (logits - build(model, tmp_path)(images(config))).abs().max() > 2e-3


@torch.no_grad()
def test_transformers_has_the_epsilon(tmp_path: Path) -> None:
    model = imported(replace(SMALL, layer_norm_eps=0.1))
    logits = logits_of_transformers(written(tmp_path / "folder", "transformers", model), images(SMALL))
    torch.testing.assert_close(logits, build(model, tmp_path)(images(SMALL)), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("width", "height"), [(98, 49), (49, 98), (80, 64)])
def test_transformers_makes_images_ready_as_vitrail_does(width: int, height: int, tmp_path: Path) -> None:
    processor = peer("transformers").AutoImageProcessor.from_pretrained(
        written(tmp_path / "folder", "transformers", imported(replace(SMALL, image_size=28, patch_size=7)))
    )
    picture, expected = photo(width, height)
    (found,) = processor(picture, return_tensors="pt")["pixel_values"]
    # It resizes with torch, which rounds otherwise than Pillow.
    torch.testing.assert_close(found, expected, atol=1.01 / 255 / min(STD), rtol=0)


@pytest.mark.parametrize(("width", "height"), [(98, 49), (49, 98), (80, 64)])
def test_timm_makes_images_ready_as_vitrail_does(width: int, height: int, tmp_path: Path) -> None:
    timm = peer("timm")
    data = importlib.import_module("timm.data")
    folder = written(tmp_path / "folder", "timm", imported(replace(SMALL, image_size=28, patch_size=7)))
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    picture, expected = photo(width, height)
    found = data.create_transform(**data.resolve_model_data_config(model))(picture)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def photo(width: int, height: int) -> tuple[Image.Image, torch.Tensor]:
    """A photo, and what a model of 28 × 28 pixels is to see of it: its sides become 32 and more, then its middle. Where
    the longer side comes out between two pixels, Vitrail rounds it and others cut it off: here it does not."""
    noise = np.random.default_rng(0).integers(0, 256, (height // 7, width // 7, 3), np.uint8)
    picture = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    pixels = to_pixels(picture, 28)
    top, left = ((side - 28) // 2 for side in pixels.shape[:2])
    assert min(pixels.shape[:2]) == 32
    square = torch.from_numpy(pixels[top : top + 28, left : left + 28]).permute(2, 0, 1) / 255
    return picture, (square - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_card_can_be_followed(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    peer(library)
    model = imported(SMALL)
    card = (written(tmp_path / "folder", library, model) / "README.md").read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (20, 30), (200, 30, 90)).save("image.png")
    capsys.readouterr()
    exec(card.split("```python\n")[1].split("```")[0], {})  # noqa: S102
    assert capsys.readouterr().out.strip() in CLASSES


# What they write is read


def random_transformers(folder: Path, name: str = "ViTForImageClassification", **settings: Any) -> Any:
    """A model of theirs with random weights, saved."""
    transformers = peer("transformers")
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "image_size": 16, "patch_size": 4, "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2,
        "intermediate_size": 50, "id2label": dict(enumerate(CLASSES)), "initializer_range": 0.2,
    }  # fmt: skip
    model = getattr(transformers, name)(transformers.ViTConfig(**shape | settings)).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3},
        {"dtype": "bfloat16"},
    ],
)
def test_what_transformers_writes_is_read(settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = random_transformers(tmp_path / "folder", **settings)
    ours = vitrail.load(tmp_path / "folder")
    assert isinstance(ours, VisionTransformer)
    assert read(tmp_path / "folder").classes == CLASSES
    torch.testing.assert_close(ours(images(SMALL)), theirs(images(SMALL)).logits, atol=1e-4, rtol=0)
    assert ours.config.gelu == ("exact" if settings.get("hidden_act", "gelu") == "gelu" else "tanh")
    assert ours.config.layer_norm_eps == settings.get("layer_norm_eps", 1e-12)


@torch.no_grad()
def test_names_that_transformers_has_in_memory_are_read(tmp_path: Path) -> None:
    theirs = random_transformers(tmp_path / "folder")
    expected = read(tmp_path / "folder").tensors
    save_file({name: w.contiguous() for name, w in theirs.state_dict().items()}, tmp_path / "folder/model.safetensors")
    found = read(tmp_path / "folder").tensors
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@torch.no_grad()
def test_a_model_of_transformers_without_a_head_gets_one(tmp_path: Path) -> None:
    theirs = random_transformers(tmp_path / "folder", "ViTModel")
    with pytest.raises(BadInput, match=r"folder has no head; say for how many classes"):
        vitrail.load(tmp_path / "folder")
    ours = vitrail.load(tmp_path / "folder", num_classes=5)
    assert isinstance(ours, VisionTransformer)
    assert not ours(images(SMALL)).any()
    encoded = ours.forward_encoder(ours.embed(images(SMALL)))
    torch.testing.assert_close(encoded, theirs(images(SMALL)).last_hidden_state, atol=1e-4, rtol=0)


def test_a_model_of_transformers_for_masked_images_is_refused(tmp_path: Path) -> None:
    random_transformers(tmp_path / "folder", "ViTForMaskedImageModeling", encoder_stride=4)
    with pytest.raises(BadInput, match=r"a token for masked patches, .*: decoder\.0\.bias"):
        vitrail.load(tmp_path / "folder")


@pytest.mark.parametrize("saved", [{}, {"do_normalize": False}, {"image_mean": list(MEAN), "image_std": list(STD)}])
def test_what_transformers_normalises_by_is_read(saved: dict[str, Any], tmp_path: Path) -> None:
    transformers = peer("transformers")
    random_transformers(tmp_path / "folder")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}, **saved).save_pretrained(tmp_path / "folder")
    found = read(tmp_path / "folder")
    given = (saved.get("image_mean", HALF), saved.get("image_std", HALF))
    expected = ((0.0,) * 3, (1.0,) * 3) if saved.get("do_normalize") is False else given
    assert (list(found.mean), list(found.std)) == tuple(map(list, expected))


def random_timm(folder: Path, name: str = "vit_tiny_patch16_224", **settings: Any) -> Any:
    """A model of theirs with random weights, saved."""
    timm = peer("timm")
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "img_size": 16, "patch_size": 4, "embed_dim": 24, "num_heads": 3, "depth": 2, "mlp_ratio": 50 / 24,
        "num_classes": 3,
    }  # fmt: skip
    model = timm.create_model(name, **shape | settings).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    labels = {"label_names": list(CLASSES)} if model.num_classes == len(CLASSES) else {}
    timm.models.save_for_hf(model, folder, model_config=labels, safe_serialization=True)
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"act_layer": "gelu_tanh"}),
        ("vit_base_patch16_gap_224", {}),
        ("vit_tiny_patch16_224", {"fc_norm": True}),
        ("vit_huge_patch14_224", {"drop_path_rate": 0.1, "proj_drop_rate": 0.1, "norm_layer": "layernorm"}),
        ("deit_tiny_patch16_224", {"dynamic_img_size": True}),
        ("vit_tiny_r_s16_p8_384", {"img_size": 64, "patch_size": 8}),
        ("vit_small_r26_s32_224", {"img_size": 64, "patch_size": 1, "act_layer": "gelu_tanh"}),
        (
            "vit_base_r26_s32_224",
            {"img_size": 64, "patch_size": 2, "class_token": False, "global_pool": "avg", "fc_norm": False},
        ),
        ("vit_base_r50_s16_384", {"img_size": 48, "patch_size": 1}),
        ("vit_large_r50_s32_224", {"img_size": 96, "patch_size": 1}),
    ],
)
def test_what_timm_writes_is_read(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = random_timm(tmp_path / "folder", name, **settings)
    found = read(tmp_path / "folder")
    assert found.classes == CLASSES
    assert (found.mean, found.std) == (theirs.pretrained_cfg["mean"], theirs.pretrained_cfg["std"])
    ours = vitrail.load(tmp_path / "folder")
    x = images(found.config)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_large_patch32_384", "vit_base_patch16_gap_224",
                                  "deit_small_patch16_224", "vit_gigantic_patch14_224"])  # fmt: skip
def test_heads_of_timm_go_by_the_architecture(name: str, tmp_path: Path) -> None:
    timm = peer("timm")
    torch.manual_seed(0)
    theirs = timm.create_model(name, depth=1, num_classes=3, img_size=56 if "14" in name else 64).eval()
    torch.nn.init.normal_(theirs.head.weight, std=theirs.embed_dim**-0.5)  # logits of about 1, which 1e-4 is meant for
    timm.models.save_for_hf(theirs, tmp_path / "folder", safe_serialization=True)
    change(tmp_path / "folder" / "config.json", model_args=None)  # what older versions leave out
    x = torch.randn(2, 3, *theirs.patch_embed.img_size)
    torch.testing.assert_close(vitrail.load(tmp_path / "folder")(x), theirs(x), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("deit3_small_patch16_224", {}, "architecture 'deit3_small_patch16_224'. Vitrail reads those"),
        ("vit_tiny_patch16_224", {"reg_tokens": 2}, "register tokens"),
        ("vit_tiny_patch16_224", {"qk_norm": True}, "attention of another kind"),
        ("vit_tiny_patch16_224", {"init_values": 1e-3}, "LayerScale, which Vitrail does not read: .*ls1.gamma"),
        ("vit_tiny_patch16_224", {"pre_norm": True}, "a norm before the first block"),
        ("vit_tiny_patch16_224", {"global_pool": "map"}, "pooling by attention"),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}, "global_pool = 'avg' and a class token, its norm behind"),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": False}, "global_pool = 'avg' and a class token"),
        ("vit_tiny_patch16_224", {"global_pool": "max", "class_token": False, "fc_norm": False}, "global_pool = 'max'"),
        ("vit_base_patch16_gap_224", {"fc_norm": True}, "without a class token, its norm behind"),
        ("vit_tiny_patch16_224", {"qkv_bias": False}, "qkv_bias = False"),
        ("vit_tiny_patch16_224", {"act_layer": "quick_gelu"}, "act_layer = 'quick_gelu'"),
        ("vit_tiny_patch16_224", {"norm_layer": "rmsnorm"}, "norm_layer = 'rmsnorm'"),
        ("vit_tiny_patch16_224", {"no_embed_class": True}, "no_embed_class = True"),
        ("vit_tiny_patch16_224", {"img_size": [16, 24]}, "24 patches, which make no square"),
        ("vit_tiny_patch16_224", {"in_chans": 1}, r"patch_embed.proj.weight has shape \(24, 1, 4, 4\)"),
        ("vit_base_patch16_clip_quickgelu_224", {"pre_norm": False}, "architecture 'vit_base_patch16_clip"),
        ("flexivit_small", {}, "flexivit_small"),
        ("deit_tiny_distilled_patch16_224", {}, "architecture 'deit_tiny_distilled_patch16_224'"),
        ("vit_small_resnet26d_224", {"img_size": 64, "patch_size": 1}, "architecture 'vit_small_resnet26d_224'"),
        ("vit_small_r26_s32_224", {"img_size": 64, "patch_size": 1, "in_chans": 1}, r"stem.conv.weight has shape"),
    ],
)
def test_what_timm_has_besides_is_refused(name: str, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    random_timm(tmp_path / "folder", name, **settings)
    with pytest.raises(BadInput, match=f"folder.*{message}"):
        vitrail.load(tmp_path / "folder")
