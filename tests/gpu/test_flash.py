"""The GPU routes against their oracles. Skipped without CUDA; not yet run on a GPU."""

from functools import partial

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn

from llama32 import paged
from llama32.attention import eager, fused
from llama32.batch import Batch, Span
from llama32.cache import PagedCache
from llama32.generate import generate
from llama32.settings import Sampling
from tests.checkpoints import random_model, tiny_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

# bf16 keeps 8 bits; the pattern, which flash rounds to bf16 and the oracle does not, adds its own.
close = partial(torch.testing.assert_close, atol=2e-2, rtol=2e-2)


def random(*shape: int, seed: int) -> torch.Tensor:
    draw = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=draw, device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("walks_pages", [True, False], ids=["page table", "gathered"])
@pytest.mark.parametrize("D", [64, 128])
def test_flash_over_pages_equals_eager(monkeypatch, walks_pages, D):
    if walks_pages and not paged.walks_pages(varlen_attn):
        pytest.skip("this torch has no block_table")
    monkeypatch.setattr(paged, "walks_pages", lambda kernel: walks_pages)
    spans = [
        Span([1] * 300, 0, [5, 2]),  # a prompt
        Span([1] * 64, 700, [1, 6, 3]),  # a chunk of one
        Span([1], 511, [0, 7]),  # decoding, at the last slot of a page
        Span([1], 0, [4]),
    ]
    batch = Batch.pack(spans, 256, "cuda")
    q = random(len(batch.tokens), 24, D, seed=0)
    keys, values = random(8, 256, 8, D, seed=1), random(8, 256, 8, D, seed=2)
    expected = paged.eager(q, keys, values, batch)
    close(paged.flash(q, keys, values, batch), expected)


@pytest.mark.parametrize(("T", "S"), [(1, 900), (64, 900), (300, 300)])
def test_fused_equals_eager_on_cuda(T, S):
    q, k, v = random(T, 32, 64, seed=0), random(S, 8, 64, seed=1), random(S, 8, 64, seed=2)
    close(fused(q, k, v), eager(q, k, v))


def test_the_fastest_form_on_a_recent_gpu_is_flash():
    device = torch.device("cuda")
    assert paged.fastest(device, torch.bfloat16, 64, 256) is paged.flash
    assert paged.fastest(device, torch.float32, 64, 256) is paged.fused
    assert paged.fastest(device, torch.bfloat16, 64, 16) is paged.fused


def test_generation_on_cuda_gives_the_tokens_of_the_cpu_in_fp32():
    config = tiny_config(head_dim=64, vocab_size=100)
    greedy = Sampling(temperature=0, max_new_tokens=50)
    prompt = list(range(1, 90))
    ids = {
        device: [t.id for t in generate(random_model(config).to(device), prompt, greedy)]
        for device in ("cpu", "cuda")
    }
    assert ids["cuda"] == ids["cpu"]


def test_a_bf16_model_generates_through_flash_as_through_eager():
    model = random_model(tiny_config(head_dim=64, vocab_size=100), dtype=torch.bfloat16).cuda()
    tokens = torch.randint(100, (700,)).tolist()
    logits = []
    for attend in (paged.flash, paged.eager):
        cache = PagedCache(model.config, 4, dtype=torch.bfloat16, device="cuda", attend=attend)
        batch = Batch.pack([Span(tokens, 0, [0, 1, 2])], cache.page_size, "cuda")
        with torch.no_grad():
            logits.append(model(batch.tokens, batch.positions, cache.attends(batch)).float())
    torch.testing.assert_close(*logits, atol=0.25, rtol=0.05)
