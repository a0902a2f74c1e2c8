"""Model names resolve to folders; the Hub's own client talks to a small local Hub."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

import llama32
from llama32.checkpoint.download import download
from llama32.checkpoint.hub import resolve
from llama32.checkpoint.reader import read_model
from llama32.checkpoint.writer import save
from tests.checkpoints import random_model, tiny_config, write_meta

REPO = "org/some-Llama_3.2"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """The files, answers and received requests of the small Hub."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.error: tuple[int, str] | None = None  # status and X-Error-Code of every answer
        self.cut: set[str] = set()  # files whose next answer stops in the middle
        self.requests: list[str] = []
        self.sent: list[tuple[str, int]] = []  # file, first byte
        self.tokens: set[str | None] = set()

    def add(self, folder: Path, inside: str = "") -> None:
        for file in folder.iterdir():
            self.files[inside + file.name] = file.read_bytes()

    def fetched(self) -> set[str]:
        return {name for name, _ in self.sent}


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self) -> None:
        hub = self.hub
        path = self.path.split("?")[0]
        hub.requests.append(f"{self.command} {path}")
        hub.tokens.add(self.headers["Authorization"])
        if hub.error is not None:
            self.send(hub.error[0], b"", {"X-Error-Code": hub.error[1]})
        elif path.startswith(f"/api/models/{REPO}/tree/"):
            listing = [
                {"type": "file", "path": name, "size": len(data), "oid": etag(data)}
                for name, data in hub.files.items()
            ]
            self.send(200, json.dumps(listing).encode())
        elif path.startswith(f"/api/models/{REPO}"):
            siblings = [{"rfilename": name} for name in hub.files]
            info = {"id": REPO, "sha": COMMIT, "siblings": siblings}
            self.send(200, json.dumps(info).encode())
        elif path.startswith(f"/{REPO}/resolve/") and (name := self.name(path)) in hub.files:
            self.send_file(name, hub.files[name])
        else:
            self.send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def name(self, path: str) -> str:
        return path.split("/resolve/")[1].split("/", 1)[1]

    def send_file(self, name: str, data: bytes) -> None:
        start = int(self.headers.get("Range", "bytes=0-")[len("bytes=") :].split("-")[0])
        headers = {"ETag": f'"{etag(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        end = None
        if self.command == "GET":
            self.hub.sent.append((name, start))
            if name in self.hub.cut:
                self.hub.cut.remove(name)
                end = len(data) // 2
        self.send(206 if start else 200, data[start:], headers, end)

    def send(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        end: int | None = None,
    ) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:end])
        self.close_connection = end is not None


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    """Start a local Hub with an empty cache, without token, proxy and progress bars."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": Hub()}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    constants = huggingface_hub.constants
    address = f"http://127.0.0.1:{server.server_port}"
    file_url = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", file_url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    huggingface_hub.close_session()
    huggingface_hub.utils.disable_progress_bars()
    yield server.RequestHandlerClass.hub
    huggingface_hub.utils.enable_progress_bars()
    huggingface_hub.close_session()
    server.shutdown()
    thread.join()
    server.server_close()


def publish(hub: Hub, folder: Path, **options: Any) -> None:
    """Publish a typical repository: our files, and the same weights in other formats."""
    save(random_model(tiny_config()), folder, **options)
    hub.add(folder)
    hub.files["tokenizer.json"] = b"{}"
    for other in ("README.md", "pytorch_model.bin", "model.gguf", "onnx/model.safetensors"):
        hub.files[other] = b"not wanted"
    hub.files["original/consolidated.00.pth"] = b"not wanted"


def same(folder: Path) -> bool:
    expected = random_model(tiny_config()).state_dict()
    weights = read_model(folder).state_dict()
    return all(torch.equal(weights[name], weight) for name, weight in expected.items())


def test_a_folder_resolves_to_itself(tmp_path, monkeypatch):
    assert resolve(tmp_path) == tmp_path
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/model") == Path("org/model")


def test_tiny_is_the_model_that_ships_with_the_package():
    assert resolve("tiny") == Path(llama32.__file__).parent / "tiny"


@pytest.mark.parametrize("name", ["nowhere", "/no/such/folder", "a/b/c", "org/na me", "../x"])
def test_an_invalid_name_is_refused_with_the_allowed_forms(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder; give a folder, a Hub id such as"):
        resolve(name)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 100_000])
def test_only_the_needed_files_are_downloaded(hub, tmp_path, max_shard_bytes):
    publish(hub, tmp_path / "source", max_shard_bytes=max_shard_bytes)
    folder = resolve(REPO)
    expected = {file.name for file in (tmp_path / "source").iterdir()} | {"tokenizer.json"}
    assert hub.fetched() == {file.name for file in folder.iterdir()} == expected
    assert same(folder)


def test_metas_layout_is_downloaded_if_the_hubs_layout_is_absent(hub, tmp_path):
    write_meta(random_model(tiny_config()), tmp_path / "source", num_shards=2)
    hub.add(tmp_path / "source", "original/")
    hub.files["original/tokenizer.model"] = b""
    hub.files["pytorch_model.bin"] = b"not wanted"
    folder = resolve(REPO)
    assert {file.name for file in (folder / "original").iterdir()} == {
        "consolidated.00.pth",
        "consolidated.01.pth",
        "params.json",
        "tokenizer.model",
    }
    assert "pytorch_model.bin" not in hub.fetched()
    assert same(folder)


def test_a_downloaded_model_is_not_requested_again(hub, tmp_path):
    publish(hub, tmp_path / "source")
    folder = resolve(REPO)
    hub.requests.clear()
    assert resolve(REPO) == folder
    assert hub.requests == []


def test_an_interrupted_download_resumes(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    publish(hub, tmp_path / "source")
    hub.cut = {"model.safetensors"}
    assert same(download(REPO))
    assert [start > 0 for name, start in hub.sent if name == "model.safetensors"] == [False, True]


def test_an_incomplete_cache_is_completed(hub, tmp_path):
    publish(hub, tmp_path / "source", max_shard_bytes=100_000)
    folder = resolve(REPO)
    lost = folder / "model-00002-of-00004.safetensors"
    lost.resolve().unlink()
    lost.unlink()
    hub.sent.clear()
    assert same(resolve(REPO))
    assert hub.fetched() == {lost.name}


def test_a_download_can_go_to_a_folder_and_name_a_revision(hub, tmp_path):
    publish(hub, tmp_path / "source")
    folder = download(REPO, to=tmp_path / "here", revision="v2")
    assert folder == tmp_path / "here"
    assert any("/revision/v2" in request for request in hub.requests)
    assert same(folder)


def test_the_token_is_sent_to_the_hub(hub, tmp_path, monkeypatch):
    publish(hub, tmp_path / "source")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    download(REPO)
    assert hub.tokens == {"Bearer hf_secret"}


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ((403, "GatedRepo"), PermissionError, "gated; accept its licence at http://127.0.0.1"),
        ((401, "GatedRepo"), PermissionError, "`hf auth login` or set HF_TOKEN"),
        ((404, "RepoNotFound"), FileNotFoundError, "neither a folder here nor a model on the Hub"),
        ((401, ""), ConnectionError, "401 Unauthorized"),
        ((404, "RevisionNotFound"), FileNotFoundError, "has no revision 'v2' on the Hub"),
        ((500, ""), ConnectionError, "500"),
    ],
)
def test_a_refusal_says_what_to_do(hub, answer, error, message):
    hub.error = answer
    with pytest.raises(error) as caught:
        download(REPO, revision="v2")
    assert str(caught.value).startswith(f"{REPO}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_repository_with_only_its_files_gated_is_reported_as_gated(hub, tmp_path, monkeypatch):
    publish(hub, tmp_path / "source")
    gate = (403, b"", {"X-Error-Code": "GatedRepo"})
    monkeypatch.setattr(Handler, "send_file", lambda self, name, data: self.send(*gate))
    with pytest.raises(PermissionError, match="accept its licence"):
        resolve(REPO)


def test_a_downloaded_model_resolves_without_a_network(hub, tmp_path, monkeypatch):
    publish(hub, tmp_path / "source")
    folder = resolve(REPO)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert resolve(REPO) == folder
    with pytest.raises(ConnectionError, match="check the network and HF_TOKEN") as error:
        resolve("org/another")
    assert "\n" not in str(error.value)


def test_offline_mode_is_reported_in_one_line(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=f"^{re.escape(REPO)}: not downloaded") as error:
        resolve(REPO)
    assert "\n" not in str(error.value)


def test_a_repository_without_loadable_weights_is_refused(hub):
    hub.files = {"README.md": b"not wanted", "pytorch_model.bin": b"not wanted"}
    with pytest.raises(FileNotFoundError, match="has neither safetensors nor Meta's"):
        resolve(REPO)
    assert "pytorch_model.bin" not in hub.fetched()


def test_another_kind_of_model_is_refused_before_its_weights_are_downloaded(hub, tmp_path):
    publish(hub, tmp_path / "source")
    hub.files["config.json"] = b'{"model_type": "mamba"}'
    with pytest.raises(ValueError, match="model_type 'mamba' is not supported"):
        resolve(REPO)
    assert hub.fetched() == {"config.json"}
