"""What the README shows works as it stands there."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llama32.__main__ import app

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text("utf-8"), re.S | re.M)


def test_its_python_runs_from_top_to_bottom(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it saves a model
    names: dict = {}
    for block in blocks("python"):
        exec(compile(block, str(README), "exec"), names)
    assert names["logits"].shape == (1, names["tokens"].shape[1], names["model"].config.vocab_size)
    assert "'role': 'assistant'" in capsys.readouterr().out


COMMANDS = [
    line.partition("#")[0]
    for block in blocks("sh")
    for line in block.splitlines()
    if line.startswith("llama32 ") and "meta-llama" not in line
]


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_run(command):
    result = CliRunner().invoke(app, shlex.split(command)[1:], input="Hi\n")
    assert result.exit_code == 0, result.output
    assert result.output.strip()


def test_it_leads_through_files_that_exist():
    named = set(re.findall(r"\b\w+\.py\b", README.read_text("utf-8")))
    assert "model.py" in named
    folders = (README.parent / folder for folder in ("llama32", "tests", "weights", "benchmarks"))
    assert named <= {path.name for folder in folders for path in folder.rglob("*.py")}
