"""What all tests share: shapes are checked, nothing leaves the machine or lands in the user's cache."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jaxtyping import install_import_hook

# Read by torch when it is imported, and by what tests start. More than two threads only get in each other's way on
# models as small as those of the tests, and so do more than one where tests run side by side.
os.environ["OMP_NUM_THREADS"] = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
os.environ["NO_COLOR"] = "1"
os.environ["COLUMNS"] = "100"
os.environ.pop("FORCE_COLOR", None)

# Shapes are checked wherever they are written. Not in all modules: elsewhere beartype would refuse an int for a float.
PACKAGE = Path(__file__).parent.parent / "vitrail"
install_import_hook(
    [
        ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
        for file in PACKAGE.rglob("*.py") if "from jaxtyping import" in file.read_text("utf-8")
    ],
    "beartype.beartype",
)  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["VITRAIL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("huggingface"))


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a test would have connected to {address[0]}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_here)
        yield


@pytest.fixture
def power_cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object], int], None]:
    """A function that starts a run and has it die when it is about to do the step of that number (from 0). What was
    saved before is all that is left; a run that saves after each step loses nothing else."""
    from vitrail.training import session
    from vitrail.training.step import train_step

    def cut(start: Callable[[], object], at: int) -> None:
        def step_or_die(model: Any, optimizer: Any, batches: Any, step: int) -> Any:
            if step == at:
                raise ConnectionAbortedError("power cut")
            return train_step(model, optimizer, batches, step)

        with monkeypatch.context() as patch:
            patch.setattr(session, "train_step", step_or_die)
            with pytest.raises(ConnectionAbortedError, match="power cut"):
                start()

    return cut
