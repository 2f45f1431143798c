"""Weights from elsewhere: files that are damaged or mean harm, and run folders that are not what they say."""

import contextlib
import io
import json
import os
import pickle
import re
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import GOLDEN, arrays_of, save
from fuzzing import assert_refused_or_read, assert_refused_unread, with_more, within_seconds
from safetensors.torch import save_file

import vitrail
from vitrail.errors import BadInput
from vitrail.vit.config import ViTConfig
from vitrail.vit.model import VisionTransformer
from vitrail.weights.checkpoint import Run

FUZZED = 2000  # files of each kind


def npz(header: bytes, content: bytes = b"", name: str = "embedding/kernel.npy") -> bytes:
    """An archive of one array whose header says what it likes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content)
    return buffer.getvalue()


def bomb() -> bytes:
    """A gigabyte of zeros in a megabyte."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("head/bias.npy", "w") as file:
        file.write(b"\x93NUMPY\x01\x00")
        for _ in range(1000):
            file.write(bytes(1 << 20))
    return buffer.getvalue()


def lying(compression: int) -> bytes:
    """200 MB of zeros, packed, of which the archive says that they are 144 bytes."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (4,)}".ljust(117) + b"\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(16)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("head/bias.npy", content + bytes(200 << 20))
    whole, said = buffer.getvalue(), struct.pack("<L", len(content) + (200 << 20))
    assert whole.count(said) == 2  # before the array, and in the directory at the end
    return whole.replace(said, struct.pack("<L", len(content)))


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_what_an_archive_hides_is_not_unpacked(compression: int, tmp_path: Path) -> None:
    (tmp_path / "file.npz").write_bytes(lying(compression))
    tracemalloc.start()
    with pytest.raises(BadInput, match=r"file\.npz"):
        vitrail.load(tmp_path / "file.npz")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 20e6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32, torch.bool])
def test_weights_of_a_run_that_are_no_floats_of_32_bits_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    model = VisionTransformer(ViTConfig(16, 4, 8, 8, 2, 1, 3))
    run = Run.create(tmp_path / "run")
    run.save_model(model, ("a", "b", "c"))
    save_file({n: w.to(dtype) for n, w in model.state_dict().items()}, run.path / "model" / "model.safetensors")
    with pytest.raises(BadInput, match=r"model\.safetensors"):
        vitrail.load(run.path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"num_layers": 1000}}, r"says num_layers = 1000, and .*model\.safetensors has 1"),
        ({"preprocessing": {"shorter_side": 10**400}}, "shorter_side is .* from 16 to 160"),
    ],
)
def test_a_run_whose_config_is_not_its_weights_is_refused_at_once(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    run = Run.create(tmp_path / "run")
    run.save_model(VisionTransformer(ViTConfig(16, 4, 8, 8, 2, 1, 3)), ("a", "b", "c"))
    path = run.path / "model" / "config.json"
    content = json.loads(path.read_text())
    for section, values in changes.items():
        content[section] |= values
    path.write_text(json.dumps(content))
    with pytest.raises(BadInput, match=message):
        vitrail.load(run.path)


def torch_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(1)}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("length", [0x0280, 0x613C, 64])
def test_cut_off_safetensors_are_taken_for_nothing_else(length: int, tmp_path: Path) -> None:
    """They begin with a length of any bytes, in turn those that pickles begin with, and <a."""
    run = Run.create(tmp_path / "run")
    run.save_model(VisionTransformer(ViTConfig(16, 4, 8, 8, 2, 1, 3)), ("a", "b", "c"))
    (run.path / "model" / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b'{"weight":{"dtype"')
    with pytest.raises(BadInput, match=r"It may have been cut off: if it was fetched or copied, do that again\."):
        vitrail.load(run.path)


def objects() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, cls=np.array([{"a": 1}], dtype=object))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"cannot be read as a NumPy archive.*It is empty: fetch or save it again\."),
        (b"no archive", "cannot be read as a NumPy archive.*It may have been cut off"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "a pointer of Git LFS.*`git lfs pull`"),
        (b" <!DOCTYPE html>", "It is a web page: fetch the file itself"),
        (pickle.dumps({"weight": 1}), "cannot be read as a NumPy archive.*It is a pickle, .*save .* as safetensors"),
        (torch_file(), "It is a pickle, .*save .* as safetensors"),
        (objects(), "cls of object, and not of floats"),
        (bomb(), "says that it holds 1,048,57.,...: it is not read"),
        (npz(b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999, 2)}\n"), "bytes: that cannot be"),
        (npz(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-4,)}\n", bytes(16)), "bytes: that cannot be"),
        (npz(b"{'descr': '<f4', 'fortran_order': False, 'shape': (4,)}\n", bytes(12)), "bytes: that cannot be"),
        (
            npz(b"{'descr': '<f4', 'fortran_order': False, 'shape': (4,)}\n", bytes(16)),
            r"embedding/kernel has shape \(4,\); Transformer/posembed_input/pos_embedding is missing",
        ),
        (npz(b"__import__('os').system('true')\n"), "cannot be read as a NumPy archive"),
        (npz(b"x = 1", name="a.txt"), "cannot be read as a NumPy archive"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_by_name(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "file.npz").write_bytes(content)
    with pytest.raises(BadInput, match=f"file.npz.*{message}"):
        vitrail.load(tmp_path / "file.npz")


@pytest.mark.parametrize("kind", ["npz", "safetensors", "config"])
def test_damaged_files_are_refused_or_read_and_nothing_else(kind: str, tmp_path: Path) -> None:
    config = ViTConfig(image_size=8, patch_size=4, hidden_size=8, mlp_dim=8, num_heads=2, num_layers=1, num_classes=3)
    run = Run.create(tmp_path / "run")
    run.save_model(VisionTransformer(config), ("a", "b", "c"))
    source: Path = run.path
    file = run.path / "model" / ("config.json" if kind == "config" else "model.safetensors")
    if kind == "npz":
        small = {name: array for name, array in arrays_of("token").items() if "encoderblock_1" not in name}
        source = file = tmp_path / "small.npz"
        save(file, small)
    assert_refused_or_read(source, file, FUZZED)


def test_run_folders_of_before_gelu_and_epsilon_were_settings_are_read(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run")
    run.save_model(VisionTransformer(ViTConfig(16, 4, 8, 8, 2, 1, 3)), ("a", "b", "c"))
    path = run.path / "model" / "config.json"
    content = json.loads(path.read_text())
    del content["model"]["gelu"], content["model"]["layer_norm_eps"]
    path.write_text(json.dumps(content))
    assert vitrail.load(run.path).config == ViTConfig(16, 4, 8, 8, 2, 1, 3)
    content["model"]["colour"] = "red"
    path.write_text(json.dumps(content))
    with pytest.raises(BadInput, match=r"config\.json: settings that this version of Vitrail lacks: colour"):
        vitrail.load(run.path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["npz", "run"])
def test_weights_that_are_no_numbers_are_refused(kind: str, value: float, tmp_path: Path) -> None:
    if kind == "npz":
        arrays = arrays_of("token")
        arrays["head/kernel"] = np.full_like(arrays["head/kernel"], value)
        save(source := tmp_path / "token.npz", arrays)
    else:
        model = VisionTransformer(ViTConfig(16, 4, 8, 8, 2, 1, 3))
        torch.nn.init.constant_(model.head.weight, value)
        source = Run.create(tmp_path / "run").path
        Run(source).save_model(model, ("a", "b", "c"))
    with pytest.raises(BadInput, match=r"are broken: head\.weight have NaN or infinite values"):
        vitrail.load(source)


def test_what_is_not_there_is_answered_with_what_may_be_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "laptop").mkdir()
    for said, answer in (
        ("labtop", "there is no file or folder labtop; did you mean 'laptop'?"),
        ("gone/laptop/again", "there is no file or folder gone/laptop/again."),
        ("google/vit-base", "hf download google/vit-base --local-dir vit-base does, and vit-base is read."),
        ("hf:google/vit-base", "hf download google/vit-base --local-dir vit-base does, and vit-base is read."),
        ("https://huggingface.co/google/vit-base", "hf download google/vit-base --local-dir vit-base does,"),
    ):
        with pytest.raises(BadInput, match=re.escape(answer)):
            vitrail.load(said)


def test_images_of_more_patches_than_a_model_takes_are_refused() -> None:
    with pytest.raises(BadInput, match=r"images of 4000 pixels are 250,000 patches of 8; a model takes at most "):
        vitrail.load(GOLDEN / "token.npz", image_size=4000)


def test_a_part_of_a_run_folder_is_answered_with_the_whole(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run")
    run.save_model(VisionTransformer(ViTConfig(16, 4, 8, 8, 2, 1, 3)), ("a", "b", "c"))
    with pytest.raises(BadInput, match=f"model is a part of a run folder; name the whole, {run.path}"):
        vitrail.load(run.path / "model")


def test_a_new_head_takes_the_place_of_the_whole_old_one() -> None:
    model = vitrail.load(GOLDEN / "pre-logits.npz", num_classes=7)
    assert isinstance(model, VisionTransformer)
    assert (model.config.num_classes, model.config.representation_size) == (7, None)
    assert not model.head.weight.any()
    assert all(weight.requires_grad for weight in model.parameters())


def test_a_pickle_in_the_place_of_weights_is_not_opened(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run")
    run.save_model(VisionTransformer(ViTConfig(16, 4, 8, 8, 2, 1, 3)), ("a", "b", "c"))
    weights = run.path / "model" / "model.safetensors"
    weights.unlink()
    torch.save({"head.weight": torch.zeros(1)}, weights)
    with pytest.raises(BadInput, match=r"model\.safetensors"):
        vitrail.load(run.path)
    save_file({"head.weight": torch.zeros(1)}, weights)
    with pytest.raises(BadInput, match=r"model\.safetensors"):
        vitrail.load(run.path)


def test_weights_that_the_model_of_a_run_has_no_place_for_are_not_read(tmp_path: Path) -> None:
    model = VisionTransformer(ViTConfig(16, 4, 8, 8, 2, 1, 3))
    good, bad = (Run.create(tmp_path / name) for name in ("good", "bad"))
    for run in (good, bad):
        run.save_model(model, ("a", "b", "c"))
    with_more(bad.path / "model" / "model.safetensors", "extra", 2 << 30)
    assert_refused_unread(good.path, bad.path, "extra is unexpected")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pipe_in_a_run_is_not_waited_for(name: str, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run")
    run.save_model(VisionTransformer(ViTConfig(16, 4, 8, 8, 2, 1, 3)), ("a", "b", "c"))
    (path := run.path / "model" / name).unlink()
    os.mkfifo(path)
    with within_seconds(10), pytest.raises(BadInput, match=f"{run.path}.*(no regular file|no run folder)"):
        vitrail.load(run.path)


@contextlib.contextmanager
def closed(folder: Path) -> Iterator[None]:
    """Nobody may look into a folder; root, who may look into any, is somebody else meanwhile."""
    user = os.geteuid()
    folder.chmod(0)
    try:
        if not user:
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o700)


def test_what_the_system_does_not_open_is_named(tmp_path: Path) -> None:
    readers: tuple[Callable[[Path], object], ...] = (vitrail.load, Run.open)
    run = Run.create(tmp_path / "run")
    run.save_model(VisionTransformer(ViTConfig(16, 4, 8, 8, 2, 1, 3)), ("a", "b", "c"))
    for path in (tmp_path / ("x" * 300), tmp_path / f"{'x' * 300}.npz", tmp_path / ("x" * 300) / "model"):
        for read in readers:
            with pytest.raises(BadInput, match=rf"{path} cannot be opened: file name too long\."):
                read(path)
    with closed(run.path):
        for path in (run.path, run.path / "a.npz"):
            for read in readers:
                with pytest.raises(BadInput, match=rf"{path} cannot be opened: permission denied\."):
                    read(path)
