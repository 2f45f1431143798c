"""Order and augmentation are functions of (seed, step); every image is seen as often as every other."""

import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from vitrail.augment import draw, places, rotate
from vitrail.batches import Pixels, TrainingBatches, evaluation_batches, generator
from vitrail.cache import Images
from vitrail.errors import BadInput
from vitrail.recipes import Recipe

CPU = torch.device("cpu")
RECIPE = Recipe(image_size=8, batch_size=6, epochs=3, flip=True, rotate=10.0, crop=1, seed=7)


def split(sizes: list[tuple[int, int]]) -> Images:
    """Images of those heights and widths, of random pixels; image i is of class i modulo 3."""
    random = np.random.default_rng(0)
    pixels = [random.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in sizes]
    ends = np.cumsum([array.size for array in pixels])
    return Images(
        pixels=np.concatenate([array.ravel() for array in pixels]),
        offsets=np.concatenate([[0], ends[:-1]]).astype(np.int64),
        sizes=np.array(sizes, np.int32),
        labels=np.arange(len(sizes)) % 3,
        names=tuple(map(str, range(len(sizes)))),
    )


def batches_of(images: Images, recipe: Recipe) -> TrainingBatches:
    return TrainingBatches(Pixels(images, recipe.image_size, CPU), recipe)


SQUARES = split([(8, 8)] * 20)
MIXED = split([(8, 8), (9, 8), (8, 12), (16, 9), (9, 9), (11, 30)])


def test_every_image_comes_once_an_epoch_across_the_borders_of_batches() -> None:
    batches = batches_of(SQUARES, RECIPE)
    assert batches.steps == 10  # 3 epochs of 20 images are 60, in batches of 6
    order = torch.cat([batches.order(step) for step in range(batches.steps)]).tolist()
    epochs = [order[start : start + 20] for start in range(0, 60, 20)]
    assert all(Counter(epoch) == Counter(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != sorted(epochs[2])
    assert [batches.first_step(epoch) for epoch in range(4)] == [0, 4, 7, 10]


def test_a_batch_larger_than_the_data_set_is_filled() -> None:
    batches = batches_of(SQUARES, replace(RECIPE, batch_size=50))
    assert batches.steps == 2
    assert set(Counter(batches.order(0).tolist()).values()) == {2, 3}


def test_a_step_is_the_same_whatever_was_done_before() -> None:
    batches, again = batches_of(MIXED, RECIPE), batches_of(MIXED, RECIPE)
    sequence = [next(batches.parts(step)) for step in range(3)]
    images, labels = next(again.parts(2))
    assert torch.equal(images, sequence[2][0])
    assert torch.equal(labels, sequence[2][1])
    other = next(batches_of(MIXED, replace(RECIPE, seed=8)).parts(2))
    assert not torch.equal(other[0], images)


def test_the_parts_of_a_batch_make_up_the_whole() -> None:
    whole, labels = next(batches_of(MIXED, RECIPE).parts(1))
    parts = list(batches_of(MIXED, replace(RECIPE, accumulate=3)).parts(1))
    assert [len(part) for part, _ in parts] == [2, 2, 2]
    assert torch.equal(torch.cat([part for part, _ in parts]), whole)
    assert torch.equal(torch.cat([part for _, part in parts]), labels)


def test_a_batch_is_divided_into_as_few_more_equal_parts_as_there_can_be() -> None:
    batches = batches_of(SQUARES, replace(RECIPE, batch_size=12, accumulate=2))
    found = []
    while batches.divided_by < 12:
        batches.divide()
        found.append((batches.divided_by, len(list(batches.parts(0)))))
    assert found == [(3, 3), (4, 4), (6, 6), (12, 12)]
    with pytest.raises(BadInput, match="does not hold what a single image takes"):
        batches.divide()


def test_what_making_batches_takes_is_counted_once() -> None:
    batches = batches_of(MIXED, RECIPE)
    began = time.perf_counter()
    list(batches.parts(0))
    assert 0 < batches.watch.read() <= time.perf_counter() - began
    assert batches.watch.read() == 0


def test_squares_are_cut_out_of_images_of_many_sizes() -> None:
    pixels = Pixels(MIXED, 8, CPU)
    index = torch.arange(6)
    for window in (0.0, 0.5, 0.999):
        cut = pixels.cut(index, torch.full((6, 2), window))
        for number, square in enumerate(cut):
            image = MIXED.image(number)
            top, left = (int(window * (side - 8 + 1)) for side in image.shape[:2])
            np.testing.assert_array_equal(square.permute(1, 2, 0).numpy(), image[top : top + 8, left : left + 8])


def test_rows_and_columns_are_those_asked_for() -> None:
    random = torch.Generator().manual_seed(0)
    rows, columns = (torch.randint(0, 8, (6, 8), generator=random) for _ in range(2))
    for images in (SQUARES, MIXED):
        pixels, index, window = Pixels(images, 8, CPU), torch.arange(6), torch.full((6, 2), 0.5)
        squares = pixels.cut(index, window)
        expected = [square[:, rows[i]][:, :, columns[i]] for i, square in enumerate(squares)]
        assert torch.equal(pixels.cut(index, window, (rows, columns)), torch.stack(expected))


def test_a_batch_is_flipped_shifted_rotated_and_normalised_as_drawn() -> None:
    pixels = Pixels(MIXED, 8, CPU)
    for recipe in (RECIPE, replace(RECIPE, rotate=0.0), replace(RECIPE, flip=False, crop=0)):
        batches = TrainingBatches(pixels, recipe)
        index, draws = batches.order(4), draw(recipe, 6, generator(recipe.seed, "augmentation", 4))
        images = pixels.cut(index, draws.window, places(draws, 8, recipe)).float()
        expected = rotate(images, draws.angle) if recipe.rotate else images
        assert torch.equal(next(batches.parts(4))[0], expected / 127.5 - 1)


def test_images_of_the_right_size_take_the_short_way_to_the_same_pixels() -> None:
    index = torch.tensor([3, 0, 19, 3])
    short, long = Pixels(SQUARES, 8, CPU), Pixels(SQUARES, 8, CPU)
    assert short.uniform
    long.uniform = False
    window = torch.rand(4, 2)
    assert torch.equal(short.cut(index, window), long.cut(index, window))
    in_order = torch.arange(8).expand(4, 8)
    assert torch.equal(short.cut(index, window), short.cut(index, window, (in_order, in_order)))
    few = Pixels(SQUARES.take(np.array([5, 2])), 8, CPU, beside=short)  # a slice of the images over the same bytes
    assert torch.equal(few.cut(torch.tensor([1]), window[:1])[0], short.cut(torch.tensor([2]), window[:1])[0])


def test_evaluation_sees_each_image_once_the_last_batch_included() -> None:
    batches = list(evaluation_batches(Pixels(SQUARES, 8, CPU), 6))
    assert [len(labels) for _, labels in batches] == [6, 6, 6, 2]
    assert {images.shape for images, _ in batches} == {(6, 3, 8, 8)}  # one shape, so that nothing is compiled twice
    assert [images.shape[0] for images, _ in evaluation_batches(Pixels(MIXED, 8, CPU), 100)] == [6]
    assert torch.cat([labels for _, labels in batches]).tolist() == SQUARES.labels.tolist()
    first = torch.from_numpy(SQUARES.image(0)).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.equal(batches[0][0][0], first)
