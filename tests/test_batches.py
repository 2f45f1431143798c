"""Order and augmentation are functions of (seed, step); every image is seen as often as every other."""

import time
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vitrail.data.cache import Images
from vitrail.errors import BadInput
from vitrail.input.augment import draw, places, rotate
from vitrail.input.batches import Targets, TrainingBatches, evaluation_batches, generator
from vitrail.input.pixels import Pixels
from vitrail.settings import Recipe

CPU = torch.device("cpu")
RECIPE = Recipe(image_size=8, batch_size=6, epochs=3, flip="random", rotate=10.0, crop=1, seed=7)


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


def same(one: Targets, other: Targets) -> bool:
    return all(torch.equal(value, vars(other)[name]) for name, value in vars(one).items())


# All that there is to ask for, on pairs
MIXING = replace(
    RECIPE, batch_size=12, flip="alternate", resized_crop=0.3, policy="rand-augment", jitter=0.2, erase=0.5, mixup=0.2,
    cutmix=1.0, repeats=3,
)  # fmt: skip
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


def sides(batches: TrainingBatches) -> list[int]:
    return [batches.stretch(step).side for step in range(batches.steps)]


def test_images_are_smaller_in_the_first_share_of_the_steps() -> None:
    recipe = replace(RECIPE, batch_size=12, patch_size=2, first_size=4, first_share=0.7)
    growing, full = batches_of(SQUARES, recipe), batches_of(SQUARES, replace(recipe, first_size=None))
    assert sides(growing) == [4, 4, 4, 4, 8]  # 0.7 of 5 steps are 3.5
    for step in range(growing.steps + 1):
        assert growing.pixels_left(step) == sum(12 * side**2 for side in sides(growing)[step:])
        assert full.pixels_left(step) == 12 * 64 * (full.steps - step)
    small, large = next(growing.parts(0))[0], next(full.parts(0))[0]
    rows = torch.zeros(4, 10)
    for row in range(4):  # the triangle of an antialiased bilinear kernel, cut off at the edges
        rows[row, 2 * row : 2 * row + 4] = torch.tensor([1.0, 3.0, 3.0, 1.0])
    rows = rows[:, 1:9] / rows[:, 1:9].sum(1, keepdim=True)
    torch.testing.assert_close(small, rows @ large @ rows.T)
    assert torch.equal(next(growing.parts(4))[0], next(full.parts(4))[0])


def test_squares_are_cut_out_of_images_between_the_small_and_the_whole_ones() -> None:
    recipe = replace(RECIPE, batch_size=6, patch_size=2, crop=2, crop_size=4, last_share=0.25)
    cut, whole = batches_of(SQUARES, recipe), batches_of(SQUARES, replace(recipe, crop_size=None))
    assert cut.steps == 10
    assert sides(cut) == 7 * [4] + 3 * [8]  # 0.25 of 10 steps are 2.5
    assert torch.equal(next(cut.parts(6))[0], next(whole.parts(6))[0][:, :, 2:6, 2:6])
    assert torch.equal(next(cut.parts(7))[0], next(whole.parts(7))[0])
    grown = batches_of(SQUARES, replace(recipe, first_size=6, first_share=0.3))
    assert sides(grown) == 3 * [6] + 4 * [4] + 3 * [8]
    assert [grown.stretch(step).whole for step in range(10)] == 3 * [6] + 7 * [8]  # what is cut out is not shrunk
    for step in range(11):
        assert grown.pixels_left(step) == sum(6 * side**2 for side in sides(grown)[step:])
    # Squares as large as the small images are cut out of large ones all the same
    alike = batches_of(SQUARES, replace(recipe, first_size=4, first_share=0.3))
    assert [alike.stretch(step).whole for step in range(10)] == 3 * [4] + 7 * [8]
    assert torch.equal(next(alike.parts(6))[0], next(cut.parts(6))[0])
    # Shares that rounding makes overlap: the first has its steps
    short = batches_of(SQUARES, replace(recipe, epochs=1, first_size=6, first_share=0.51, last_share=0.45))
    assert short.steps == 4
    assert sides(short) == [6, 6, 6, 8]


def test_a_batch_larger_than_the_data_set_is_filled() -> None:
    batches = batches_of(SQUARES, replace(RECIPE, batch_size=50))
    assert batches.steps == 2
    assert set(Counter(batches.order(0).tolist()).values()) == {2, 3}


@pytest.mark.parametrize("recipe", [RECIPE, MIXING], ids=["few", "all"])
def test_a_step_is_the_same_whatever_was_done_before(recipe: Recipe) -> None:
    batches, again = batches_of(MIXED, recipe), batches_of(MIXED, recipe)
    sequence = [next(batches.parts(step)) for step in range(3)]
    images, targets = next(again.parts(2))
    assert torch.equal(images, sequence[2][0])
    assert same(targets, sequence[2][1])
    other = next(batches_of(MIXED, replace(recipe, seed=8)).parts(2))
    assert not torch.equal(other[0], images)


@pytest.mark.parametrize("recipe", [RECIPE, MIXING], ids=["few", "all"])
def test_the_parts_of_a_batch_make_up_the_whole(recipe: Recipe) -> None:
    whole, targets = next(batches_of(MIXED, recipe).parts(1))
    parts = list(batches_of(MIXED, replace(recipe, accumulate=3)).parts(1))
    assert {len(part) for part, _ in parts} == {recipe.batch_size // 3}
    assert torch.equal(torch.cat([part for part, _ in parts]), whole)
    assert same(Targets(*(torch.cat([vars(part)[name] for _, part in parts]) for name in vars(targets))), targets)


@pytest.mark.parametrize(
    ("images", "settings", "digest"),
    [
        ("squares", {}, "3609433bbc67dacf040956bee3a26bba97ec922e595bbb89e02a3cf4fcc097f2"),
        ("mixed", {}, "bb6ebe6586207ae600dc85dbec6293a52f70ccd62542e3c728aa744fc8815bd8"),
        ("squares", {"flip": "random", "seed": 3}, "7c728b17981102615219d97e7f2cae9d6e4b0b5e0d634ee54e58375c6d11cd9c"),
        ("mixed", {"flip": "random", "seed": 3}, "6ac4e8bcd7adde32fb52288dcf98614eadb517ffea112f7cbf3c1df6ad52ec2f"),
        (
            "squares", {"flip": "random", "crop": 4, "seed": 5},
            "650e76f739affb5b4b1ed0035a5e3427e9dfdce35079ab76578e05f66fed9902",
        ),
        (
            "mixed", {"flip": "random", "crop": 4, "seed": 5},
            "de33eaac1157d00c960982f67bc8360e15f9fa7bdaf48bcff7c06c353897490f",
        ),
    ],
)  # fmt: skip
def test_batches_are_those_of_the_first_release(images: str, settings: dict[str, Any], digest: str) -> None:
    """Recorded before there was more augmentation than flips, shifts and rotation. Of rotation, which processors round
    differently, test_augment.py has the angles, and the test below what is done with them."""
    squares, mixed = [(16, 16)] * 40, [(16, 16), (17, 16), (16, 24), (32, 18), (18, 18), (22, 60)]
    recipe = Recipe(image_size=16, batch_size=12, **settings)
    batches, found = batches_of(split(squares if images == "squares" else mixed), recipe), sha256()
    for step in (0, 1, 5):
        pixels, targets = next(batches.parts(step))
        found.update(pixels.contiguous().numpy().tobytes() + targets.labels.numpy().tobytes())
    assert found.hexdigest() == digest


def test_an_image_is_what_it_shows_unless_it_is_mixed() -> None:
    for recipe in (RECIPE, replace(MIXING, mixup=0.0, cutmix=0.0)):
        batches = batches_of(SQUARES, recipe)
        targets = next(batches.parts(1))[1]
        assert torch.equal(targets.labels, torch.from_numpy(SQUARES.labels)[batches.order(1)])
        assert torch.equal(targets.others, targets.labels)
        assert (targets.share == 1).all()


def test_a_mixed_image_is_a_share_of_its_own_class_and_the_rest_of_its_partners() -> None:
    recipe = replace(MIXING, flip="none", rotate=0.0, crop=0, resized_crop=0.0, policy="none", jitter=0.0, erase=0.0)
    for settings in ({"cutmix": 0.0}, {"mixup": 0.0}):
        batches = batches_of(SQUARES, replace(recipe, **settings))  # type: ignore[arg-type]
        images, targets = next(batches.parts(1))
        index = batches.order(1)
        partner = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10])
        assert torch.equal(targets.labels, torch.from_numpy(SQUARES.labels)[index])
        assert torch.equal(targets.others, torch.from_numpy(SQUARES.labels)[index[partner]])
        plain = batches.pixels.cut(index, torch.zeros(12, 2)).double() / 127.5 - 1
        share = targets.share.double()[:, None, None, None]
        if "cutmix" in settings:
            torch.testing.assert_close(images.double(), share * plain + (1 - share) * plain[partner], atol=1e-5, rtol=0)
        else:
            own = (images.double() - plain).abs().amax(1) < 1e-6
            pasted = (images.double() - plain[partner]).abs().amax(1) < 1e-6
            assert (own | pasted).all()
            torch.testing.assert_close(own.double().mean((1, 2)), targets.share.double(), atol=1e-6, rtol=0)


def test_with_repeats_each_image_comes_so_often_in_its_batch_and_as_often_as_others() -> None:
    batches = batches_of(SQUARES, replace(RECIPE, batch_size=12, repeats=3, epochs=6))
    assert batches.steps == 10  # an epoch is still as many images as there are
    orders = [batches.order(step).tolist() for step in range(10)]
    assert all(set(Counter(order).values()) == {3} for order in orders)
    assert all(order[n] != order[n + 1] for order in orders for n in range(0, 12, 2))  # pairs are of different images
    for epochs in (orders[:5], orders[5:]):  # three of them, after which all images have come
        assert Counter(image for order in epochs for image in order) == dict.fromkeys(range(20), 3)
    images = next(batches.parts(0))[0]
    copies = [n for n, image in enumerate(orders[0]) if image == orders[0][0]]
    assert not torch.equal(images[copies[0]], images[copies[1]])  # each is augmented anew


@pytest.mark.parametrize("repeats", [1, 2])
def test_alternating_flips_take_turns(repeats: int) -> None:
    recipe = replace(RECIPE, flip="alternate", batch_size=10, repeats=repeats, epochs=8, rotate=0.0, crop=0)
    batches, seen = batches_of(split([(8, 8)] * 500), recipe), dict[int, list[bool]]()
    for step in range(batches.steps):
        index = batches.order(step)
        images, plain = next(batches.parts(step))[0], batches.pixels.cut(index, torch.zeros(10, 2)) / 127.5 - 1
        for number, image, original in zip(index.tolist(), images, plain, strict=True):
            assert torch.equal(image, original) or torch.equal(image, original.flip(2))
            seen.setdefault(number, []).append(not torch.equal(image, original))
    assert {len(directions) for directions in seen.values()} == {8}
    assert all(directions == [directions[0], not directions[0]] * 4 for directions in seen.values())
    assert 200 < sum(directions[0] for directions in seen.values()) < 300
    other = batches_of(split([(8, 8)] * 500), replace(recipe, seed=8))
    assert not torch.equal(other.first_directions, batches.first_directions)


def test_a_batch_is_divided_into_as_few_more_equal_parts_as_there_can_be() -> None:
    batches = batches_of(SQUARES, replace(RECIPE, batch_size=12, accumulate=2))
    found = []
    while batches.divided_by < 12:
        batches.divide()
        found.append((batches.divided_by, len(list(batches.parts(0)))))
    assert found == [(3, 3), (4, 4), (6, 6), (12, 12)]
    with pytest.raises(BadInput, match="does not hold what a single image takes"):
        batches.divide()
    batches = batches_of(SQUARES, replace(RECIPE, batch_size=12, mixup=0.2))
    found = []
    while batches.divided_by < 6:
        batches.divide()
        found.append((batches.divided_by, len(list(batches.parts(0)))))
    assert found == [(2, 2), (3, 3), (6, 6)]  # 4 would leave 3 images, and pairs stay together
    with pytest.raises(BadInput, match="does not hold what a pair of images takes"):
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
    for recipe in (RECIPE, replace(RECIPE, rotate=0.0), replace(RECIPE, flip="none", crop=0)):
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
    small, _ = next(evaluation_batches(Pixels(SQUARES, 8, CPU), 6, side=4))
    assert torch.equal(small, F.interpolate(batches[0][0], (4, 4), mode="bilinear", antialias=True))
