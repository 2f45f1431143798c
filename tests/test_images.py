"""From files to pixels: storage, layouts, splits, and what becomes of odd images. All files and archives are real."""

import bz2
import gc
import gzip
import io
import lzma
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from vitrail.data import archives
from vitrail.data.cache import load
from vitrail.data.images import (
    Source,
    Unreadable,
    locate,
    open_image,
    parse_image,
    read_file,
    read_source,
    to_pixels,
    to_rgb,
)
from vitrail.data.layouts import hold_out
from vitrail.errors import BadInput


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def colour(name: str) -> tuple[int, int, int]:
    """A colour of its own for each name."""
    value = zlib.crc32(name.encode())
    return value & 255, value >> 8 & 255, value >> 16 & 255


def write(folder: Path, *names: str) -> Path:
    """Fills a folder: images in a colour of their own, other files with text, `…/` empty folders."""
    for name in names:
        path = folder / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".png", ".JPEG"):
            Image.new("RGB", (8, 8), colour(name)).save(path, "PNG")
        else:
            path.write_text("words")
    return folder


def open_source(data: str) -> Source:
    return read_source(data, *locate(data))


def image_of(source: Source, name: str) -> Image.Image:
    return parse_image(read_file(source.storage, source.prefix + name))


def names(source: Source, split: str) -> list[tuple[str, int]]:
    return [(entry.name, entry.label) for entry in source.splits[split]]


PLAIN = ("train/ant/1.png", "train/ant/2.png", "train/bee/deep/3.png", "val/ant/4.png", "val/bee/5.png")
LITTER = ("__MACOSX/train/ant/._1.png", "train/.DS_Store", "train/ant/._2.png", "train/bee/Thumbs.db", "README.txt")


def archived(folder: Path, kind: str) -> Path:
    archive = folder.parent / f"{folder.name}.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            for path in sorted(folder.rglob("*")):
                file.write(path, path.relative_to(folder.parent))
    else:
        openers: dict[str, Any] = {"tar": open, "tar.gz": gzip.open, "tar.xz": lzma.open, "tar.bz2": bz2.open}
        with openers[kind](archive, "wb") as plain, tarfile.open(fileobj=plain, mode="w") as file:
            file.add(folder, f"./{folder.name}")
    return archive


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tar.gz", "tar.xz", "tar.bz2"])
def test_the_same_images_from_any_storage(kind: str, tmp_path: Path, cache: Path) -> None:
    folder = write(tmp_path / "insects", *PLAIN, *LITTER)
    source = open_source(str(folder if kind == "folder" else archived(folder, kind)))
    assert source.name == "insects"
    assert source.classes == ("ant", "bee")
    assert names(source, "train") == [("train/ant/1.png", 0), ("train/ant/2.png", 0), ("train/bee/deep/3.png", 1)]
    assert names(source, "val") == [("val/ant/4.png", 0), ("val/bee/5.png", 1)]
    assert list(source.splits) == ["train", "val"]
    for entry in source.splits["train"]:
        assert image_of(source, entry.name).getpixel((0, 0)) == colour(entry.name)
    other = pickle.loads(pickle.dumps(source))  # noqa: S301  # as for a worker process
    assert image_of(other, "val/bee/5.png").getpixel((0, 0)) == colour("val/bee/5.png")
    del source, other
    gc.collect()
    assert not list(cache.glob("*"))  # nothing decompressed is left


@pytest.mark.parametrize("kind", ["folder", "zip", "tar.gz"])
def test_the_fingerprint_follows_contents_and_not_places(kind: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "insects", *PLAIN)
    path = folder if kind == "folder" else archived(folder, kind)
    before = open_source(str(path)).fingerprint
    moved = path.rename(tmp_path / f"moved{'' if kind == 'folder' else '.' + kind}")
    assert open_source(str(moved)).fingerprint == before
    if kind == "folder":
        write(moved, "train/ant/9.png")
    else:
        os.utime(moved, (1, 1))
    assert open_source(str(moved)).fingerprint != before


@pytest.mark.parametrize(
    ("files", "train", "judged", "split"),
    [
        (("train/a/1.png", "train/b/2.png", "valid/a/3.png"), 2, 1, "val"),
        (("Train/a/1.png", "Train/b/2.png", "Validation/a/3.png"), 2, 1, "val"),
        (("train/a/1.png", "train/b/2.png", "test/b/3.png"), 2, 1, "test"),
        (("x/y/train/a/1.png", "x/y/train/b/2.png", "x/y/test/b/3.png"), 2, 1, "test"),
        (tuple(f"{c}/{i}.png" for c in "ab" for i in range(10)), 16, 4, "test"),
        (tuple(f"train/{c}/{i}.png" for c in "ab" for i in range(10)), 16, 4, "test"),
        (tuple(f"{c}/in/deep/{i}.png" for c in "ab" for i in range(10)), 16, 4, "test"),
        (tuple(f"{c}/{i}.png" for c in ("bus", "train") for i in range(10)), 16, 4, "test"),
        (("train/a/1.png", "train/a/2.png", "train/b/3.png", "train/b/4.png", "test/5.png"), 2, 2, "test"),
        (("train/a/0.png", "train/a/1.png", "train/b/x.txt", "train/b/2.png", "train/b/3.png", "val/"), 2, 2, "test"),
    ],
)  # fmt: skip
def test_layouts(files: tuple[str, ...], train: int, judged: int, split: str, tmp_path: Path) -> None:
    source = open_source(str(write(tmp_path / "data", *files)))
    assert {name: len(entries) for name, entries in source.splits.items()} == {"train": train, split: judged}
    assert len(source.classes) == 2
    assert {entry.label for entry in source.splits["train"]} == {0, 1}


def test_val_and_test_are_both_kept(tmp_path: Path) -> None:
    files = ("train/a/1.png", "train/b/2.png", "val/a/3.png", "test/b/4.png")
    assert list(open_source(str(write(tmp_path / "data", *files))).splits) == ["train", "val", "test"]


def test_a_class_of_one_image_is_trained_on(tmp_path: Path) -> None:
    files = (*(f"many/{i}.png" for i in range(10)), "one/1.png", "two/1.png", "two/2.png")
    source = open_source(str(write(tmp_path / "data", *files)))
    assert [entry.label for entry in source.splits["train"]] == [0] * 8 + [1, 2]
    assert [entry.label for entry in source.splits["test"]] == [0, 0, 2]


def test_what_is_held_out_is_the_same_for_ever() -> None:
    images = [f"a/{i}.png" for i in range(10)]
    kept, held = hold_out(images, 0.2, "test")
    assert held == ["a/0.png", "a/5.png"]  # as published: another choice would let old runs train on new test images
    assert kept == [name for name in images if name not in held]
    # Nor does it depend on what else there is: one image more moves at most one.
    assert len(set(held) & set(hold_out([*images, "a/x.png"], 0.2, "test")[1])) >= 1
    assert hold_out(images, 0.2, "holdout")[1] != held
    assert hold_out(images, 0.99, "test")[0]
    assert hold_out(images, 0.001, "test")[1]


WORDS = "n01\tant, emmet\nn02\tcrane, big bird\nn03\tcrane\nn04\tbee\n"


def tiny_imagenet(folder: Path) -> Path:
    train = [f"train/{wnid}/images/{wnid}_{i}.JPEG" for wnid in ("n01", "n02", "n03") for i in range(2)]
    write(folder, *train, *(f"val/images/val_{i}.JPEG" for i in range(3)), "test/images/test_0.JPEG")
    write(folder, *(f"train/{wnid}/{wnid}_boxes.txt" for wnid in ("n01", "n02", "n03")))
    (folder / "words.txt").write_text(WORDS)
    lines = ["val_0.JPEG\tn03\t0\t0\t9\t9", "val_1.JPEG\tn01\t0\t0\t9\t9", "val_2.JPEG\tn02\t0\t0\t9\t9"]
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_tiny_imagenet_has_its_classes_in_val(kind: str, tmp_path: Path) -> None:
    folder = tiny_imagenet(tmp_path / "tiny-imagenet-200")
    source = open_source(str(folder if kind == "folder" else archived(folder, kind)))
    assert source.classes == ("ant", "crane (n02)", "crane (n03)")
    assert len(source.splits["train"]) == 6
    assert names(source, "val") == [
        ("val/images/val_1.JPEG", 0), ("val/images/val_2.JPEG", 1), ("val/images/val_0.JPEG", 2),
    ]  # fmt: skip
    assert "test" not in source.splits


def test_tiny_imagenet_put_in_class_folders_is_read_too(tmp_path: Path) -> None:
    folder = tiny_imagenet(tmp_path / "data")
    for wnid, image in (("n03", "val_0"), ("n01", "val_1"), ("n02", "val_2")):
        (folder / "val" / wnid).mkdir()
        (folder / "val" / "images" / f"{image}.JPEG").rename(folder / "val" / wnid / f"{image}.JPEG")
    assert names(open_source(str(folder)), "val") == [
        ("val/n01/val_1.JPEG", 0), ("val/n02/val_2.JPEG", 1), ("val/n03/val_0.JPEG", 2),
    ]  # fmt: skip


def test_val_without_its_annotations_is_never_a_class(tmp_path: Path) -> None:
    folder = tiny_imagenet(tmp_path / "data")
    annotations = folder / "val" / "val_annotations.txt"
    annotations.write_text("val_0.JPEG\tn03\n")
    with pytest.raises(BadInput, match=r"does not say the class of val/images/val_1\.JPEG"):
        open_source(str(folder))
    annotations.unlink()
    with pytest.raises(BadInput, match="has images of images in val, but none to train on"):
        load(str(folder), 8)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "has no images"),
        (("a/x.txt", "b/y.txt"), "has no images"),
        (("1.png", "2.png"), "in no folder"),
        (("a/1.png", "a/2.png"), "one class"),
        (("train/a/1.png", "train/b/", "val/a/1.png"), "one class"),
        (("a/1.png", "b/1.png"), "one image a class"),
        (("train/a/1.png", "train/b/2.png", "val/a/3.png", "val/c/4.png"), "images of c in val, but none to train on"),
        (("train/a/1.png", "train/b/2.png", "val/3.png", "val/4.png"), "right in val/"),
        (("train/a/1.png", "train/b/2.png", "val/a/3.png", "valid/a/3.png"), "val/ as well as valid/"),
        (("val/a/1.png", "test/a/1.png"), r"images in val and test, but none to train on; those go to train/CLASS/\.$"),
        (("train/a/x.heic", "valid/a/1.png", "1.png", "test/a/1.png"), "images in val and test, but none to train on"),
        (("train/1.png", "test/1.png"), "right in train/"),
        (("train/1.png", "train/2.png"), "right in train/"),
    ],
)  # fmt: skip
def test_folders_that_are_no_data_set(files: tuple[str, ...], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    with pytest.raises(BadInput, match=message) as caught:
        load(str(write(folder, *files)), 8)
    assert str(caught.value).startswith(f"{folder} has ")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("digit", "did you mean 'digits'"),
        ("tiny-imagenet-200", "did you mean 'tiny-imagenet'"),
        ("photos", r"It can be digits, tiny-imagenet, cifar-10, cifar-100, a folder, an archive .*, or hf:NAME"),
        ("", "no data set, folder or archive ''"),
        ("nowhere/at/all", "no data set, folder or archive 'nowhere/at/all'"),
    ],
)
def test_unknown_names_are_answered_with_what_there_is(data: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        open_source(data)


def test_files_that_are_no_archives(tmp_path: Path) -> None:
    whole = archived(write(tmp_path / "data", *PLAIN), "tar.gz").read_bytes()
    for name, content, message in (
        ("data.csv", b"1,2", "neither a folder nor an archive"),
        ("words.zip", b"words", "is no zip archive"),
        ("half.zip", archived(tmp_path / "data", "zip").read_bytes()[:-40], "is no zip archive"),
        ("words.tar", b"words" * 1000, "is no tar archive"),
        ("empty.tar", b"", "is no tar archive"),
        ("half.tar.gz", whole[: len(whole) // 2], "is no tar archive"),
        ("bad.tar.gz", whole[:200] + b"\0\1\2" + whole[203:], "is no tar archive"),
        ("bad.tar.xz", b"\xfd7zXZ\0" + b"words" * 9, "is no tar archive"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(BadInput, match=message) as caught:
            open_source(str(path))
        assert str(path) in str(caught.value)
    assert not list((tmp_path / "cache").glob("*"))


def test_an_encrypted_zip_is_named(tmp_path: Path) -> None:
    path = archived(write(tmp_path / "data", *PLAIN), "zip")
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\1\2")
    while at >= 0:  # the flag in each entry of the list of members
        content[at + 8] |= 1
        at = content.find(b"PK\1\2", at + 1)
    path.write_bytes(content)
    with pytest.raises(BadInput, match="encrypted"):
        open_source(str(path))


@pytest.mark.parametrize("name", ["../a/1.png", "/a/1.png", "a/../../b/1.png", "C:/a/1.png", "..\\a\\1.png"])
def test_members_that_point_outside_are_refused(name: str, tmp_path: Path) -> None:
    zipped, tarred = tmp_path / "data.zip", tmp_path / "data.tar"
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr(name, b"")
    with tarfile.open(tarred, "w") as archive:
        archive.addfile(tarfile.TarInfo(name.replace("\\", "/")))
    for path in (zipped, tarred):
        with pytest.raises(BadInput, match="points outside"):
            open_source(str(path))


def png(value: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), value).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("target", ["../../secret.png", "/etc/secret.png"])
def test_links_that_point_outside_are_refused(target: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "data.tar", "w") as archive:
        link = tarfile.TarInfo("a/1.png")
        link.type, link.linkname = tarfile.SYMTYPE, target
        archive.addfile(link)
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive_:
        info = zipfile.ZipInfo("a/1.png")
        info.external_attr = 0o120777 << 16
        archive_.writestr(info, target)
    for kind in ("tar", "zip"):
        with pytest.raises(BadInput, match="points outside"):
            open_source(str(tmp_path / f"data.{kind}"))


def test_links_within_an_archive_are_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "data.tar", "w") as archive:
        for i, folder in enumerate("ab"):
            info = tarfile.TarInfo(f"{folder}/1.png")
            info.size = len(png((i, 2, 3)))
            archive.addfile(info, io.BytesIO(png((i, 2, 3))))
        for name, kind, target in (("a/2.png", tarfile.SYMTYPE, "1.png"), ("b/2.png", tarfile.LNKTYPE, "b/1.png")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            archive.addfile(link)
    source = open_source(str(tmp_path / "data.tar"))
    assert image_of(source, "a/2.png").getpixel((0, 0)) == (0, 2, 3)
    assert image_of(source, "b/2.png").getpixel((0, 0)) == (1, 2, 3)


def test_links_in_a_folder_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "1.png", "2.png")
    folder = write(tmp_path / "data", "b/1.png", "b/2.png")
    (folder / "a").symlink_to(tmp_path / "elsewhere")
    (folder / "b" / "circle").symlink_to(folder / "b")
    (folder / "b" / "3.png").symlink_to(folder / "gone.png")
    source = open_source(str(folder))
    assert source.classes == ("a", "b")
    assert image_of(source, "a/1.png").getpixel((0, 0)) == colour("1.png")
    with pytest.raises(Unreadable, match="No such file"):
        image_of(source, "b/3.png")


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    source = open_source("digits")
    digits = load_digits()
    assert source.classes == tuple("0123456789")
    assert len(source.splits["train"]) == 1438
    assert len(source.splits["test"]) == 359
    seen = set()
    for entry in (*source.splits["train"], *source.splits["test"]):
        index = int(entry.name[2:6])
        seen.add(index)
        assert entry.label == digits.target[index]
    assert seen == set(range(1797))
    entry = source.splits["test"][-1]
    pixels = to_pixels(image_of(source, entry.name), 8)
    assert pixels.shape == (8, 8, 3)
    assert (pixels[..., 1] == np.round(digits.images[int(entry.name[2:6])] * 255 / 16)).all()


@pytest.mark.parametrize(
    ("size", "wanted", "shape"),  # size is (width, height), shape (height, width)
    [
        ((64, 64), 64, (64, 64)),
        ((73, 80), 64, (80, 73)),  # within 64 to 73: not touched
        ((200, 100), 64, (73, 146)),
        ((100, 200), 64, (146, 73)),
        ((20, 10), 64, (64, 128)),
        ((1, 1), 8, (8, 8)),
        ((1000, 10), 8, (9, 36)),  # trimmed to four times the shorter side
        ((64, 1000), 64, (256, 64)),
        ((5, 1), 8, (8, 32)),
    ],
)
def test_the_shorter_side_is_what_is_asked_for(size: tuple[int, int], wanted: int, shape: tuple[int, int]) -> None:
    pixels = to_pixels(noise(size), wanted)
    assert pixels.shape == (*shape, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    assert pixels.flags.c_contiguous


def noise(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def test_an_image_of_the_right_size_is_not_touched_and_a_long_one_is_trimmed_about_its_centre() -> None:
    image = noise((70, 66))
    assert (to_pixels(image, 64) == np.asarray(image)).all()
    long = noise((303, 70))
    assert (to_pixels(long, 64) == np.asarray(long)[:, 11 : 11 + 280]).all()


def reopened(image: Image.Image, kind: str, **options: object) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return parse_image(file.getvalue())


GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def palette_with_holes() -> Image.Image:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 0)
    return reopened(image, "PNG", transparency=0)


def half_red() -> Image.Image:
    return reopened(Image.new("RGBA", (8, 8), (255, 0, 0, 51)), "PNG")


@pytest.mark.parametrize(
    ("make", "mode", "expected"),
    [
        (lambda: reopened(Image.fromarray(GREY), "PNG"), "L", {(7, 7): (252, 252, 252), (0, 1): (4, 4, 4)}),
        (lambda: reopened(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"), "I;16", {(7, 7): (252, 252, 252)}),
        (lambda: reopened(Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF"), "I;16", {(0, 1): (4, 4, 4)}),
        (lambda: reopened(Image.new("1", (8, 8), 1), "PNG"), "1", {(0, 0): (255, 255, 255)}),
        (palette_with_holes, "P", {(0, 0): (255, 255, 255), (1, 1): (0, 0, 255)}),
        (half_red, "RGBA", {(3, 3): (255, 204, 204)}),
        (lambda: reopened(Image.new("LA", (8, 8), (100, 0)), "PNG"), "LA", {(3, 3): (255, 255, 255)}),
        (lambda: reopened(Image.new("RGB", (8, 8), (9, 9, 9)), "PNG", transparency=(9, 9, 9)), "RGB",
         {(0, 0): (255, 255, 255)}),
        (lambda: reopened(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"), "CMYK", {(0, 0): (255, 0, 0)}),
        (lambda: reopened(Image.fromarray(GREY).convert("P"), "GIF"), "P", {(7, 7): (252, 252, 252)}),
    ],
)  # fmt: skip
def test_every_mode_becomes_rgb(
    make: Callable[[], Image.Image], mode: str, expected: dict[tuple[int, int], tuple[int, int, int]]
) -> None:
    image = make()
    assert image.mode == mode
    pixels = to_pixels(image, 8)
    assert pixels.shape == (8, 8, 3)
    for (row, column), value in expected.items():
        assert tuple(pixels[row, column]) == value


def test_a_cmyk_jpeg_is_not_inverted() -> None:
    pixels = to_pixels(reopened(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"), 16)
    assert abs(pixels[8, 8].astype(int) - (255, 0, 0)).max() < 8


@pytest.mark.parametrize(
    ("image", "message"),
    [(Image.new("F", (8, 8), 0.5), "floating-point"), (Image.new("I", (8, 8), 70_000), "beyond 16 bits")],
)
def test_pixels_without_a_set_range_are_refused(image: Image.Image, message: str) -> None:
    with pytest.raises(Unreadable, match=message):
        to_rgb(image)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = reopened(noise((12, 9)), "PNG", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(image))
    assert expected.shape[:2] == ((9, 12) if orientation < 5 else (12, 9))
    assert (np.asarray(to_rgb(reopened(noise((12, 9)), "PNG", exif=exif))) == expected).all()


def test_damaged_exif_does_not_cost_the_image() -> None:
    image = reopened(noise((16, 16)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert to_pixels(image, 16).shape == (16, 16, 3)


def test_large_jpegs_are_decoded_smaller_and_look_the_same() -> None:
    ramp = np.linspace(0, 255, 1200)
    field = np.stack(np.broadcast_arrays(ramp, ramp[:900, None], 128.0), axis=-1).astype(np.uint8)
    image = reopened(Image.fromarray(field), "JPEG", quality=95)
    fast = to_pixels(image, 64)
    assert image.size == (300, 225)  # a quarter: at an eighth it would be below twice what is wanted
    whole = reopened(Image.fromarray(field), "JPEG", quality=95)
    whole.load()
    assert fast.shape == (73, 97, 3)
    assert np.abs(fast.astype(int) - to_pixels(whole, 64)).max() <= 4


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 2.5 thousand million pixels."""
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"words", "no image"),
        (b"", "no image"),
        (bomb(), "more than 179 million pixels"),
        (png((1, 2, 3))[:50], "truncated|no image"),
        (png((1, 2, 3)).replace(b"IDAT", b"IDXT"), "."),
    ],
)
def test_bad_files_are_named_with_a_reason(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(Unreadable, match=message) as caught:
        to_pixels(open_image(path), 8)
    assert str(caught.value).startswith(f"{path}: ")


class Short(archives.Folder):
    """A folder on a machine that runs out of memory."""

    def read(self, name: str) -> bytes:
        raise MemoryError


def test_an_image_is_not_to_blame_where_memory_is_short(tmp_path: Path) -> None:
    with pytest.raises(MemoryError):
        read_file(Short(tmp_path), "1.png")


def test_a_truncated_jpeg_is_no_image(tmp_path: Path) -> None:
    noise((64, 64)).save(tmp_path / "half.jpg", quality=95)
    content = (tmp_path / "half.jpg").read_bytes()
    with pytest.raises(Unreadable, match="truncated"):
        to_pixels(parse_image(content[: len(content) // 2]), 64)


def test_a_member_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "LARGEST", 1000)
    with zipfile.ZipFile(tmp_path / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for folder in "ab":
            archive.writestr(f"{folder}/1.png", png((1, 2, 3)))
            archive.writestr(f"{folder}/2.png", b"\0" * 100_000)
    source = open_source(str(tmp_path / "data.zip"))
    assert image_of(source, "a/1.png").size == (8, 8)
    with pytest.raises(Unreadable, match="100,000 bytes"):
        image_of(source, "a/2.png")


def test_a_damaged_zip_member_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("a/1.png", "a/2.png", "b/1.png"):
            archive.writestr(name, png(colour(name)))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"IDAT", b"IDxT", 1))
    source = open_source(str(path))
    with pytest.raises(Unreadable, match="Bad CRC"):
        image_of(source, "a/1.png")
    assert image_of(source, "a/2.png").getpixel((0, 0)) == colour("a/2.png")


def test_all_kinds_of_images_in_a_folder_are_named(tmp_path: Path) -> None:
    for name in ("a.JPEG", "b.jpg", "c.jpg", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.raises(Unreadable, match=r"name the images in it: \S+/\*\.jpg \S+/\*\.JPEG$"):
        open_image(tmp_path)
