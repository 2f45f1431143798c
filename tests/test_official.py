"""Official checkpoints (`.npz`): which names, shapes and types are understood, and how others are refused."""

import io
import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import GOLDEN, Arrays, add, arrays_of, backslashes, of_later_code, save, with_optimizer
from fuzzing import mutated, within_seconds

import vitrail
from vitrail.errors import BadInput
from vitrail.vit.model import VisionTransformer
from vitrail.weights.load import read

MUTATED = 120  # archives of each checkpoint
BLOCK = "Transformer/encoderblock_1"
HIDDEN, QUERY = f"{BLOCK}/MlpBlock_3/Dense_0/kernel", f"{BLOCK}/MultiHeadDotProductAttention_1/query/kernel"
POSITIONS = "Transformer/posembed_input/pos_embedding"


def assert_same(found: Path, expected: Path) -> None:
    """See that two files hold the same model."""
    ours, theirs = vitrail.load(found), vitrail.load(expected)
    assert ours.config == theirs.config
    weights = ours.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in theirs.state_dict().items())
    assert all(weight.is_contiguous() for weight in weights.values())


def refusal(path: Path, arrays: Arrays) -> str:
    """Why an archive of these arrays is refused, by a message that names it."""
    save(path, arrays)
    with pytest.raises(BadInput) as error:
        vitrail.load(path)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("case", ["token", "gap", "pre-logits", "hybrid"])
@pytest.mark.parametrize("rename", [backslashes, with_optimizer, of_later_code])
@pytest.mark.parametrize("compressed", [False, True])
def test_all_names_of_official_checkpoints_are_understood(
    case: str, rename: Callable[[str], str], compressed: bool, tmp_path: Path
) -> None:
    renamed = {rename(name): array for name, array in arrays_of(case).items()}
    save(tmp_path / "renamed.npz", renamed, compressed)
    assert_same(tmp_path / "renamed.npz", GOLDEN / f"{case}.npz")


def test_group_norms_may_be_vectors(tmp_path: Path) -> None:
    arrays = arrays_of("hybrid")
    flat = {name: array.ravel() if array.shape[:-1] == (1, 1, 1) else array for name, array in arrays.items()}
    assert sum(flat[name].shape != arrays[name].shape for name in arrays) > 10
    save(tmp_path / "flat.npz", flat)
    assert_same(tmp_path / "flat.npz", GOLDEN / "hybrid.npz")


@pytest.mark.parametrize("dtype", ["<f2", "<f8", ">f4"])
def test_weights_of_other_floats_and_in_fortrans_order_are_read(dtype: str, tmp_path: Path) -> None:
    rounded = {name: array.astype(dtype) for name, array in arrays_of("token").items()}
    save(tmp_path / "a.npz", {name: np.asfortranarray(array) for name, array in rounded.items()})
    save(tmp_path / "b.npz", {name: array.astype(np.float32) for name, array in rounded.items()})
    assert_same(tmp_path / "a.npz", tmp_path / "b.npz")


@pytest.mark.parametrize(
    "dtype", [np.uint8, np.int32, np.bool_, np.complex64, np.longdouble, np.dtype("V2"), np.dtype("U1")], ids=str
)
def test_arrays_of_what_no_weights_are_of_are_refused_by_name(dtype: Any, tmp_path: Path) -> None:
    arrays = arrays_of("token")
    message = refusal(tmp_path / "a.npz", arrays | {"head/kernel": np.zeros(arrays["head/kernel"].shape, dtype)})
    assert f"has head/kernel of {np.dtype(dtype)}, and not of floats" in message


# What lies beside the weights


def of_training(rename: Callable[[str], str]) -> Arrays:
    """What checkpoints of training have, momenta in bf16 (which NumPy does not know, and keeps as two bytes of
    nothing in particular)."""
    arrays = arrays_of("token")
    state = {f"opt/state/param_states/{name}/momentum": np.zeros(array.shape, "V2") for name, array in arrays.items()}
    more = {"opt/state/step": np.array(7), "chrono/accum_train_time": np.array(1.5), "extra/names": np.array(["a"])}
    return {rename(name): array for name, array in arrays.items()} | state | more


@pytest.mark.parametrize("rename", [with_optimizer, of_later_code])
def test_what_training_keeps_beside_the_weights_is_left_alone(rename: Callable[[str], str], tmp_path: Path) -> None:
    save(tmp_path / "a.npz", of_training(rename))
    assert_same(tmp_path / "a.npz", GOLDEN / "token.npz")


def most_memory(path: Path) -> int:
    """The most bytes that were taken at once while a file was read, or refused."""
    refusal = str(path)
    tracemalloc.start()
    try:
        vitrail.load(path)
    except BadInput as error:
        refusal = str(error)
    finally:
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert str(path) in refusal
    return most


@pytest.mark.parametrize(
    ("name", "dtype"), [("opt/state/momentum", "<f4"), ("opt/target/more", "<f4"), ("opt/target/more", "|u1")]
)
def test_what_is_not_wanted_is_not_read(name: str, dtype: str, tmp_path: Path) -> None:
    save(tmp_path / "a.npz", of_training(with_optimizer) | {name: np.zeros(24 << 20, dtype)})
    assert most_memory(tmp_path / "a.npz") < 16e6


def test_a_header_is_not_as_long_as_it_says(tmp_path: Path) -> None:
    save(tmp_path / "a.npz", arrays_of("token"))
    add(tmp_path / "a.npz", "more.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + bytes(64 << 20))
    assert most_memory(tmp_path / "a.npz") < 16e6


# What is wrong is listed


@pytest.mark.parametrize("rename", [str, with_optimizer, of_later_code])
def test_missing_unexpected_and_misshapen_arrays_are_listed_by_the_files_names(
    rename: Callable[[str], str], tmp_path: Path
) -> None:
    arrays = arrays_of("token")
    del arrays[HIDDEN]
    arrays[QUERY] = arrays[QUERY][:, :, 1:]
    arrays["LayerScale_0/gamma"] = np.ones(48, np.float32)
    message = refusal(tmp_path / "a.npz", {rename(name): array for name, array in arrays.items()})
    for part in (
        f"{rename(HIDDEN)} is missing", f"{rename('LayerScale_0/gamma')} is unexpected",
        f"{rename(QUERY)} has shape (48, 4, 11) instead of (48, 4, 12)",
    ):  # fmt: skip
        assert part in message


def test_what_the_shape_is_read_from_is_listed_too(tmp_path: Path) -> None:
    arrays = arrays_of("token")
    del arrays["embedding/kernel"], arrays["head/kernel"]
    arrays[POSITIONS] = arrays[POSITIONS][0]
    message = refusal(tmp_path / "a.npz", arrays)
    for part in ("embedding/kernel is missing", f"{POSITIONS} has shape (17, 48)", "head/kernel is missing"):
        assert part in message


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (QUERY.replace("_1/", "_0/", 1), (48, 5, 9), "5 heads do not divide a width of 48"),
        ("cls", None, "position embeddings for a class token and 16 patches, and cls is missing"),
        (POSITIONS, (1, 1, 48), "0 patches, which make no square"),
        (POSITIONS, (1, 25, 48), "24 patches, which make no square"),
        (POSITIONS, (1, 1 + 400**2, 1), "160,000 patches of 8"),
        ("head/kernel", (1, 1 << 18), "num_classes = 262144 cannot be; it must be at most 131,072"),
        ("head/kernel", (), r"head/kernel has shape ()"),
        ("embedding/kernel", (8, 8, 1, 48), "embedding/kernel has shape (8, 8, 1, 48) instead of (8, 8, 3, 48)"),
        ("cls", (0,), "cls of shape (0,) in 0 bytes: that cannot be"),
    ],
)
def test_shapes_of_no_model_are_refused(name: str, shape: tuple[int, ...] | None, message: str, tmp_path: Path) -> None:
    arrays = arrays_of("token")
    del arrays[name]
    if shape is not None:
        arrays[name] = np.zeros(shape, np.float32)
    assert message in refusal(tmp_path / "a.npz", arrays)


def test_a_resnet_of_many_stages_is_refused(tmp_path: Path) -> None:
    more = {f"block{stage}/unit1/conv1/kernel": np.zeros(1, np.float32) for stage in range(3, 300)}
    assert "a ResNet with 299 stages" in refusal(tmp_path / "a.npz", arrays_of("hybrid") | more)


def test_arrays_under_one_name_are_refused(tmp_path: Path) -> None:
    arrays, content = arrays_of("token"), io.BytesIO()
    np.save(content, arrays["head/bias"])
    for number, entry in enumerate(("head/bias.npy", "head\\bias.npy", "head/bias")):
        save(path := tmp_path / f"{number}.npz", arrays)
        if number:
            add(path, entry, content.getvalue())
        else:
            with pytest.warns(UserWarning, match="Duplicate name"):
                add(path, entry, content.getvalue())
        with pytest.raises(BadInput, match=rf"{number}\.npz has head/bias twice"):
            vitrail.load(path)
    save(path := tmp_path / "other.npz", arrays | {"opt/target/head/bias": arrays["head/bias"]})
    with pytest.raises(BadInput, match=r"other\.npz .*opt/target/head/bias is unexpected"):
        vitrail.load(path)


# Other files


@pytest.mark.parametrize("case", ["token", "pre-logits"])
def test_a_checkpoint_without_a_head_is_given_a_new_one(case: str, tmp_path: Path) -> None:
    arrays = {name: array for name, array in arrays_of(case).items() if not name.startswith("head/")}
    assert "a.npz has no head; say for how many classes to make one" in refusal(tmp_path / "a.npz", arrays)
    found, whole = (vitrail.load(path, num_classes=3) for path in (tmp_path / "a.npz", GOLDEN / f"{case}.npz"))
    assert isinstance(found, VisionTransformer)
    assert (found.config, found.head.weight.any().item()) == (whole.config, False)
    assert all(torch.equal(found.state_dict()[name], weight) for name, weight in whole.state_dict().items())
    assert read(tmp_path / "a.npz").classes == ()


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "folder.npz").mkdir()
    os.mkfifo(tmp_path / "pipe.npz")
    with within_seconds(10):
        with pytest.raises(BadInput, match=r"folder\.npz is no run folder"):
            vitrail.load(tmp_path / "folder.npz")
        with pytest.raises(BadInput, match=r"pipe\.npz is no regular file"):
            vitrail.load(tmp_path / "pipe.npz")


@pytest.mark.parametrize("case", ["token", "gap", "pre-logits"])
def test_archives_of_changed_arrays_are_refused_or_read_and_nothing_else(case: str, tmp_path: Path) -> None:
    whole, noise, refusals = arrays_of(case), random.Random(0), dict[Path, str]()
    for number in range(MUTATED):
        path = tmp_path / f"{number}.npz"
        save(path, mutated(whole, noise), compressed=noise.random() < 0.5)
        try:
            with within_seconds(10):
                vitrail.load(path)
        except BadInput as error:
            refusals[path] = str(error)
        path.unlink()
    assert MUTATED / 4 < len(refusals) < MUTATED
    assert all(str(path) in refusal for path, refusal in refusals.items())


def test_one_misshapen_array_of_an_mlp_is_the_one_that_is_named(tmp_path: Path) -> None:
    """Though the width of the MLP is read from such arrays."""
    arrays = arrays_of("token")
    name = "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel"
    arrays[name] = arrays[name][:, :-1]
    save(tmp_path / "a.npz", arrays)
    with pytest.raises(BadInput) as refused:
        vitrail.load(tmp_path / "a.npz")
    assert f"{name} has shape (48, 95) instead of (48, 96)" in str(refused.value)
    assert "bias" not in str(refused.value)
