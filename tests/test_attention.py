"""Attention without a cache: `eager` against the formula, `fused` against `eager`."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llama32.attention import causal, eager, fused, mix, pattern, per_document
from tests.closeness import assert_near


def heads(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_formula(q, k, v, t: int, h: int, visible: list[int]):
    """Return the mixed value of one query and head, in fp64 and with loops."""
    kv_head = h // (q.shape[-2] // k.shape[-2])
    scores = [float(q[t, h].double() @ k[s, kv_head].double()) for s in visible]
    weights = [math.exp(score / math.sqrt(q.shape[-1])) for score in scores]
    mixed = sum(w * v[s, kv_head].double() for w, s in zip(weights, visible, strict=True))
    return mixed / sum(weights)


def test_eager_is_the_formula():
    q, k, v = heads(5, 6, 8), heads(5, 2, 8, seed=1), heads(5, 2, 8, seed=2)
    mixed = eager(q, k, v)
    for t in range(5):
        for h in range(6):
            expected = by_formula(q, k, v, t, h, list(range(t + 1)))
            torch.testing.assert_close(mixed[t, h].double(), expected, atol=1e-6, rtol=1e-5)


def test_with_more_keys_than_queries_the_last_query_sees_all_keys():
    q, k, v = heads(2, 2, 8), heads(7, 1, 8, seed=1), heads(7, 1, 8, seed=2)
    expected = by_formula(q, k, v, 0, 1, list(range(6)))
    torch.testing.assert_close(eager(q, k, v)[0, 1].double(), expected, atol=1e-6, rtol=1e-5)
    assert causal(2, 4, torch.device("cpu")).tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("shape", [(9, 9), (1, 9), (4, 9), (1, 1)], ids=str)
@pytest.mark.parametrize(("H", "K"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("leading", [(), (3,)], ids=str)
def test_fused_equals_eager(shape, H, K, leading):
    T, S = shape
    q = heads(*leading, T, H, 16)
    k, v = heads(*leading, S, K, 16, seed=1), heads(*leading, S, K, 16, seed=2)
    assert_near(fused(q, k, v), eager(q, k, v), within=2e-6)
    mask = torch.rand(T, S) < 0.5
    mask[:, 0] = True
    given = fused(q, k, v, mask), eager(q, k, v, mask)
    assert_near(*given, within=2e-6)


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation creates."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.size = max(self.size, out.numel())
        return out


@pytest.mark.parametrize("leading", [(), (1,)], ids=str)
@pytest.mark.parametrize("T", [64, 1])
def test_fused_never_holds_a_pattern_for_every_head(leading, T):
    """SDPA holds a pattern, a hundred times larger, if no fused kernel fits the arguments."""
    q = heads(*leading, T, 24, 16)
    k, v = heads(*leading, 1000, 8, 16, seed=1), heads(*leading, 1000, 8, 16, seed=2)
    with Largest() as largest:
        fused(q, k, v)
    assert largest.size <= max(T * 1000, k.numel())  # nothing larger than a T x S mask
    with Largest() as largest:
        eager(q, k, v)
    assert largest.size >= T * 1000 * 24


def test_decode_does_not_copy_shared_heads(monkeypatch):
    k, v = heads(64, 2, 8, seed=1), heads(64, 2, 8, seed=2)
    seen = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, **options):
        seen.append((k.data_ptr(), v.data_ptr(), k.shape))
        return attention(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    fused(heads(1, 6, 8), k, v)
    assert seen == [(k.data_ptr(), v.data_ptr(), (1, 2, 64, 8))]


def test_a_custom_attention_can_record_patterns():
    seen = []

    def recording(q, k, v):
        p = pattern(q, k)
        seen.append(p)
        return mix(p, v)

    q, k, v = heads(2, 5, 4, 8), heads(2, 5, 2, 8, seed=1), heads(2, 5, 2, 8, seed=2)
    assert torch.equal(recording(q, k, v), eager(q, k, v))
    (p,) = seen
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 4, 5))
    assert torch.equal(p, p.tril())


def test_bf16_attention_sums_in_fp32():
    q, k, v = (heads(300, 2, 16, seed=seed) for seed in range(3))
    exact = eager(q, k, v)
    for attend in (eager, fused):
        low = attend(q.bfloat16(), k.bfloat16(), v.bfloat16())
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), exact, atol=0.03, rtol=0.02)


def test_per_document_equals_a_block_diagonal_mask():
    lengths = (5, 1, 6)
    q, k, v = (torch.randn(12, heads, 8) for heads in (4, 2, 2))
    document = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    mask = causal(12, 12, q.device) & (document.unsqueeze(1) == document)
    expected = eager(q, k, v, mask)
    for attend in (eager, fused):
        torch.testing.assert_close(per_document(q, k, v, lengths, attend), expected)
