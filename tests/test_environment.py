"""What a run is said to have run on, and by what the program is called."""

from pathlib import Path

import pytest

from vitrail.environment import cpu, program


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


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="processors are described elsewhere")
def test_a_processor_is_named_with_its_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """`AMD EPYC` alone has been two generations, of which one is more than twice as fast."""
    described = Path("/proc/cpuinfo").read_text()
    assert cpu().split(" (")[0] in described
    monkeypatch.setattr(
        Path, "read_text", lambda self: "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n" * 2
    )
    assert cpu() == "AMD EPYC (family 25, model 17)"
    monkeypatch.setattr(Path, "read_text", lambda self: "model name\t: ARMv8\n")
    assert cpu() == "ARMv8"
