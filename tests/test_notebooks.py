"""Each notebook from a clean kernel: it runs, is silent on stderr, and shows what was committed."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def kinds(cell: nbformat.NotebookNode) -> list[str]:
    """What a cell puts out: text, pictures, errors. Digits may differ between processors."""
    found = [
        output.get("name") or ", ".join(sorted(output.data)) for output in cell.get("outputs", ())
    ]
    return [kind for i, kind in enumerate(found) if i == 0 or kind != found[i - 1]]


def test_all_are_there_and_lead_from_one_to_the_next():
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{n:02}" for n in range(1, 14)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_a_clean_kernel_and_shows_what_was_committed(path):
    committed = nbformat.read(path, as_version=4)
    assert len(committed.cells) < 15
    assert "llama32" in committed.cells[1].source
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
    for cell, before in zip(book.cells, committed.cells, strict=True):
        assert "stderr" not in kinds(cell), cell.outputs
        assert kinds(cell) == kinds(before), cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_small_and_tells_nothing_of_where_it_was_made(path):
    assert path.stat().st_size < 600_000
    text = path.read_text("utf-8")
    for word in ("/home/", "/root/", "/tmp/", str(FOLDER.parent), "Traceback"):
        assert word not in text, word
