"""Augmentation does to each image what was drawn for it, as Pillow and NumPy would."""

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.augment import augment, draw, flip, normalise, rotate, shift
from vitrail.recipes import Recipe

SIZE = 16
EVERYTHING = Recipe(image_size=SIZE, flip=True, rotate=15.0, crop=3)


def photos(count: int) -> torch.Tensor:
    """Smooth random images, uint8 (count, 3, SIZE, SIZE): where they are sampled between pixels hardly matters."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(5)) * 255
    return torch.nn.functional.interpolate(coarse, SIZE, mode="bicubic").clamp(0, 255).to(torch.uint8)


def test_flips_are_pillows() -> None:
    images = photos(4)
    flipped = flip(images, torch.tensor([True, False, True, False]))
    for image, result, mirrored in zip(images, flipped, (True, False, True, False), strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        expected = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else picture
        np.testing.assert_array_equal(result.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_shifts_are_reflected_crops_of_numpy() -> None:
    images, most = photos(5).float(), 3
    by = torch.tensor([[0, 0], [3, -3], [-2, 1], [-3, -3], [1, 3]]).float()
    shifted = shift(images, by, most)
    for image, result, (down, right) in zip(images, shifted, by.int().tolist(), strict=True):
        padded = np.pad(image.numpy(), ((0, 0), (most, most), (most, most)), mode="reflect")
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
    images = photos(8)
    plain = Recipe(image_size=SIZE)
    draws = draw(plain, 8, torch.Generator().manual_seed(0))
    assert torch.equal(augment(images, draws, plain), images.float())
    one = draw(EVERYTHING, 8, torch.Generator().manual_seed(0))
    other = draw(Recipe(image_size=SIZE, rotate=15.0), 8, torch.Generator().manual_seed(0))
    assert torch.equal(one.angle, other.angle)  # the other settings do not move its numbers


def test_a_part_of_a_batch_is_augmented_as_within_the_whole() -> None:
    images = photos(6)
    draws = draw(EVERYTHING, 6, torch.Generator().manual_seed(1))
    whole = augment(images, draws, EVERYTHING)
    part = augment(images[2:5], draws.part(slice(2, 5)), EVERYTHING)
    assert torch.equal(part, whole[2:5])
    assert not torch.equal(part, images[2:5].float())
