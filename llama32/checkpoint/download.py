"""Download models from the Hub, into the Hub's cache or into a folder."""

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

from llama32.checkpoint.layouts import COMPANION_FILES, HUB_FILE, HUB_INDEX
from llama32.checkpoint.reader import inspect
from llama32.config import LlamaConfig
from llama32.json_files import read_json

# Repositories hold the same weights in several formats. Only files that match are downloaded.
HUB_PATTERNS = (
    "config.json",
    *COMPANION_FILES,
    HUB_FILE,
    "model-?????-of-?????.safetensors",
    HUB_INDEX,
)
META_PATTERNS = (
    "params.json",
    "consolidated.*.pth",
    "tokenizer.model",
    "original/params.json",
    "original/consolidated.*.pth",
    "original/tokenizer.model",
)


def find_cached(repo: str) -> Path | None:
    """Return the folder of an earlier download, or None; never ask the network."""
    try:
        return _snapshot(repo, local_files_only=True)
    except LocalEntryNotFoundError:
        return None


def download(repo: str, to: str | Path | None = None, revision: str | None = None) -> Path:
    """Download a model from the Hub, into the Hub's cache or the folder `to`.

    An interrupted download resumes. The Hub client sends HF_TOKEN, or the token stored by
    `hf auth login`. Raises PermissionError for a gated model, FileNotFoundError if the repository,
    the revision or the weights do not exist, ConnectionError if the network fails.
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
            "name or, for a private model, run `hf auth login` or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise FileNotFoundError(f"{repo}: has no revision {revision!r} on the Hub") from None
    except (HTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConnectionError(
            f"{repo}: not downloaded ({reason}); check the network and HF_TOKEN and try again (the "
            "download resumes), or give a folder that holds the model"
        ) from None
    if folder is None:
        raise FileNotFoundError(
            f"{repo}: has neither safetensors nor Meta's consolidated.*.pth on the Hub"
        )
    return folder


def _snapshot(repo: str, **options: Any) -> Path | None:
    """Download the Hub's layout, else Meta's; return the folder, or None without a checkpoint.

    The config is downloaded first: an unsupported model is refused before any weight is downloaded.
    """
    config = Path(snapshot_download(repo, allow_patterns="config.json", **options)) / "config.json"
    if config.is_file():
        LlamaConfig.from_hub(read_json(config))
    for patterns in (HUB_PATTERNS, META_PATTERNS):
        folder = Path(snapshot_download(repo, allow_patterns=[*patterns], **options))
        try:
            inspect(folder)
        except FileNotFoundError:
            continue
        return folder
    return None
