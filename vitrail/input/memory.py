"""What a training step takes of the machine's memory, and what is free: where a CPU runs out of it, the system ends the
process without a word, so that it has to be known before.

    T tokens    D hidden_size    F mlp_dim    H heads    S side of the image, in pixels
"""

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from vitrail.errors import BadInput
from vitrail.input.batches import equal_parts
from vitrail.progress import counted, say
from vitrail.settings import Recipe
from vitrail.vit.config import ViTConfig
from vitrail.vit.fused import PLAIN_ATTENTION_TOKENS
from vitrail.vit.models import Config, build

SPARED = 0.1  # of what is free: for other processes, and for what is counted here too low
# Memory that glibc keeps (process.keep_freed_memory) has holes: in steps of models of 65 to 1,024 tokens, the process
# had 1.06 to 1.31 times what is counted here at most; where none is kept, 0.70 to 0.98 times, of up to 2,304 tokens.
HOLES = 1.3
COPIES = 6  # of an image in float32, while it is cut out, augmented and divided into patches
EVALUATED = 200  # images at a time in evaluation,
EVALUATION_BYTES = 2**30  # or as many as take this
# Where Linux says what a control group may take and has taken, and what stands before the names of what is in files of
# that, which give way; by what a line of /proc/self/cgroup has for controllers: in version 2, nothing.
GROUPS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", ""),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}


def activation_bytes(config: ViTConfig, recipe: Recipe) -> int:
    """What a training step on a CPU has of one image in memory when it has most: behind the last block.

    A block keeps for its gradient 8 T D numbers (what its two norms read, and the layers behind these; queries, keys
    and values; what attention gives), 2 T F (the MLP's hidden layer, before and after its GELU) and, where attention is
    written down, which it is up to 256 tokens, H T². Dropout adds masks of 2 T D + T F, layer_scale the 2 T D that it
    scales. A last block that is asked for the class token alone keeps 4 T D: what its norm reads and gives, keys and
    values. With checkpoint_activations, each block keeps the T D that enter it, and one at a time all.

    Beside that, there are gradients of one block: of the hidden layer, 2 T F, or of attention, 2 H T². And there are
    the 3 S² numbers of the image, in `COPIES`.

    A number has 4 bytes; with bf16 it has 2, but for the image and the 2 T D that norms read. Patch dropout leaves
    fewer tokens. A convolutional stem keeps what each of its convolutions gives, before and behind norm and ReLU, the
    sum behind each of its units, and what its projection reads. The ResNet of a hybrid is not counted.
    """
    width, hidden, small = config.hidden_size, config.mlp_dim, 2 if recipe.precision == "bf16" else 4
    tokens = config.num_prefix_tokens + config.kept_patches(config.grid**2)
    attention = config.num_heads * tokens**2 if tokens <= PLAIN_ATTENTION_TOKENS else 0
    numbers = 6 * tokens * width + 2 * tokens * hidden + attention
    numbers += (2 * tokens * width + tokens * hidden) * (config.dropout > 0)
    numbers += 2 * tokens * width * (config.layer_scale is not None)
    block, layers = small * numbers + 4 * 2 * tokens * width, config.num_layers
    if recipe.checkpoint_activations:
        kept = layers * 4 * tokens * width + block
    elif config.classifier == "token":
        kept = (layers - 1) * block + 4 * 4 * tokens * width
    else:
        kept = layers * block
    if config.stem == "convolutions":
        maps = sum(width * (config.image_size >> level) ** 2 for level, width in enumerate(config.stem_widths, start=1))
        kept += small * (2 * maps + config.grid**2 * width)
        kept += small * 3 * config.stem_units * config.unit_width * (2 * config.grid) ** 2
    return kept + small * 2 * max(tokens * hidden, attention) + COPIES * 4 * 3 * config.image_size**2


def weight_bytes(config: ViTConfig, recipe: Recipe) -> int:
    """What weights, their gradients, the optimizer's state and the running average take, in float32."""
    copies = 2 + (1 if recipe.optimizer == "sgd" else 2) + (recipe.ema_decay > 0)
    return 4 * parameters(config) * copies


@lru_cache
def parameters(config: Config) -> int:
    """How many a model of that shape has."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in build(config).parameters())


def fit(recipe: Recipe, config: Config) -> Recipe:
    """The recipe, with batches divided into as many parts as let a training step on this machine's CPU stay within the
    memory that is free; that is said. Of a ResNet and of pre-training it is not known what they take.

    Raises:
        BadInput: a single image, or a pair where pairs are mixed, takes more. The message says which settings would do.
    """
    free = free_memory()
    if free is None or not isinstance(config, ViTConfig) or recipe.self_supervised:
        return recipe
    batch, least = recipe.batch_size, recipe.least_images
    if (room := images_that_fit(recipe, config, free)) * recipe.accumulate >= batch:
        return recipe
    if room < least:
        raise BadInput(too_large(recipe, config, free))
    together = batch // recipe.accumulate
    parts = equal_parts(batch // least, max(recipe.accumulate, -(-batch // room)))
    say(
        f"{together:,} images of {counted(config.num_tokens, 'token')} at a time would need "
        f"{gigabytes(needed(recipe, config, together))} of memory, and {gigabytes(free)} are free: each batch is "
        f"worked through in {parts} parts of {counted(batch // parts, 'image')}"
    )
    return replace(recipe, accumulate=parts)


def needed(recipe: Recipe, config: ViTConfig, images: int) -> float:
    """Bytes that have to be free for a training step on that many images at a time."""
    each = activation_bytes(config, recipe) * (1 if recipe.checkpoint_activations else HOLES)
    return (weight_bytes(config, recipe) + images * each) / (1 - SPARED)


def images_that_fit(recipe: Recipe, config: ViTConfig, free: int) -> int:
    """How many images a training step has room for, in as many bytes as are free."""
    none = needed(recipe, config, 0)
    return max(int((free - none) / (needed(recipe, config, 1) - none)), 0)


def too_large(recipe: Recipe, config: ViTConfig, free: int) -> str:
    """Why not even one image fits, and what would do."""
    least, cell = recipe.least_images, config.cell
    again = replace(recipe, checkpoint_activations=True)
    sizes = range(cell, config.image_size, cell)
    mends = ["--checkpoint-activations"] if images_that_fit(again, config, free) >= least else []
    first = bisect_left(sizes, True, key=lambda n: images_that_fit(recipe, replace(config, image_size=n), free) < least)
    mends += [f"--image-size {size}" for size in sizes[:first][-1:]]
    return (
        f"a training step on {counted(least, 'image')} of {config.image_size} pixels, each of which is "
        f"{counted(config.num_tokens, 'token')}, needs {gigabytes(needed(recipe, config, least))} of memory, and "
        f"{gigabytes(free)} are free; {' or '.join(mends) or 'a smaller model'} would do."
    )


def gigabytes(count: float) -> str:
    """`1.5 GB`."""
    return f"{count / 1e9:,.1f} GB"


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can be taken without anything being swapped out or ended: what Linux calls available, or less where a
    container or another control group that the process is in has less left. None where the system does not say.

    Args:
        root: where `proc` and `sys` are.
    """
    try:
        said = dict(line.split(":", 1) for line in (root / "proc" / "meminfo").read_text().splitlines())
        return min([1024 * int(said["MemAvailable"].split()[0]), *left_to_groups(root)])
    except (OSError, ValueError, KeyError):
        return None


def left_to_groups(root: Path) -> Iterator[int]:
    """Bytes that are left to each control group that the process is in, of those that have a limit."""
    path = root / "proc" / "self" / "cgroup"
    for line in path.read_text().splitlines() if path.is_file() else []:
        _, controllers, own = line.split(":", 2)
        if controllers not in GROUPS:
            continue
        where, limit, taken, before = GROUPS[controllers]
        top, names = root / where, own.strip("/").split("/")
        for depth in range(len(names) + 1):
            group = top.joinpath(*names[:depth])
            with suppress(OSError, ValueError, KeyError):  # not seen from within a container, or without a limit
                stat = dict(entry.split() for entry in (group / "memory.stat").read_text().splitlines())
                files = sum(int(stat[f"{before}{which}_file"]) for which in ("active", "inactive"))
                yield int((group / limit).read_text()) - int((group / taken).read_text()) + files


def images_at_once(model: nn.Module) -> int:
    """How many images evaluation gives to a model at a time: `EVALUATED`, or fewer where a block of a Vision
    Transformer, which then has 4 T D + 2 T F numbers of each, would take more than `EVALUATION_BYTES`. It does not hang
    on what is free: figures are to be the same bits everywhere."""
    config = getattr(model, "config", None)
    if not isinstance(config, ViTConfig):
        return EVALUATED
    each = 4 * (config.num_tokens * (4 * config.hidden_size + 2 * config.mlp_dim) + 3 * config.image_size**2)
    return min(max(EVALUATION_BYTES // each, 1), EVALUATED)
