"""Folders of transformers and timm: what is written is read back to the same bits, and what cannot be read is refused
by name. Whether those libraries agree is tested in test_peers.py."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from folders import CLASSES, LIBRARIES, MEAN, SMALL, STD, TINY, change, change_weights, imported, sayable, written
from fuzzing import assert_refused_or_read, assert_refused_unread, with_more, within_seconds

import vitrail
from vitrail.errors import BadInput
from vitrail.settings import Recipe
from vitrail.vit.config import HALF, ViTConfig
from vitrail.weights.exchange import Library, check_options
from vitrail.weights.load import read
from vitrail.weights.timm_format import crop_share, mlp_ratio

FUZZED = 400  # files of each kind


# There and back


@pytest.mark.parametrize(("library", "config"), list(sayable()))
def test_every_variant_comes_back_with_the_same_bits(library: Library, config: ViTConfig, tmp_path: Path) -> None:
    model = imported(config)
    found = read(written(tmp_path / "folder", library, model))
    assert (found.config, found.classes, found.mean, found.std) == (config, CLASSES, MEAN, STD)
    assert found.tensors.keys() == model.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in model.tensors.items())


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_floats_become_float32(library: Library, dtype: torch.dtype, tmp_path: Path) -> None:
    model = imported(SMALL)
    folder = written(tmp_path / "folder", library, model)
    change_weights(folder, lambda weights: weights.update({name: w.to(dtype) for name, w in weights.items()}))
    found = read(folder).tensors
    assert all(torch.equal(found[name], tensor.to(dtype).float()) for name, tensor in model.tensors.items())


def test_timm_comes_to_the_same_sizes_though_it_rounds_down() -> None:
    for hidden_size in (24, 192, 384, 768, 1001):
        assert all(int(hidden_size * mlp_ratio(hidden_size, dim)) == dim for dim in range(1, 5200, 7))
    for size in range(1, 1025):
        for side in {size, round(size * 8 / 7), size + 1}:
            assert int(size / crop_share(size, side)) == side


# What cannot be read


@pytest.mark.parametrize(
    ("library", "changed", "lacking", "mend"),
    [
        ("transformers", {"classifier": "gap"}, "classifier = gap",
         "--to timm has it; a model that was trained with classifier = token can go to transformers."),
        ("transformers", {"classifier": "gap", "layer_scale": 0.1, "stem": "convolutions"},
         "classifier = gap, stem = convolutions, layer_scale = 0.1, and timm has none either",
         "A model that was trained with classifier = token, stem = patch, layer_scale = none can go to transformers."),
        ("timm", {"representation_size": 8, "layer_scale": 0.1},
         "representation_size = 8, layer_scale = 0.1, and transformers has none either",
         "A model that was trained with representation_size = none, layer_scale = none can go to timm."),
        ("timm", {"layer_norm_eps": 1e-12}, "layer_norm_eps = 1e-12", "--to transformers has it."),
        ("transformers", {"patch_size": 2, "resnet_blocks": (1,)}, "resnet_blocks = (1,), and timm has none either",
         "Such a model stays with Vitrail"),
        ("timm", {"patch_size": 2, "resnet_blocks": (1,)}, "resnet_blocks = (1,), and transformers has none either",
         "Such a model stays with Vitrail"),
    ],
)  # fmt: skip
def test_all_that_a_format_cannot_say_is_named_and_what_is_advised_is_taken(
    library: Library, changed: dict[str, Any], lacking: str, mend: str
) -> None:
    with pytest.raises(BadInput) as refused:
        check_options(replace(TINY, **changed), library)
    assert f"{library} has no such model: it has {lacking}. " in str(refused.value)
    assert mend.lower() in str(refused.value).lower()
    if "--to" in mend:
        (other,) = {"timm", "transformers"} - {library}
        check_options(replace(TINY, **changed), cast(Library, other))
    if "can go to" in mend:
        check_options(replace(TINY, **{name: getattr(Recipe, name) for name in changed}), library)


@pytest.mark.parametrize(
    ("library", "settings", "message"),
    [
        ("transformers", {"hidden_size": 16}, r"json says hidden_size = 16, and the weights in .*safetensors have 8"),
        ("transformers", {"num_hidden_layers": 12}, "num_hidden_layers = 12, .* have 1"),
        ("transformers", {"intermediate_size": 10**15}, "intermediate_size = 1000000000000000, .* have 8"),
        ("transformers", {"image_size": 224}, "image_size = 224, .* have 8"),
        ("transformers", {"image_size": [8, 16]}, r"image_size = \[8, 16\]"),
        ("transformers", {"image_size": {"a": [[]]}}, "image_size = "),
        ("transformers", {"patch_size": 2}, "patch_size = 2, .* have 4"),
        ("transformers", {"num_channels": 1}, "num_channels = 1; Vitrail's images have 3"),
        ("transformers", {"num_attention_heads": 3}, "3 heads do not divide a width of 8"),
        ("transformers", {"num_attention_heads": "2"}, "num_heads = '2' cannot be"),
        ("transformers", {"num_attention_heads": 10**12}, "num_heads = 1000000000000 cannot be"),
        ("transformers", {"layer_norm_eps": "small"}, "config.json: .*not supported"),
        ("transformers", {"layer_norm_eps": float("nan")}, "layer_norm_eps is nan"),
        ("transformers", {"hidden_dropout_prob": 1}, "dropout is 1"),
        ("transformers", {"qkv_bias": False}, "qkv_bias = False"),
        ("transformers", {"hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu'"),
        ("transformers", {"hidden_act": ["gelu"]}, r"hidden_act = \['gelu'\]"),
        ("transformers", {"id2label": {"0": "a", "1": "b"}}, "2 classes in id2label, and not the 0 to 2"),
        ("transformers", {"id2label": {"0": "a", "1": "b", "3": "c"}}, "3 classes in id2label, and not the 0 to 2"),
        ("transformers", {"id2label": ["a", "b", "c"]}, "id2label = .*no settings by name"),
        ("transformers", {"model_type": "deit"}, "model type 'deit'"),
        ("transformers", {"model_type": None}, "no model_type, as transformers', and no architecture"),
        ("timm", {"architecture": "resnet50"}, "architecture 'resnet50'"),
        ("timm", {"architecture": ["vit"]}, "architecture "),
        ("timm", {"num_features": 16}, "num_features = 16, .* have 8"),
        ("timm", {"label_names": ["a", "b"]}, "label_names = .*not the names of the head's 3 classes"),
        ("timm", {"label_names": "abc"}, "label_names = 'abc'"),
        ("timm", {"model_args": ["embed_dim"]}, "model_args = .*no settings by name"),
        ("timm", {"model_args": {"embed_dim": 16}}, "embed_dim = 16, .* have 8"),
        ("timm", {"model_args": {"depth": 10**9}}, "depth = 1000000000, .* have 1"),
        ("timm", {"model_args": {"img_size": 64}}, "img_size = 64, .* have 8"),
        ("timm", {"model_args": {"mlp_ratio": 4}}, "= 32, .* have 8"),
        ("timm", {"model_args": {"num_classes": 1000}}, "num_classes = 1000, .* have 3"),
        ("timm", {"model_args": {"num_heads": 3}}, "3 heads do not divide a width of 8"),
        ("timm", {"model_args": {"num_heads": 2, "proj_drop_rate": "a"}}, "config.json: "),
        ("timm", {"model_args": {"dual": [1]}}, r"dual = \[1\], which Vitrail's model has not"),
        ("timm", {"pretrained_cfg": {"input_size": [3, 224, 224]}, "model_args": None}, r"img_size = 224, .* have 8"),
        ("timm", {"pretrained_cfg": {"mean": [0.5, 0.5]}}, r"its mean of \[0.5, 0.5\]"),
        ("timm", {"pretrained_cfg": {"std": [0.5, 0, 0.5]}}, r"its std of \[0.5, 0, 0.5\]"),
        ("timm", {"pretrained_cfg": 7}, "pretrained_cfg = 7"),
    ],
)  # fmt: skip
def test_a_config_that_disagrees_is_refused(
    library: Library, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = written(tmp_path / "folder", library, imported(TINY))
    change(folder / "config.json", **settings)
    with pytest.raises(BadInput, match=f"{folder}.*{message}"):
        vitrail.load(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_mean": "grey"}, "its mean of 'grey'"),
        ({"image_std": [10**400, 1, 1]}, "its std of"),
        ({"image_std": 0}, "its std of 0"),
        ({"rescale_factor": "a"}, "rescale_factor = 'a'"),
        ({"rescale_factor": 0}, "rescale_factor = 0"),
    ],
)
def test_preprocessing_that_cannot_be_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "folder", "transformers", imported(TINY))
    change(folder / "preprocessor_config.json", **settings)
    with pytest.raises(BadInput, match=rf"preprocessor_config.json.*{message}"):
        vitrail.load(folder)


def test_other_scales_of_pixels_are_taken_into_account(tmp_path: Path) -> None:
    folder = written(tmp_path / "folder", "transformers", imported(TINY))
    change(folder / "preprocessor_config.json", do_rescale=False, image_mean=127.5, image_std=[51, 102, 127.5])
    found = read(folder)
    assert found.mean == HALF
    assert found.std == pytest.approx((0.2, 0.4, 0.5))
    (folder / "preprocessor_config.json").unlink()
    assert (read(folder).mean, read(folder).std) == (HALF, HALF)


def test_missing_unexpected_and_misshapen_weights_are_listed_by_their_names(tmp_path: Path) -> None:
    cases: list[tuple[Library, tuple[str, str, str]]] = [
        (
            "transformers",
            ("vit.encoder.layer.0.attention.attention.key.bias", "vit.layernorm.weight", "classifier.bias"),
        ),
        ("timm", ("blocks.0.attn.qkv.bias", "norm.weight", "head.bias")),
    ]
    for library, names in cases:
        folder = written(tmp_path / library, library, imported(TINY))
        missing, misshapen, other = names

        def harm(weights: dict[str, torch.Tensor], names: tuple[str, ...] = names) -> None:
            del weights[names[0]]
            weights[names[1]] = torch.ones(3)
            weights["extra"] = weights.pop(names[2])

        change_weights(folder, harm)
        with pytest.raises(BadInput) as error:
            vitrail.load(folder)
        for part in (f"{missing} is missing", f"{misshapen} has shape (3,)", "extra is unexpected", f"{other} is"):
            assert part in str(error.value)


def test_weights_that_are_no_vits_are_refused(tmp_path: Path) -> None:
    cases: list[tuple[Library, str, torch.Tensor, str]] = [
        ("timm", "patch_embed.proj.weight", torch.ones(8, 48), r"patch_embed.proj.weight has shape \(8, 48\)"),
        ("timm", "pos_embed", torch.ones(1, 7, 8), "6 patches, which make no square"),
        ("timm", "pos_embed", torch.ones(1, 0, 8), "-1 patches, which make no square"),
        ("timm", "head.bias", torch.ones(3, dtype=torch.int8), "head.bias of torch.int8"),
        ("transformers", "classifier.weight", torch.ones(0, 8), "num_classes|classifier.weight"),
        ("transformers", "layers.0.mlp.fc1.weight", torch.ones(8, 8), "intermediate.dense.weight twice"),
    ]
    for library, name, weight, message in cases:
        folder = written(tmp_path / "folder", library, imported(TINY))
        change_weights(folder, lambda weights, name=name, weight=weight: weights.update({name: weight}))  # type: ignore[misc]
        with pytest.raises(BadInput, match=f"{folder}.*{message}"):
            vitrail.load(folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_is_not_there_or_never_opened(library: Library, tmp_path: Path) -> None:
    folder = written(tmp_path / "folder", library, imported(TINY))
    weights = folder / "model.safetensors"
    torch.save({"a": torch.ones(1)}, tmp_path / "pickle.bin")
    weights.unlink()
    with pytest.raises(BadInput, match=r"model\.safetensors is missing"):
        vitrail.load(folder)
    shutil.copy(tmp_path / "pickle.bin", weights)
    with pytest.raises(BadInput, match=r"model\.safetensors cannot be read as safetensors"):
        vitrail.load(folder)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(BadInput, match=rf"a pickle, pytorch_model\.bin, which may run any program.*{library}"):
        vitrail.load(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(BadInput, match="divided into several files"):
        vitrail.load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[1]", "no settings by name"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b'{"model_type": "vit", "hidden_size": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
        (b" " * (1 << 26), "it is not read"),
    ],
    ids=["empty", "bytes", "list", "deep", "digits", "huge"],
)
def test_a_config_that_is_no_json(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(BadInput, match=f"config.json.*{message}"):
        vitrail.load(tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for name, message in (("a.bin", "a pickle by its name, which Vitrail never opens"), ("a.txt", "is a file")):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(BadInput, match=f"{name}.*{message}"):
            vitrail.load(tmp_path / name)
    with pytest.raises(
        BadInput, match=r"is no run folder, .*: it has a\.bin, a\.txt\. Vitrail reads run folders, official"
    ):
        vitrail.load(tmp_path)
    with pytest.raises(BadInput, match=r"there is no file .*gone\.npz"):
        vitrail.load(tmp_path / "gone.npz")


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("transformers", "model.safetensors"), ("transformers", "config.json"),
        ("transformers", "preprocessor_config.json"), ("timm", "model.safetensors"), ("timm", "config.json"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused_or_read_and_nothing_else(library: Library, name: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "folder", library, imported(TINY))
    assert_refused_or_read(folder, folder / name, FUZZED)


@pytest.mark.parametrize("library", LIBRARIES)
def test_weights_that_the_model_has_no_place_for_are_not_read(library: Library, tmp_path: Path) -> None:
    good, bad = (written(tmp_path / name, library, imported(TINY)) for name in ("good", "bad"))
    with_more(bad / "model.safetensors", "extra", 2 << 30)
    assert_refused_unread(good, bad, "extra is unexpected")


@pytest.mark.parametrize("name", ["model.safetensors", "preprocessor_config.json"])
def test_a_pipe_is_not_waited_for(name: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "folder", "transformers", imported(TINY))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with within_seconds(10), pytest.raises(BadInput, match=f"{folder / name} is no regular file"):
        vitrail.load(folder)
