"""The GPU routes against their oracles. Skipped without CUDA; not yet run on a GPU."""

from functools import partial

import pytest
import torch

from llama32.attention import eager, fused, per_document
from llama32.cache import paged_attention
from llama32.cache.batch import Batch, Span
from llama32.cache.flash_attention import flash, select_backend
from llama32.cache.kv_cache import PagedCache
from llama32.generate import generate
from llama32.sampling_params import Sampling
from llama32.train.document_attention import DocumentAttention
from tests.checkpoints import random_model, tiny_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

# bf16 keeps 8 bits; the pattern, which flash rounds to bf16 and the oracle does not, adds its own.
close = partial(torch.testing.assert_close, atol=2e-2, rtol=2e-2)


def random(*shape: int, seed: int) -> torch.Tensor:
    draw = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=draw, device="cuda", dtype=torch.bfloat16)


PROMPTS = [
    Span([1] * 300, 0, [5, 2, 9]),
    Span([1] * 64, 700, [1, 6, 3, 8, 4, 15]),
    Span([1], 0, [7]),
]
IN_A_ROW = [Span([1] * 300, 0, [5, 6, 7]), Span([1] * 64, 250, [1, 2, 3])]
DECODING = [Span([1], 127, [0]), Span([1], 700, [1, 6, 3, 8, 4, 15]), Span([1], 0, [7])]


@pytest.mark.parametrize("spans", [PROMPTS, IN_A_ROW, DECODING], ids=["prompts", "row", "decoding"])
@pytest.mark.parametrize(("H", "D"), [(32, 64), (24, 128), (8, 64)])
def test_flash_over_pages_equals_eager(spans, H, D):
    batch = Batch.pack(spans, 128, "cuda")
    q = random(len(batch.tokens), H, D, seed=0)
    keys, values = random(16, 128, 8, D, seed=1), random(16, 128, 8, D, seed=2)
    expected = paged_attention.eager_per_sequence(q, keys, values, batch)
    close(flash(q, keys, values, batch), expected)


@pytest.mark.parametrize("D", [64, 128])
def test_decoding_by_pages_has_the_same_bits_in_any_company(D):
    q = random(64, 24, D, seed=0)
    keys, values = random(300, 128, 8, D, seed=1), random(300, 128, 8, D, seed=2)
    span = Span([1], 700, [1, 6, 3, 8, 4, 15])
    alone = flash(q[:1], keys, values, Batch.pack([span], 128, "cuda"))
    for n in (2, 8, 64):
        others = [
            Span([1], 128 * (i % 4 + 1) - 1, [*range(4 * i, 4 * i + i % 4 + 1)])
            for i in range(1, n)
        ]
        batch = Batch.pack([span, *others], 128, "cuda")
        assert torch.equal(flash(q[:n], keys, values, batch)[:1], alone)


@pytest.mark.parametrize("D", [64, 128])
def test_a_prompt_s_attention_has_the_same_bits_however_it_is_cut(D):
    q = random(400, 24, D, seed=0)
    keys, values = random(4, 128, 8, D, seed=1), random(4, 128, 8, D, seed=2)
    pages = [0, 1, 2, 3]
    whole = flash(q, keys, values, Batch.pack([Span([1] * 400, 0, pages)], 128, "cuda"))
    for cut in (64, 192, 320):
        parts = [Span([1] * cut, 0, pages), Span([1] * (400 - cut), cut, pages)]
        mixed = [
            flash(q[part.start : part.length], keys, values, Batch.pack([part], 128, "cuda"))
            for part in parts
        ]
        assert torch.equal(torch.cat(mixed), whole)


@pytest.mark.parametrize(("T", "S"), [(1, 900), (64, 900), (300, 300)])
def test_fused_equals_eager_on_cuda(T, S):
    q, k, v = random(T, 32, 64, seed=0), random(S, 8, 64, seed=1), random(S, 8, 64, seed=2)
    close(fused(q, k, v), eager(q, k, v))


def test_the_fastest_form_on_a_recent_gpu_is_flash():
    device = torch.device("cuda")
    assert select_backend(device, torch.bfloat16, 64, 128) is flash
    assert select_backend(device, torch.float32, 64, 128) is paged_attention.sdpa_per_sequence
    assert select_backend(device, torch.bfloat16, 64, 256) is paged_attention.sdpa_per_sequence


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
    for attend in (flash, paged_attention.eager_per_sequence):
        cache = PagedCache(model.config, 6, dtype=torch.bfloat16, device="cuda", attend=attend)
        batch = Batch.pack([Span(tokens, 0, [0, 1, 2, 3, 4, 5])], cache.page_size, "cuda")
        with torch.no_grad():
            logits.append(model(batch.tokens, batch.positions, cache.attention_fns(batch)).float())
    torch.testing.assert_close(*logits, atol=0.25, rtol=0.05)


@pytest.mark.parametrize(("H", "D"), [(32, 64), (24, 128)])
def test_documents_end_to_end_and_their_gradients_equal_eager_one_by_one(H, D):
    lengths = (300, 1, 64, 129)
    found = []
    for attend in (
        DocumentAttention(lengths),
        partial(per_document, lengths=lengths, attend=eager),
    ):
        q, k, v = (
            random(sum(lengths), heads, D, seed=i).requires_grad_()
            for i, heads in enumerate((H, 8, 8))
        )
        mixed = attend(q, k, v)
        mixed.sum().backward()
        found.append((mixed, q.grad, k.grad, v.grad))
    for ours, expected in zip(*found, strict=True):
        close(ours, expected)
