import dataclasses
import json
from pathlib import Path

import pytest

from llama32 import checkpoint, layouts
from llama32.loading import load
from tests.alphabet import alphabet_checkpoint
from tests.checkpoints import random_model, tiny_config, write_meta
from tests.commands import error_of, json_of, run

CONTEXT = 2048


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return alphabet_checkpoint(tmp_path_factory.mktemp("abc"), max_position_embeddings=CONTEXT)


def test_info_tells_what_the_library_would_do_without_loading_weights(folder, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(layouts.StoredTensor, "copy_to", forbidden)
    [said] = json_of(run("info", folder, "--json"))
    monkeypatch.undo()
    llm, found = load(folder), checkpoint.inspect(folder)
    assert said["found"] == str(found)
    assert said["num_parameters"] == sum(w.numel() for w in llm.model.parameters())
    assert said["weights"] == {"stored": found.nbytes, "bfloat16": found.nbytes // 2}
    config = llm.config
    assert said["config"]["head_dim"] == config.head_dim
    slots = CONTEXT * config.num_key_value_heads * config.head_dim
    assert said["kv_cache"] == {"tokens": CONTEXT, "bfloat16": slots * 2 * 2}
    assert said["tokenizer"] == llm.tokenizer.source
    assert said["chat_format"] == "hub"
    assert said["eos"] == {str(llm.eos_ids[0]): "<|eot_id|>"}
    assert said["sampling"] == json.loads(json.dumps(dataclasses.asdict(llm.defaults)))
    assert said["attention"]["form"] in ("fused", "flash")


def test_info_sizes_the_cache_for_a_context(folder):
    sizes = [
        json_of(run("info", folder, "--json", "--context", n))[0]["kv_cache"]["bfloat16"]
        for n in (100, 200)
    ]
    assert sizes[1] == 2 * sizes[0] > 0


def test_info_is_laid_out_for_people(folder):
    shown = run("info", folder).stdout
    assert shown.startswith(f"{folder}: the Hub's layout, 1 file")
    for row in ("num_key_value_heads", "KV cache", "<|eot_id|>", "temperature 0", "byte-level BPE"):
        assert row in shown


def test_info_knows_meta_s_layout_and_folders_without_tokenizer(tmp_path):
    write_meta(random_model(tiny_config()), tmp_path)
    shown = run("info", tmp_path).stdout
    assert "Meta's layout" in shown
    assert "none: ids only" in shown
    assert "none: generate only" in shown
    [said] = json_of(run("info", tmp_path, "--json", "--rope-factor", 16))
    assert said["config"]["rope_scaling"]["factor"] == 16
    assert said["tokenizer"] is None


def test_info_of_nothing_is_refused(tmp_path):
    assert "no checkpoint here" in error_of(run("info", tmp_path))
