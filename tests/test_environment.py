"""What a run is said to have run on, and by what the program is called."""

from pathlib import Path

import pytest

from vitrail.environment import program


def test_a_program_that_the_shell_does_not_find_is_called_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (there := tmp_path / "bin").mkdir()
    (there / "vitrail").touch(mode=0o755)
    monkeypatch.setattr("sys.argv", [".venv/bin/vitrail", "train"])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert program() == ".venv/bin/vitrail"
    monkeypatch.setattr("sys.argv", ["my files/bin/vitrail", "train"])
    assert program() == "'my files/bin/vitrail'"
    monkeypatch.setenv("PATH", str(there))
    assert program() == "vitrail"
    monkeypatch.setattr("sys.argv", ["notebook.py"])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert program() == "vitrail"
