from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llama32.cache.kv_cache import bytes_per_token
from llama32.engine.cache_size import num_pages, page_size
from llama32.engine.settings import EngineSettings
from llama32.model import Llama
from tests.checkpoints import tiny_config

CONTEXT = 1000
PER_TOKEN = 2 * 3 * 2 * 10 * 4  # keys and values, layers, heads, coordinates, bytes
PER_PAGE = 64 * PER_TOKEN


def make_model(context: int = CONTEXT) -> Llama:
    return Llama(tiny_config(max_position_embeddings=context))


def on_gpu(monkeypatch: pytest.MonkeyPatch, free: int) -> Llama:
    """Return a model that claims to be in bf16 on a GPU with `free` bytes."""
    model = make_model(context=10**9)
    model.norm = nn.Identity()
    model.norm.weight = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 << 30))
    return model


def pages(model: Llama, **settings) -> int:
    return num_pages(model, EngineSettings(**settings))


def test_a_token_takes_a_key_and_a_value_in_every_layer():
    assert bytes_per_token(tiny_config(), torch.float32) == PER_TOKEN == 480
    assert bytes_per_token(tiny_config(), torch.bfloat16) == 240
    llama_1b = tiny_config(
        num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64
    )
    assert bytes_per_token(llama_1b, torch.bfloat16) == 32768


def test_a_page_has_64_slots_unless_told():
    model = make_model()
    assert page_size(model, EngineSettings()) == 64
    assert page_size(model, EngineSettings(page_size=192)) == 192


@pytest.mark.parametrize(
    ("tokens", "expected"), [(1, 1), (63, 1), (64, 1), (65, 2), (128, 2), (6401, 101)]
)
def test_a_size_in_tokens_is_rounded_up_to_pages(tokens, expected):
    assert pages(make_model(), cache_tokens=tokens) == expected


@pytest.mark.parametrize(
    ("room", "expected"),
    [(PER_PAGE, 1), (2 * PER_PAGE - 1, 1), (2 * PER_PAGE, 2), (9 * PER_PAGE + 1, 9)],
)
def test_a_size_in_bytes_is_rounded_down_to_pages(room, expected):
    assert pages(make_model(), cache_bytes=room) == expected


def test_larger_pages_are_fewer():
    assert pages(make_model(), cache_tokens=6400, page_size=128) == 50
    assert pages(make_model(), cache_bytes=100 * PER_PAGE, page_size=128) == 50


def test_bytes_count_in_the_dtype_of_the_model():
    assert pages(make_model().to(torch.bfloat16), cache_bytes=9 * PER_PAGE) == 18


def test_on_a_cpu_the_cache_has_4_gib_unless_told():
    assert pages(make_model(context=10**6), max_running=1000) == 4 * 2**30 // PER_PAGE


@pytest.mark.parametrize(
    ("max_running", "context", "expected"),
    [(1, 1000, 16), (3, 1000, 48), (3, 1024, 48), (3, 1025, 51)],
)
def test_the_cache_is_no_larger_than_all_that_may_run_can_fill(max_running, context, expected):
    model = make_model(context)
    assert pages(model, max_running=max_running) == expected
    assert pages(model, max_running=max_running, cache_bytes=10**9) == expected


def test_too_little_for_a_page_is_refused_with_both_numbers():
    match = "the KV cache gets 30,719 bytes, and a page of 64 tokens takes 30,720"
    with pytest.raises(ValueError, match=match):
        pages(make_model(), cache_bytes=PER_PAGE - 1)


def test_on_a_gpu_a_page_has_128_slots(monkeypatch):
    model = on_gpu(monkeypatch, free=1)
    assert page_size(model, EngineSettings()) == 128
    assert page_size(model, EngineSettings(page_size=64)) == 64


def test_on_a_gpu_the_cache_takes_a_share_of_what_is_free(monkeypatch):
    model = on_gpu(monkeypatch, free=1000 * PER_PAGE)  # as long and half as wide as on the CPU
    assert pages(model) == 900
    assert pages(model, memory_fraction=0.5) == 500
    assert pages(model, memory_fraction=0.5, page_size=64) == 1000
    assert pages(model, cache_bytes=7 * PER_PAGE) == 7
    assert pages(model, cache_tokens=130) == 2


def test_a_gpu_that_is_full_is_refused_with_what_it_has(monkeypatch):
    model = on_gpu(monkeypatch, free=1000)
    match = "the KV cache gets 900 bytes, and a page of 128 tokens takes 30,720"
    with pytest.raises(ValueError, match=match):
        pages(model)


def test_a_cache_of_bytes_has_more_pages_in_the_same_memory():
    per_page = 64 * 2 * 3 * 2 * (10 + 4)
    assert pages(make_model(), cache_bytes=9 * per_page, cache_dtype="int8") == 9
    assert pages(make_model(), cache_bytes=9 * per_page - 1, cache_dtype="int8") == 8
