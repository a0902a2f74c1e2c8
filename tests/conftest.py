"""What every test stands on: shapes are checked, and reference cases are found or skipped."""

import os

# Two threads of one product wait for each other, and beside other work, which has one of them stand
# by, they wait a hundred times as long as they work. What the tests run is small enough for one.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch looks; for processes they start, too

from jaxtyping import install_import_hook

install_import_hook("llama32", "beartype.beartype")  # before anything imports llama32

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """For `-n auto`: each worker takes a processor and up to 2 GB."""
    return min(os.cpu_count() or 1, 4)


@pytest.fixture(scope="session")
def reference() -> Path:
    """Exact cases that are too large for the repository, in a folder beside it."""
    folder = Path(__file__).parents[2] / "shared" / "reference"
    if not folder.is_dir():
        pytest.skip(f"no reference cases at {folder}")
    return folder
