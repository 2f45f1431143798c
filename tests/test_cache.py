"""Decoded once, checked each time: whatever happens in between, what is loaded is what the files say."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrail.data import workers
from vitrail.data.cache import Dataset, Images, Split, load, load_for_evaluation
from vitrail.data.images import open_image, to_pixels
from vitrail.data.stream import Streamed
from vitrail.errors import BadInput


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes of 10 noisy images, of many sizes, in JPEG and in PNG."""
    random = np.random.default_rng(0)
    for label in ("ant", "bee", "cat"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(10):
            width, height = random.integers(8, 60, 2)
            image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
            image.save(tmp_path / "photos" / label / f"{i}.{'jpg' if i % 2 else 'png'}")
    return tmp_path / "photos"


def entry(root: Path) -> Path:
    """The one cache that there is."""
    (only,) = root.iterdir()
    return only


def decoded(dataset: Dataset) -> dict[str, Images]:
    """Its splits."""
    return {split: images for split, images in dataset.splits.items() if isinstance(images, Images)}


def same(one: Dataset, other: Dataset) -> bool:
    return one.classes == other.classes and all(
        images.names == others.names
        and (images.labels == others.labels).all()
        and (images.sizes == others.sizes).all()
        and (images.offsets == others.offsets).all()
        and (images.pixels == others.pixels).all()
        for images, others in zip(decoded(one).values(), decoded(other).values(), strict=True)
    )


@pytest.mark.parametrize("patience", [0.0, 60.0], ids=["on all cores", "in this process"])
def test_what_is_loaded_is_what_the_files_say(patience: float, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PATIENCE", patience)
    monkeypatch.setattr("vitrail.data.decoding.TASK", 16 * 16 * 3 * 4)  # tasks of four images
    dataset = load(str(photos), 16)
    assert (dataset.name, dataset.classes, dataset.evaluation) == ("photos", ("ant", "bee", "cat"), "test")
    assert list(dataset.splits) == ["train", "test"]
    for split, images in decoded(dataset).items():
        assert [name.split("/")[0] for name in images.names] == [dataset.classes[label] for label in images.labels]
        assert list(images.names) == sorted(images.names)
        assert len(images) == {"train": 24, "test": 6}[split]
        end = 0
        for i, name in enumerate(images.names):
            expected = to_pixels(open_image(photos / name), 16)
            assert (images.image(i) == expected).all()
            assert images.offsets[i] == end
            end += expected.size
        assert end == len(images.pixels)
        assert [array.dtype for array in (images.offsets, images.sizes, images.labels)] == [
            np.int64,
            np.int32,
            np.int64,
        ]


def test_the_second_time_nothing_is_decoded(photos: Path, root: Path) -> None:
    first = load(str(photos), 16)
    written = (entry(root) / "pixels.bin").stat()
    assert same(load(str(photos), 16), first)
    again = (entry(root) / "pixels.bin").stat()
    assert (again.st_ino, again.st_mtime_ns) == (written.st_ino, written.st_mtime_ns)


def test_other_images_or_another_size_are_another_cache(photos: Path, root: Path) -> None:
    load(str(photos), 16)
    assert min(decoded(load(str(photos), 24))["train"].sizes.ravel()) == 24
    (photos / "ant" / "0.png").unlink()
    assert len(load(str(photos), 16).splits["train"]) == 23
    assert len(list(root.iterdir())) == 3


def test_pixels_can_be_given_to_torch_and_written_to_without_harm(photos: Path, root: Path) -> None:
    import torch  # not above: workers import this file

    images = decoded(load(str(photos), 16))["train"]
    pixels = images.pixels
    before = (entry(root) / "pixels.bin").read_bytes()
    for array in (images.offsets, images.sizes, images.labels, pixels):
        torch.from_numpy(array).zero_()  # it would warn of memory that cannot be written to
    assert not pixels.any()
    assert (entry(root) / "pixels.bin").read_bytes() == before


@pytest.mark.parametrize("file", ["pixels.bin", "index.safetensors", "header.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "empty"])
def test_a_damaged_cache_is_built_anew_and_said(
    file: str, damage: str, photos: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = load(str(photos), 16)
    expected = {split: images.pixels.copy() for split, images in decoded(whole).items()}
    path = entry(root) / file
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "flip":
        content[len(content) // 2] ^= 1
    if damage != "remove":
        path.write_bytes({"flip": bytes(content), "cut": bytes(content[:-1]), "empty": b""}[damage])
    capsys.readouterr()
    again = load(str(photos), 16)
    assert "is damaged" in capsys.readouterr().err
    assert all((images.pixels == expected[split]).all() for split, images in decoded(again).items())
    assert same(load(str(photos), 16), again)
    assert "damaged" not in capsys.readouterr().err
    assert entry(root).is_dir()


def test_unreadable_images_are_named_and_nothing_is_left(photos: Path, root: Path) -> None:
    (photos / "ant" / "1.jpg").write_text("words")
    with pytest.raises(BadInput, match=r"an image that cannot be read: ant/1\.jpg \(it is no image.*vitrail data"):
        load(str(photos), 16)
    for i in range(7):
        (photos / "bee" / f"x{i}.png").write_bytes(b"")
    with pytest.raises(BadInput, match=r"8 images that cannot be read: (ant|bee)/") as caught:
        load(str(photos), 16)
    assert str(caught.value).count("it is no image") == 5
    assert not list(root.iterdir())


@pytest.fixture
def little_space() -> Iterator[None]:
    """No file may grow beyond 20 kB: the nearest to a full disk that every system allows."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("little_space")
@pytest.mark.parametrize("patience", [0.0, 60.0], ids=["on all cores", "in this process"])
def test_where_there_is_no_room_nothing_is_left(
    patience: float, photos: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "PATIENCE", patience)
    monkeypatch.setattr("vitrail.data.decoding.TASK", 32 * 32 * 3 * 4)
    with pytest.raises(OSError, match="File too large"):
        load(str(photos), 32)
    assert not list(root.iterdir())


def test_what_an_undivided_folder_is_judged_by_is_said(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judged = len(load(str(photos), 16).splits["test"])
    assert f"photos comes undivided: {judged} images, a fifth of each class," in capsys.readouterr().err
    load(str(photos), 16, holdout=0.25)
    load("digits", 8)
    assert "undivided" not in capsys.readouterr().err


def test_the_slice_held_out_is_of_train_and_always_the_same(photos: Path) -> None:
    train = load(str(photos), 16).splits["train"]
    tuning = load(str(photos), 16, holdout=0.25)
    assert list(tuning.splits) == ["train", "holdout"]
    assert tuning.evaluation == "holdout"
    kept, held = tuning.splits["train"], tuning.splits["holdout"]
    assert held.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert sorted(kept.names + held.names) == sorted(train.names)
    for images in (kept, held):
        assert list(images.names) == sorted(images.names)
        for i, name in enumerate(images.names):
            assert (images.image(i) == train.image(train.names.index(name))).all()
    assert load(str(photos), 16, holdout=0.25).splits["holdout"].names == held.names


# Data that a model is only measured on


def colour(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (value, value, value)).save(path)


def assert_true_to(folder: Path, images: Split, classes: tuple[str, ...]) -> None:
    """Labels and pixels are those of the files that the names say."""
    for i, name in enumerate(images.names):
        assert classes[images.labels[i]] in Path(name).parts
        assert (images.image(i) == to_pixels(open_image(folder / name), 16)).all()


def test_undivided_images_are_scored_whole_from_the_same_cache(photos: Path, root: Path) -> None:
    load(str(photos), 16)
    written = (entry(root) / "pixels.bin").stat().st_mtime_ns
    classes = ("zebra", "cat", "bee", "ant")
    name, split, images = load_for_evaluation(str(photos), 16, classes)
    assert (name, split, len(images), len(set(images.names))) == ("photos", "all", 30, 30)
    assert sorted(images.labels.tolist()) == [1] * 10 + [2] * 10 + [3] * 10
    assert_true_to(photos, images, classes)
    assert (entry(root) / "pixels.bin").stat().st_mtime_ns == written
    photos.rename(photos.parent / "inside")
    photos.mkdir()
    (photos.parent / "inside").rename(photos / "train")  # a train/ alone is undivided, too
    assert load_for_evaluation(str(photos), 16, classes)[1] == "all"


def test_images_are_as_large_as_those_that_were_learnt_from(photos: Path, root: Path) -> None:
    classes = ("ant", "bee", "cat")
    for side in (16, 17, 40):
        kept = load_for_evaluation(str(photos), 16, classes, shorter_side=side)[2]
        streamed = load_for_evaluation(str(photos), 16, classes, shorter_side=side, stream=True)[2]
        assert {min(kept.image(i).shape[:2]) for i in range(len(kept))} == {side}
        for index, image in enumerate(streamed.read(range(len(streamed)))):
            assert (image == kept.image(index)).all()
            assert (image == to_pixels(open_image(photos / kept.names[index]), 16, side)).all()
        assert isinstance(streamed, Streamed)
        streamed.decoders.close()
    before = sorted(root.iterdir())
    load_for_evaluation(str(photos), 16, classes, shorter_side=40)
    assert sorted(root.iterdir()) == before  # kept, each size by itself


def test_its_own_data_set_is_divided_as_in_training_wherever_it_lies(photos: Path) -> None:
    whole, tuning = load(str(photos), 16), load(str(photos), 16, holdout=0.25)
    moved = str(photos.rename(photos.parent / "moved"))
    assert load(moved, 16).digest() == whole.digest() != tuning.digest()
    _, split, images = load_for_evaluation(moved, 16, whole.classes, own=whole.digest())
    assert (split, images.names) == ("test", whole.splits["test"].names)
    _, split, images = load_for_evaluation(moved, 16, whole.classes, own=tuning.digest(), holdout=0.25)
    assert (split, images.names) == ("holdout", tuning.splits["holdout"].names)
    (Path(moved) / "ant" / "0.png").rename(Path(moved) / "ant" / "new.png")
    assert load_for_evaluation(moved, 16, whole.classes, own=whole.digest())[1] == "all"


def test_the_built_in_division_of_digits_applies() -> None:
    dataset = load("digits", 8)
    name, split, images = load_for_evaluation("digits", 8, dataset.classes)
    assert (name, split, images.names) == ("digits", "test", dataset.splits["test"].names)


@pytest.mark.parametrize(
    ("files", "split", "count"),
    [
        (["train/ant/1.png", "train/bee/2.png", "val/bee/3.png", "test/ant/4.png", "test/ant/5.png"], "val", 1),
        (["train/ant/1.png", "train/bee/2.png", "test/ant/4.png", "test/bee/5.png"], "test", 2),
        (["train/ant/1.png", "train/unheard-of/2.png", "test/ant/4.png"], "test", 1),
        (["val/ant/1.png", "test/bee/2.png"], "val", 1),
        (["val/ant/1.png", "val/bee/2.png"], "all", 2),
        (["test/ant/1.png"], "all", 1),
        (["ant/1.png"], "all", 1),
        (["ant/1.png", "ant/2.png", "ant/3.png"], "all", 3),
        (["ant/1.png", "bee/2.png", "cat/"], "all", 2),
    ],
)
def test_what_nothing_could_be_trained_on_can_be_measured_on(
    files: list[str], split: str, count: int, tmp_path: Path
) -> None:
    for value, file in enumerate(files):
        if file.endswith("/"):
            (tmp_path / "new" / file).mkdir()
        else:
            colour(tmp_path / "new" / file, 10 * value)
    for _ in range(2):  # built, and from the cache
        name, found, images = load_for_evaluation(str(tmp_path / "new"), 16, ("cat", "bee", "ant"))
        assert (name, found, len(images)) == ("new", split, count)
        wrapped = tmp_path / "new" / files[0].split("/")[0]
        assert_true_to(tmp_path / "new" if (tmp_path / "new" / images.names[0]).exists() else wrapped, images,
                       ("cat", "bee", "ant"))  # fmt: skip


def test_what_was_cached_to_measure_on_is_still_nothing_to_train_on(tmp_path: Path) -> None:
    for files, why in (
        (("ant/1.png", "ant/2.png"), "has one class"),
        (("ant/1.png", "bee/1.png"), "has one image a class"),
        (("val/ant/1.png", "test/ant/1.png"), "none to train on"),
        (("train/ant/1.png", "train/bee/1.png", "val/cat/1.png"), "has images of cat in val"),
    ):
        folder = tmp_path / why
        for value, file in enumerate(files):
            colour(folder / file, 10 * value)
        for _ in range(2):
            with pytest.raises(BadInput, match=f"{why}.*"):
                load(str(folder), 16)
            load_for_evaluation(str(folder), 16, ("ant", "bee", "cat"))


def test_a_class_that_the_model_lacks_is_named(photos: Path) -> None:
    with pytest.raises(BadInput, match="photos has images of bee, cat, which are none of the 2 classes"):
        load_for_evaluation(str(photos), 16, ("ant", "dog"))


def test_classes_go_by_their_words_or_their_folders(tmp_path: Path) -> None:
    for value, file in enumerate(("n2/1.png", "n3/2.png")):
        colour(tmp_path / "new" / file, 10 * value)
    plain = load_for_evaluation(str(tmp_path / "new"), 16, ("n1", "n2", "n3"))[2]
    (tmp_path / "new" / "words.txt").write_text("n2\tcrane, bird\nn3\tbee\n")
    for classes in (("n1", "n2", "n3"), ("ant", "crane", "bee"), ("crane (n1)", "crane (n2)", "bee")):
        images = load_for_evaluation(str(tmp_path / "new"), 16, classes)[2]
        assert (images.names, images.labels.tolist()) == (plain.names, [1, 2])


def test_a_pack_is_read_like_a_split() -> None:
    some = [np.full((2, 3, 3), 7, np.uint8), np.full((4, 2, 3), 9, np.uint8)]
    images = Images.pack(some, names=("a", "b"))
    assert len(images) == 2
    assert all((images.image(i) == some[i]).all() for i in range(2))
    assert len(Images.pack([], names=())) == 0


SCRIPT = """
import hashlib, sys
from vitrail.data import cache, decoding, workers
workers.PATIENCE, decoding.TASK = 0.0, 16 * 16 * 3 * 2
print("once", flush=True)
dataset = cache.load(sys.argv[1], 16)
print(hashlib.sha256(b"".join(images.pixels.tobytes() for images in dataset.splits.values())).hexdigest())
"""  # without `if __name__ == "__main__"`, as people write them


def start(photos: Path, tmp_path: Path) -> "subprocess.Popen[str]":
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), str(photos)], stdout=subprocess.PIPE, text=True, env=environment
    )


def test_two_processes_may_build_the_same_at_once(photos: Path, root: Path, tmp_path: Path) -> None:
    both = [start(photos, tmp_path) for _ in range(2)]
    told = [process.communicate(timeout=60)[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert [lines[0] for lines in told] == ["once", "once"]  # workers do not run the script again
    assert len(told[0]) == 2
    assert told[0] == told[1]
    assert entry(root).is_dir()


@pytest.mark.skipif(sys.platform != "linux", reason="it finds the workers in /proc")
def test_a_killed_build_leaves_nothing_that_is_taken_for_complete(photos: Path, root: Path, tmp_path: Path) -> None:
    for i in range(300):  # so that it takes long enough to be killed on the way
        (photos / "ant" / f"more{i}.png").symlink_to(photos / "ant" / "0.png")
    with start(photos, tmp_path) as process:
        deadline = time.monotonic() + 30
        while not any(path.stat().st_size for path in root.glob("*/pixels.bin")):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        workers_ = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        process.kill()
    (unfinished,) = root.iterdir()
    assert unfinished.name.startswith(".unfinished-")
    while any(map(is_running, workers_)):  # they end by themselves
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(load(str(photos), 16).splits["train"]) == 264
    assert unfinished.exists()  # it could be another process's, at work
    os.utime(unfinished, (time.time() - 2 * 24 * 3600,) * 2)
    load(str(photos), 16)
    assert entry(root).is_dir()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def end(how: str, task: int) -> int:
    """What a worker does in the next test."""
    if task == 2 and how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == 2 and how == "raises":
        raise ValueError("task 2")
    return task


def test_a_worker_that_dies_is_an_error_and_not_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PATIENCE", 0.0)
    assert list(workers.work_through(end, "well", range(20))) == list(range(20))
    with pytest.raises(ValueError, match="task 2"):
        list(workers.work_through(end, "raises", range(20)))
    with pytest.raises(ChildProcessError, match=r"ended from outside\..*memory"):
        list(workers.work_through(end, "killed", range(20)))
