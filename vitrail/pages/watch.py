"""The page of a run, served while the run goes on: its curves move, and how far it is stands below.

The page asks every two seconds whether there is something new, and takes over what has changed. Nothing is written.
"""

import errno
import ipaddress
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Set
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from vitrail.data.cache import Dataset
from vitrail.errors import BadInput
from vitrail.pages.gallery import scored
from vitrail.pages.record import read
from vitrail.pages.report import PICTURE, fill, is_its_own, render, split_of
from vitrail.progress import duration, say
from vitrail.weights.checkpoint import Run

PORTS = 20  # that are tried, from the one that is wanted
EVERY = 2.0  # seconds between two questions of the page
LATE = 15.0  # seconds after which it is said when the run was last heard of
ALONE = "default-src 'none'"  # in the page's policy: it loads nothing
TEXT = "text/plain; charset=utf-8"
LOCAL = frozenset(("localhost", "127.0.0.1", "[::1]"))  # what this machine calls itself
ELSEWHERE = "This page is for the machine that it is made on, as http://localhost; --host 0.0.0.0 is for others."
MOVING = ("recipe.yaml", "environment.json", "metrics.jsonl")  # what the page of a run that goes on is made of


class Watched:
    """A run folder that is looked at, perhaps by several at once.

    Args:
        run: the folder.
        dataset: what it was trained on, for pictures of training images; None where that is not to be had.

    Raises:
        BadInput: it is no run folder, or a file in it is damaged.
    """

    def __init__(self, run: Path, dataset: Dataset | None) -> None:
        self.run, self.dataset = run, dataset
        self.lock = threading.Lock()
        self.seen, self.html = "", ""  # the page as it was last made, and of which files
        self.page()

    def page(self) -> str:
        """The page as it is now. It is made anew only where a file has changed."""
        with self.lock:
            if (now := self.version()) != self.seen:
                self.html = live(self.made(), now)
                self.seen = now
            return self.html

    def version(self) -> str:
        """What changes when the page does."""
        report, results = self.run / "report.html", self.run / "results.json"
        if not results.is_file():
            return " ".join(map(stamp, (self.run / name for name in MOVING)))
        # The figures are written some seconds before the page, which shows where the model looked: until then, the
        # page stays as it was.
        written = report.is_file() and report.stat().st_mtime_ns >= results.stat().st_mtime_ns
        return f"done {stamp(report)}" if written or not self.seen else self.seen

    def made(self) -> str:
        """The page of the run, made here while it goes on; when it is done, the one that is written then, if it is
        there."""
        report = self.run / "report.html"
        if Run(self.run).ended and report.is_file():
            return report.read_text(encoding="utf-8")
        record = read(self.run)
        told = scored(record, self.dataset, split_of(record, self.dataset))
        return render(record, self.dataset, told, its_own=is_its_own(self.run, self.dataset))

    def state(self) -> dict[str, Any]:
        """For the page: which it should be by now, and how far the run is, in words and as a share."""
        noted = self.run / "progress.json"
        with self.lock:
            page = self.version()
        try:
            told, heard = json.loads(noted.read_text(encoding="utf-8")), time.time() - noted.stat().st_mtime
            late = f" · last heard of {duration(heard)} ago" if heard > LATE else ""
            return {"page": page, "words": f"{told['words']}{late}", "share": float(told["share"])}
        except (OSError, ValueError, KeyError, TypeError):
            return {"page": page, **self.ended()}

    def ended(self) -> dict[str, Any]:
        """How far a run is that is not being trained, in words and as a share."""
        try:
            results = json.loads((self.run / "results.json").read_text(encoding="utf-8"))
            done, planned = results["epochs"], results.get("epochs_planned")
            if planned is None:  # as of runs that are older than it
                planned = Run(self.run).recipe().recipe.epochs
            if done < planned:
                return {"words": f"stopped after {done:,} of {planned:,} epochs", "share": done / planned}
            return {"words": "done", "share": 1.0}
        except (OSError, ValueError, KeyError, TypeError, BadInput):
            return {"words": "not training now", "share": 0.0}


def stamp(path: Path) -> str:
    """What changes when a file does."""
    try:
        found = path.stat()
    except OSError:
        return "-"
    return f"{found.st_mtime_ns}.{found.st_size}"


def live(page: str, version: str) -> str:
    """The page, with what makes it move."""
    moving = fill("live.html", seen=version, every=round(1000 * EVERY))
    return page.replace(ALONE, f"{ALONE}; connect-src 'self'", 1).replace("</body>", f"{moving}</body>")


def answer(watched: Watched, path: str) -> tuple[int, str, str]:
    """The status, the kind and the text of what is answered to a request."""
    try:
        match path.partition("?")[0]:
            case "/":
                return 200, "text/html; charset=utf-8", watched.page()
            case "/state":
                return 200, "application/json", json.dumps(watched.state())
            case _:
                return 404, TEXT, "There is only one page here: /"
    except (BadInput, OSError) as error:  # a run folder that is moved away, say
        return 503, TEXT, str(error)
    except Exception as error:  # a file in it that says something else than it should
        return 503, TEXT, f"The page of {watched.run} cannot be made; a file there is damaged: {error!r}."


def answering(watched: Watched, names: Set[str] | None) -> type[BaseHTTPRequestHandler]:
    """What answers requests for this run. `names`: what it may be asked as, or None for anything."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A page from elsewhere, whose name is made to lead here, could have its reader's browser read this one.
            asked_as = re.sub(r":\d*$", "", self.headers.get("Host", "")).lower()
            if names is None or asked_as in names:
                status, kind, text = answer(watched, self.path)
            else:
                status, kind, text = 403, TEXT, ELSEWHERE
            content = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing of each request."""

    return Handler


class Server(ThreadingHTTPServer):
    """A server at an address of any family."""

    def __init__(self, family: socket.AddressFamily, address: Any, handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = family
        super().__init__(address, handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say what went wrong, but for a browser that has gone away meanwhile."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def listen(watched: Watched, host: str, port: int) -> Server:
    """A server at that port, or, where it is taken, at the next that is free; any free one for port 0. One that only
    this machine can reach answers to this machine's names only.

    Raises:
        BadInput: there is no such port, none of the next is free, or there is no such host here.
    """
    if port >= 1 << 16:
        raise BadInput(f"there is no port {port}; they end with {(1 << 16) - 1}.")
    otherwise = "127.0.0.1 shows the page on this machine only, 0.0.0.0 on others too"
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise BadInput(f"there is no host {host}; {otherwise}.") from None
    family, _, _, _, at = found[0]
    names = LOCAL | {bracketed(host).lower()} if ipaddress.ip_address(at[0]).is_loopback else None
    taken = None
    for number in range(port, min(port + PORTS, 1 << 16)) if port else (0,):
        try:
            server = Server(family, (at[0], number, *at[2:]), answering(watched, names))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise BadInput(f"nothing can be served at {host} ({error.strerror}); {otherwise}.") from None
            taken = error
            continue
        if taken is not None:
            say(f"port {port} is {'taken' if taken.errno == errno.EADDRINUSE else 'refused'}; taking {number}")
        return server
    raise BadInput(f"nothing can be served at {host}, port {port} and the {PORTS - 1} after it: {taken}.")


def bracketed(host: str) -> str:
    """A host as an address has it: an IPv6 one in brackets."""
    return f"[{host}]" if ":" in host else host


def where(host: str, port: int) -> str:
    """The address of a page that is served at a host; both, where machines elsewhere have another for it."""
    if host not in ("", "0.0.0.0", "::"):  # which are all addresses of this machine, and none to be typed
        return f"http://{bracketed(host)}:{port}/"
    here = "[::1]" if host == "::" else "127.0.0.1"
    return f"http://{here}:{port}/  or, from elsewhere,  http://{socket.gethostname()}:{port}/"


def watch(run: Path, dataset: Dataset | None, why_none: str, host: str, port: int) -> None:
    """Serve the page of a run until Ctrl-C. Where there is no data set, `why_none` says why.

    Raises:
        BadInput: it is no run folder, or there is no free port.
    """
    watched = Watched(run, dataset)
    if why_none and PICTURE not in watched.page():  # that of a run that is done was written, perhaps with pictures
        until = "" if Run(run).ended else " while the run goes on"
        say(f"vitrail: the page is without pictures{until}: {why_none}")
    with listen(watched, host, port) as server:
        say(f"look at  {where(host, server.server_address[1])}  (Ctrl-C ends it)")
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            say("")
