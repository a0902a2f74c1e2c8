"""What the README shows works as it stands there."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llama32.__main__ import app
from llama32.loading import load
from tests.serving import Served, serving

README = Path(__file__).parent.parent / "README.md"


ADDRESS = "http://127.0.0.1:8000"
TORCHRUN = "# torchrun "


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text("utf-8"), re.S | re.M)


def test_its_python_runs_from_top_to_bottom(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it saves a model
    names: dict = {}
    for block in blocks("python"):
        if ADDRESS not in block and TORCHRUN not in block:
            exec(compile(block, str(README), "exec"), names)
    assert names["logits"].shape == (1, names["tokens"].shape[1], names["model"].config.vocab_size)
    assert "'role': 'assistant'" in capsys.readouterr().out


COMMANDS = [
    line.partition("#")[0]
    for block in blocks("sh")
    for line in block.splitlines()
    if line.startswith("llama32 ") and "meta-llama" not in line and " serve" not in line
]


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A folder with the files that the commands speak of."""
    folder = tmp_path_factory.mktemp("here")
    (examples,) = blocks("json")
    (folder / "data.jsonl").write_text(examples)
    (folder / "README.md").write_text(README.read_text("utf-8"))
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_run(command, here, monkeypatch):
    monkeypatch.chdir(here)
    result = CliRunner().invoke(app, shlex.split(command)[1:], input="Hi\n")
    assert result.exit_code == 0, result.output
    assert result.output.strip()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """The server of `llama32 serve --model tiny`, at another port: that one may be taken."""
    assert "llama32 serve --model tiny " in README.read_text("utf-8")
    with serving(load("tiny")) as server:
        yield server


def test_its_server_answers_its_curl(served):
    (command,) = [block for block in blocks("sh") if block.startswith("curl ")]
    command = command.replace(ADDRESS, served.url)
    told = subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout
    events = [event for event in told.split("\n\n") if event]
    assert len(events) > 20
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"


def test_its_server_answers_its_client(served, capsys):
    (block,) = [block for block in blocks("python") if ADDRESS in block]
    exec(compile(block.replace(ADDRESS, served.url), str(README), "exec"), names := {})
    told = capsys.readouterr().out
    assert len(told) > 200
    assert "name='Throw'" in told
    assert "mood=" in told
    names["client"].close()


def test_its_script_for_two_processes_tells_one_story(tmp_path):
    (block,) = [block for block in blocks("python") if TORCHRUN in block]
    arguments = block.splitlines()[0].removeprefix(TORCHRUN).split()
    (tmp_path / arguments[-1]).write_text(block)
    torchrun = [sys.executable, "-m", "torch.distributed.run", *arguments]
    told = subprocess.run(torchrun, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    tokenizer = load("tiny").require_tokenizer()
    assert 25 < len(tokenizer.encode(told)) < 40  # 32 tokens, or by a merge or two less, once


def test_it_leads_through_files_that_exist():
    named = set(re.findall(r"\b\w+\.py\b", README.read_text("utf-8")))
    assert "model.py" in named
    named.remove("story.py")  # which the reader writes
    folders = (README.parent / folder for folder in ("llama32", "tests", "weights", "benchmarks"))
    assert named <= {path.name for folder in folders for path in folder.rglob("*.py")}
