"""Where figures go beside the run folder: TensorBoard's files; Weights & Biases and MLflow where they are installed,
as they are in the environment of `make trackers`."""

import importlib.util
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import vitrail
from vitrail.cli import main
from vitrail.data import cache
from vitrail.errors import BadInput, Stopped
from vitrail.explanation.explain import attended
from vitrail.pages.panes import enlarge, shine
from vitrail.recipes import resolve
from vitrail.settings import Tracking
from vitrail.training import session, track
from vitrail.training import train as training
from vitrail.training.session import Result
from vitrail.training.track import GAP, LOOKED_AT, NOTE, SIDE, Trackers
from vitrail.training.trackers import Status, connect
from vitrail.weights.checkpoint import Run

TINY: dict[str, Any] = {
    "hidden_size": 16, "mlp_dim": 32, "num_heads": 2, "num_layers": 1, "epochs": 3, "batch_size": 256, "dropout": 0.1,
    "classifier": "token",
}  # fmt: skip
STEPS = [6, 12, 17]  # behind each epoch
WEIGHTS = Path("model/model.safetensors")
STARTING = 300  # seconds that a server may take on a busy machine


def installed(name: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(missing, reason=f"{name} is not installed; `make trackers` tests with it")


def train(output: Path, **settings: Any) -> Result:
    return vitrail.train("digits", output=output, **TINY | settings)


@pytest.fixture(scope="module")
def untracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "untracked").run


class Notebook:
    """A tracker that keeps what it is told in a list, and is away for as long as `away` says."""

    name: Tracking = "mlflow"

    def __init__(self, told: list[tuple[str, Any, int]], away: Callable[[], bool] = lambda: False) -> None:
        self.told, self.away = told, away

    def note(self, what: str, value: Any, step: int) -> None:
        if self.away():
            raise RuntimeError("nobody is there\nand more of it")
        self.told.append((what, value, step))

    def connect(self) -> None:
        pass

    def begin(self, run: Path, settings: dict[str, Any], known: str | None) -> str:
        self.note("begin", settings, 0)
        return known or f"id-{len(self.told)}"

    def scalars(self, metrics: dict[str, float], step: int) -> None:
        self.note("scalars", metrics, step)

    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        self.note(name, pixels, step)

    def results(self, results: dict[str, Any], step: int) -> None:
        self.note("results", results, step)

    def close(self, status: Status) -> None:
        self.note("close", status, 0)

    def steps(self, what: str) -> list[int]:
        return [step for told, _, step in self.told if told == what]


# TensorBoard


def pictures(run: Path) -> dict[str, dict[int, NDArray[np.uint8]]]:
    """By name and step."""
    found: dict[str, dict[int, NDArray[np.uint8]]] = {}
    for path in run.glob("events.out.tfevents.*"):
        events = EventAccumulator(str(path), size_guidance={"images": 0}).Reload()
        for name in events.Tags()["images"]:
            for event in events.Images(name):
                with Image.open(io.BytesIO(event.encoded_image_string)) as image:
                    found.setdefault(name, {})[event.step] = np.asarray(image)
    return found


def test_events_show_training_images_and_what_the_last_weights_look_at(untracked: Path) -> None:
    shown = pictures(untracked)
    assert list(shown["training images"]) == [0]
    assert len(np.unique(shown["training images"][0])) > 100
    judged = cache.load("digits", 16).splits["test"]
    images = [judged.image(i) for i in np.linspace(0, len(judged) - 1, LOOKED_AT).astype(int)]
    maps = attended(vitrail.load(untracked), images)
    picture = shown["attention"][17]
    assert picture.shape == (2 * (SIDE + GAP), LOOKED_AT * (SIDE + GAP), 3)
    for place, (image, values) in enumerate(zip(images, maps, strict=True)):
        left, large = place * (SIDE + GAP), enlarge(image, SIDE)
        assert np.array_equal(picture[:SIDE, left : left + SIDE], large)
        below = picture[SIDE + GAP : 2 * SIDE + GAP, left : left + SIDE]
        assert np.abs(below.astype(int) - shine(large, values)).max() <= 1  # other batches round otherwise


def test_attention_is_drawn_no_more_often_than_its_share_of_the_time_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "EARLY", 0.0)
    monkeypatch.setattr(session, "LOOKING", 1e-6)
    assert list(pictures(train(tmp_path / "run").run)["attention"]) == [6, 17]


# What a tracker gets


def test_a_tracked_run_that_dies_and_goes_on_is_one_run_there_and_ends_with_the_same_bytes(
    untracked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    power_cut: Callable[[Callable[[], object], int], None],
) -> None:  # fmt: skip
    notebook = Notebook([])
    monkeypatch.setattr(training, "connect", lambda name: notebook)
    monkeypatch.setattr(session, "EARLY", 0.0)
    monkeypatch.setattr(session, "LOOKING", 1e6)  # after each epoch
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        # The last checkpoint is that of step 5: the first epoch's figures are sent, and its last step is done again.
        patch.setattr(Run, "save_state", forgetting(5))
        power_cut(lambda: train(run, track="mlflow", checkpoint_every=0.0), 8)
    assert notebook.steps("scalars") == [6]
    assert notebook.told[-1] == ("close", "FAILED", 0)
    done = vitrail.train(output=run, resume=True, track="mlflow")
    assert (run / WEIGHTS).read_bytes() == (untracked / WEIGHTS).read_bytes()
    assert notebook.steps("scalars") == notebook.steps("attention") == STEPS
    assert notebook.steps("training images") == [0]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    told = [value for what, value, _ in notebook.told if what == "scalars"]
    assert [line["val_top1"] for line in lines] == [metrics["val_top1"] for metrics in told]
    assert json.loads((run / NOTE).read_text()) == {"mlflow": {"run": "id-1", "step": 17}}
    settings = notebook.told[0][1]
    assert (settings["recipe"], settings["hidden_size"], settings["lr"]) == ("digits", 16, 3e-3)
    what, results, step = notebook.told[-2]
    assert (what, step, results["top1"]) == ("results", 17, done.results["top1"])
    assert "per_class" not in results
    assert notebook.told[-1] == ("close", "FINISHED", 0)


def forgetting(after: int) -> Callable[..., None]:
    """A `Run.save_state` that saves nothing behind that step."""
    save = Run.save_state

    def save_early(self: Run, state: dict[str, Tensor], progress: dict[str, Any]) -> None:
        if progress["step"] <= after:
            save(self, state, progress)

    return save_early


def trackers(run: Path, step: int, notebook: Notebook | None) -> Trackers:
    return Trackers(Run(run), resolve("digits"), step, notebook)


def epoch(run: Path, step: int) -> dict[str, float]:
    """Figures as a session has them: in the run folder before they go anywhere."""
    metrics = {"step": step, "val_loss": 1 / step}
    Run(run).add_metrics(metrics)
    return metrics


def test_a_run_that_was_not_tracked_is_sent_whole(tmp_path: Path) -> None:
    with trackers(tmp_path, 0, None) as alone:
        for step in (10, 20):
            alone.scalars(epoch(tmp_path, step), step)
    assert not (tmp_path / NOTE).exists()
    with trackers(tmp_path, 20, notebook := Notebook([])) as both:
        both.scalars(epoch(tmp_path, 30), 30)
    assert notebook.steps("scalars") == [10, 20, 30]
    with trackers(tmp_path, 30, again := Notebook([])):
        pass
    assert again.steps("scalars") == []


def test_what_a_tracker_did_not_take_is_sent_when_it_answers_and_by_the_next_stretch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    away = False
    notebook = Notebook([], lambda: away)
    with trackers(tmp_path, 0, notebook) as sending:
        sending.scalars(epoch(tmp_path, 10), 10)
        away = True
        for step in (20, 30):
            sending.picture("attention", np.zeros((2, 2, 3), np.uint8), step)
            sending.scalars(epoch(tmp_path, step), step)
        said = capsys.readouterr().err
        assert said.count("mlflow does not answer; the run goes on") == 1
        assert said.endswith("when it does: nobody is there\n")
        away = False
        sending.scalars(epoch(tmp_path, 40), 40)
        assert notebook.steps("scalars") == [10]  # it is not asked before the minute is over
        monkeypatch.setattr(track, "AGAIN", 0.0)
        sending.ask_at = 0.0
        sending.scalars(epoch(tmp_path, 50), 50)
        assert notebook.steps("scalars") == [10, 20, 30, 40, 50]
        away = True
        sending.scalars(epoch(tmp_path, 60), 60)
        sending.results({"top1": 0.5}, 60)
    said = capsys.readouterr().err
    assert "mlflow did not take 1 of the epochs and the results; --resume --track mlflow sends them" in said
    away = False
    with trackers(tmp_path, 60, notebook) as sending:
        assert notebook.steps("scalars") == [10, 20, 30, 40, 50, 60]
        sending.results({"top1": 0.5}, 60)
    assert notebook.steps("results") == [60]
    assert "did not take" not in capsys.readouterr().err


def test_a_tracker_is_told_of_steps_in_their_order(tmp_path: Path) -> None:
    away = False
    notebook, picture = Notebook([], lambda: away), np.zeros((2, 2, 3), np.uint8)
    with trackers(tmp_path, 0, notebook) as sending:
        away = True
        sending.scalars(epoch(tmp_path, 10), 10)
        sending.ask_at = 0.0
        sending.picture("attention", picture, 20)
        away = False
        sending.scalars(epoch(tmp_path, 20), 20)
        sending.ask_at = 0.0
        sending.picture("attention", picture, 30)
        sending.scalars(epoch(tmp_path, 30), 30)
    told = [(what, step) for what, _, step in notebook.told if what in ("scalars", "attention")]
    assert told == [("scalars", 10), ("scalars", 20), ("attention", 30), ("scalars", 30)]


def test_where_nothing_can_be_written_the_first_error_is_the_one_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sending = trackers(tmp_path, 0, notebook := Notebook([]))
    (tmp_path / NOTE).unlink()
    (tmp_path / NOTE).mkdir()  # no file can be put there, as on a full disk
    close = sending.events.close

    def close_and_fail() -> None:
        close()
        raise OSError("No space left on device")

    monkeypatch.setattr(sending.events, "close", close_and_fail)

    def stop() -> None:
        with sending:
            sending.scalars(epoch(tmp_path, 10), 10)
            raise Stopped("by a signal", 130)

    with pytest.raises(Stopped, match="by a signal"):
        stop()
    assert [what for what, _, _ in notebook.told] == ["begin", "scalars", "close"]


def test_a_tracker_that_does_not_take_the_run_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(
        BadInput, match=r"mlflow does not take the run: nobody is there\. MLFLOW_TRACKING_URI says where"
    ):
        trackers(tmp_path, 0, Notebook([], lambda: True))
    for damaged in ("{", "[]", '{"mlflow": {}}', '{"mlflow": 3}', '{"wandb": {"run": "id", "step": null}}'):
        (tmp_path / NOTE).write_text(damaged)
        with pytest.raises(BadInput, match=rf"{NOTE} is damaged .* delete it"):
            trackers(tmp_path, 0, Notebook([]))


def test_which_trackers_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadInput, match="track is 'mlflw'; it must be one of wandb, mlflow; did you mean 'mlflow'"):
        train(tmp_path / "run", track="mlflw")
    assert main(["train", "--track", "wand"]) == 2
    assert "'wand' is not one of wandb, mlflow; did you mean 'wandb'?" in capsys.readouterr().err
    for name in ("wandb", "mlflow"):
        if importlib.util.find_spec(name) is None:
            with pytest.raises(BadInput, match=rf"{name} is not installed: pip install 'vitrail\[{name}\]'"):
                train(tmp_path / "run", track=name)
    assert not list(tmp_path.iterdir())


# MLflow


class Server:
    """A real MLflow server with its SQLite store in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        store, artifacts = f"sqlite:///{self.folder / 'mlflow.db'}", str(self.folder / "artifacts")
        words = ["--backend-store-uri", store, "--artifacts-destination", artifacts, "--workers", "1"]
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), *words]
        with (self.folder / "server.log").open("a") as log:  # a session of its own, for it has children
            self.process = subprocess.Popen(
                command, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        deadline = time.monotonic() + STARTING
        while True:
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            assert time.monotonic() < deadline
            try:
                with urllib.request.urlopen(f"{self.address}/health", timeout=10):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    server.start()
    yield server
    server.stop()


@installed("mlflow")
def test_a_run_on_a_real_mlflow_server_that_goes_away_and_comes_back(
    server: Server, untracked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    variables = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_HTTP")}
    train(run, track="mlflow", stop_after=1)
    assert variables == {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_HTTP")}
    other.mkdir()
    with Trackers(Run(other), resolve("vit-12"), 0, connect("mlflow")) as sending:
        server.stop()
        sending.picture("attention", np.zeros((2, 2, 3), np.uint8), 10)
        sending.scalars(epoch(other, 10), 10)
        assert capsys.readouterr().err.count("mlflow does not answer; the run goes on") == 1
        with pytest.raises(
            BadInput, match=r"mlflow does not take the run: .*MLFLOW_TRACKING_URI says where its server is"
        ):
            vitrail.train(output=run, resume=True, track="mlflow")
        vitrail.train(output=run, resume=True, stop_after=2)  # untracked meanwhile
        server.start()
    last = vitrail.train(output=run, resume=True, track="mlflow")
    assert capsys.readouterr().out == ""
    assert (run / WEIGHTS).read_bytes() == (untracked / WEIGHTS).read_bytes()

    from mlflow import MlflowClient

    client = MlflowClient(server.address)
    experiment = client.get_experiment_by_name("vitrail")
    found = {each.info.run_name: each for each in client.search_runs([experiment.experiment_id])}
    assert set(found) == {"run", "other"}
    there = found["run"]
    assert {each.info.status for each in found.values()} == {"FINISHED"}
    assert there.info.run_id == json.loads((run / NOTE).read_text())["mlflow"]["run"]
    assert (there.data.params["recipe"], there.data.params["hidden_size"]) == ("digits", "16")
    assert there.data.tags["results/dataset"] == "digits"
    assert there.data.metrics["results/top1"] == last.results["top1"]
    assert [each.value for each in client.get_metric_history(found["other"].info.run_id, "val_loss")] == [0.1]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name in lines[0]:
        history = client.get_metric_history(there.info.run_id, name)
        assert {each.step: each.value for each in history} == {line["step"]: line[name] for line in lines}
        assert len(history) == len(STEPS)
    paths = [each.path for each in client.list_artifacts(there.info.run_id, "images") if each.path.endswith(".png")]
    assert sorted(path.partition("+timestamp")[0] for path in paths) == [
        "images/attention+step+17", "images/attention+step+6", "images/training images+step+0"
    ]  # fmt: skip
    drawn = pictures(run)
    for path in paths:
        name, _, step, *_ = path.removeprefix("images/").split("+")
        with Image.open(client.download_artifacts(there.info.run_id, path, str(tmp_path))) as image:
            assert np.array_equal(np.asarray(image), drawn[name][int(step)])


# Weights & Biases


def written(path: Path) -> Iterator[Any]:
    """The records of a `.wandb` file: protocol buffers in LevelDB's log format, blocks of 32 KiB that hold records or
    parts of them (types 2 and 3: more follows)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (room := -at % 32768) and room < 7:
            at += room
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(parts)
            parts = b""


def values(items: Any) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


@installed("wandb")
def test_a_run_with_weights_and_biases_offline(
    untracked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    run = tmp_path / "run"
    train(run, track="wandb", stop_after=1)
    last = vitrail.train(output=run, resume=True, track="wandb")
    assert capsys.readouterr().out == ""
    assert (run / WEIGHTS).read_bytes() == (untracked / WEIGHTS).read_bytes()
    known = json.loads((run / NOTE).read_text())["wandb"]["run"]
    stretches = [list(written(path)) for path in sorted(run.glob("wandb/offline-run-*/*.wandb"))]
    assert len(stretches) == 2
    lines = {line["step"]: line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    history: dict[int, dict[str, Any]] = {}
    for records in stretches:
        (begun,) = (record.run for record in records if record.HasField("run"))
        assert (begun.run_id, begun.project, begun.display_name) == (known, "vitrail", "run")
        settings = values(begun.config.update)
        assert (settings["recipe"], settings["hidden_size"]) == ("digits", 16)
        rows = [values(record.history.item) for record in records if record.HasField("history")]
        history |= {row["_step"]: row for row in rows}
        assert [row["_step"] for row in rows] == ([0, 6] if records is stretches[0] else [12, 17])
    for step, line in lines.items():
        assert {name: history[step][name] for name in line} == line
    assert {step: "attention.path" in row for step, row in history.items() if step != 12} == {
        0: False,
        6: True,
        17: True,
    }
    assert "training images.path" in history[0]
    assert len(list(run.glob("wandb/offline-run-*/files/media/images/attention_*.png"))) >= 2
    summary = {
        k: v for record in stretches[1] if record.HasField("summary") for k, v in values(record.summary.update).items()
    }
    assert (summary["results/top1"], summary["results/device"]) == (last.results["top1"], last.results["device"])
    assert "results/per_class" not in summary
