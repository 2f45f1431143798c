"""How the tests look at pages: through a parser, and through Chromium over its DevTools protocol."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import Any


class Page(HTMLParser):
    """A parsed page: its text, its pictures, and that every element that was opened was closed."""

    VOID = ("meta", "link", "img", "br", "wbr", "path", "rect")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(self.html)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:  # <path><title>…</title></path> closes what stands in VOID
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    def values(self, tag: str, name: str) -> list[str]:
        return [value for t, n, value in self.attributes if (t, n) == (tag, name)]


def assert_self_contained(page: Page) -> None:
    loading = ("src", "srcset", "href", "xlink:href", "data", "action", "poster", "background")
    for tag, name, value in page.attributes:
        if name in loading:
            assert value.startswith(("data:", "#")), f"<{tag} {name}={value[:80]}>"
        assert not name.startswith("on")
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|\bimport\b *[({'\"]", page.html)
    assert any("default-src 'none'" in content for content in page.values("meta", "content"))


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--no-sandbox", "--remote-debugging-pipe")  # fmt: skip
# The browser reads commands from file descriptor 3 and answers on 4.
START = """import fcntl, os, sys
commands, answers = (fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3])
os.dup2(commands, 3), os.dup2(answers, 4)
os.execv(sys.argv[3], sys.argv[3:])"""


class Browser:
    """One window. `events` is all that the browser has reported since the page was opened."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None, "there is no Chromium here"
        commands, self.commands = os.pipe()
        self.answers, answers = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(commands), str(answers), CHROMIUM, *FLAGS,
             f"--user-data-dir={profile}"],
            pass_fds=(commands, answers), stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(commands)
        os.close(answers)
        self.limit = self.patience()
        self.received, self.number, self.events = b"", 0, list[dict[str, Any]]()
        self.session: dict[str, str] = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def patience(self) -> threading.Timer:
        """In a minute the browser is ended: then reading ends, and the test fails instead of hanging."""
        limit = threading.Timer(60, self.process.kill)
        limit.daemon = True
        limit.start()
        return limit

    def call(self, method: str, **params: Any) -> Any:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params, **self.session}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def read(self) -> dict[str, Any]:
        while b"\0" not in self.received:
            data = os.read(self.answers, 1 << 16)
            assert data, "the browser has ended"
            self.received += data
        message, self.received = self.received.split(b"\0", 1)
        return dict(json.loads(message))

    def open(self, page: Path | str, width: int, scheme: str = "light") -> None:
        """A page at that width, loaded."""
        self.limit.cancel()
        self.limit = self.patience()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=page if isinstance(page, str) else page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.read())

    def complaints(self) -> list[dict[str, Any]]:
        """Errors, and whatever else was written to the console, since the page was opened."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event for event in self.events if event["method"] in kinds]

    def asked(self) -> set[str]:
        """The addresses that were asked for since the page was opened."""
        sent = (event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent")
        return {params["request"]["url"] for params in sent if not params["request"]["url"].startswith("data:")}

    def run(self, script: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.limit.cancel()
        os.close(self.commands)
        os.close(self.answers)
