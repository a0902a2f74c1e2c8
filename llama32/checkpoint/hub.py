"""Resolve a model name to a folder: a local folder, the model that ships, or a Hub download."""

import re
from pathlib import Path

REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def resolve(name: str | Path) -> Path:
    """Return the folder of a model.

    A name is a folder, "tiny", or a Hub id such as "meta-llama/Llama-3.2-1B-Instruct". A model that
    was downloaded before comes from the Hub's cache without asking the network, so no model changes
    unnoticed; `download` updates the cache. Raises FileNotFoundError for any other name.
    """
    folder = Path(name).expanduser()
    if folder.exists():
        return folder
    if name == "tiny":
        return Path(__file__).parent.parent / "tiny"
    if not REPO_ID.fullmatch(str(name)):
        raise FileNotFoundError(
            f"{name}: no such folder; give a folder, a Hub id such as "
            "meta-llama/Llama-3.2-1B-Instruct, or tiny"
        )
    from llama32.checkpoint import download  # the Hub client takes a second to import

    return download.find_cached(str(name)) or download.download(str(name))
