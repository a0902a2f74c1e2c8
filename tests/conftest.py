"""What every test stands on: shapes are checked, and reference cases are found or skipped."""

from jaxtyping import install_import_hook

install_import_hook("llama32", "beartype.beartype")  # before anything imports llama32

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def reference() -> Path:
    """Exact cases that are too large for the repository, in a folder beside it."""
    folder = Path(__file__).parents[2] / "shared" / "reference"
    if not folder.is_dir():
        pytest.skip(f"no reference cases at {folder}")
    return folder
