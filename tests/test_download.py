"""Downloads, from a real server on this machine that breaks off, is slow, and lies."""

import contextlib
import hashlib
import io
import re
import socket
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitrail.data import images
from vitrail.data.download import TINY_IMAGENET, Remote, fetch
from vitrail.data.images import locate, read_source
from vitrail.errors import BadInput

CONTENT = np.random.default_rng(0).bytes(300_000)
QUICK = (0.01, 0.01, 0.01)  # pauses


class Server(ThreadingHTTPServer):
    """Serves `content`. How it answers is the first of `plan`, or properly when that is used up."""

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = content
        self.plan: list[Callable[[Handler, int], None]] = []
        self.asked: list[str | None] = []  # the Range of each request
        self.paths: list[str] = []  # and the file

    @property
    def remote(self) -> Remote:
        url = f"http://127.0.0.1:{self.server_address[1]}/data.zip"
        return Remote(url, len(self.content), hashlib.md5(self.content, usedforsecurity=False).hexdigest())

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is part of the tests."""


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.server.asked.append(asked)
        self.server.paths.append(self.path)
        begin = int(re.findall(r"\d+", asked)[0]) if asked else 0
        (self.server.plan.pop(0) if self.server.plan else proper)(self, begin)

    def begin(self, status: int, length: int | None, **headers: str) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def part(self, begin: int, length: int | None = None) -> None:
        """The head of a proper answer, but for what it says of the length."""
        size = len(self.server.content)
        length = size - begin if length is None else length
        if begin:
            self.begin(206, length, Content_Range=f"bytes {begin}-{size - 1}/{size}")
        else:
            self.begin(200, length)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


def proper(handler: Handler, begin: int) -> None:
    handler.part(begin)
    handler.wfile.write(handler.server.content[begin:])


def break_off(handler: Handler, begin: int) -> None:
    handler.part(begin)
    handler.wfile.write(handler.server.content[begin : begin + 100_000])


def break_off_at_once(handler: Handler, begin: int) -> None:
    handler.part(begin)


def say_too_much(handler: Handler, begin: int) -> None:
    handler.part(begin, 10 * len(handler.server.content))
    handler.wfile.write(handler.server.content[begin:])


def say_too_little(handler: Handler, begin: int) -> None:
    handler.part(begin, 1000)
    handler.wfile.write(handler.server.content[begin:])


def send_too_much(handler: Handler, begin: int) -> None:
    handler.begin(200, None)
    handler.wfile.write(handler.server.content + b"more" * 100_000)


def ignore_range(handler: Handler, begin: int) -> None:
    handler.part(0)
    handler.wfile.write(handler.server.content)


def ignore_range_and_break_off(handler: Handler, begin: int) -> None:
    handler.part(0)
    handler.wfile.write(handler.server.content[:200_000])


def send_another_part(handler: Handler, begin: int) -> None:
    handler.begin(206, 1000, Content_Range=f"bytes {begin + 1}-{begin + 1000}/{len(handler.server.content)}")
    handler.wfile.write(bytes(1000))


def drip(handler: Handler, begin: int) -> None:
    handler.part(begin)
    for at in range(begin, len(handler.server.content), 30_000):
        handler.wfile.write(handler.server.content[at : at + 30_000])
        time.sleep(0.05)


def fall_silent(handler: Handler, begin: int) -> None:
    handler.part(begin)
    handler.wfile.write(handler.server.content[begin : begin + 100_000])
    time.sleep(0.5)


def never_answer(handler: Handler, begin: int) -> None:
    time.sleep(0.5)


def talk_nonsense(handler: Handler, begin: int) -> None:
    handler.wfile.write(b"words\r\n\r\n")


def be_overloaded(handler: Handler, begin: int) -> None:
    handler.send_error(503)


def have_no_such_file(handler: Handler, begin: int) -> None:
    handler.send_error(404)


def have_no_such_range(handler: Handler, begin: int) -> None:
    handler.send_error(416)


@contextlib.contextmanager
def serving(content: bytes) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch, Server(content) as running:
        patch.setenv("no_proxy", "127.0.0.1")
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(CONTENT) as running:
        yield running


FROM_100 = "bytes=100000-"
FROM_200 = "bytes=200000-"


@pytest.mark.parametrize(
    ("plan", "asked"),
    [
        ([proper], [None]),
        ([break_off, break_off], [None, FROM_100, FROM_200]),
        ([break_off, break_off_at_once, break_off_at_once, break_off], [None, *[FROM_100] * 3, FROM_200]),
        ([break_off, ignore_range], [None, FROM_100]),
        ([break_off, ignore_range_and_break_off], [None, FROM_100, FROM_200]),
        ([break_off, send_another_part], [None, FROM_100, FROM_100]),
        ([break_off, be_overloaded, never_answer, talk_nonsense], [None, *[FROM_100] * 4]),
        ([drip], [None]),
        ([fall_silent], [None, FROM_100]),
        ([say_too_much], [None]),
        ([say_too_little], [None, "bytes=1000-"]),
        ([send_too_much], [None]),
        ([break_off, have_no_such_range], [None, FROM_100, None]),
    ],
    ids=lambda value: "-".join(step.__name__ if callable(step) else str(step) for step in value),
)
def test_it_arrives_whatever_happens(
    plan: list[Callable[[Handler, int], None]], asked: list[str | None], server: Server, tmp_path: Path
) -> None:
    server.plan = [*plan]
    path = fetch(server.remote, tmp_path, pauses=QUICK, timeout=0.25)
    assert path.read_bytes() == CONTENT
    assert server.asked == asked
    assert not list(tmp_path.glob("*.part"))
    assert fetch(server.remote, tmp_path, pauses=QUICK) == path
    assert server.asked == asked  # nothing is asked for what is there


def test_a_later_process_goes_on_where_the_first_stopped(server: Server, tmp_path: Path) -> None:
    server.plan = [break_off, *[break_off_at_once] * 4]
    with pytest.raises(BadInput, match=r"the server broke off.*100,000 of 300,000 bytes are here.*--data data\.zip"):
        fetch(server.remote, tmp_path, pauses=QUICK)
    assert (tmp_path / "data.zip.part").stat().st_size == 100_000
    assert not (tmp_path / "data.zip").exists()
    assert fetch(server.remote, tmp_path).read_bytes() == CONTENT
    assert server.asked[-1] == FROM_100


@pytest.mark.parametrize("resumed", [False, True])
def test_another_file_than_the_one_asked_for_is_refused(resumed: bool, server: Server, tmp_path: Path) -> None:
    remote = server.remote
    server.content = CONTENT[:-1] + b"?"
    if resumed:
        server.plan = [break_off]
    with pytest.raises(BadInput, match=f"not the file that was asked for.*{remote.md5}.*removed") as caught:
        fetch(remote, tmp_path, pauses=QUICK)
    assert server.remote.md5 in str(caught.value)
    assert not list(tmp_path.glob("data.zip*")) or [p.name for p in tmp_path.iterdir()] == ["data.zip.lock"]


def test_a_shorter_file_is_refused(server: Server, tmp_path: Path) -> None:
    remote = server.remote
    server.content = CONTENT[:1000]
    with pytest.raises(BadInput, match=r"cannot be downloaded.*broke off.*1,000 of 300,000"):
        fetch(remote, tmp_path, pauses=QUICK)


def test_a_server_without_the_file_is_asked_once(server: Server, tmp_path: Path) -> None:
    server.plan = [have_no_such_file]
    with pytest.raises(BadInput, match="answers 404 Not Found"):
        fetch(server.remote, tmp_path, pauses=QUICK)
    assert len(server.asked) == 1


def test_without_a_connection_it_says_what_to_do(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        remote = Remote(f"http://127.0.0.1:{closed.getsockname()[1]}/data.zip", 9, "")
        with pytest.raises(BadInput, match=r"no connection to the server \(Connection refused\).*--data data\.zip"):
            fetch(remote, tmp_path, pauses=QUICK)


def test_two_processes_download_it_once(server: Server, tmp_path: Path) -> None:
    server.plan = [drip]
    with ThreadPoolExecutor() as pool:
        paths = list(pool.map(lambda _: fetch(server.remote, tmp_path, timeout=5), range(3)))
    assert {path.read_bytes() for path in paths} == {CONTENT}
    assert server.asked == [None]


def test_tiny_imagenet_is_downloaded_to_the_cache(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, image = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (64, 64)).save(image, "JPEG")
    with zipfile.ZipFile(file, "w") as archive:
        for wnid in ("n01", "n02"):
            archive.writestr(f"tiny-imagenet-200/train/{wnid}/images/{wnid}_0.JPEG", image.getvalue())
        archive.writestr("tiny-imagenet-200/val/images/val_0.JPEG", image.getvalue())
        archive.writestr("tiny-imagenet-200/val/val_annotations.txt", "val_0.JPEG\tn02\t0\t0\t62\t62\n")
        archive.writestr("tiny-imagenet-200/words.txt", "n01\tant\nn02\tbee\n")
    server.content = file.getvalue()
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(images.REMOTES, "tiny-imagenet", server.remote)
    for _ in range(2):
        source = read_source("tiny-imagenet", *locate("tiny-imagenet"))
        assert (source.name, source.classes) == ("tiny-imagenet", ("ant", "bee"))
        assert [(entry.name, entry.label) for entry in source.splits["val"]] == [("val/images/val_0.JPEG", 1)]
    assert len(server.asked) == 1


def test_the_real_file_is_the_one_that_its_authors_ship() -> None:
    remote = TINY_IMAGENET
    assert remote.url == "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    assert (remote.size, remote.md5) == (248_100_043, "90528d7ca1a48142e341f4ef8d21d0de")
