"""The page of a run, served while the run goes on: its curves move, and how far it is stands below.

The page asks every two seconds whether there is something new, and takes over what has changed. Nothing is written.
"""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from vitrail.cache import Dataset
from vitrail.errors import BadInput
from vitrail.progress import duration, say
from vitrail.record import read
from vitrail.report import fill, is_its_own, render

PORTS = 20  # that are tried, from the one that is wanted
EVERY = 2.0  # seconds between two questions of the page
LATE = 15.0  # seconds after which it is said when the run was last heard of
ALONE = "default-src 'none'"  # in the page's policy: it loads nothing
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
        """The page of the run, made here while it goes on; when it is done, the one that is written then."""
        report = self.run / "report.html"
        if (self.run / "results.json").is_file() and report.is_file():
            return report.read_text(encoding="utf-8")
        return render(read(self.run), self.dataset, its_own=is_its_own(self.run, self.dataset))

    def state(self) -> dict[str, Any]:
        """For the page: which it should be by now, and how far the run is, in words and as a share."""
        noted = self.run / "progress.json"
        with self.lock:
            page = self.version()
        try:
            told, heard = json.loads(noted.read_text(encoding="utf-8")), time.time() - noted.stat().st_mtime
            late = f" · last heard of {duration(heard)} ago" if heard > LATE else ""
            return {"page": page, "words": told["words"] + late, "share": told["share"]}
        except (OSError, ValueError):
            done = (self.run / "results.json").is_file()
            return {"page": page, "words": "done" if done else "not training now", "share": float(done)}


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


def answering(watched: Watched) -> type[BaseHTTPRequestHandler]:
    """What answers requests for this run."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                match self.path.partition("?")[0]:
                    case "/":
                        self.answer(200, "text/html; charset=utf-8", watched.page())
                    case "/state":
                        self.answer(200, "application/json", json.dumps(watched.state()))
                    case _:
                        self.answer(404, "text/plain; charset=utf-8", "There is only one page here: /")
            except (BadInput, OSError) as error:  # a run folder that is moved away, say
                self.answer(503, "text/plain; charset=utf-8", str(error))

        def answer(self, status: int, kind: str, text: str) -> None:
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


def listen(watched: Watched, host: str, port: int) -> ThreadingHTTPServer:
    """A server at that port, or, where it is taken, at the next that is free; any free one for port 0.

    Raises:
        BadInput: there is no such port, none of the next is free, or there is no such host here.
    """
    if port >= 1 << 16:
        raise BadInput(f"there is no port {port}; they end with {(1 << 16) - 1}.")
    taken = None
    for number in range(port, min(port + PORTS, 1 << 16)) if port else (0,):
        try:
            server = ThreadingHTTPServer((host, number), answering(watched))
        except OSError as error:
            taken = error
            continue
        if taken is not None:
            say(f"port {port} is taken; taking {number}")
        return server
    raise BadInput(f"nothing can be served at {host}, port {port} and the {PORTS - 1} after it: {taken}.")


def watch(run: Path, dataset: Dataset | None, host: str, port: int) -> None:
    """Serve the page of a run until Ctrl-C.

    Raises:
        BadInput: it is no run folder, or there is no free port.
    """
    with listen(Watched(run, dataset), host, port) as server:
        where = f"[{host}]" if ":" in host else host
        say(f"look at  http://{where}:{server.server_address[1]}/  (Ctrl-C ends it)")
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            say("")
