"""What README.md and the pages in docs/ show works as it stands there."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI
from typer.testing import CliRunner

from llama32.cli.main import app
from llama32.llm.loading import load
from tests.serving import Served, serving
from tests.test_glossary import references, resolve

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md"))]

ADDRESS = "http://127.0.0.1:8000"
TORCHRUN = "# torchrun "
CODE_FOLDERS = "llama32", "tests", "weights", "benchmarks"
LONGEST_README = 220  # lines


def page_name(page: Path) -> str:
    return page.stem


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.S | re.M)


def all_blocks(language: str) -> list[str]:
    return [block for page in PAGES for block in blocks(page, language)]


def prose(page: Path) -> str:
    """A page without the list of identifiers that are gone."""
    return page.read_text("utf-8").partition("\n## Renamed identifiers\n")[0]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """The server of `llama32 serve --model tiny`, at another port: that one may be taken."""
    assert "llama32 serve --model tiny " in README.read_text("utf-8")
    with serving(load("tiny")) as server:
        yield server


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A folder with the files that pages speak of."""
    folder = tmp_path_factory.mktemp("here")
    examples = {block for block in all_blocks("json") if block.startswith('{"messages"')}
    (folder / "data.jsonl").write_text(max(examples, key=len))  # the longest has all kinds
    (folder / "README.md").write_text(README.read_text("utf-8"))
    return folder


def run_python(page: Path, request: pytest.FixtureRequest) -> dict:
    """Run the Python of a page from top to bottom, and return the names that it defines."""
    names: dict = {}
    scripts = [block for block in blocks(page, "python") if TORCHRUN not in block]
    if any(ADDRESS in block for block in scripts):
        url = request.getfixturevalue("served").url
        scripts = [block.replace(ADDRESS, url) for block in scripts]
    try:
        for block in scripts:
            exec(compile(block, str(page), "exec"), names)
    finally:
        for client in [value for value in names.values() if isinstance(value, OpenAI)]:
            client.close()
    return names


PYTHON = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("page", PYTHON, ids=page_name)
def test_the_python_of_a_page_runs_from_top_to_bottom(
    page, request, capsys, here, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # pages save models
    for file in here.glob("*.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    names = run_python(page, request)
    shown = capsys.readouterr().out
    if page == README:
        rows = names["tokens"].shape[1]
        assert names["logits"].shape == (1, rows, names["model"].config.vocab_size)
        assert "'role': 'assistant'" in shown
    if any("openai" in block for block in blocks(page, "python")):
        assert len(shown) > 200
        assert "name='Throw'" in shown
        assert "mood=" in shown


def test_a_page_shows_how_a_client_is_served():
    assert any(ADDRESS in block and "openai" in block for block in all_blocks("python"))


COMMANDS = {
    line.partition("#")[0].strip(): page.stem
    for page in reversed(PAGES)
    for block in blocks(page, "sh")
    for line in block.splitlines()
    if line.startswith("llama32 ") and "meta-llama" not in line and " serve" not in line
}
IN_ORDER = [
    command
    for page in PAGES
    for command in (
        line.partition("#")[0].strip() for line in "".join(blocks(page, "sh")).splitlines()
    )
    if COMMANDS.get(command) == page.stem
]


@pytest.mark.parametrize("command", dict.fromkeys(IN_ORDER))
def test_the_commands_of_the_pages_run(command, here, monkeypatch):
    monkeypatch.chdir(here)
    result = CliRunner().invoke(app, shlex.split(command)[1:], input="Hi\n")
    assert result.exit_code == 0, result.output
    assert result.output.strip()


CURLS = list(dict.fromkeys(block for block in all_blocks("sh") if block.startswith("curl ")))


@pytest.mark.parametrize("command", CURLS)
def test_the_server_answers_curl(command, served):
    command = command.replace(ADDRESS, served.url)
    told = subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout
    if '"stream": true' not in command:
        assert told
        assert '"error"' not in told
        return
    events = [event for event in told.split("\n\n") if event]
    assert len(events) > 20
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"


def test_a_page_shows_a_stream():
    assert any('"stream": true' in block for block in CURLS)


SCRIPTS = {
    block.splitlines()[0].split()[-1]: block for block in all_blocks("python") if TORCHRUN in block
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_for_several_processes_tells_one_story(name, tmp_path):
    arguments = SCRIPTS[name].splitlines()[0].removeprefix(TORCHRUN).split()
    (tmp_path / name).write_text(SCRIPTS[name])
    torchrun = [sys.executable, "-m", "torch.distributed.run", *arguments]
    told = subprocess.run(torchrun, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert told.strip()
    if name == "story.py":
        tokenizer = load("tiny").require_tokenizer()
        assert 25 < len(tokenizer.encode(told)) < 40  # 32 tokens, or by a merge or two less, once


def test_a_script_generates_in_two_processes():
    assert "story.py" in SCRIPTS


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_a_page_leads_through_files_that_exist(page):
    named = set(re.findall(r"\b[\w/]*\w+\.py\b", prose(page)))
    if page == README:
        assert "model.py" in named
    named -= SCRIPTS.keys()  # which the reader writes
    folders = (ROOT / folder for folder in CODE_FOLDERS)
    files = [f"/{path.relative_to(ROOT)}" for folder in folders for path in folder.rglob("*.py")]
    for name in named:
        assert any(file.endswith(f"/{name}") for file in files), name


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_the_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s#]*)(?:#[^)\s]*)?\)", prose(page)):
        if target and "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_the_references_of_a_page_lead_into_the_code(page):
    for dotted in references(page.read_text("utf-8")):
        resolve(dotted)


def test_the_readme_is_short():
    assert len(README.read_text("utf-8").splitlines()) <= LONGEST_README


def test_the_tree_of_the_readme_is_that_of_the_package():
    shown = set(re.findall(r"^[├└]── (\S+)", README.read_text("utf-8"), re.M))
    package = ROOT / "llama32"
    rooms = {f"{path.name}/" for path in package.iterdir() if path.is_dir() and path.name[0] != "_"}
    files = {path.name for path in package.glob("*.py") if path.name[0] != "_"}
    assert shown == rooms | files


ARCHITECTURE = DOCS / "architecture.md"


def test_ten_questions_are_answered_with_files_and_symbols():
    part = (
        ARCHITECTURE.read_text("utf-8").partition("\n## Ten questions\n")[2].partition("\n## ")[0]
    )
    answers = re.split(r"^### (.*\?)$", part, flags=re.M)[1:]
    questions = dict(zip(answers[::2], answers[1::2], strict=True))
    assert len(questions) == 10
    for question, answer in questions.items():
        assert references(answer), question
        assert re.search(r"`\w[\w/]*\.py`", answer), question
        for dotted in references(answer):
            resolve(dotted)


def count_lines(room: str) -> int:
    path = ROOT / "llama32" / room
    files = path.rglob("*.py") if path.is_dir() else [path]
    return sum(len(file.read_text("utf-8").splitlines()) for file in files)


def test_the_architecture_page_counts_lines_as_they_are():
    rows = re.findall(r"^\| \d+ \| (`.*`) \| ([\d,]+) \|", ARCHITECTURE.read_text("utf-8"), re.M)
    assert len(rows) > 10
    for rooms, shown in rows:
        lines = sum(count_lines(room) for room in re.findall(r"`([^`]+)`", rooms))
        assert abs(int(shown.replace(",", "")) - lines) <= 0.15 * lines, f"{rooms}: {lines}"
