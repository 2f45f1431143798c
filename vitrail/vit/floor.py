"""What the hardware could do: the matrix products of a model, each timed by itself, and the speed of memory.

    B batch    T tokens (patches, and the class token)    D hidden_size    F mlp_dim
    H heads    K = D / H, width of a head                 P patch_size     C classes

A head that reads the class token needs one token of the last block: its query, output projection and MLP are counted
for that one alone. `every_token` counts them for all tokens, which is what most implementations compute.
"""

import math
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vitrail.vit.config import ViTConfig

Precision = Literal["fp32", "bf16"]  # of the matrix products; weights are float32 in both
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}

SAMPLES = 5
SAMPLE_SECONDS = 0.02  # at least, for each sample: well above what the clock and a launch take
COPIED_BYTES = 256_000_000


@dataclass(frozen=True)
class Product:
    """A matrix product, (m, k) @ (k, n), that a step does `count` times; each of these is `batch` products at once."""

    m: int
    k: int
    n: int
    count: int = 1
    batch: int = 1

    @property
    def flops(self) -> int:
        """Floating-point operations of all of them, 2 for each multiply-add."""
        return 2 * self.m * self.k * self.n * self.batch * self.count


def forward_flops(config: ViTConfig, every_token: bool = False) -> int:
    """Floating-point operations of one image's logits: 2 for each multiply-add, matrix products only."""
    return sum(product.flops for product in products(config, 1, training=False, every_token=every_token))


def training_flops(config: ViTConfig, every_token: bool = False) -> int:
    """The same of one image's share of a training step: logits, and the gradients of all weights and activations. The
    image itself needs no gradient."""
    return sum(product.flops for product in products(config, 1, training=True, every_token=every_token))


def products(config: ViTConfig, batch: int, training: bool, every_token: bool = False) -> tuple[Product, ...]:
    """The matrix products of `batch` images' logits, and in training of all gradients; those of one shape are one.

    Raises:
        ValueError: the model is a hybrid; the convolutions of its ResNet are no such products.
    """
    if config.resnet_blocks is not None:
        raise ValueError("the products of a hybrid's ResNet are not counted")
    forward = _forward(config, batch, training, every_token)
    found = list(forward)
    if training:
        # Y = X W, of (m, k) and (k, n): the gradient of W is that of Y, transposed, times X; that of X takes W.
        found += [Product(p.n, p.m, p.k, p.count, p.batch) for p in forward]
        found += [Product(p.m, p.n, p.k, p.count, p.batch) for p in forward[1:]]  # all but that of the images
    counts: Counter[tuple[int, int, int, int]] = Counter()
    for p in found:
        counts[p.m, p.k, p.n, p.batch] += p.count
    return tuple(Product(m, k, n, count, together) for (m, k, n, together), count in counts.items())


def _forward(config: ViTConfig, batch: int, training: bool, every_token: bool) -> list[Product]:
    """The products of the logits, those of the patches first."""
    width, patches = config.hidden_size, config.grid**2
    tokens = config.num_prefix_tokens + (config.kept_patches(patches) if training else patches)
    last = tokens if every_token or config.classifier == "gap" else 1  # tokens that the last block is asked for
    whole = config.num_layers - (last < tokens)
    read = config.representation_size or width
    return [
        *_stem(config, batch),
        *(_block(config, batch, tokens, tokens, whole)),
        *(_block(config, batch, tokens, last, 1) if whole < config.num_layers else []),
        *([Product(batch, width, read)] if config.representation_size else []),
        Product(batch, read, config.num_classes),
    ]


def _stem(config: ViTConfig, batch: int) -> list[Product]:
    """The products that make tokens of patches; a convolution is one of what each of its cells sees."""
    patches, width, half, count = config.grid**2, config.hidden_size, config.unit_width, config.stem_units
    if config.stem == "patch":
        return [Product(batch * patches, 3 * config.patch_size**2, width)]
    widths = config.stem_widths
    cells = [batch * patches * 4**halvings for halvings in reversed(range(len(widths)))]
    convolutions = [Product(m, 9 * before, n) for m, before, n in zip(cells, [3, *widths], widths, strict=False)]
    units = [Product(4 * batch * patches, 9 * half, half, count)] if count else []
    return [*convolutions, *units, Product(batch * patches, width, width)]


def _block(config: ViTConfig, batch: int, tokens: int, asked: int, count: int) -> list[Product]:
    """The products of `count` encoder blocks on that many tokens, of which the first `asked` are needed."""
    width, heads = config.hidden_size, config.num_heads
    if asked == tokens:
        project = [Product(batch * tokens, width, 3 * width, count)]
    else:
        project = [Product(batch * asked, width, width, count), Product(batch * tokens, width, 2 * width, count)]
    return [
        *project,
        Product(asked, width // heads, tokens, count, batch * heads),
        Product(asked, tokens, width // heads, count, batch * heads),
        Product(batch * asked, width, width, count),
        Product(batch * asked, width, config.mlp_dim, count),
        Product(batch * asked, config.mlp_dim, width, count),
    ]


def product_seconds(products: Sequence[Product], device: torch.device, dtype: torch.dtype) -> float:
    """How long the products take, each shape timed alone with its operands at hand, and summed: a step cannot be
    shorter than its matrix products. On a GPU the launch of each belongs to it, which counts where they are tiny."""
    return sum(product.count * _seconds_of_one(product, device, dtype) for product in products)


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of a product of square matrices of that size; 1024 on a CPU and 8192 on a GPU if None."""
    size = size or (1024 if device.type == "cpu" else 8192)
    square = Product(size, size, size)
    return square.flops / _seconds_of_one(square, device, dtype)


def native_precision(device: torch.device) -> Precision:
    """bf16 where the device says that it has instructions for it, else fp32. Nothing is timed: it is the same at every
    call, which what is timed (`faster_precision`) need not be where both take about as long."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return "fp32"
    if platform.machine().lower() in ("aarch64", "arm64"):
        there = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    else:
        # Not what oneDNN says, which takes any AVX-512 for enough, and then is several times slower than in float32.
        # Where there is AMX there is its bf16. torch.cpu.get_capabilities, which is public, is younger than torch 2.9.
        there = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if there else "fp32"


def faster_precision(device: torch.device) -> Precision:
    """The one that is worth training in: bf16 on CUDA devices that have it; on a CPU, the one whose matrix products are
    the faster here, for some processors have instructions for bf16 and others take several times as long for it; fp32
    elsewhere."""
    if device.type == "cuda":
        return native_precision(device)
    if device.type != "cpu":
        return "fp32"
    rates = {precision: matrix_rate(device, dtype, 512) for precision, dtype in DTYPES.items()}
    return "bf16" if rates["bf16"] > rates["fp32"] else "fp32"


def precisions(device: torch.device) -> list[Precision]:
    """Those that are worth training in: bf16 on a GPU; float32 on a CPU, and bf16 where its products are faster, which
    they are not on processors without instructions for them."""
    if device.type == "cuda":
        return ["bf16"]
    return ["fp32", "bf16"] if faster_precision(device) == "bf16" else ["fp32"]


def bandwidth(device: torch.device) -> float:
    """Bytes/s of a copy of 256 MB within the device's memory, what is read and what is written counted."""
    source = torch.ones(COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / median_seconds(lambda: target.copy_(source), device)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(work: Callable[[], object], device: torch.device) -> float:
    """The median time of a call, of samples that are long enough to be timed; after two calls to warm up."""
    once = [_seconds(work, 1, device) for _ in range(2)]
    repeat = math.ceil(SAMPLE_SECONDS / once[-1])
    return statistics.median(_seconds(work, repeat, device) for _ in range(SAMPLES))


@torch.inference_mode()
def _seconds_of_one(product: Product, device: torch.device, dtype: torch.dtype) -> float:
    """The time of one of the `count` products, its operands laid out as it is fastest: row by row, or either of them
    column by column, as the transposed operands of a linear layer and of its gradients are."""
    m, k, n, batch = product.m, product.k, product.n, product.batch
    out = torch.empty(batch, m, n, device=device, dtype=dtype)

    def operand(rows: int, columns: int, transposed: bool) -> Tensor:
        shape = (batch, columns, rows) if transposed else (batch, rows, columns)
        made = torch.randn(shape, device=device).to(dtype)
        return made.mT if transposed else made

    def multiply(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
        if batch > 1:
            return lambda: torch.bmm(a, b, out=out)
        return lambda: torch.mm(a[0], b[0], out=out[0])

    layouts = [
        multiply(operand(m, k, first), operand(k, n, second))
        for first, second in ((False, False), (False, True), (True, False))
    ]
    quickest = min(layouts, key=lambda layout: min(_seconds(layout, 1, device) for _ in range(3)))
    return median_seconds(quickest, device)


def _seconds(work: Callable[[], object], repeat: int, device: torch.device) -> float:
    """The time of a call, from `repeat` of them in a row."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(repeat):
        work()
    synchronise(device)
    return (time.perf_counter() - start) / repeat
