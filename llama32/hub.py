"""A name becomes a folder: one that is there, the model that ships, or one from the Hub."""

import re
from pathlib import Path

REPO = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def resolve(name: str | Path) -> Path:
    """The folder behind a name: a folder itself, "tiny", or a Hub id such as
    "meta-llama/Llama-3.2-1B-Instruct".

    A Hub id that was downloaded before is taken from the Hub's cache without asking the network, so
    a model does not change by itself; `download` brings it up to date.
    """
    folder = Path(name).expanduser()
    if folder.exists():
        return folder
    if name == "tiny":
        return Path(__file__).parent / "tiny"
    if not REPO.fullmatch(str(name)):
        raise FileNotFoundError(
            f"{name}: no such folder; give a folder, a Hub id such as "
            "meta-llama/Llama-3.2-1B-Instruct, or tiny"
        )
    from llama32 import download  # not before it is needed: the Hub's library takes its time

    return download.cached(str(name)) or download.download(str(name))
