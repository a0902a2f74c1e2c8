"""Every bad checkpoint gives an error of one line: the problem, the place, what to do."""

import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama32.checkpoint.reader import inspect, read_model
from llama32.checkpoint.writer import save
from tests.checkpoints import edit_json, edit_tensors, random_model, tiny_config, write_meta

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def good_hub(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    save(random_model(tiny_config()), folder)
    return folder


@pytest.fixture(scope="module")
def good_shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    save(random_model(tiny_config()), folder, max_shard_bytes=100_000)
    return folder


@pytest.fixture(scope="module")
def good_meta(tmp_path_factory) -> Path:
    return write_meta(random_model(tiny_config()), tmp_path_factory.mktemp("meta"), num_shards=2)


@pytest.fixture
def hub(good_hub, tmp_path) -> Path:
    return shutil.copytree(good_hub, tmp_path / "hub")


@pytest.fixture
def shards(good_shards, tmp_path) -> Path:
    return shutil.copytree(good_shards, tmp_path / "shards")


@pytest.fixture
def meta(good_meta, tmp_path) -> Path:
    return shutil.copytree(good_meta, tmp_path / "meta")


def refuses(folder: Path, *parts: str, error: type[Exception] = ValueError, **options) -> None:
    """Assert that loading fails with one line that names the folder and contains all parts."""
    with pytest.raises(error) as caught:
        read_model(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(folder), *parts):
        assert part in message, message


def cut(file: Path, size: int) -> None:
    with file.open("r+b") as opened:
        opened.truncate(size)


def test_a_missing_folder(tmp_path):
    refuses(tmp_path / "nowhere", "no such folder", error=FileNotFoundError)


def test_a_file_in_place_of_a_folder(hub):
    file = hub / "model.safetensors"
    refuses(file, "give the folder of the file", error=FileNotFoundError)


def test_a_folder_without_a_checkpoint_names_the_expected_files(hub, meta):
    (hub / "model.safetensors").unlink()
    (meta / "params.json").unlink()
    for folder in (hub, meta):
        expected = ("model.safetensors.index.json", "params.json", "consolidated.*.pth")
        refuses(folder, "no checkpoint here", *expected, error=FileNotFoundError)


def test_a_missing_config(hub):
    (hub / "config.json").unlink()
    refuses(hub, "config.json", "incomplete", error=FileNotFoundError)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_safetensors_file(hub, size):
    file = hub / "model.safetensors"
    cut(file, size % file.stat().st_size)
    refuses(hub, "model.safetensors: cannot be read", "download it again")


def test_a_web_page_in_place_of_a_safetensors_file(hub):
    (hub / "model.safetensors").write_text("<html>Not Found</html>")
    refuses(hub, "model.safetensors: cannot be read")


@pytest.mark.parametrize("size", [0, 5, 5000, -1])
def test_a_truncated_pth_file(meta, size):
    file = meta / "consolidated.01.pth"
    cut(file, size % file.stat().st_size)
    refuses(meta, "consolidated.01.pth: cannot be read", "download it again")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("layout", ["hub", "meta"])
def test_overwritten_bytes_raise_only_a_clear_error(hub, meta, layout):
    file = hub / "model.safetensors" if layout == "hub" else meta / "consolidated.00.pth"
    good, draw = file.read_bytes(), random.Random(0)
    messages = []
    for _ in range(60):
        damaged = bytearray(good)
        for _ in range(3):
            damaged[draw.randrange(1500)] = draw.randrange(256)
        file.write_bytes(damaged)
        try:
            inspect(file.parent)
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 40
    assert not any("\n" in message for message in messages)


class Runs:
    """An object that runs a command when unpickled without care."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.system, (self.command,)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(meta, tmp_path):
    ran = tmp_path / "ran"
    torch.save({"norm.weight": Runs(f"touch {ran}")}, meta / "consolidated.00.pth")
    refuses(meta, "consolidated.00.pth: refused", "could run code")
    assert not ran.exists()


def test_a_bare_pickle_is_refused(meta):
    (meta / "consolidated.00.pth").write_bytes(pickle.dumps({"norm.weight": Runs("false")}))
    refuses(meta, "consolidated.00.pth: cannot be read")


@pytest.mark.parametrize("content", [[torch.ones(1)], {"model": {}}, {7: torch.ones(1)}])
def test_a_pth_file_that_is_not_a_dictionary_of_tensors(meta, content):
    torch.save(content, meta / "consolidated.00.pth")
    refuses(meta, "consolidated.00.pth: ")


def test_malformed_json_is_located_to_the_column(hub, shards, meta):
    broken = '{\n  "hidden_size": 64,,\n}'
    for file in (
        hub / "config.json",
        shards / "model.safetensors.index.json",
        meta / "params.json",
    ):
        file.write_text(broken)
        refuses(file.parent, f"{file.name}: not valid JSON at line 2, column 21")


@pytest.mark.parametrize("text", [b"[1, 2]", b"\xff\xfe\xfd"])
def test_json_other_than_an_object_in_utf8(hub, text):
    (hub / "config.json").write_bytes(text)
    refuses(hub, "config.json: ")


def test_an_index_that_names_a_missing_shard(shards):
    (shards / "model-00002-of-00004.safetensors").unlink()
    refuses(shards, "model-00002-of-00004.safetensors: missing", error=FileNotFoundError)


def test_an_index_that_names_the_wrong_shard(shards):
    index = shards / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    weight_map["model.norm.weight"] = weight_map["model.embed_tokens.weight"]
    edit_json(index, weight_map=weight_map)
    refuses(shards, "lists model.norm.weight, which is not in model-00001-of-00004.safetensors")


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "weights.bin"])
def test_an_index_that_leads_out_of_the_folder(shards, file):
    edit_json(shards / "model.safetensors.index.json", weight_map={"model.norm.weight": file})
    refuses(shards, repr(file), "is not a safetensors file in the same folder")


@pytest.mark.parametrize("weight_map", [None, [], {"model.norm.weight": 3}])
def test_an_index_without_a_usable_weight_map(shards, weight_map):
    edit_json(shards / "model.safetensors.index.json", weight_map=weight_map)
    refuses(shards, "weight_map must name a file for each tensor")


def test_missing_tensors_are_counted_and_named(hub):
    def without_layer_1(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".layers.1." in name]:
            del tensors[name]

    edit_tensors(hub, without_layer_1)
    first = "model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weight, "
    refuses(hub, f"9 of 29 tensors are missing: {first}", "and 6 more")


def test_a_missing_lm_head_of_an_untied_model(hub, tmp_path):
    edit_json(hub / "config.json", tie_word_embeddings=False)
    refuses(hub, "1 of 30 tensors are missing: lm_head.weight")


def test_unexpected_tensors_are_named(hub):
    edit_tensors(hub, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(60)}))
    refuses(hub, "unexpected tensors: model.layers.0.self_attn.q_proj.bias", "without biases")


def test_more_layers_than_the_config_says(hub):
    edit_json(hub / "config.json", num_hidden_layers=2)
    refuses(hub, "unexpected tensors: model.layers.2.")


def test_tensors_of_wrong_shape_are_named_with_both_shapes(hub):
    edit_tensors(hub, lambda t: t.update({UP: t[UP].t().contiguous()}))
    refuses(hub, f"{UP} [48, 112] (expected [112, 48])")


def test_a_vocabulary_that_differs_from_the_config(hub):
    edit_json(hub / "config.json", vocab_size=161)
    refuses(hub, "model.embed_tokens.weight [160, 48] (expected [161, 48])")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_weights_other_than_floats(hub, dtype):
    edit_tensors(hub, lambda t: t.update({UP: t[UP].to(dtype)}))
    refuses(hub, UP, str(dtype).removeprefix("torch."), "only float weights load")


def test_an_unsupported_dtype(hub):
    with pytest.raises(ValueError, match=r"dtype torch\.int8: weights load in float64, float32"):
        read_model(hub, dtype=torch.int8)


def test_a_rope_factor_for_the_hubs_layout(hub):
    refuses(hub, "rope_factor is for Meta's layout", rope_factor=8.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", ["hub", "meta"])
def test_a_warning_names_weights_with_nan_or_infinity(hub, tmp_path, value, layout):
    if layout == "hub":
        edit_tensors(hub, lambda tensors: tensors[UP].view(-1)[1234].fill_(value))
        folder, name = hub, UP
    else:
        name = "layers.2.attention.wk.weight"
        folder = write_meta(
            random_model(tiny_config()),
            tmp_path / "broken",
            change=lambda tensors: tensors[name].view(-1)[77].fill_(value),
        )
    with pytest.warns(UserWarning, match=f"^{folder}: NaN or infinity in {name}$"):
        read_model(folder)


def test_a_warning_names_weights_that_overflow_the_given_dtype(hub):
    edit_tensors(hub, lambda tensors: tensors[UP].view(-1)[5].fill_(1e5))
    read_model(hub)
    with pytest.warns(UserWarning, match=f"NaN or infinity in {UP}"):
        read_model(hub, dtype=torch.float16)


def test_a_gap_in_the_shards_of_metas_layout(meta):
    (meta / "consolidated.01.pth").rename(meta / "consolidated.02.pth")
    refuses(meta, "consolidated.01.pth: missing", error=FileNotFoundError)


def test_a_missing_last_shard_of_metas_layout(meta):
    (meta / "consolidated.01.pth").unlink()
    refuses(meta, "shapes differ from the config: layers.0.attention.wk.weight [10, 48]")


def test_shards_of_different_checkpoints(meta, tmp_path):
    other = write_meta(random_model(tiny_config(num_hidden_layers=2)), tmp_path / "2", num_shards=2)
    shutil.copy(other / "consolidated.01.pth", meta)
    differ = "tensor names differ from consolidated.00.pth: layers.2."
    refuses(meta, f"consolidated.01.pth: {differ}")
    other = write_meta(random_model(tiny_config(), dtype=torch.half), tmp_path / "h", num_shards=2)
    shutil.copy(other / "consolidated.01.pth", meta)
    refuses(meta, "tok_embeddings.weight differs in shape or dtype between the shards")


def test_a_pth_file_of_another_model(meta):
    for number in range(2):
        torch.save({"conv.weight": torch.ones(3, 3)}, meta / f"consolidated.0{number}.pth")
    refuses(meta, "has no matrix tok_embeddings.weight")


def test_refused_configs_say_why_in_one_line(hub):
    config = hub / "config.json"
    whole = config.read_text()
    for changes, message in (
        ({"model_type": "mistral"}, "model_type 'mistral' is not supported"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"quantization_config": {"bits": 4}}, "only weights quantized by llama32 load"),
        ({"sliding_window": 4096}, "unknown key sliding_window"),
        ({"head_dim": 11}, "head_dim 11 is odd"),
    ):
        edit_json(config, **changes)
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            read_model(hub)
        assert "\n" not in str(error.value)
        config.write_text(whole)
