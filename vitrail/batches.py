"""Batches on the training device. Order and augmentation are pure functions of (seed, step): nothing has to be saved
to go on in the middle of an epoch, and nothing depends on how a batch is divided.

    B batch    S side of the image, in pixels
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from vitrail.augment import augment, draw, normalise
from vitrail.cache import Images
from vitrail.recipes import Recipe

STREAMS = {"order": 0, "augmentation": 1, "dropout": 2}


def stream_seed(seed: int, stream: Literal["order", "augmentation", "dropout"], number: int) -> int:
    """A seed of its own for each use of randomness and each step or epoch `number`."""
    return int(np.random.SeedSequence([seed, STREAMS[stream], number]).generate_state(1, np.uint64)[0] >> 1)


def generator(seed: int, stream: Literal["order", "augmentation", "dropout"], number: int) -> torch.Generator:
    """A fresh generator, on the processor whatever the device, so that every device draws the same numbers."""
    return torch.Generator().manual_seed(stream_seed(seed, stream, number))


class Pixels:
    """The bytes of a split on a device, from which squares are cut.

    Args:
        images: the split; its images are at least `image_size` high and wide.
        image_size: S.
        device: where the bytes go, all of them, once.
        beside: another split over the same bytes, which are then not sent a second time.
    """

    def __init__(self, images: Images, image_size: int, device: torch.device, beside: "Pixels | None" = None) -> None:
        self.size = image_size
        self.device = device
        self.labels = torch.from_numpy(images.labels).to(device)
        self.bytes: UInt8[Tensor, " bytes"] = (
            torch.from_numpy(images.pixels).to(device) if beside is None else beside.bytes
        )
        self.offsets = torch.from_numpy(images.offsets).to(device)
        self.sizes = torch.from_numpy(images.sizes).to(device)
        area = image_size * image_size * 3
        # Where all are of the right size already, cutting is only picking rows of one array.
        self.uniform = bool((images.sizes == image_size).all()) and not (images.offsets % area).any()

    def __len__(self) -> int:
        return len(self.labels)

    def cut(self, index: Int[Tensor, " B"], window: Float[Tensor, "B 2"]) -> UInt8[Tensor, "B 3 S S"]:
        """A square of each image of `index`; `window` says where, from 0 (top, left) to 1 (bottom, right)."""
        size = self.size
        if self.uniform:
            area = size * size * 3
            rows = self.bytes[: len(self.bytes) // area * area].view(-1, size, size, 3)
            return rows[self.offsets[index] // area].permute(0, 3, 1, 2)
        heights, widths = self.sizes[index].long().unbind(1)
        room = torch.stack([heights - size, widths - size], 1)
        top, left = (window * (room + 1)).long().minimum(room).unbind(1)
        along = torch.arange(size, device=self.device)
        line = (top[:, None] + along) * widths[:, None]  # (B, S): where each row starts, in pixels
        pixel = line[:, :, None] + (left[:, None] + along)[:, None, :]  # (B, S, S)
        byte = self.offsets[index][:, None, None] + pixel * 3
        return torch.stack([self.bytes[byte + channel] for channel in range(3)], dim=1)


class TrainingBatches:
    """The endless, shuffled and augmented sequence of batches that a recipe trains on.

    Epochs follow one another without a gap: step s takes the images from s·B to (s + 1)·B of that sequence, so that
    every image is seen as often as every other, and all batches have the same size.
    """

    def __init__(self, pixels: Pixels, recipe: Recipe) -> None:
        self.pixels = pixels
        self.recipe = recipe
        self.permutation = lru_cache(maxsize=2)(self._permutation)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.first_step(self.recipe.epochs)

    def first_step(self, epoch: int) -> int:
        """The first step that belongs to the epoch (from 0): the one before it saw the last epoch's last image."""
        return -(-epoch * len(self.pixels) // self.recipe.batch_size)

    def _permutation(self, epoch: int) -> Int[Tensor, " images"]:
        return torch.randperm(len(self.pixels), generator=generator(self.recipe.seed, "order", epoch))

    def order(self, step: int) -> Int[Tensor, " B"]:
        """Which images the step takes."""
        position = np.arange(step * self.recipe.batch_size, (step + 1) * self.recipe.batch_size)
        epochs, places = np.divmod(position, len(self.pixels))
        return torch.cat([self.permutation(int(e))[torch.from_numpy(places[epochs == e])] for e in np.unique(epochs)])

    def parts(self, step: int) -> Iterator[tuple[Float[Tensor, "b 3 S S"], Int[Tensor, " b"]]]:
        """Normalised images and labels of the step's batch, in `accumulate` equal parts."""
        recipe = self.recipe
        index = self.order(step)
        draws = draw(recipe, len(index), generator(recipe.seed, "augmentation", step))
        size = len(index) // recipe.accumulate
        for start in range(0, len(index), size):
            rows = slice(start, start + size)
            part, todo = index[rows].to(self.pixels.device), draws.part(rows)
            images = self.pixels.cut(part, todo.window.to(self.pixels.device))
            yield normalise(augment(images, todo, recipe)), self.pixels.labels[part]


def evaluation_batches(pixels: Pixels, batch_size: int) -> Iterator[tuple[Float[Tensor, "b 3 S S"], Int[Tensor, " b"]]]:
    """Every image once, in order, its centre cut out; the last batch is as long as what is left."""
    for start in range(0, len(pixels), batch_size):
        index = torch.arange(start, min(start + batch_size, len(pixels)), device=pixels.device)
        centre = torch.full((len(index), 2), 0.5, device=pixels.device)
        yield normalise(pixels.cut(index, centre)), pixels.labels[index]
