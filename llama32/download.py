"""Models from the Hub, into its cache or a folder."""

from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # httpx's, or httpx2's from Hub 2 on
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from llama32.checkpoint import inspect
from llama32.config import LlamaConfig
from llama32.files import read_json
from llama32.layouts import BESIDE, HUB_FILE, HUB_INDEX

# Repositories repeat their weights in other formats; only these files are downloaded.
HUB_LAYOUT = (
    "config.json",
    *BESIDE,
    HUB_FILE,
    "model-?????-of-?????.safetensors",
    HUB_INDEX,
)
META_LAYOUT = (
    "params.json",
    "consolidated.*.pth",
    "tokenizer.model",
    "original/params.json",
    "original/consolidated.*.pth",
    "original/tokenizer.model",
)


def cached(repo: str) -> Path | None:
    """The folder of what was downloaded before, without asking the network."""
    try:
        return _snapshot(repo, local_files_only=True)
    except LocalEntryNotFoundError:
        return None


def download(repo: str, to: str | Path | None = None, revision: str | None = None) -> Path:
    """Fetch what a model needs from the Hub, into its cache or the folder `to`.

    A download that broke off goes on where it was. HF_TOKEN, or the token that `hf auth login`
    keeps, is shown to the Hub.
    """
    try:
        folder = _snapshot(repo, local_dir=to, revision=revision)
    except GatedRepoError:
        raise PermissionError(
            f"{repo}: gated; accept its licence at {constants.ENDPOINT}/{repo}, then run "
            "`hf auth login` or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{repo}: neither a folder here nor a model on the Hub that you can see; check the "
            "name, or, if it is private, run `hf auth login` or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise FileNotFoundError(f"{repo}: has no revision {revision!r} on the Hub") from None
    except (HTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConnectionError(
            f"{repo}: not downloaded ({reason}); check the network and HF_TOKEN and try again, it "
            "goes on where it broke off, or give a folder that holds the model"
        ) from None
    if folder is None:
        raise FileNotFoundError(
            f"{repo}: has neither safetensors nor Meta's consolidated.*.pth on the Hub"
        )
    return folder


def _snapshot(repo: str, **options: Any) -> Path | None:
    """The folder of a repository's model, in the Hub's layout or else in Meta's, if it has one.

    The config comes first, so that another kind of model is refused before its weights come.
    """
    config = Path(snapshot_download(repo, allow_patterns="config.json", **options)) / "config.json"
    if config.is_file():
        LlamaConfig.from_hub(read_json(config))
    for wanted in (HUB_LAYOUT, META_LAYOUT):
        folder = Path(snapshot_download(repo, allow_patterns=[*wanted], **options))
        try:
            inspect(folder)
        except FileNotFoundError:
            continue
        return folder
    return None
