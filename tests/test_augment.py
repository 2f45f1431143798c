"""Augmentation does to each image what was drawn for it, as Pillow and NumPy would."""

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.augment import Draws, draw, normalise, places, rotate
from vitrail.recipes import Recipe

SIZE = 16
EVERYTHING = Recipe(image_size=SIZE, flip=True, rotate=15.0, crop=3)


def photos(count: int) -> torch.Tensor:
    """Smooth random images, uint8 (count, 3, SIZE, SIZE): where they are sampled between pixels hardly matters."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(5)) * 255
    return torch.nn.functional.interpolate(coarse, SIZE, mode="bicubic").clamp(0, 255).to(torch.uint8)


def moved(images: torch.Tensor, mirrored: list[bool], by: list[list[int]], recipe: Recipe) -> torch.Tensor:
    """The images, mirrored, then shifted."""
    count = len(images)
    draws = Draws(torch.zeros(count, 2), torch.tensor(mirrored), torch.zeros(count), torch.tensor(by).float())
    found = places(draws, SIZE, recipe)
    assert found is not None
    return torch.stack([image[:, rows][:, :, columns] for image, rows, columns in zip(images, *found, strict=True)])


def test_flips_are_pillows() -> None:
    images, which = photos(4), [True, False, True, False]
    flipped = moved(images, which, [[0, 0]] * 4, Recipe(image_size=SIZE, flip=True))
    for image, result, mirrored in zip(images, flipped, which, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        expected = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else picture
        np.testing.assert_array_equal(result.permute(1, 2, 0).numpy(), np.asarray(expected))


@pytest.mark.parametrize("most", [3, SIZE - 1])
@pytest.mark.parametrize("mirrored", [False, True])
def test_shifts_are_reflected_crops_of_numpy(most: int, mirrored: bool) -> None:
    images = photos(5)
    by = [[0, 0], [most, -most], [-2, 1], [-most, -most], [1, most]]
    shifted = moved(images, [mirrored] * 5, by, Recipe(image_size=SIZE, flip=True, crop=most))
    for image, result, (down, right) in zip(images.numpy(), shifted, by, strict=True):
        padded = np.pad(image[:, :, ::-1] if mirrored else image, ((0, 0), (most, most), (most, most)), mode="reflect")
        expected = padded[:, most - down : most - down + SIZE, most - right : most - right + SIZE]
        np.testing.assert_array_equal(result.numpy(), expected)


@pytest.mark.parametrize("angle", [-30.0, -7.5, 0.0, 10.0, 90.0])
def test_rotations_are_pillows(angle: float) -> None:
    images = photos(3)
    rotated = rotate(images.float(), torch.full((3,), angle))
    for image, result in zip(images, rotated, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        expected = np.asarray(picture.rotate(angle, Image.Resampling.BILINEAR), dtype=np.float32)
        # Pillow takes a position just outside for black, where we fade into black: the rim is left out.
        inner = slice(4, -4)
        difference = np.abs(result.permute(1, 2, 0).numpy() - expected)[inner, inner]
        assert difference.max() <= 1.01  # Pillow rounds to whole levels


def test_corners_become_black() -> None:
    turned = rotate(torch.full((1, 3, SIZE, SIZE), 200.0), torch.tensor([45.0]))
    assert not turned[..., 0, 0].any()
    assert (turned[..., SIZE // 2, SIZE // 2] > 199).all()


def test_pixels_are_normalised_as_in_the_official_code() -> None:
    levels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3).expand(1, 3, 3, 3)
    torch.testing.assert_close(normalise(levels)[0, 0, 0], torch.tensor([-1.0, -0.6, 1.0]))


def test_what_is_drawn_stays_in_its_range_and_fills_it() -> None:
    draws = draw(EVERYTHING, 4000, torch.Generator().manual_seed(0))
    assert 0.45 < draws.mirrored.float().mean() < 0.55
    assert draws.angle.abs().max() <= 15
    assert draws.angle.min() < -14
    assert draws.angle.max() > 14
    assert set(draws.shift.unique().tolist()) == {-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0}
    assert draws.window.min() >= 0
    assert draws.window.max() < 1


def test_what_a_recipe_leaves_out_is_left_alone() -> None:
    plain = Recipe(image_size=SIZE, rotate=15.0)
    one = draw(EVERYTHING, 8, torch.Generator().manual_seed(0))
    other = draw(plain, 8, torch.Generator().manual_seed(0))
    assert torch.equal(one.angle, other.angle)  # the other settings do not move its numbers
    assert not other.mirrored.any()
    assert not other.shift.any()
    assert places(other, SIZE, plain) is None
