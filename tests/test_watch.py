"""The live page: what is served while a run goes on, when it is done, and where."""

import json
import os
import signal
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

from vitrail import report, watch
from vitrail.cli import main
from vitrail.errors import BadInput
from vitrail.progress import TrainingDisplay


@contextmanager
def served(watched: watch.Watched) -> Iterator[int]:
    """The port at which it is served meanwhile."""
    with watch.listen(watched, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield int(server.server_address[1])
        finally:
            server.shutdown()


def get(port: int, path: str) -> tuple[int, str]:
    """The status and the text of an answer."""
    connection = HTTPConnection("127.0.0.1", port, timeout=30)  # urllib would ask a proxy
    try:
        connection.request("GET", path)
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
    assert watched.state() == {"page": watched.seen, "words": "done", "share": 1.0}
    assert 'id="calibration"' in watch.Watched(run, None).page()
    (run / "results.json").unlink()  # as resuming does
    assert 'id="calibration"' not in watched.page()


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
    said = capsys.readouterr().err
    assert "without pictures" in said
    assert f"port {taken} is taken; taking {ports[0]}" in said
    assert f"look at  http://127.0.0.1:{ports[0]}/" in said
    assert main(["watch", str(run), "--port", "65536"]) == 2
    assert "there is no port 65536" in capsys.readouterr().err
