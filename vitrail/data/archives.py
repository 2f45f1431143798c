"""Where bytes come from: a folder, a zip or a tar, read in place. Nothing is ever unpacked beside the user's files.

The three share one small interface, `Storage`. A storage is cheap to make and to pickle: a worker process gets a
copy and opens the file for itself.
"""

import bz2
import gzip
import hashlib
import lzma
import os
import posixpath
import shutil
import stat
import tarfile
import tempfile
import time
import weakref
import zipfile
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Protocol

import platformdirs

from vitrail.errors import BadInput
from vitrail.progress import track

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")
SUFFIXES = (".zip", *TAR_SUFFIXES)

# One file of an archive is read into memory whole; a few kilobytes of zip can claim to hold terabytes.
LARGEST = 1 << 30

UNFINISHED = ".unfinished-"  # what a killed process may leave in the cache: swept a day later


class Storage(Protocol):
    """Files by name."""

    def names(self) -> list[str]:
        """Posix paths of all files, and of folders too, these with a `/` at the end. What operating systems and
        archivers leave behind (dot files, `__MACOSX`, `Thumbs.db`) is not among them."""

    def read(self, name: str) -> bytes:
        """The bytes of one file.

        Raises:
            Exception: of whatever kind the operating system or the archive's library has for it.
        """

    def fingerprint(self) -> str:
        """A short text that changes when the contents do, and not when they are moved. It is quick to have: of an
        archive it looks at size, time, beginning and end (where a zip has its list), not at all members."""


def open_storage(path: Path) -> Storage:
    """The storage at `path`.

    Raises:
        BadInput: it is neither a folder nor an archive, or it is damaged.
    """
    if path.is_dir():
        return Folder(path)
    if path.name.lower().endswith(".zip"):
        return Zip(path)
    if path.name.lower().endswith(TAR_SUFFIXES):
        return Tar(path)
    raise BadInput(f"{path} is neither a folder nor an archive; an archive's name ends in {', '.join(SUFFIXES)}.")


def cache_root() -> Path:
    """Where downloads and decoded images are kept: the environment's `VITRAIL_CACHE`, or the user's cache folder.
    It is made where it is missing, and rid of what processes that were killed left there more than a day ago."""
    root = Path(os.environ.get("VITRAIL_CACHE") or platformdirs.user_cache_dir("vitrail"))
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob(f"{UNFINISHED}*"):
        try:
            if time.time() - left.stat().st_mtime > 24 * 3600:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        except OSError:
            pass  # another process was quicker, or its owner is another user
    return root


class Folder:
    """A folder on disk. Links are followed: they are the user's own."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()

    def __reduce__(self) -> tuple[Any, ...]:
        return Folder, (self.path,)

    @cached_property
    def _files(self) -> list[tuple[str, int, int]]:
        """Name, size and time of change of each file, sorted; of folders the name."""
        return sorted(_scan(str(self.path), "", ()))

    def names(self) -> list[str]:
        return [name for name, _, _ in self._files]

    def read(self, name: str) -> bytes:
        with open(f"{self.path}/{name}", "rb") as file:  # a Path would cost 5% of decoding a small image
            return file.read()

    def fingerprint(self) -> str:
        return _digest(repr(self._files).encode("utf-8", "surrogateescape"))


def _scan(folder: str, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, int, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            name = prefix + entry.name
            if _is_litter(entry.name):
                continue
            if entry.is_dir():
                inside = above
                if entry.is_symlink():
                    found = entry.stat()
                    if (found.st_dev, found.st_ino) in above:
                        continue  # a link to a folder that it lies in
                    inside = (*above, (found.st_dev, found.st_ino))
                yield f"{name}/", 0, 0
                yield from _scan(entry.path, f"{name}/", inside)
            else:
                # A link that leads nowhere is listed all the same, so that reading it is what fails, by name.
                found = entry.stat(follow_symlinks=entry.is_file())
                yield name, found.st_size, found.st_mtime_ns


class Zip:
    """A zip archive.

    Raises:
        BadInput: on first use, where it is no zip, is encrypted, or has a member that points outside of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()

    def __reduce__(self) -> tuple[Any, ...]:
        return Zip, (self.path,)

    @cached_property
    def _archive(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.path)
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise BadInput(f"{self.path} is no zip archive, or a damaged one: {error}.") from None

    @cached_property
    def _members(self) -> dict[str, zipfile.ZipInfo]:
        members, links = {}, {}
        for info in self._archive.infolist():
            name = _inside(info.filename.replace("\\", "/"), self.path)
            if info.flag_bits & 1:
                raise BadInput(f"{self.path} is encrypted; unpack it, and pass the folder.")
            if stat.S_ISLNK(info.external_attr >> 16):
                links[name] = _link(name, self._archive.read(info).decode("utf-8", "replace"), self.path)
            elif not _is_litter(name):
                members[name] = info
        return members | {name: members[target] for name, target in links.items() if target in members}

    def names(self) -> list[str]:
        return list(self._members)

    def read(self, name: str) -> bytes:
        info = self._members[name]
        if info.file_size > LARGEST:
            raise ValueError(f"it would take {info.file_size:,} bytes of memory")
        return self._archive.read(info)

    def fingerprint(self) -> str:
        return archive_fingerprint(self.path)


class Tar:
    """A tar archive. One that is compressed is decompressed once, to a file in the cache folder that goes when the
    storage does, so that its members can be read in any order.

    Raises:
        BadInput: on first use, where it is no tar, is damaged, or has a member that points outside of it.
    """

    def __init__(self, path: Path) -> None:
        # What has been found out is pickled with it: workers neither decompress nor list the archive again.
        self.path = path.resolve()

    @cached_property
    def _plain(self) -> Path:
        """The same archive, not compressed."""
        with self.path.open("rb") as file:
            start = file.read(6)
            opener = next((opener for magic, opener in _COMPRESSED.items() if start.startswith(magic)), None)
            if opener is None:
                return self.path
            file.seek(0)
            handle, name = tempfile.mkstemp(dir=cache_root(), prefix=UNFINISHED, suffix=".tar")
            remove = weakref.finalize(self, Path(name).unlink, missing_ok=True)
            try:
                with os.fdopen(handle, "wb") as output, opener(file) as content:
                    self._decompress(file, content, output)
            except BaseException:
                remove()
                raise
        return Path(name)

    def _decompress(self, file: IO[bytes], content: IO[bytes], output: IO[bytes]) -> None:
        """Copies the `content` of the compressed `file` to `output`."""
        size = os.fstat(file.fileno()).st_size
        done = 0
        with track(size, f"Decompressing {self.path.name}", "bytes") as advance:
            while True:
                try:
                    block = content.read(1 << 20)
                except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                    raise BadInput(f"{self.path} is no tar archive, or a damaged one: {error}.") from None
                if not block:
                    return
                output.write(block)
                advance(file.tell() - done)
                done = file.tell()

    @cached_property
    def _members(self) -> dict[str, tuple[int, int]]:
        """Where in the plain archive each file's bytes lie, and how many they are."""
        members, links = {}, {}
        try:
            with tarfile.open(self._plain, "r:") as archive:
                for member in archive:
                    name = _inside(member.name, self.path)
                    if member.issym():
                        links[name] = _link(name, member.linkname, self.path)
                    elif member.islnk():
                        links[name] = _inside(member.linkname, self.path)
                    elif not _is_litter(name) and member.isdir():
                        members[f"{name}/"] = (0, 0)
                    elif not _is_litter(name) and member.isreg() and not member.issparse():
                        members[name] = (member.offset_data, member.size)
        except tarfile.TarError as error:
            raise BadInput(f"{self.path} is no tar archive, or a damaged one: {error}.") from None
        return members | {name: members[target] for name, target in links.items() if target in members}

    def names(self) -> list[str]:
        return list(self._members)

    def read(self, name: str) -> bytes:
        offset, size = self._members[name]
        with self._plain.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise EOFError("the archive ends in the middle of it")
        return content

    def fingerprint(self) -> str:
        return archive_fingerprint(self.path)


def _gunzip(file: IO[bytes]) -> IO[bytes]:
    return gzip.GzipFile(fileobj=file)  # type: ignore[return-value]


_COMPRESSED: dict[bytes, Any] = {
    b"\x1f\x8b": _gunzip, b"BZh": bz2.BZ2File, b"\xfd7zXZ\x00": lzma.LZMAFile,
}  # fmt: skip


def _inside(name: str, archive: Path) -> str:
    """The name of a member, tidied: no `./` in front, a folder's `/` kept."""
    tidy = posixpath.normpath(name)
    if tidy.startswith(("/", "../")) or tidy == ".." or tidy[1:3] == ":/":
        raise BadInput(f"{archive} has a member that points outside of it, {name!r}; nothing of it was read.")
    return f"{tidy}/" if name.endswith("/") else tidy


def _link(name: str, target: str, archive: Path) -> str:
    """The member that a symbolic link stands for."""
    if target.startswith("/"):
        raise BadInput(f"{archive} has a link that points outside of it, {name!r} to {target!r}; nothing was read.")
    return _inside(posixpath.join(posixpath.dirname(name), target), archive)


def _is_litter(name: str) -> bool:
    if "/" not in name:
        return name.startswith((".", "__MACOSX")) or name in ("Thumbs.db", "desktop.ini")
    return any(_is_litter(part) for part in name.split("/"))


def archive_fingerprint(path: Path) -> str:
    """The fingerprint of one large file, as of `Storage`."""
    with path.open("rb") as file:
        found = os.fstat(file.fileno())
        start = file.read(1 << 20)
        file.seek(max(0, found.st_size - (1 << 20)))
        return _digest(b"%d %d " % (found.st_size, found.st_mtime_ns), start, file.read())


def _digest(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
