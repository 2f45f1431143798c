"""The live page: what is served while a run goes on, when it is done, and where."""

import errno
import json
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from run_folders import begin, digits, finish

from vitrail.cli import main
from vitrail.data.cache import Dataset
from vitrail.errors import BadInput
from vitrail.pages import report, watch
from vitrail.progress import TrainingDisplay
from vitrail.training import books
from vitrail.training.train import train


@contextmanager
def served(watched: watch.Watched, host: str = "127.0.0.1") -> Iterator[int]:
    """The port at which it is served meanwhile."""
    with watch.listen(watched, host, 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield int(server.server_address[1])
        finally:
            server.shutdown()


def get(port: int, path: str, host: str = "127.0.0.1", **headers: str) -> tuple[int, str]:
    """The status and the text of an answer."""
    connection = HTTPConnection(host, port, timeout=30)  # urllib would ask a proxy
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        assert answer.headers["Cache-Control"] == "no-store"
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_the_page_moves_while_the_run_goes_on(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    before = {path.name for path in run.iterdir()}
    watched = watch.Watched(run, None)
    first = watched.page()
    assert "3 of 80 epochs so far" in " ".join(first.split())
    assert "connect-src 'self'" in first
    assert watched.page() is first  # nothing is made twice
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) | {"epoch": 4, "val_top1": 0.875}
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write(json.dumps(row) + "\n")
    assert watched.state()["page"] != watched.seen  # so that the page asks for
    second = watched.page()
    assert "4 of 80 epochs so far" in " ".join(second.split())
    assert "87.5%" in second
    assert watched.state()["page"] == watched.seen
    assert f'data-seen="{watched.seen}"' in second
    assert {path.name for path in run.iterdir()} == before


def test_the_page_of_a_run_that_is_done_is_the_one_that_was_written(tmp_path: Path) -> None:
    run, dataset = tmp_path / "run", digits(2)
    watched = watch.Watched(begin(run), dataset)
    page = watched.page()
    done = finish(tmp_path / "done", dataset)
    for name in ("results.json", "predictions.safetensors"):
        (done / name).rename(run / name)
    assert watched.page() is page  # until the page is written too
    written = report.write_report(run, dataset)
    assert watched.page() == watch.live(written.read_text("utf-8"), watched.seen)
    assert watched.state() == {"page": watched.seen, "words": "stopped after 3 of 80 epochs", "share": 3 / 80}
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps(results | {"epochs_planned": 3}))
    written.touch()
    assert watched.state()["words"] == "done"
    assert 'id="calibration"' in watch.Watched(run, None).page()
    (run / "results.json").unlink()  # as resuming does
    assert 'id="calibration"' not in watched.page()


def test_the_page_of_a_run_that_is_done_is_made_where_it_is_not_there(tmp_path: Path) -> None:
    run, dataset = finish(tmp_path / "run", digits()), digits()
    page = watch.Watched(run, dataset).page()
    written = report.write_report(run, dataset).read_text("utf-8")

    def parts(html: str) -> str:
        return html[html.index("<main") : html.index("</main>")]

    assert parts(page) == parts(written)


def test_how_far_it_is(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    watched = watch.Watched(run, None)
    assert watched.state()["words"] == "not training now"
    noted = run / "progress.json"
    with TrainingDisplay(noted) as display:
        display.update(30, 120, 1.5, 6, "loss 0.5", 1000.0, 9.0)
        told = "step 30/120 · epoch 1.5/6 · loss 0.5 · 1,000 images/s · 9.0 s left"
        state = watched.state()
        assert (state["words"], state["share"]) == (told, 0.25)
        display.update(31, 120, 1.6, 6, "loss 0.4", 1000.0, 8.9)  # too soon for another note
        assert watched.state()["share"] == 0.25
        os.utime(noted, (time.time() - 90, time.time() - 90))
        assert watched.state()["words"] == f"{told} · last heard of 1 min 30 s ago"
    assert not noted.exists()
    assert [path for path in run.iterdir() if path.name.startswith(".")] == []
    for damaged in ("{", "[]", "{}", '{"words": "step 1/2", "share": null}'):
        noted.write_text(damaged)
        assert watched.state()["words"] == "not training now"


def test_it_trains_until_its_page_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, told = report.write_report, list[str]()

    def look(run: Path, dataset: Dataset | None) -> Path:
        told.append(watch.Watched(run, None).state()["words"])
        return write(run, dataset)

    monkeypatch.setattr(books, "write_report", look)
    run = train("digits", output=tmp_path / "run", stop_after=1, image_size=8, hidden_size=16, mlp_dim=16, num_layers=1,
                num_heads=1, batch_size=256).run  # fmt: skip
    assert told[0] == "not training now"  # before the first step
    assert len(told) > 1
    assert all(words.startswith("step ") for words in told[1:])
    state = watch.Watched(run, None).state()
    assert (state["words"], state["share"]) == ("stopped after 1 of 80 epochs", 1 / 80)


def test_that_there_are_no_pictures_is_said_where_it_is_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", lambda *_, **__: None)
    run, why = finish(tmp_path / "run", digits()), "photos are gone."
    for dataset in (None, digits()):
        report.write_report(run, dataset)
        watch.watch(run, None, why, "127.0.0.1", 8500)
        said = f"vitrail: the page is without pictures: {why}\n"
        assert (said in capsys.readouterr().err) == (dataset is None)
    watch.watch(begin(tmp_path / "begun"), None, why, "127.0.0.1", 8500)
    assert f"without pictures while the run goes on: {why}" in capsys.readouterr().err


def test_served(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    watched = watch.Watched(run, None)
    with served(watched) as port:
        assert get(port, "/") == (200, watched.page())
        status, state = get(port, "/state?again")
        assert (status, json.loads(state)) == (200, watched.state())
        for path in ("/recipe.yaml", "/../run/recipe.yaml", "//recipe.yaml"):
            assert get(port, path) == (404, "There is only one page here: /")
        (run / "recipe.yaml").unlink()
        status, text = get(port, "/")
        assert status == 503
        assert "no run folder" in text


def test_served_to_this_machine_only(tmp_path: Path) -> None:
    watched = watch.Watched(begin(tmp_path / "run"), None)
    with served(watched) as port:
        for name in (f"localhost:{port}", "LOCALHOST", "127.0.0.1", f"127.0.0.1:{port}", "[::1]", f"[::1]:{port}"):
            assert get(port, "/", Host=name) == (200, watched.page())
        # Names of somebody else's that were made to lead here, so that this page could be read by theirs.
        for name in ("example.org", f"example.org:{port}", "localhost.example.org", "127.0.0.1.example.org", "::1", ""):
            for path in ("/", "/state"):
                status, text = get(port, path, Host=name)
                assert (status, text) == (403, watch.ELSEWHERE)
    handler = watch.answering(watched, None)  # as it is at 0.0.0.0
    with watch.Server(socket.AF_INET, ("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        assert get(server.server_address[1], "/state", Host="example.org")[0] == 200
        server.shutdown()


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as tried:
            tried.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
def test_ipv6(tmp_path: Path) -> None:
    watched = watch.Watched(begin(tmp_path / "run"), None)
    with served(watched, "::1") as port:
        assert get(port, "/", "::1") == (200, watched.page())
        assert get(port, "/", "::1", Host="example.org")[0] == 403


def test_where_it_is_to_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "box")
    assert watch.where("127.0.0.1", 8500) == "http://127.0.0.1:8500/"
    assert watch.where("fe80::2", 8500) == "http://[fe80::2]:8500/"
    assert watch.where("0.0.0.0", 8500) == "http://127.0.0.1:8500/  or, from elsewhere,  http://box:8500/"
    assert watch.where("::", 80) == "http://[::1]:80/  or, from elsewhere,  http://box:80/"


def test_a_browser_that_goes_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    watched = watch.Watched(begin(tmp_path / "run"), None)
    asked, gone = threading.Event(), threading.Event()

    def late() -> str:
        asked.set()
        gone.wait(30)
        return " " * 10_000_000

    monkeypatch.setattr(watched, "page", late)
    with served(watched) as port:
        for request in (b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n", b"GET / "):  # the second is not even asked
            with socket.create_connection(("127.0.0.1", port)) as browser:
                browser.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # ended, not closed
                browser.sendall(request)
                assert asked.wait(30)
        gone.set()
        assert get(port, "/state")[0] == 200
        for thread in threading.enumerate():
            if "process_request" in thread.name:
                thread.join(30)
    assert capsys.readouterr().err == ""


def test_a_damaged_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = begin(tmp_path / "run")
    watched = watch.Watched(run, None)
    with served(watched) as port:
        for damaged, what in (("{", "is damaged"), ('{"launches": [1]}', "damaged: TypeError(")):
            (run / "environment.json").write_text(damaged)
            status, text = get(port, "/")
            assert status == 503
            assert what in text
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("host", "why"), [("a..b", "there is no host a..b; 127"), ("192.0.2.1", "at 192.0.2.1 [(]")])
def test_a_host_that_is_not_here(tmp_path: Path, host: str, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        watch.listen(watch.Watched(begin(tmp_path / "run"), None), host, 8500)


def test_ports_that_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    bind, watched = watch.Server.server_bind, watch.Watched(begin(tmp_path / "run"), None)

    def refuse(server: watch.Server) -> None:
        if server.server_address[1] < 1024 + allowed:
            raise OSError(errno.EACCES, "Permission denied")
        server.server_address = ("127.0.0.1", 0)
        bind(server)

    monkeypatch.setattr(watch.Server, "server_bind", refuse)
    allowed = 0
    with watch.listen(watched, "127.0.0.1", 1022):
        assert capsys.readouterr().err == "port 1022 is refused; taking 1024\n"
    allowed = 20
    with pytest.raises(BadInput, match=r"port 1022 and the 19 after it: .*Permission denied"):
        watch.listen(watched, "127.0.0.1", 1022)


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no run folder"):
        watch.Watched(tmp_path, None)


def test_a_port_that_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    run = begin(tmp_path / "run", data="gone")
    with watch.listen(watch.Watched(run, None), "127.0.0.1", 0) as first:
        taken = first.server_address[1]

        start, ports = ThreadingHTTPServer.serve_forever, list[int]()

        def interrupt() -> None:
            assert get(ports[0], "/state")[0] == 200  # it answers before that
            os.kill(os.getpid(), signal.SIGINT)

        def serve(server: Any, poll_interval: float) -> None:
            ports.append(server.server_address[1])
            threading.Thread(target=interrupt, daemon=True).start()
            start(server, poll_interval)

        monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", serve)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored in the background
        try:
            assert main(["watch", str(run), "--port", str(taken)]) == 0  # Ctrl-C is how it ends
        finally:
            signal.signal(signal.SIGINT, before)
    out, said = capsys.readouterr()
    assert out == f"{run}\n"
    assert "without pictures" in said
    assert f"port {taken} is taken; taking {ports[0]}" in said
    assert f"look at  http://127.0.0.1:{ports[0]}/" in said
    assert main(["watch", str(run), "--port", "65536"]) == 2
    assert "there is no port 65536" in capsys.readouterr().err
