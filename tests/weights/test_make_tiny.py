"""The script that makes `tiny`, run for two steps on made-up stories."""

import random
import sys
from pathlib import Path

import pytest

import llama32

WEIGHTS = Path(__file__).parents[2] / "weights"
WORDS = ("dog", "cat", "ball", "tree", "ran", "saw", "the", "a", "big", "red", "happy", "and", "it")


@pytest.fixture
def make_tiny(monkeypatch):
    monkeypatch.syspath_prepend(str(WEIGHTS))
    import make_tiny

    yield make_tiny
    for module in ("make_tiny", "requests_from_stories"):
        sys.modules.pop(module)


def write_stories(folder: Path) -> Path:
    draw = random.Random(0)
    stories = [" ".join(draw.choices(WORDS, k=60)) + "." for _ in range(400)]
    (folder / "s_train.txt").write_text("\n<|endoftext|>\n".join(stories))
    (folder / "s_heldout.txt").write_text("\n<|endoftext|>\n".join(stories[:40]))
    return folder


def test_stories_become_a_model_that_generates_and_chats(make_tiny, tmp_path, monkeypatch):
    # Two steps of full size take three minutes where a processor emulates bf16.
    monkeypatch.setattr(make_tiny, "BATCH", 2)
    monkeypatch.setattr(make_tiny, "CONTEXT", 256)
    texts, out, run = write_stories(tmp_path), tmp_path / "out", tmp_path / "run"
    make_tiny.main(texts, out=out, run=run, steps=2, compiled=False)
    llm = llama32.load(out)
    assert llm.config == make_tiny.CONFIG
    assert llm.generate("a dog", max_new_tokens=3, ignore_eos=True).usage.completion_tokens == 3
    assert llm.chat([{"role": "user", "content": "Tell me."}], max_new_tokens=2).message

    weights = (out / "model.safetensors").read_bytes()
    make_tiny.main(texts, out=out, run=run, steps=2, compiled=False)  # nothing left to do
    assert (out / "model.safetensors").read_bytes() == weights


def test_half_of_the_stories_are_in_dialogs_and_no_story_is_lost(make_tiny, tmp_path):
    texts, out = write_stories(tmp_path), tmp_path / "out"
    stories = make_tiny.read_stories(texts, "*_train.txt")
    requests = make_tiny.Requests(stories)
    out.mkdir()
    make_tiny.write_tokenizer(out, stories, requests)
    documents = make_tiny.Documents(llama32.Tokenizer.load(out), requests)
    tokenizer = documents.tokenizer
    header = tokenizer.special["<|start_header_id|>"]
    first, again, later = (documents.for_epoch(stories, epoch) for epoch in (0, 0, 1))
    assert first == again
    assert first != later
    plain = [ids for ids in first if header not in ids]
    assert 0.4 < len(plain) / len(stories) < 0.6
    text = "".join(tokenizer.decode(ids) for ids in first)
    assert sum(story in text for story in stories) >= len(stories) - 1  # the last may be left over


def test_a_folder_without_stories_is_refused(make_tiny, tmp_path):
    with pytest.raises(SystemExit, match="no stories in"):
        make_tiny.read_stories(tmp_path, "*_train.txt")
