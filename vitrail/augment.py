"""Batched augmentation on the training device: what happens to each image is drawn first, then done to all at once.

Drawing is separate from doing so that the numbers come from the processor's generator whatever the device, and so
that a part of a batch (a micro-batch, another process's share) is augmented exactly as it would be within the whole.

    B batch    S side of the image, in pixels
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
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


def draw(recipe: Recipe, batch: int, generator: torch.Generator) -> Draws:
    """Draw what the recipe asks for; everything is drawn, used or not, so that no setting moves another's numbers."""
    window = torch.rand(batch, 2, generator=generator)
    mirrored = torch.rand(batch, generator=generator) < 0.5
    angle = torch.rand(batch, generator=generator) * 2 - 1
    shift = torch.randint(-recipe.crop, recipe.crop + 1, (batch, 2), generator=generator).float()
    return Draws(window, mirrored & recipe.flip, angle * recipe.rotate, shift)


def augment(images: UInt8[Tensor, "B 3 S S"], draws: Draws, recipe: Recipe) -> Float[Tensor, "B 3 S S"]:
    """Augmented images, still from 0 to 255; see `normalise`."""
    device = images.device
    if recipe.flip:
        images = flip(images, draws.mirrored.to(device))
    pixels = images.float()
    if recipe.crop:
        pixels = shift(pixels, draws.shift.to(device), recipe.crop)
    if recipe.rotate:
        pixels = rotate(pixels, draws.angle.to(device))
    return pixels


def normalise(pixels: Float[Tensor, "B 3 S S"] | UInt8[Tensor, "B 3 S S"]) -> Float[Tensor, "B 3 S S"]:
    """Pixels from 0…255 to -1…1, as the official code feeds them (input_pipeline.py)."""
    return pixels.float() / 127.5 - 1


def flip(images: UInt8[Tensor, "B 3 S S"], mirrored: Bool[Tensor, " B"]) -> UInt8[Tensor, "B 3 S S"]:
    """Mirror left and right where `mirrored`."""
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def shift(pixels: Float[Tensor, "B 3 S S"], by: Float[Tensor, "B 2"], most: int) -> Float[Tensor, "B 3 S S"]:
    """Move each image down and right by `by` pixels, none of them more than `most`; what comes in is the reflection
    of the edge. The same as padding by `most` and cutting a random square."""
    size = pixels.shape[-1]
    padded = F.pad(pixels, (most, most, most, most), mode="reflect")
    along = torch.arange(size, device=pixels.device)
    rows, columns = (most + along - by[:, axis, None].long() for axis in (0, 1))  # each (B, S)
    picked = padded.permute(0, 2, 3, 1)[
        torch.arange(len(pixels), device=pixels.device)[:, None, None], rows[:, :, None], columns[:, None, :]
    ]
    return picked.permute(0, 3, 1, 2)


def rotate(pixels: Float[Tensor, "B 3 S S"], angle: Float[Tensor, " B"]) -> Float[Tensor, "B 3 S S"]:
    """Rotate each image about its centre by `angle` degrees counter-clockwise, bilinearly; corners become black."""
    radians = angle * (math.pi / 180)
    cos, sin, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    # From an output position to where its colour is taken: the inverse rotation, y pointing down.
    inverse = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    where = F.affine_grid(inverse, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, where, mode="bilinear", padding_mode="zeros", align_corners=False)
