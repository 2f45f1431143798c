"""Downloads that go on where a broken one stopped, and are what they should be."""

import contextlib
import fcntl
import hashlib
import http.client
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from vitrail.errors import BadInput
from vitrail.progress import Advance, track


@dataclass(frozen=True)
class Remote:
    """A file on a server, its size in bytes and its MD5 sum in hexadecimal digits."""

    url: str
    size: int
    md5: str

    @property
    def name(self) -> str:
        """What the file is called."""
        return self.url.rpartition("/")[2]


# Of the Stanford course CS231n, whose page has the file, and neither size nor sum: those are of the file of 2015.
TINY_IMAGENET = Remote(
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip", 248_100_043, "90528d7ca1a48142e341f4ef8d21d0de"
)

# Krizhevsky's; the sums are those that their page gives, and the sizes those of the files.
CIFAR_10 = Remote(
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", 170_052_171, "c32a1d4ab5d03f1284b67883e8d87530"
)
CIFAR_100 = Remote(
    "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz", 168_513_733, "03b5dce01913d631647c71ecec9e9cb8"
)

PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds before each new attempt, while attempts in a row bring nothing
TIMEOUT = 30.0  # seconds of silence after which a connection is given up


class _Failed(Exception):
    """An attempt brought no more. The message says why."""


class _TooFar(Exception):
    """The server's file ends before the part that was asked for."""


class _Refused(Exception):
    """Another attempt would bring no more either."""


def fetch(remote: Remote, folder: Path, *, pauses: tuple[float, ...] = PAUSES, timeout: float = TIMEOUT) -> Path:
    """The file in `folder`, downloaded if it is not there yet. What has come of it is kept beside it, in a file whose
    name ends in `.part`, from where the next attempt goes on, be it of this process or of a later one.

    Raises:
        BadInput: it cannot be had, or is not what it should be.
        OSError: it cannot be written.
    """
    path = folder / remote.name
    part = path.with_name(f"{path.name}.part")
    with _one_process_at_a_time(path.with_name(f"{path.name}.lock")):
        if path.is_file() and path.stat().st_size == remote.size:
            return path  # its sum was right when it got its name
        with part.open("ab") as file, track(remote.size, f"Downloading {remote.name}", "bytes") as advance:
            advance(file.tell())
            _complete(remote, file, advance, pauses, timeout)
        with part.open("rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found != remote.md5:
            part.unlink()
            raise BadInput(
                f"what came from {remote.url} is not the file that was asked for: its MD5 sum is {found}, not "
                f"{remote.md5}. It was removed. Try again, or {_by_hand(remote)}"
            )
        part.replace(path)
    return path


def _by_hand(remote: Remote) -> str:
    return f"get {remote.name} from elsewhere, and pass it: --data {remote.name}"


def _complete(remote: Remote, file: IO[bytes], advance: Advance, pauses: tuple[float, ...], timeout: float) -> None:
    """Appends what is missing."""
    failures = 0
    while (had := file.tell()) < remote.size:
        try:
            _append(remote, file, advance, timeout)
        except (_Failed, _Refused) as error:
            failures = 0 if file.tell() > had else failures + 1
            if failures > len(pauses) or isinstance(error, _Refused):
                raise BadInput(
                    f"{remote.name} cannot be downloaded from {remote.url}: {error}. Try again later ({file.tell():,} "
                    f"of {remote.size:,} bytes are here, and will not be asked for again), or {_by_hand(remote)}"
                ) from None
            time.sleep(pauses[max(failures - 1, 0)] if pauses else 0)


def _append(remote: Remote, file: IO[bytes], advance: Advance, timeout: float) -> None:
    """One attempt. What the server says of lengths is not relied on: the size and the sum are known.

    Raises:
        _Failed: it ended before the file was complete.
        _Refused: it is of no use to try again.
    """
    had = file.tell()
    try:
        response = _request(remote.url, had, timeout)
    except _TooFar:
        file.seek(0)
        file.truncate()  # so what is here is of another file
        advance(-had)
        raise _Failed("the server's file is shorter than the part of it that was here") from None
    with response:
        # A server that does not know of ranges sends all of it again.
        skip = had if response.status == 200 else 0
        while file.tell() < remote.size:
            try:
                block = response.read1(1 << 16)
            except TimeoutError:
                raise _Failed(f"the server was silent for {timeout:.0f} s") from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise _Failed(str(error) or type(error).__name__) from None
            if not block:
                raise _Failed("the server broke off")
            kept = block[skip : skip + remote.size - file.tell()]
            skip = max(skip - len(block), 0)
            file.write(kept)
            advance(len(kept))


def _request(url: str, begin: int, timeout: float) -> http.client.HTTPResponse:
    request = urllib.request.Request(url, headers={"Range": f"bytes={begin}-"} if begin else {})
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            raise _TooFar from None
        # Try again where the server is overloaded or ill; not where it has no such file, or no so long one.
        kind = _Failed if error.code >= 500 or error.code in (408, 429) else _Refused
        raise kind(f"the server answers {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        kind = _Refused if isinstance(error.reason, socket.gaierror) else _Failed
        reason = error.reason.strerror if isinstance(error.reason, OSError) else None
        raise kind(f"there is no connection to the server ({reason or error.reason})") from None
    except (OSError, http.client.HTTPException) as error:
        raise _Failed(f"the server does not answer as it should ({str(error) or type(error).__name__})") from None
    if response.status == 206:
        given = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        if not given or int(given[1]) != begin:
            response.close()
            raise _Failed("the server sends another part than the one that was asked for")
    return response


@contextlib.contextmanager
def _one_process_at_a_time(path: Path) -> Iterator[None]:
    """Waits until no other process holds the lock file. The file stays: removing it would undo the lock."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
