import dataclasses
import json
from pathlib import Path

import pytest

from llama32.checkpoint import layouts, reader
from llama32.llm.loading import load
from tests.alphabet import alphabet_checkpoint
from tests.checkpoints import random_model, tiny_config, write_meta
from tests.commands import error_of, json_of, run

CONTEXT = 2048


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return alphabet_checkpoint(tmp_path_factory.mktemp("abc"), max_position_embeddings=CONTEXT)


def test_info_reports_the_settings_of_load_without_loading_weights(folder, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(layouts.StoredTensor, "copy_to", forbidden)
    [facts] = json_of(run("info", folder, "--json"))
    monkeypatch.undo()
    llm, checkpoint = load(folder), reader.inspect(folder)
    assert facts["found"] == str(checkpoint)
    assert facts["num_parameters"] == sum(w.numel() for w in llm.model.parameters())
    assert facts["weights"] == {"stored": checkpoint.nbytes, "bfloat16": checkpoint.nbytes // 2}
    config = llm.config
    assert facts["config"]["head_dim"] == config.head_dim
    slots = CONTEXT * config.num_key_value_heads * config.head_dim
    assert facts["kv_cache"] == {"tokens": CONTEXT, "bfloat16": slots * 2 * 2}
    assert facts["tokenizer"] == llm.tokenizer.source
    assert facts["chat_format"] == "hub"
    assert facts["eos"] == {str(llm.eos_ids[0]): "<|eot_id|>"}
    assert facts["sampling"] == json.loads(json.dumps(dataclasses.asdict(llm.defaults)))
    assert facts["attention"]["form"] in ("fused", "flash")


def test_info_sizes_the_cache_for_a_context(folder):
    sizes = [
        json_of(run("info", folder, "--json", "--context", n))[0]["kv_cache"]["bfloat16"]
        for n in (100, 200)
    ]
    assert sizes[1] == 2 * sizes[0] > 0


def test_info_prints_tables(folder):
    shown = run("info", folder).stdout
    assert shown.startswith(f"{folder}: the Hub's layout, 1 file")
    for row in ("num_key_value_heads", "KV cache", "<|eot_id|>", "temperature 0", "byte-level BPE"):
        assert row in shown


def test_info_reads_meta_s_layout_and_folders_without_tokenizer(tmp_path):
    write_meta(random_model(tiny_config()), tmp_path)
    shown = run("info", tmp_path).stdout
    assert "Meta's layout" in shown
    assert "none: ids only" in shown
    assert "none: generate only" in shown
    [facts] = json_of(run("info", tmp_path, "--json", "--rope-factor", 16))
    assert facts["config"]["rope_scaling"]["factor"] == 16
    assert facts["tokenizer"] is None


def test_info_of_an_empty_folder_is_refused(tmp_path):
    assert "no checkpoint here" in error_of(run("info", tmp_path))
