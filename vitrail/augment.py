"""Batched augmentation on the training device: what happens to each image is drawn first, then done to all at once.

Flips and shifts only pick pixels and are done while the bytes are read (`places`); the rest works on the pixels.
Drawing is separate from doing so that the numbers come from the processor's generator whatever the device, and so
that a part of a batch (a micro-batch, another process's share) is augmented exactly as it would be within the whole.

    B batch    S side of the image, in pixels
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from vitrail.recipes import Recipe


@dataclass(frozen=True)
class Draws:
    """What is to be done to each image of a batch."""

    window: Float[Tensor, "B 2"]  # where to cut the square out of a larger image: 0 top or left … 1 bottom or right
    mirrored: Bool[Tensor, " B"]
    angle: Float[Tensor, " B"]  # degrees, counter-clockwise
    shift: Float[Tensor, "B 2"]  # whole pixels, down and right

    def part(self, rows: slice) -> "Draws":
        """The draws of some of the images."""
        return Draws(self.window[rows], self.mirrored[rows], self.angle[rows], self.shift[rows])

    def to(self, device: torch.device) -> "Draws":
        """The same on a device."""
        return Draws(*(send(drawn, device) for drawn in (self.window, self.mirrored, self.angle, self.shift)))


def send(drawn: Tensor, device: torch.device) -> Tensor:
    """A tensor of the processor's on a device, without waiting for what the device still has to do: CUDA copies from
    pinned memory behind that, and from other memory only after it."""
    return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn.to(device)


def draw(recipe: Recipe, batch: int, generator: torch.Generator) -> Draws:
    """Draw what the recipe asks for; everything is drawn, used or not, so that no setting moves another's numbers."""
    window = torch.rand(batch, 2, generator=generator)
    mirrored = torch.rand(batch, generator=generator) < 0.5
    angle = torch.rand(batch, generator=generator) * 2 - 1
    shift = torch.randint(-recipe.crop, recipe.crop + 1, (batch, 2), generator=generator).float()
    return Draws(window, mirrored & recipe.flip, angle * recipe.rotate, shift)


def places(draws: Draws, size: int, recipe: Recipe) -> tuple[Int[Tensor, "B S"], Int[Tensor, "B S"]] | None:
    """Flips and shifts: which row, and which column, of the square cut out of an image each row and column of the
    augmented image shows. None where the recipe asks for neither.

    A shift moves the image, mirrored or not, down and right; what comes in is the reflection of the edge: the same as
    padding and cutting a random square. All of it is picking pixels, so that one read of the bytes does it.
    """
    if not (recipe.flip or recipe.crop):
        return None
    along = torch.arange(size, device=draws.shift.device)
    last = size - 1
    moved = along - draws.shift.long()[:, :, None]  # (B, 2, S)
    rows, columns = (last - (last - moved.abs()).abs()).unbind(1)  # reflected at 0, then at `last`
    return rows, torch.where(draws.mirrored[:, None], last - columns, columns)


def normalise(pixels: Float[Tensor, "B 3 S S"] | UInt8[Tensor, "B 3 S S"]) -> Float[Tensor, "B 3 S S"]:
    """Pixels from 0…255 to -1…1, as the official code feeds them (input_pipeline.py)."""
    return torch.div(pixels, 127.5).sub_(1)


def rotate(pixels: Float[Tensor, "B 3 S S"], angle: Float[Tensor, " B"]) -> Float[Tensor, "B 3 S S"]:
    """Rotate each image about its centre by `angle` degrees counter-clockwise, bilinearly; corners become black."""
    radians = angle * (math.pi / 180)
    cos, sin, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    # From an output position to where its colour is taken: the inverse rotation, y pointing down.
    inverse = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    where = F.affine_grid(inverse, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, where, mode="bilinear", padding_mode="zeros", align_corners=False)
