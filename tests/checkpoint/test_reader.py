"""Inspecting, reading and saving checkpoints."""

import json
import resource
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from llama32.checkpoint.layouts import NAME_TABLE, TENSOR_SUFFIXES, name_map
from llama32.checkpoint.reader import inspect, read_model
from llama32.checkpoint.writer import save
from llama32.model import Llama
from llama32.rope import compute_inv_freq
from tests.checkpoints import (
    edit_json,
    edit_tensors,
    meta_params,
    random_model,
    tiny_config,
    write_meta,
)

TOKENS = torch.arange(100).reshape(2, 50)


def saved(folder: Path, dtype: torch.dtype = torch.float32, **changes) -> tuple[Llama, Path]:
    model = random_model(tiny_config(**changes), dtype=dtype)
    save(model, folder)
    return model, folder


def same(a: Llama, b: Llama) -> bool:
    return torch.equal(a(TOKENS), b(TOKENS))


@pytest.mark.parametrize("layout", ["hub", "meta"])
def test_names_map_one_to_one_to_all_parameters(layout):
    model = Llama(tiny_config(tie_word_embeddings=False))
    table = name_map(layout, 3)
    assert table.keys() == dict(model.named_parameters()).keys()
    assert len(set(table.values())) == len(table) == 3 * 9 + 3
    assert len({getattr(name, layout) for name in NAME_TABLE}) == len(NAME_TABLE)


def test_the_tensors_of_a_module_are_in_a_row():
    modules = [name.rpartition(".")[0] for name in name_map("hub", 3, TENSOR_SUFFIXES)]
    assert len([*groupby(modules)]) == len({*modules}) == 3 * 9 + 3


def test_names_are_those_of_the_published_files():
    hub, meta = name_map("hub", 12), name_map("meta", 12)
    assert hub["layers.11.mlp_norm.weight"] == "model.layers.11.post_attention_layernorm.weight"
    assert hub["layers.0.attn.k_proj.weight"] == "model.layers.0.self_attn.k_proj.weight"
    assert meta["layers.11.mlp_norm.weight"] == "layers.11.ffn_norm.weight"
    assert meta["layers.0.mlp.down_proj.weight"] == "layers.0.feed_forward.w2.weight"


def test_a_checkpoint_is_described_without_reading_weights(tmp_path):
    model, folder = saved(tmp_path, dtype=torch.bfloat16)
    found = inspect(folder)
    assert (found.layout, found.folder, found.dtype) == ("hub", folder, torch.bfloat16)
    assert found.files == [folder / "model.safetensors"]
    assert found.num_parameters == sum(weight.numel() for weight in model.parameters())
    assert found.nbytes == 2 * found.num_parameters
    assert str(found) == (
        f"{folder}: the Hub's layout, 1 file, 0.2 MB; 79,440 parameters in bfloat16, "
        "tied embeddings, RoPE slowed by 32"
    )


def test_a_sharded_meta_checkpoint_is_described(tmp_path):
    model = random_model(tiny_config(tie_word_embeddings=False, rope_scaling=None))
    found = inspect(write_meta(model, tmp_path, num_shards=2))
    assert str(found) == (
        f"{tmp_path}: Meta's layout, 2 files, 0.3 MB; 87,120 parameters in float32, "
        "untied embeddings, RoPE without scaling"
    )


def test_the_stored_dtype_is_the_dtype_of_most_weights(tmp_path):
    _, folder = saved(tmp_path, dtype=torch.bfloat16)

    def widen_most_tensors_but_few_weights(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if "mlp." not in name and "embed" not in name:
                tensors[name] = tensors[name].float()

    edit_tensors(folder, widen_most_tensors_but_few_weights)
    assert inspect(folder).dtype == torch.bfloat16
    assert {weight.dtype for weight in read_model(folder).parameters()} == {torch.bfloat16}


def test_weights_load_in_the_stored_or_the_given_dtype(tmp_path):
    model, folder = saved(tmp_path, dtype=torch.bfloat16)
    stored, widened = read_model(folder), read_model(str(folder), dtype=torch.float32)
    for name, weight in model.named_parameters():
        assert torch.equal(stored.get_parameter(name), weight)
        assert torch.equal(widened.get_parameter(name), weight.float())
    assert read_model(folder, dtype=torch.float16).embed.weight.dtype == torch.float16


def test_a_loaded_model_can_be_trained(tmp_path):
    _, folder = saved(tmp_path)
    model = read_model(folder)
    assert model.lm_head.weight is model.embed.weight
    model(TOKENS).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_rotary_speeds_stay_fp32_whatever_the_dtype(tmp_path):
    _, folder = saved(tmp_path)
    model = read_model(folder, dtype=torch.bfloat16)
    assert torch.equal(model.inv_freq, compute_inv_freq(model.config))


def test_loading_a_model_does_not_import_the_compiler():
    code = "import sys, llama32; llama32.load('tiny').generate('Once', max_new_tokens=2)"
    check = "sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", f"{code}; {check}"]).returncode == 0


def test_changing_a_file_after_loading_does_not_change_the_model(tmp_path):
    model, folder = saved(tmp_path)
    loaded = read_model(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(bytes(file.seek(0, 2) - file.seek(0)))
        file.truncate(10)
    assert same(loaded, model)


def test_progress_counts_every_byte_once(tmp_path):
    _, folder = saved(tmp_path, dtype=torch.bfloat16)
    calls: list[tuple[int, int]] = []
    read_model(folder, dtype=torch.float32, on_progress=lambda *progress: calls.append(progress))
    nbytes = inspect(folder).nbytes
    assert calls == sorted(calls)
    assert len(calls) == len(dict(Llama(tiny_config()).named_parameters()))
    assert calls[-1] == (nbytes, nbytes)


@pytest.mark.parametrize("layout", ["hub", "meta"])
def test_an_lm_head_that_repeats_a_tied_embedding_is_dropped(tmp_path, layout):
    model, hub = saved(tmp_path / "hub")
    edit_tensors(
        hub, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    meta = write_meta(model, tmp_path / "meta", output=True)
    found = inspect(hub if layout == "hub" else meta)
    assert found.config.tie_word_embeddings
    assert "lm_head.weight" not in found.tensors


def test_an_lm_head_unlike_the_tied_embedding_is_used_with_a_warning(tmp_path):
    untied, folder = saved(tmp_path, tie_word_embeddings=False)
    edit_json(folder / "config.json", tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="config.json ties lm_head"):
        model = read_model(folder)
    assert not model.config.tie_word_embeddings
    assert same(model, untied)


def test_an_untied_lm_head_that_equals_the_embedding_stays_untied_in_the_hub_layout(tmp_path):
    model = random_model(tiny_config(tie_word_embeddings=False))
    with torch.no_grad():
        model.lm_head.weight.copy_(model.embed.weight)
    save(model, tmp_path)
    assert not read_model(tmp_path).config.tie_word_embeddings


def test_constants_of_old_exports_are_ignored(tmp_path):
    model, hub = saved(tmp_path / "hub")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(hub, lambda tensors: tensors.update({name: torch.ones(5)}))
    freqs = {"rope.freqs": torch.ones(5)}
    meta = write_meta(model, tmp_path / "meta", change=lambda tensors: tensors.update(freqs))
    assert same(read_model(hub), model)
    assert same(read_model(meta, rope_factor=32.0), model)


def test_metas_layout_is_found_in_the_folder_original_unless_the_hubs_is_present(tmp_path):
    model = random_model(tiny_config(), seed=1)
    write_meta(model, tmp_path / "original")
    assert inspect(tmp_path).folder == tmp_path / "original"
    assert same(read_model(tmp_path, rope_factor=32.0), model)
    other, _ = saved(tmp_path)
    assert inspect(tmp_path).layout == "hub"
    assert same(read_model(tmp_path), other)


def test_the_rope_factor_of_metas_layout_can_be_given(tmp_path):
    write_meta(random_model(tiny_config()), tmp_path)
    for rope_factor, factor in ((None, 8.0), (32.0, 32.0)):
        scaling = read_model(tmp_path, rope_factor=rope_factor).config.rope_scaling
        assert scaling is not None
        assert scaling.factor == factor


def test_metas_vocabulary_size_comes_from_the_tensors(tmp_path):
    model = random_model(tiny_config())
    assert meta_params(model.config)["vocab_size"] == -1
    for axis in (0, 1):
        write_meta(model, tmp_path, num_shards=2, embed_axis=axis)
        assert inspect(tmp_path).config.vocab_size == 160


def test_save_splits_shards_by_size_and_writes_an_index(tmp_path):
    model, _ = saved(tmp_path)
    save(model, tmp_path, max_shard_bytes=100_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert [shard.name for shard in shards] == [
        f"model-{number:05}-of-00004.safetensors" for number in range(1, 5)
    ]
    for shard in shards:
        with safe_open(shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert {index["weight_map"].pop(name) for name in file.keys()} == {shard.name}  # noqa: SIM118
        assert shard.stat().st_size < 100_000 + 10_000  # plus the header
    assert not index["weight_map"]
    assert index["metadata"]["total_size"] == inspect(tmp_path).nbytes
    assert same(read_model(tmp_path), model)


def test_a_tensor_larger_than_a_shard_gets_its_own_file(tmp_path):
    model = random_model(tiny_config())
    save(model, tmp_path, max_shard_bytes=1)
    assert len(list(tmp_path.glob("*.safetensors"))) == len(dict(model.named_parameters()))
    assert same(read_model(tmp_path), model)


@pytest.mark.parametrize(("before", "after"), [(50_000, 10**9), (10**9, 50_000), (50_000, 100_000)])
def test_save_replaces_an_older_checkpoint_and_no_other_file(tmp_path, before, after):
    save(random_model(tiny_config(), seed=1), tmp_path, max_shard_bytes=before)
    (tmp_path / "tokenizer.json").write_text("{}")
    new = random_model(tiny_config(), seed=2)
    save(new, tmp_path, max_shard_bytes=after)
    assert same(read_model(tmp_path), new)
    fresh = tmp_path / "fresh"
    save(new, fresh, max_shard_bytes=after)
    left = {file.name for file in tmp_path.iterdir()} - {"fresh", "tokenizer.json"}
    assert left == {file.name for file in fresh.iterdir()}


def test_saved_files_have_the_usual_permissions(tmp_path):
    _, folder = saved(tmp_path / "model")
    (tmp_path / "other").touch()
    expected = (tmp_path / "other").stat().st_mode
    assert {file.stat().st_mode for file in folder.iterdir()} == {expected}


def test_save_takes_tying_and_dtype_from_the_model_not_the_config(tmp_path):
    model = random_model(tiny_config(dtype=None)).bfloat16()
    model.lm_head.weight = torch.nn.Parameter(model.embed.weight * 2)
    save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["tie_word_embeddings"], config["torch_dtype"]) == (False, "bfloat16")
    assert same(read_model(tmp_path), model)


def test_non_contiguous_weights_are_saved(tmp_path):
    model = random_model(tiny_config())
    up = model.get_submodule("layers.0.mlp.up_proj")
    up.weight = torch.nn.Parameter(torch.randn(48, 112).t())
    save(model, tmp_path)
    assert same(read_model(tmp_path), model)


def test_a_full_disk_leaves_the_old_checkpoint_intact_and_no_temporary_files(tmp_path):
    model, folder = saved(tmp_path)
    before = sorted(folder.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # maximum file size
    try:
        with pytest.raises(OSError, match=r"the checkpoint was not saved: .*too large") as error:
            save(random_model(tiny_config(), seed=1), folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert sorted(folder.iterdir()) == before
    assert same(read_model(folder), model)


def test_saving_a_model_with_an_adapter_is_refused(tmp_path):
    model = random_model(tiny_config())
    up = "layers.1.mlp.up_proj"
    model.set_submodule(up, torch.nn.Sequential(model.get_submodule(up)))
    with pytest.raises(ValueError, match=r"mlp\.up_proj\.weight; merge or remove adapters"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
