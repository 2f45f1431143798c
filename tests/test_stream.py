"""Images decoded as they are needed: the same as those of the cache, a bounded number of them ahead."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitrail.data import cache, stream
from vitrail.data.cache import Images
from vitrail.data.images import locate, to_pixels
from vitrail.data.stream import Decoders, Streamed
from vitrail.errors import BadInput

# torch is not imported here: workers import this file.
COUNT, SIZE = 40, 16


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 20 noisy images each, of many sizes, in JPEG and in PNG."""
    folder, random = tmp_path_factory.mktemp("data") / "photos", np.random.default_rng(0)
    for i in range(COUNT):
        (folder / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        width, height = random.integers(8, 60, 2)
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i % 2}" / f"{i:02}.{'jpg' if i % 3 else 'png'}")
    return folder


@pytest.fixture(scope="module")
def decoded(photos: Path) -> Images:
    images = cache.load(str(photos), SIZE).splits["train"]
    assert isinstance(images, Images)
    return images


@pytest.fixture(scope="module")
def decoders(photos: Path) -> Iterator[Decoders]:
    """Of two processes that decode two images at a time, eight ahead."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "cores", lambda: 2)
        patch.setattr(stream, "TASK", 2 * 3 * SIZE**2)
        patch.setattr(stream, "ROOM", 12 * Decoders(locate(str(photos))[1], "", SIZE).slot)
        made = Decoders(locate(str(photos))[1], "", SIZE)
    assert (made.at_once, made.slots) == (2, 12)
    yield made
    made._workers.close()


@pytest.fixture
def streamed(decoded: Images, decoders: Decoders) -> Streamed:
    return Streamed(decoded.labels, decoded.names, decoders)


def test_a_streamed_data_set_is_that_of_the_cache(photos: Path) -> None:
    whole, cut = (cache.load(str(photos), SIZE, holdout=share) for share in (0.0, 0.25))
    for dataset, share in ((whole, 0.0), (cut, 0.25)):
        other = cache.load(str(photos), SIZE, holdout=share, stream=True)
        assert other.digest() == dataset.digest()
        assert other.classes == dataset.classes
        for split, images in dataset.splits.items():
            again = other.splits[split]
            assert again.names == images.names
            assert (again.labels == images.labels).all()
            assert (again.image(3) == images.image(3)).all()
    classes = ("1", "2", "0")
    one, other_one = (cache.load_for_evaluation(str(photos), SIZE, classes, stream=way) for way in (False, True))
    assert one[:2] == other_one[:2] == ("photos", "all")
    assert one[2].names == other_one[2].names
    assert one[2].labels.tolist() == other_one[2].labels.tolist()


def test_what_is_read_is_what_the_cache_has_expected_or_not(streamed: Streamed, decoded: Images) -> None:
    def read(*index: int) -> None:
        for i, image in zip(index, streamed.read(index), strict=True):
            assert (image == decoded.image(i)).all()

    order = np.random.default_rng(1).permutation(len(decoded)).tolist()
    streamed.expect(order)
    read(*order[:5])
    read(*order[5:11])
    read(3, 1, 4, 1, 5)  # by surprise, one of them twice
    streamed.expect(order[11:])
    streamed.expect(order[11:20])  # the same, if fewer
    read(*order[11:13])
    streamed.expect([7, 8])  # something else after all
    read(7, 8, 9)
    one = streamed.read([0, 1])
    next(one)
    del one  # given up in the middle
    read(0, 1, *order)
    streamed.expect(order)
    streamed.decoders.close()
    read(*order)  # by new processes


def test_no_more_are_decoded_than_there_is_room_for(streamed: Streamed) -> None:
    streamed.expect(list(range(len(streamed))))
    for _ in streamed.read(list(range(len(streamed)))):
        tasks = streamed.decoders._tasks
        slots = [slot for task in tasks for slot in task.slots[task.taken :]]
        assert len(set(slots)) == len(slots) <= streamed.ahead == 12
        assert not set(slots) & set(streamed.decoders._free)
    assert len(streamed.decoders._free) == 12


@pytest.mark.parametrize("cores", [2, 64])
@pytest.mark.parametrize(("size", "ahead"), [(8, 2048), (64, 2048), (224, 300), (512, 50)])
def test_room_is_bounded(size: int, ahead: int, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "cores", lambda: cores)
    decoders = Decoders(locate("digits")[1], "", size)
    assert ahead <= decoders.slots
    assert decoders.slots * decoders.slot <= max(stream.ROOM, 3 * cores * decoders.slot)
    assert to_pixels(Image.new("RGB", (9 * size, 2 * size)), size).size <= decoders.slot


def test_an_unreadable_image_is_named_when_its_turn_comes(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.png", "b/3.png", "b/4.png", "b/5.png", "a/6.png"):
        (tmp_path / "new" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "new" / name)
    (tmp_path / "new/b/4.png").write_text("words")
    images = cache.load(str(tmp_path / "new"), 8, stream=True).splits["train"]
    bad = images.names.index("b/4.png")
    order = [*(i for i in range(len(images)) if i != bad), bad]
    images.expect(order)
    with pytest.raises(BadInput, match=r"^b/4\.png cannot be read \(it is no image.*Mend it.*vitrail data.*--resume"):
        assert [image.shape for image in images.read(order)] == [(9, 9, 3)] * len(order)
    with pytest.raises(BadInput, match=r"^b/4\.png cannot be read"):
        images.image(bad)
    Image.new("RGB", (9, 9)).save(tmp_path / "new/b/4.png")
    assert len(list(images.read(order))) == len(order)


def test_a_worker_that_is_killed_is_missed(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "cores", lambda: 1)
    images = cache.load(str(photos), SIZE, stream=True).splits["train"]
    assert isinstance(images, Streamed)
    assert images.decoders._workers.submit(imported_torch, None).result() == (False, str(photos))
    (pid,) = images.decoders._workers._pool._processes
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match="ended from outside"):
        list(images.read([0, 1]))


def imported_torch(decoder: Any, task: None) -> tuple[bool, str]:
    """In a worker."""
    return "torch" in sys.modules, str(decoder.storage.path)


# On its way to the model


def test_squares_cut_on_the_host_are_those_cut_on_the_device(decoded: Images, streamed: Streamed) -> None:
    import torch

    from vitrail.input.pixels import HostPixels, Pixels

    cpu, random = torch.device("cpu"), torch.Generator().manual_seed(0)
    index = torch.randint(0, len(decoded), (20,), generator=random)
    window = torch.rand(20, 2, generator=random)
    window[0] = 1 - 2**-24  # the largest that is drawn
    places = tuple(torch.randint(0, SIZE, (20, SIZE), generator=random) for _ in range(2))
    on_device = Pixels(decoded, SIZE, cpu)
    for images in (decoded, streamed):
        on_host = HostPixels(images, SIZE, cpu)
        for where in (None, (places[0], places[1])):
            expected, found = on_device.cut(index, window, where), on_host.cut(index, window, where)
            assert torch.equal(found, expected)
            assert found.stride() == expected.stride()


def test_images_that_a_gpu_has_no_room_for_stay_on_the_host(decoded: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from vitrail.input import pixels

    if not torch.cuda.is_available():
        pytest.skip("it takes a CUDA device")
    cuda = torch.device("cuda")
    index, window = torch.arange(8), torch.rand(8, 2)
    whole = pixels.pixels_of(decoded, SIZE, cuda)
    monkeypatch.setattr(pixels, "FREE", 0.0)
    rest = pixels.pixels_of(decoded, SIZE, cuda)
    assert (type(whole), type(rest)) == (pixels.Pixels, pixels.HostPixels)
    assert type(pixels.pixels_of(decoded, SIZE, cuda, beside=whole)) is pixels.Pixels  # no more bytes
    assert torch.equal(whole.cut(index, window), rest.cut(index, window))
    assert rest.cut(index, window).device.type == "cuda"


def test_a_run_that_streams_is_known_before_torch_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitrail.commands.training import streams
    from vitrail.recipes import resolve
    from vitrail.weights.checkpoint import Run

    monkeypatch.chdir(tmp_path)
    for name, streaming in (("first", True), ("latest", False)):
        run = Run.create(Path("runs") / name)
        run.write_recipe(resolve("small", data="photos", stream=streaming))
        run.save_state({}, {})
    os.utime(Path("runs/first/last/state.safetensors"), (0, 0))
    assert streams({"stream": True})
    assert not streams({"stream": False})
    assert not streams({})
    assert streams({"resume": True, "output": Path("runs/first")})
    assert not streams({"resume": True})
    os.utime(Path("runs/latest/last/state.safetensors"), (-9, -9))
    assert streams({"resume": True})
    assert not streams({"resume": True, "output": Path("gone")})
    assert not streams({"resume": True, "stream": False})
    assert streams({"resume": True, "stream": True, "output": Path("runs/latest")})
    assert streams({"resume": True, "recipe": "small"})
    assert not streams({"resume": True, "recipe": "sma"})
    Path("runs/first/results.json").write_text("{}")
    assert not streams({"resume": True})


def test_images_beyond_memory_are_read_ahead(decoded: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from vitrail.input.batches import TrainingBatches, evaluation_batches
    from vitrail.input.pixels import pixels_of
    from vitrail.settings import Recipe

    recipe = Recipe(image_size=SIZE, batch_size=8, accumulate=2, repeats=2, epochs=2)
    batches = TrainingBatches(pixels_of(decoded, SIZE, torch.device("cpu")), recipe)
    assert batches.pixels.ahead == 0  # they stay in memory
    monkeypatch.setattr(os, "sysconf", lambda name: 1)
    fetched: list[list[int]] = []
    expect = Images.expect

    def noted(self: Images, index: list[int]) -> None:
        fetched.append(index)
        expect(self, index)

    monkeypatch.setattr(Images, "expect", noted)
    monkeypatch.setattr(cache, "AHEAD", 6)
    ahead = TrainingBatches(pixels_of(decoded, SIZE, torch.device("cpu")), recipe)
    assert ahead.pixels.ahead == 6
    for step in range(batches.steps):
        for (one, _), (other, _) in zip(batches.parts(step), ahead.parts(step), strict=True):
            assert torch.equal(one, other)
        order = [batches.order(s).tolist() for s in range(step, min(step + 2, batches.steps))]
        # Each part of a batch has all of its images, which here come once in each.
        assert fetched.pop() == [i for whole in order for i in whole]
    assert not fetched
    for _ in evaluation_batches(ahead.pixels, 10):
        pass
    assert fetched == [list(range(start, min(start + 16, 32))) for start in range(0, 32, 10)]


def test_a_streamed_run_ends_with_the_bits_of_the_cached_one(tmp_path: Path, photos: Path) -> None:
    import vitrail
    from vitrail.evaluation.evaluate import evaluate_run

    tiny: dict[str, Any] = {
        "data": str(photos), "image_size": SIZE, "patch_size": 8, "hidden_size": 16, "mlp_dim": 16, "num_heads": 1,
        "num_layers": 1, "epochs": 3, "batch_size": 8, "accumulate": 2, "repeats": 2, "crop": 2, "flip": "random",
        "mixup": 0.2, "device": "cpu",
    }  # fmt: skip
    weights = Path("model/model.safetensors")
    whole = vitrail.train("vit-12", output=tmp_path / "whole", **tiny).run / weights
    run = tmp_path / "streamed"
    vitrail.train("vit-12", output=run, stream=True, stop_after=2, **tiny)
    assert evaluate_run(run)["loss"] == json.loads((run / "results.json").read_text())["loss"]  # streamed too
    result = vitrail.train(output=run, resume=True, stream=False)
    assert result.results["epochs"] == 3
    assert (run / weights).read_bytes() == whole.read_bytes()
