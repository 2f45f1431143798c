"""CIFAR's binary files: every image, its split and its class, from files in that format."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from test_download import serving

from vitrail.cli import main
from vitrail.data import cache, images
from vitrail.data.cifar import SIDE
from vitrail.data.download import CIFAR_10, CIFAR_100, Remote
from vitrail.errors import BadInput

ANIMALS = ("bird", "cat", "dog")
Records = dict[str, tuple[NDArray[np.uint8], NDArray[np.uint8]]]  # file → labels, images (N, 3, 32, 32)


def records(*files: str, each: int = 6) -> Records:
    random = np.random.default_rng(0)
    return {
        file: (np.arange(each, dtype=np.uint8) % 3, random.integers(0, 256, (each, 3, SIDE, SIDE), np.uint8))
        for file in files
    }


def written(folder: Path, content: Records, names: str, *, coarse: bool = False) -> Path:
    """The files as CIFAR-10 has them, or, with a label of 20 `coarse` classes before the class, as CIFAR-100."""
    folder.mkdir(parents=True)
    for file, (labels, pictures) in content.items():
        columns = [np.full(len(labels), 7, np.uint8)] * coarse + [labels]
        rows = np.concatenate([np.stack(columns, 1), pictures.reshape(len(labels), -1)], axis=1)
        (folder / file).write_bytes(rows.tobytes())
    (folder / names).write_text("\n".join(ANIMALS) + "\n\n")
    return folder


CIFAR_10_FILES = (*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin")


@pytest.fixture(scope="module")
def content() -> Records:
    return records(*CIFAR_10_FILES)


@pytest.fixture
def folder(tmp_path: Path, content: Records) -> Path:
    return written(tmp_path / "cifar-10-batches-bin", content, "batches.meta.txt")


def test_every_image_of_an_archive_has_its_pixels_class_and_split(folder: Path, content: Records) -> None:
    archive = folder.parent / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
        tar.addfile(tarfile.TarInfo("cifar-10-batches-bin/readme.html"), io.BytesIO())
    dataset = cache.load(str(archive), SIDE)
    assert (dataset.classes, dataset.evaluation) == (ANIMALS, "test")
    for split, files in (("train", CIFAR_10_FILES[:5]), ("test", CIFAR_10_FILES[5:])):
        labels, pictures = (np.concatenate([content[file][part] for file in files]) for part in (0, 1))
        stored = dataset.splits[split]
        numbers = [int(Path(name).stem) for name in stored.names]
        assert sorted(numbers) == list(range(len(labels)))
        np.testing.assert_array_equal(stored.labels, labels[numbers])
        for index, number in enumerate(numbers):
            np.testing.assert_array_equal(stored.image(index), pictures[number].transpose(1, 2, 0))


def test_cifar_100_has_the_fine_classes(tmp_path: Path) -> None:
    content = records("train.bin", "test.bin")
    dataset = cache.load(str(written(tmp_path / "cifar", content, "fine_label_names.txt", coarse=True)), SIDE)
    assert dataset.classes == ANIMALS
    assert dataset.splits["train"].labels.tolist() == [0, 0, 1, 1, 2, 2]
    np.testing.assert_array_equal(dataset.splits["test"].image(1), content["test.bin"][1][3].transpose(1, 2, 0))


def test_a_file_that_was_cut_short_is_named(folder: Path) -> None:
    path = folder / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadInput, match=r"data_batch_3\.bin is damaged: 18,437 bytes are no records of 3,073"):
        cache.load(str(folder), SIDE)


def test_a_class_without_a_name_is_refused(folder: Path) -> None:
    (folder / "batches.meta.txt").write_text("bird\ncat\n")
    with pytest.raises(BadInput, match=r"data_batch_1\.bin is damaged: record 2 is of class 2, .* names of 2"):
        cache.load(str(folder), SIDE)


def test_it_is_looked_through_and_trained_on(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["data", str(folder)]) == 0
    assert "bird" in capsys.readouterr().out
    sizes = ["--epochs=1", "--batch-size=15", "--hidden-size=32", "--mlp-dim=32", "--num-layers=1"]
    assert main(["train", "cifar-10", "--data", str(folder), "--output", str(tmp_path / "run"), *sizes]) == 0
    assert "6 images (cifar-10-batches-bin, test)" in capsys.readouterr().out


@pytest.mark.parametrize("data", ["cifar-10", "cifar-100"])
def test_it_is_downloaded_and_refused_where_it_is_another_file(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coarse = data == "cifar-100"
    files = ("train.bin", "test.bin") if coarse else CIFAR_10_FILES
    names = "fine_label_names.txt" if coarse else "batches.meta.txt"
    folder = written(tmp_path / f"{data}-binary", records(*files), names, coarse=coarse)
    with tarfile.open(tmp_path / "archive.tar.gz", "w:gz") as tar:
        tar.add(folder, folder.name)
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    real = images.REMOTES[data]
    with serving((tmp_path / "archive.tar.gz").read_bytes()) as server:
        url = real.url.replace("https://www.cs.toronto.edu", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setitem(images.REMOTES, data, Remote(url, len(server.content), real.md5))
        with pytest.raises(BadInput, match=f"is not the file that was asked for: .* not {real.md5}"):
            cache.load(data, SIDE)
        monkeypatch.setitem(images.REMOTES, data, Remote(url, len(server.content), server.remote.md5))
        dataset = cache.load(data, SIDE)
    assert server.paths == [f"/~kriz/{data}-binary.tar.gz"] * 2
    assert (dataset.name, dataset.classes, dataset.evaluation) == (data, ANIMALS, "test")
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 6 * len(files[1:]), "test": 6}


def test_the_sums_are_those_on_the_page_of_the_author() -> None:
    # https://www.cs.toronto.edu/~kriz/cifar.html, "binary version"
    assert CIFAR_10.md5 == "c32a1d4ab5d03f1284b67883e8d87530"
    assert CIFAR_100.md5 == "03b5dce01913d631647c71ecec9e9cb8"
