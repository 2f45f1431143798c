"""The official checkpoints: NumPy archives (`.npz`) with the names and layouts of Flax → Vitrail's.

A file may come from anywhere: what it claims is compared with its size before memory is taken, and objects are refused.
"""

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from vitrail.errors import BadInput, first_of
from vitrail.vit.config import ViTConfig

Arrays = dict[str, NDArray[Any]]
STATE = "opt/"  # what checkpoints of training have beside the weights

INFLATED = 32  # an archive may be compressed, but trained weights hardly shrink: more than this is a trap
SMALL = 1 << 24  # bytes: what any archive may hold
# What encloses the weights in checkpoints with an optimizer's state, and in those of training code that came later.
ENCLOSING = ("opt/target/", "params/")
# Released files number the parts of a block together, later code each kind by itself (convert_pre_linen in the
# official checkpoint.py).
RENAMED = {"MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0", "LayerNorm_2": "LayerNorm_1",
           "MlpBlock_3": "MlpBlock_0"}  # fmt: skip


class Used(dict[str, NDArray[Any]]):
    """Arrays that know which of them were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> NDArray[Any]:
        self.used.add(name)
        return super().__getitem__(name)


def read_official(path: Path) -> tuple[ViTConfig, dict[str, Tensor]]:
    """A checkpoint of the official JAX code: the shape that its arrays tell, and its weights under Vitrail's names.

    Raises:
        BadInput: the file is missing or damaged, holds anything but numbers, or is no Vision Transformer's.
    """
    arrays = Used()
    for name, array in _read(path).items():
        if (named := _name(name)) in arrays:
            raise BadInput(f"{path} has {named} twice, under two names.")
        arrays[named] = array
    try:
        config = _config(arrays)
        weights = {name: _tensor(array) for name, array in _weights(arrays, config)}
    except KeyError as error:
        raise BadInput(f"{path} is no checkpoint of the official Vision Transformer: {error} is missing.") from None
    except (ValueError, IndexError, TypeError) as error:
        raise BadInput(f"the arrays of {path} are not of the shapes of a Vision Transformer's: {error}.") from None
    unread = sorted(name for name in arrays.keys() - arrays.used if not name.startswith(STATE))
    if unread:
        raise BadInput(f"{path} has arrays that Vitrail's model has no place for: {first_of(unread, 3)}.")
    return config, weights


def _read(path: Path) -> Arrays:
    """All arrays of an archive, in float32."""
    try:
        with zipfile.ZipFile(path) as archive:
            # As NumPy writes them. Others are unpacked whole, however little of it is asked for.
            if {entry.compress_type for entry in archive.infolist()} - {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
                raise BadInput(f"{path} is compressed as NumPy compresses nothing: it is not read.")
            held, there = sum(entry.file_size for entry in archive.infolist()), path.stat().st_size
            if held > max(SMALL, INFLATED * there):
                raise BadInput(f"{path} has {there:,} bytes and says that it holds {held:,}: it is not read.")
            found = {}
            for entry in archive.infolist():
                with archive.open(entry) as file:
                    found[entry.filename.removesuffix(".npy")] = _array(file, entry.file_size)
            return found
    except FileNotFoundError:
        raise BadInput(f"there is no file {path}.") from None
    except BadInput:
        raise
    except Exception as error:  # zipfile, its decompressors and NumPy's parser have dozens for what is damaged
        raise BadInput(
            f"{path} cannot be read as a NumPy archive of plain arrays: {str(error) or type(error)}."
        ) from None


def _array(file: IO[bytes], size: int) -> NDArray[Any]:
    """One array of an archive, which takes `size` bytes with its header."""
    version = npy.read_magic(file)
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read_header(file)
    if dtype.kind not in "fiu":
        raise ValueError(f"an array of {dtype} is not one of numbers")
    count = int(np.prod(shape, dtype=object))
    if not count or count * dtype.itemsize != size - file.tell():
        raise ValueError(f"an array of shape {shape} is not what the {size:,} bytes there are")
    left = size - file.tell()  # asked for by its length: without one, all that is packed would be unpacked first
    flat = np.frombuffer(file.read(left), dtype).astype(np.float32)
    return flat.reshape(shape, order="F" if fortran else "C")


def _name(name: str) -> str:
    """A name as today's official code has it."""
    name = name.replace("\\", "/")
    for prefix in ENCLOSING:
        name = name.removeprefix(prefix)
    return "/".join(RENAMED.get(part, part) for part in name.split("/"))


def _config(arrays: Arrays) -> ViTConfig:
    patch_size, _, _, hidden_size = arrays["embedding/kernel"].shape
    classifier = "token" if "cls" in arrays else "gap"
    tokens = arrays["Transformer/posembed_input/pos_embedding"].shape[1] - (classifier == "token")
    shape: dict[str, Any] = {
        "patch_size": patch_size,
        "hidden_size": hidden_size,
        "mlp_dim": arrays["Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel"].shape[1],
        "num_heads": arrays["Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"].shape[1],
        "num_layers": _count(arrays, r"Transformer/encoderblock_(\d+)/"),
        "num_classes": arrays["head/kernel"].shape[1],
        "classifier": classifier,
        "representation_size": arrays["pre_logits/kernel"].shape[1] if "pre_logits/kernel" in arrays else None,
        "resnet_blocks": _blocks(arrays),
    }
    cell = ViTConfig(**shape | {"image_size": patch_size * 256}).cell  # of an image that surely divides
    return ViTConfig(**shape, image_size=cell * round(tokens**0.5))


def _blocks(arrays: Arrays) -> tuple[int, ...] | None:
    """Bottlenecks of each stage of the ResNet, if there is one."""
    if "conv_root/kernel" not in arrays:
        return None
    stages = _count(arrays, r"block(\d+)/")
    return tuple(_count(arrays, rf"block{stage}/unit(\d+)/") for stage in range(1, stages + 1))


def _count(arrays: Arrays, pattern: str) -> int:
    """How many numbers there are at that place of the names."""
    return len({found[1] for name in arrays if (found := re.match(pattern, name))})


def _weights(arrays: Arrays, config: ViTConfig) -> Iterator[tuple[str, NDArray[Any]]]:
    """The arrays under Vitrail's names. Flax keeps a matrix as (in, out), a kernel as (height, width, in, out) and
    attention's as (D, H, K)."""
    yield "patch_embedding.projection.weight", arrays["embedding/kernel"].transpose(3, 2, 0, 1)
    yield "patch_embedding.projection.bias", arrays["embedding/bias"]
    yield "position_embedding", arrays["Transformer/posembed_input/pos_embedding"]
    if config.classifier == "token":
        yield "class_token", arrays["cls"]
    if config.resnet_blocks is not None:
        yield from _resnet(arrays, config.resnet_blocks)
    for layer in range(config.num_layers):
        yield from _block(arrays, f"Transformer/encoderblock_{layer}", f"blocks.{layer}", config.hidden_size)
    yield from _affine(arrays, "Transformer/encoder_norm", "norm")
    if config.representation_size:
        yield from _dense(arrays, "pre_logits", "pre_logits")
    yield from _dense(arrays, "head", "head")


def _block(arrays: Arrays, theirs: str, ours: str, width: int) -> Iterator[tuple[str, NDArray[Any]]]:
    """One encoder block."""
    attention = f"{theirs}/MultiHeadDotProductAttention_0"
    parts = [f"{attention}/{name}" for name in ("query", "key", "value")]
    yield f"{ours}.attention.qkv.weight", np.concatenate([arrays[f"{p}/kernel"].reshape(width, width).T for p in parts])
    yield f"{ours}.attention.qkv.bias", np.concatenate([arrays[f"{p}/bias"].reshape(width) for p in parts])
    yield f"{ours}.attention.out.weight", arrays[f"{attention}/out/kernel"].reshape(width, width).T
    yield f"{ours}.attention.out.bias", arrays[f"{attention}/out/bias"]
    yield from _affine(arrays, f"{theirs}/LayerNorm_0", f"{ours}.attention_norm")
    yield from _affine(arrays, f"{theirs}/LayerNorm_1", f"{ours}.mlp_norm")
    yield from _dense(arrays, f"{theirs}/MlpBlock_0/Dense_0", f"{ours}.mlp.hidden")
    yield from _dense(arrays, f"{theirs}/MlpBlock_0/Dense_1", f"{ours}.mlp.out")


def _resnet(arrays: Arrays, blocks: tuple[int, ...]) -> Iterator[tuple[str, NDArray[Any]]]:
    """The hybrid's ResNet."""
    yield from _conv(arrays, "conv_root", "gn_root", "resnet.root", "resnet.norm")
    for stage, count in enumerate(blocks):
        for unit in range(count):
            theirs, ours = f"block{stage + 1}/unit{unit + 1}", f"resnet.stages.{stage}.{unit}"
            for number in (1, 2, 3):
                at = f"{theirs}/conv{number}", f"{theirs}/gn{number}", f"{ours}.conv{number}", f"{ours}.norm{number}"
                yield from _conv(arrays, *at)
            if f"{theirs}/conv_proj/kernel" in arrays:
                at = f"{theirs}/conv_proj", f"{theirs}/gn_proj", f"{ours}.projection.0", f"{ours}.projection.1"
                yield from _conv(arrays, *at)


def _conv(arrays: Arrays, kernel: str, norm: str, our_kernel: str, our_norm: str) -> Iterator[tuple[str, NDArray[Any]]]:
    """A convolution and its GroupNorm, which released files keep as (1, 1, 1, C)."""
    yield f"{our_kernel}.weight", arrays[f"{kernel}/kernel"].transpose(3, 2, 0, 1)
    yield f"{our_norm}.weight", arrays[f"{norm}/scale"].reshape(-1)
    yield f"{our_norm}.bias", arrays[f"{norm}/bias"].reshape(-1)


def _affine(arrays: Arrays, theirs: str, ours: str) -> Iterator[tuple[str, NDArray[Any]]]:
    yield f"{ours}.weight", arrays[f"{theirs}/scale"]
    yield f"{ours}.bias", arrays[f"{theirs}/bias"]


def _dense(arrays: Arrays, theirs: str, ours: str) -> Iterator[tuple[str, NDArray[Any]]]:
    yield f"{ours}.weight", arrays[f"{theirs}/kernel"].T
    yield f"{ours}.bias", arrays[f"{theirs}/bias"]


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
