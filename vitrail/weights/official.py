"""The official checkpoints: NumPy archives (`.npz`) with the names and layouts of Flax → Vitrail's.

A file may come from anywhere. Of each array, the header comes first: what all of them say is compared with the file's
size, and with the model that they are of, before the rest is read. Objects are refused.
"""

import io
import math
import re
import zipfile
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from vitrail.errors import BadInput
from vitrail.vit.config import ViTConfig, shorten
from vitrail.vit.model import VisionTransformer
from vitrail.vit.resnet import stride
from vitrail.weights.files import Shapes, check_plain, compare_shapes, instead

INFLATED = 32  # an archive may be compressed, but trained weights hardly shrink: more than this is a trap
SMALL = 1 << 24  # bytes: what any archive may hold
HEADER = 1 << 14  # bytes: room for the longest header that NumPy takes, whatever one says of its own length
STAGES = 6  # of a ResNet: BiT has 4

# What encloses the weights in checkpoints of training: beside it are an optimizer's state, clocks and the like.
ENCLOSING = ("", "opt/target/", "params/", "opt/target/params/")
# Released files number the parts of a block together, later code each kind by itself (convert_pre_linen in the
# official checkpoint.py): these → those.
RENAMED = {"MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0", "LayerNorm_2": "LayerNorm_1",
           "MlpBlock_3": "MlpBlock_0"}  # fmt: skip
RELEASED = {later: released for released, later in RENAMED.items()}

ATTENTION = "MultiHeadDotProductAttention_0"
TOKENS = {"class_token": "cls", "position_embedding": "Transformer/posembed_input/pos_embedding"}
ENDS = {
    "patch_embedding.projection": "embedding", "norm": "Transformer/encoder_norm", "pre_logits": "pre_logits",
    "head": "head", "resnet.root": "conv_root", "resnet.norm": "gn_root",
}  # fmt: skip
BLOCK = {
    "attention_norm": ("LayerNorm_0",),
    "attention.qkv": (f"{ATTENTION}/query", f"{ATTENTION}/key", f"{ATTENTION}/value"),
    "attention.out": (f"{ATTENTION}/out",),
    "mlp_norm": ("LayerNorm_1",),
    "mlp.hidden": ("MlpBlock_0/Dense_0",),
    "mlp.out": ("MlpBlock_0/Dense_1",),
}
UNIT = {
    "conv1": "conv1", "norm1": "gn1", "conv2": "conv2", "norm2": "gn2", "conv3": "conv3", "norm3": "gn3",
    "projection.0": "conv_proj", "projection.1": "gn_proj",
}  # fmt: skip
# The arrays that tell the shape of the model, and how many dimensions they have.
EMBEDDING, POSITIONS = "embedding/kernel", TOKENS["position_embedding"]
QUERY, HIDDEN = (f"Transformer/encoderblock_0/{part}/kernel" for part in (f"{ATTENTION}/query", "MlpBlock_0/Dense_0"))
TELLING = {EMBEDDING: 4, POSITIONS: 3, QUERY: 3, HIDDEN: 2}


class Header(NamedTuple):
    """What an archive says of one of its arrays, whose values lie `start` bytes behind the beginning of its entry."""

    entry: zipfile.ZipInfo
    start: int
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]


class Place(NamedTuple):
    """Where one of Vitrail's weights lies: the arrays that its rows are divided into, and the shape of each of them,
    in the file and in the weight."""

    names: tuple[str, ...]
    theirs: tuple[int, ...]
    ours: tuple[int, ...]


@dataclass(frozen=True)
class Spelling:
    """How a file spells the names that today's official code has: with what `prefix`, and whether it is `released`, and
    numbers the parts of a block together."""

    prefix: str
    released: bool

    @classmethod
    def of(cls, names: Collection[str]) -> "Spelling":
        """That of a file with arrays of these names."""
        prefix = max(ENCLOSING, key=lambda prefix: sum(name.startswith(f"{prefix}Transformer/") for name in names))
        weights = [name for name in names if name.startswith(f"{prefix}Transformer/")]
        return cls(prefix, any(part in RENAMED for name in weights for part in name.split("/")))

    def __call__(self, name: str) -> str:
        """The file's spelling of a name."""
        parts = (RELEASED.get(part, part) if self.released else part for part in name.split("/"))
        return self.prefix + "/".join(parts)


def read_official(path: Path) -> tuple[ViTConfig, dict[str, Tensor]]:
    """A checkpoint of the official JAX code: the shape that its arrays tell, and its weights under Vitrail's names. The
    head may be missing; the config's `num_classes` then says nothing.

    Raises:
        BadInput: the file is missing or damaged, or its arrays are not a Vision Transformer's; the message lists those
            that are missing, unexpected or misshapen by the names that the file has for them.
    """
    headers, spelled = _headers(path)
    shapes = {name: header.shape for name, header in headers.items()}
    config = _config(shapes, spelled, path)
    with torch.device("meta"):
        state = VisionTransformer(config).state_dict()
    if spelled("head/kernel") not in shapes:
        state = {ours: weight for ours, weight in state.items() if not ours.startswith("head.")}
    places = {ours: _place(ours, weight, config.num_heads, shapes, spelled) for ours, weight in state.items()}
    compare_shapes({name: place.theirs for place in places.values() for name in place.names}, shapes, path)
    with _opened(path) as archive:
        return config, {
            ours: _weight([_values(archive, headers[name]) for name in place.names], place.ours)
            for ours, place in places.items()
        }


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except BadInput:
        raise
    except Exception as error:  # zipfile, its decompressors and NumPy's parser have dozens for what is damaged
        why = str(error) or type(error)
        raise BadInput(f"{path} cannot be read as a NumPy archive of plain arrays: {why}.{instead(path)}") from None


def _headers(path: Path) -> tuple[dict[str, Header], Spelling]:
    """What an archive says of the arrays that are weights, by the names that it has for them, and how it spells these.

    Raises:
        BadInput: it is missing or damaged, or cannot be what it says.
    """
    if not path.exists():
        raise BadInput(f"there is no file {path}.")
    check_plain(path)
    with _opened(path) as archive:
        entries = [(entry.filename.removesuffix(".npy").replace("\\", "/"), entry) for entry in archive.infolist()]
        spelled = Spelling.of([name for name, _ in entries])
        entries = [(name, entry) for name, entry in entries if name.startswith(spelled.prefix)]
        # As NumPy writes them. Others are unpacked whole, however little of it is asked for.
        if {entry.compress_type for _, entry in entries} - {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
            raise BadInput(f"{path} is compressed as NumPy compresses nothing: it is not read.")
        held, there = sum(entry.file_size for _, entry in entries), path.stat().st_size
        if held > max(SMALL, INFLATED * there):
            raise BadInput(f"{path} has {there:,} bytes and says that it holds {held:,}: it is not read.")
        found: dict[str, Header] = {}
        for name, entry in entries:
            if name in found:
                raise BadInput(f"{path} has {name} twice.")
            found[name] = _header(archive, entry, f"{path} has {name}")
        return found, spelled


def _header(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, what: str) -> Header:
    """What is said of an array; `what` it is, for messages."""
    with archive.open(entry) as file:
        begin = io.BytesIO(file.read(HEADER))
    try:
        version = npy.read_magic(begin)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(begin)
    except ValueError as error:
        raise ValueError(f"{entry.filename}: {error}") from None
    # Integers are no weights, and one byte of them would become four.
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise BadInput(f"{what} of {dtype!s:.60}, and not of floats of 16, 32 or 64 bits.")
    there = entry.file_size - begin.tell()
    if min(shape, default=1) < 1 or math.prod(shape) * dtype.itemsize != there:
        raise BadInput(f"{what} of shape {shorten(shape)} in {there:,} bytes: that cannot be.")
    return Header(entry, begin.tell(), shape, fortran, dtype)


def _config(shapes: Shapes, spelled: Spelling, path: Path) -> ViTConfig:
    """The shape of the model that arrays of these shapes are of.

    Raises:
        BadInput: there is no such model.
    """
    telling = TELLING | {
        f"{part}/kernel": 2
        for part in ("head", "pre_logits")
        if any(name.startswith(spelled(f"{part}/")) for name in shapes)
    }
    found = {name: shapes.get(spelled(name)) for name in telling}
    if problems := [
        f"{spelled(name)} {'is missing' if shape is None else f'has shape {shorten(shape)}'}"
        for name, shape in found.items()
        if shape is None or len(shape) != telling[name]
    ]:
        raise BadInput(f"{path} is no checkpoint of the official Vision Transformer: {'; '.join(problems)}.")
    told = {name: shape for name, shape in found.items() if shape is not None}  # all of them
    token = spelled(TOKENS["class_token"])
    try:
        grid = grid_of(told[POSITIONS][1], token, token in shapes)
    except ValueError as error:
        raise BadInput(f"{path} has {error}.") from None
    blocks = _blocks(shapes, spelled, path)
    patch_size, _, _, hidden_size = told[EMBEDDING]
    layers = _count(shapes, spelled("Transformer/encoderblock_"))
    try:
        return ViTConfig(
            image_size=grid * patch_size * (1 if blocks is None else stride(blocks)),
            patch_size=patch_size,
            hidden_size=hidden_size,
            mlp_dim=_mlp_dim(shapes, spelled, layers),
            num_heads=told[QUERY][1],
            num_layers=layers,
            num_classes=told["head/kernel"][1] if "head/kernel" in told else 1,
            classifier="token" if spelled("cls") in shapes else "gap",
            representation_size=told["pre_logits/kernel"][1] if "pre_logits/kernel" in told else None,
            resnet_blocks=blocks,
        )
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


def grid_of(positions: int, token: str, with_token: bool) -> int:
    """Patches along a side of the images that so many position embeddings are for, one of them for the class token,
    where there is one; `token` is what the file calls that.

    Raises:
        ValueError: they are for no square; the message says what they are for.
    """
    patches = positions - with_token
    grid = math.isqrt(max(patches, 0))
    if grid and grid**2 == patches:
        return grid
    if not with_token and (math.isqrt(max(patches, 1) - 1)) ** 2 == patches - 1 > 0:
        raise ValueError(f"position embeddings for a class token and {patches - 1:,} patches, and {token} is missing")
    raise ValueError(f"position embeddings for {patches:,} patches, which make no square, as Vitrail's images are")


def _mlp_dim(shapes: Shapes, spelled: Spelling, layers: int) -> int:
    """The width that most arrays of the MLPs have, so that one that is misshapen is the one that is named."""
    widths = Counter[int]()
    for block in range(layers):
        for part, axis in (("Dense_0/kernel", 1), ("Dense_0/bias", 0), ("Dense_1/kernel", 0)):
            shape = shapes.get(spelled(f"Transformer/encoderblock_{block}/MlpBlock_0/{part}"), ())
            widths.update(shape[axis : axis + 1])
    return widths.most_common(1)[0][0]


def _blocks(shapes: Shapes, spelled: Spelling, path: Path) -> tuple[int, ...] | None:
    """Bottlenecks of each stage of the ResNet, if there is one."""
    if spelled("conv_root/kernel") not in shapes:
        return None
    if (stages := _count(shapes, spelled("block"))) > STAGES:
        raise BadInput(f"{path} is of a ResNet with {stages:,} stages, and not of at most {STAGES}.")
    return tuple(_count(shapes, spelled(f"block{stage}/unit")) for stage in range(1, stages + 1))


def _count(names: Collection[str], start: str) -> int:
    """How many numbers there are behind that start of the names."""
    return len({found[1] for name in names if (found := re.match(rf"{re.escape(start)}(\d+)/", name))})


def _place(ours: str, weight: Tensor, heads: int, shapes: Shapes, spelled: Spelling) -> Place:
    """Where one of Vitrail's weights lies. Flax keeps a matrix as (in, out), a kernel as (height, width, in, out), and
    the heads of attention apart: (D, H, K) for queries, keys and values, (H, K, D) for what comes out."""
    names = tuple(map(spelled, _names(ours, weight.ndim == 1)))
    part = tuple(weight.chunk(len(names))[0].shape)
    theirs = part
    if len(part) == 4:
        theirs = part[2], part[3], part[1], part[0]
    elif len(part) == 2:
        theirs = part[::-1]
    elif ours.startswith("resnet.") and len(shapes.get(names[0], ())) == 4:
        theirs = 1, 1, 1, *part  # as released files keep those of GroupNorm, and others do not
    if ".attention.qkv." in ours:
        theirs = *theirs[:-1], heads, theirs[-1] // heads
    elif ours.endswith(".attention.out.weight"):
        theirs = heads, theirs[0] // heads, *theirs[1:]
    return Place(names, theirs, part)


def _names(ours: str, vector: bool) -> tuple[str, ...]:
    """What Flax calls one of Vitrail's weights; query, key and value are apart there."""
    if ours in TOKENS:
        return (TOKENS[ours],)
    module, _, kind = ours.rpartition(".")
    if found := re.fullmatch(r"blocks\.(\d+)\.(.+)", module):
        theirs = [f"Transformer/encoderblock_{found[1]}/{part}" for part in BLOCK[found[2]]]
    elif found := re.fullmatch(r"resnet\.stages\.(\d+)\.(\d+)\.(.+)", module):
        theirs = [f"block{int(found[1]) + 1}/unit{int(found[2]) + 1}/{UNIT[found[3]]}"]
    else:
        theirs = [ENDS[module]]
    kind = "bias" if kind == "bias" else "scale" if vector else "kernel"  # weights that are vectors are those of norms
    return tuple(f"{part}/{kind}" for part in theirs)


def _values(archive: zipfile.ZipFile, header: Header) -> NDArray[np.float32]:
    """The values of an array, in float32."""
    with archive.open(header.entry) as file:
        file.read(header.start)
        # Asked for by its length: without one, all that is packed would be unpacked first.
        flat = np.frombuffer(file.read(header.entry.file_size - header.start), header.dtype)
    with np.errstate(over="ignore"):  # what float32 has no room for becomes infinite, which is refused by name
        return flat.astype(np.float32).reshape(header.shape, order="F" if header.fortran else "C")


def _weight(parts: list[NDArray[np.float32]], shape: tuple[int, ...]) -> Tensor:
    """One of Vitrail's weights, of arrays that each become rows of it, of that shape."""
    if len(shape) == 4:
        parts = [part.transpose(3, 2, 0, 1) for part in parts]
    elif len(shape) == 2:
        parts = [part.reshape(shape[::-1]).T for part in parts]
    return torch.cat([torch.from_numpy(part.reshape(shape)) for part in parts]).contiguous()
