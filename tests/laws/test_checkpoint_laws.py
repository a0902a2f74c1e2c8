"""Checkpoints load as saved, in both layouts, and loading takes no extra memory."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

import llama32
from llama32.checkpoint.reader import inspect, read_model
from llama32.checkpoint.writer import save
from llama32.model import Llama
from llama32.quantization.quantize import SCHEMES, quantize
from tests.checkpoints import LLAMA3, edit_json, edit_tensors, random_model, tiny_config, write_meta

SHAPES = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "every head its own keys": {"num_key_value_heads": 6},
    "one key head": {"num_key_value_heads": 1},
    "one layer, no scaling": {"num_hidden_layers": 1, "rope_scaling": None},
}
TOKENS = torch.arange(160).reshape(2, 80)


@pytest.fixture(params=SHAPES.values(), ids=list(SHAPES))
def model(request) -> Llama:
    return random_model(tiny_config(**request.param), seed=3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_save_then_load_is_the_identity(model, dtype, tmp_path):
    model = model.to(dtype)
    save(model, tmp_path, max_shard_bytes=60_000)
    loaded = read_model(tmp_path)
    spelled = str(dtype).removeprefix("torch.")
    assert loaded.config == dataclasses.replace(model.config, dtype=spelled)
    weights = dict(loaded.named_parameters())
    assert weights.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(weights[name], weight) for name, weight in model.named_parameters())
    assert all(weights[name].dtype == dtype for name in weights)


@pytest.mark.parametrize("ends", [(), (7,), (7, 8, 9)])
def test_special_tokens_come_back(ends, tmp_path):
    config = tiny_config(bos_token_id=None, eos_token_ids=ends)
    save(random_model(config), tmp_path)
    assert read_model(tmp_path).config == config


def test_load_then_save_writes_the_same_bytes(model, tmp_path):
    save(model, tmp_path / "a")
    save(read_model(tmp_path / "a"), tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.parametrize(("num_shards", "embed_axis"), [(1, 0), (2, 0), (2, 1)])
def test_metas_layout_gives_the_same_logits_as_the_hubs(model, num_shards, embed_axis, tmp_path):
    if model.config.num_key_value_heads % num_shards:
        pytest.skip("a key head is not cut")
    save(model, tmp_path / "hub")
    write_meta(model, tmp_path / "meta", num_shards=num_shards, embed_axis=embed_axis)
    factor = LLAMA3.factor if model.config.rope_scaling else None
    hub = read_model(tmp_path / "hub")
    meta = read_model(tmp_path / "meta", rope_factor=factor)
    assert torch.equal(meta(TOKENS), hub(TOKENS))


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_a_trained_model_gives_its_published_text_from_both_layouts(reference, layout):
    model = read_model(reference / "stories260K" / layout)
    expected = json.loads((reference / "stories260K" / "expected.json").read_text())
    ids = expected["greedy_ids_from_bos"]
    with torch.no_grad():
        assert model(torch.tensor(ids[:-1])).argmax(-1).tolist() == ids[1:]


def test_both_layouts_of_a_trained_model_give_the_same_logits(reference):
    hub, meta = (read_model(reference / "stories260K" / layout) for layout in ("hf", "meta"))
    assert torch.equal(hub(TOKENS), meta(TOKENS))


MEASURE = """
import os, re, sys
import torch
from llama32.quantization.quantize import quantize
from llama32.checkpoint.reader import read_model

def resident(key):
    with open("/proc/self/status") as status:
        return int(re.search(key + r":\\s+(\\d+) kB", status.read())[1]) * 1024

warm_up, *cases = sys.argv[1:]
for folder, dtype in zip(cases[::2], cases[1::2]):
    if os.fork() == 0:  # no memory that an earlier case left free
        read_model(warm_up)
        before = resident("VmRSS")
        model = read_model(folder, dtype=getattr(torch, dtype))
        print(resident("VmHWM") - before, flush=True)
        os._exit(0)
    os.wait()
"""
BIG = {
    "vocab_size": 4000,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_hidden_layers": 6,
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads peaks of memory from /proc")
def test_loading_holds_no_more_than_the_weights_and_the_largest_tensor(tmp_path):
    model = random_model(tiny_config(**BIG))
    folders = {"fp32": tmp_path / "fp32", "bf16": tmp_path / "bf16", "meta": tmp_path / "meta"}
    save(model, folders["fp32"], max_shard_bytes=40_000_000)
    save(model.bfloat16(), folders["bf16"])
    write_meta(model, folders["meta"], num_shards=2, embed_axis=1)
    cases = [
        (folder, dtype) for folder in folders.values() for dtype in (torch.bfloat16, torch.float32)
    ]
    save(random_model(tiny_config()), tmp_path / "tiny")
    arguments = [str(part).removeprefix("torch.") for case in cases for part in case]
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "tiny"), *arguments]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for (folder, dtype), peak in zip(cases, map(int, output.split()), strict=True):
        found = inspect(folder)
        largest = max(tensor.nbytes for tensor in found.tensors.values())
        around = 2_000_000  # whatever the size, the kernel maps a little more than is read
        allowed = 1.05 * found.num_parameters * dtype.itemsize + largest + around
        assert peak <= allowed, f"{folder.name} as {dtype}: {peak:,} of {allowed:,.0f} bytes"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_quantized_model_is_loaded_as_it_was_saved(scheme, tied, dtype, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    model = random_model(tiny_config(tie_word_embeddings=tied, **sizes), dtype=dtype)
    quantize(model, scheme)
    save(model, tmp_path, max_shard_bytes=30_000)
    loaded = read_model(tmp_path)
    assert loaded.config == dataclasses.replace(
        model.config, dtype=str(dtype).removeprefix("torch."), quantization=scheme
    )
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(model(TOKENS), loaded(TOKENS))


def test_quantizing_while_loading_is_quantizing_what_was_loaded(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    save(random_model(tiny_config(**sizes)), tmp_path)
    at_once = llama32.load_model(tmp_path, quantize="int4")
    assert torch.equal(at_once(TOKENS), quantize(read_model(tmp_path), "int4")(TOKENS))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"scheme": ["int8"]}, "scheme has the wrong type"),
        ({"scheme": "int3"}, "no scheme 'int3'"),
        ({"scheme": None}, "scheme is missing"),
        ({"scheme": "int8", "group": 32}, "unknown key group"),
    ],
)
def test_what_is_said_of_quantization_is_checked_like_all_else(said, message, tmp_path):
    save(quantize(random_model(tiny_config()), "int8"), tmp_path)
    edit_json(tmp_path / "config.json", quantization_config={"quant_method": "llama32"} | said)
    with pytest.raises(ValueError, match=message):
        read_model(tmp_path)


def test_a_quantized_weight_that_holds_floats_is_refused(tmp_path):
    save(quantize(random_model(tiny_config()), "int8"), tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(tmp_path, lambda tensors: tensors.update({name: tensors[name].float()}))
    with pytest.raises(ValueError, match=f"{name} in float32, but config.json says int8"):
        read_model(tmp_path)


def test_a_checkpoint_of_another_quantizer_is_refused_by_name(tmp_path):
    save(quantize(random_model(tiny_config()), "int8"), tmp_path)
    edit_json(tmp_path / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match="only weights quantized by llama32 load"):
        read_model(tmp_path)
