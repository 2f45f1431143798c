"""Data sets that Hugging Face's library reads: from files here, and what is said where its hub is not to be reached."""

import importlib.util
import io
import itertools
import json
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitrail.cli import main
from vitrail.data import cache, workers
from vitrail.data.images import Digits, is_there, locate
from vitrail.errors import BadInput

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="datasets is not installed: pip install -e '.[hub]'"
)
# File names, digits and their classes, in no order
ROWS: list[tuple[str, bytes, int]] = []


def setup_module() -> None:
    digits, names = Digits(), Digits().names()
    for name in (names[i] for i in np.random.default_rng(0).permutation(len(names))[:60]):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(digits.read(name))).save(buffer, "PNG")
        ROWS.append((name.partition("/")[2].removesuffix(".pgm"), buffer.getvalue(), int(name[0])))


def table(rows: list[tuple[str, bytes, int]], **more: Any) -> Any:
    """The rows as `datasets` has them: a column of images, one of classes, and more."""
    import datasets

    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    columns = {"scan": [{"bytes": content, "path": None} for _, content, _ in rows], "digit": [of for *_, of in rows]}
    features = {"scan": datasets.Image(), "digit": datasets.ClassLabel(names=names)}
    for name, (feature, value) in more.items():
        columns[name], features[name] = [value] * len(rows), feature
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def tar(path: Path, rows: list[tuple[str, dict[str, bytes]]]) -> None:
    with tarfile.open(path, "w") as file:
        for key, parts in rows:
            for suffix, content in parts.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards to train on, one to validate on, one to test on that has no labels."""
    folder = tmp_path_factory.mktemp("tables") / "scans"
    folder.mkdir()
    table(ROWS[:20]).to_parquet(folder / "train-00000-of-00002.parquet")
    table(ROWS[20:40]).to_parquet(folder / "train-00001-of-00002.parquet")
    table(ROWS[40:55]).to_parquet(folder / "validation-00000-of-00001.parquet")
    table([(name, content, -1) for name, content, _ in ROWS[55:]]).to_parquet(folder / "test-00000-of-00001.parquet")
    return folder


def pixels(dataset: cache.Dataset) -> dict[str, list[tuple[str, bytes]]]:
    """The class and the pixels of each image, sorted."""
    return {
        split: sorted((dataset.classes[images.labels[i]], images.image(i).tobytes()) for i in range(len(images)))
        for split, images in dataset.splits.items()
    }


def expected(rows: list[tuple[str, bytes, int]], names: list[str]) -> list[tuple[str, bytes]]:
    return sorted(
        (names[of], np.array(Image.open(io.BytesIO(content)).convert("RGB")).tobytes()) for _, content, of in rows
    )


def test_parquet_by_the_types_of_its_columns(parquet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = table(ROWS[:1]).features["digit"].names
    dataset = cache.load(f"hf:{parquet}", 8)
    assert "rows without a label, which are left out: 5 of test" in capsys.readouterr().err
    assert (dataset.name, dataset.evaluation, list(dataset.splits)) == ("scans", "val", ["train", "val"])
    assert dataset.classes == tuple(sorted(names))
    assert pixels(dataset) == {"train": expected(ROWS[:40], names), "val": expected(ROWS[40:55], names)}
    images = dataset.splits["train"]
    assert images.names[0].startswith("train/eight/")  # and the row behind it
    row = int(images.names[0].split("/")[2].removesuffix(".image"))
    assert names[ROWS[row][2]] == "eight"


def test_it_is_streamed_and_read_by_workers(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, streamed = (cache.load(f"hf:{parquet}", 8, stream=way).splits["train"] for way in (False, True))
    assert decoded.names == streamed.names
    index = list(range(len(decoded)))
    for i, image in zip(index, streamed.read(index), strict=True):
        assert (image == decoded.image(i)).all()
    monkeypatch.setattr(workers, "PATIENCE", 0.0)
    assert main(["data", f"hf:{parquet}", "--json"]) == 0


@pytest.mark.parametrize("kind", ["cls", "json", "folder"])
def test_webdataset_and_folders(kind: str, tmp_path: Path) -> None:
    names = [str(n) for n in range(10)]
    if kind == "cls":  # shards, numbers of two digits
        names = [f"{n + 5:02}" for n in range(10)]
        for number, rows in enumerate((ROWS[:30], ROWS[30:50])):
            (tmp_path / "digits").mkdir(exist_ok=True)
            shard = [(name, {"png": content, "cls": b"%d" % (of + 5)}) for name, content, of in rows]
            tar(tmp_path / "digits" / f"train-{number:03}.tar", shard)
        data = tmp_path / "digits"
    elif kind == "json":
        names = [f"a {n}/b" for n in range(10)]
        said = [json.dumps({"label": names[of], "side": 8}).encode() for *_, of in ROWS[:50]]
        data = tmp_path / "digits.tar"
        tar(data, [(row[0], {"png": row[1], "json": about}) for row, about in zip(ROWS, said, strict=False)])
        names = [name.replace("/", "_") for name in names]
    else:
        data = tmp_path / "digits"
        for name, content, of in ROWS[:50]:
            (data / names[of]).mkdir(parents=True, exist_ok=True)
            (data / names[of] / f"{name}.png").write_bytes(content)
    dataset = cache.load(f"hf:{data}", 8)
    assert (dataset.name, list(dataset.splits)) == ("digits", ["train", "test"])
    assert dataset.classes == tuple(names)
    assert sorted(itertools.chain(*pixels(dataset).values())) == expected(ROWS[:50], names)


def test_columns_that_do_not_show_are_asked_for(tmp_path: Path) -> None:
    import datasets

    image, kind = datasets.Image(), datasets.ClassLabel(names=["odd", "even"])
    file = tmp_path / "two.parquet"
    preview = {"bytes": ROWS[0][1], "path": None}
    table(ROWS[:12], preview=(image, preview), parity=(kind, 1), weight=(datasets.Value("float32"), 1.0)).to_parquet(
        file
    )
    columns = r"scan \(Image\), digit \(ClassLabel\), preview \(Image\), parity \(ClassLabel\), weight \(float32\)"
    for query, message in (
        ("", rf"several columns that can be the image \(scan, preview\)\. Its columns are {columns}; .*\?image=COLUMN"),
        ("?image=scan", r"several columns that can be the label \(digit, parity\).*\?label=COLUMN"),
        ("?image=photo", r"no column 'photo'"),
        ("?picture=scan", r"names no data set; it is spelled hf:NAME"),
        ("?image=", r"names no data set"),
    ):
        with pytest.raises(BadInput, match=message):
            locate(f"hf:{file}{query}")[1].names()
    chosen = locate(f"hf:{file}?image=scan&label=parity")[1]
    assert {name.split("/")[1] for name in chosen.names()} == {"even"}
    assert chosen.read(chosen.names()[3]) == ROWS[3][1]
    assert chosen.fingerprint() != locate(f"hf:{file}?image=scan&label=digit")[1].fingerprint()


def test_what_is_no_such_data_set_is_said(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_text("words")
    (tmp_path / "empty").mkdir()
    for data, message in (
        (f"hf:{tmp_path}/broken.parquet", r"broken\.parquet cannot be read: "),
        (f"hf:{tmp_path}/empty", "cannot be read: "),
        (f"hf:{Path(__file__)}", r"neither a folder nor a file that ends in \.parquet, \.tar"),
        (f"hf:{tmp_path}/none", "is no folder or file here, and no name that a data set on the hub can have"),
    ):
        with pytest.raises(BadInput, match=message):
            locate(data)[1].names()
    assert is_there("hf:owner/name")
    assert not is_there(f"hf:{tmp_path}/none")


def test_without_the_network_that_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    assert main(["data", "hf:no-such-owner/no-such-data"]) == 2
    assert time.monotonic() - began < 20  # the library alone would try for half a minute
    told = capsys.readouterr().err
    assert "no-such-owner/no-such-data is no file or folder here" in told
    assert "cannot be reached, and it was not downloaded before. Go online, or give the path" in told


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, parquet: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"datasets is not installed, .*pip install 'vitrail\[hub\]'"):
        locate(f"hf:{parquet}")[1].names()
