"""Five changes of the architecture, each with the public interface and without copied code.

Every change is a worked example to copy. A plain forward pass and generation on a paged cache agree
for each.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llama32 import Llama, Sampling, eager, fused, pattern
from llama32.attention import Attend, mix
from llama32.cache.kv_cache import PagedCache
from llama32.cache.paged_attention import per_sequence
from llama32.generate import generate
from llama32.model import SwiGLU
from tests.checkpoints import random_model, tiny_config
from tests.closeness import assert_near

# 1. Attention to the last few tokens only. (Longformer, Beltagy et al. 2020)


def sliding(window: int) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        T, S = q.shape[-3], k.shape[-3]
        distance = torch.arange(S - T, S).unsqueeze(1) - torch.arange(S)  # (T, S)
        return fused(q, k, v, (distance >= 0) & (distance < window))

    return attend


# 2. Attention with a sink, an extra key that takes a share of the softmax and adds nothing.
# (StreamingLLM, Xiao et al. 2023; with a learned score as in gpt-oss)


def with_sink(score: float) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        zero = torch.zeros_like(k[..., :1, :, :])
        T, S = q.shape[-3], k.shape[-3]
        mask = torch.ones(T, S + 1, dtype=torch.bool).tril(S - T + 1)
        p = pattern(q, torch.cat([zero, k], dim=-3), mask)
        p[..., 0] *= torch.tensor(score).exp()  # a zero key has the score 0
        p = p / p.sum(-1, keepdim=True)
        return mix(p, torch.cat([zero, v], dim=-3))

    return attend


# 3. No position on every fourth layer. (NoPE, Kazemnejad et al. 2023; every fourth: SmolLM3)


class NoPE(nn.Module):
    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor, cos_sin: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        cos, sin = cos_sin
        return self.attn(x, (torch.ones_like(cos), torch.zeros_like(sin)), attend)


def without_positions(model: Llama) -> None:
    for layer in model.layers[3::4]:
        layer.attn = NoPE(layer.attn)  # pyright: ignore


# 4. Another norm.


def with_layer_norm(model: Llama) -> None:
    E = model.config.hidden_size
    for layer in model.layers:
        layer.attn_norm, layer.mlp_norm = nn.LayerNorm(E), nn.LayerNorm(E)
    model.norm = nn.LayerNorm(E)


# 5. A mixture of experts in place of one mlp: each token goes to the two experts with the highest
# router scores. (Shazeer et al. 2017; Mixtral)


class Mixture(nn.Module):
    def __init__(self, experts: list[SwiGLU], width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.router = nn.Linear(width, len(experts), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)
        best, experts = scores.topk(2, dim=-1)
        shares = torch.zeros_like(scores).scatter(-1, experts, best.softmax(dim=-1))
        outputs = [
            share.unsqueeze(-1) * expert(x)
            for share, expert in zip(shares.unbind(-1), self.experts, strict=True)
        ]
        return torch.stack(outputs).sum(0)


def with_experts(model: Llama) -> None:
    experts = [SwiGLU(model.config) for _ in range(4)]
    model.layers[1].mlp = Mixture(experts, model.config.hidden_size)


PLAIN: Attend = eager
CHANGES: dict[str, tuple[Callable[[Llama], object], Attend]] = {
    "sliding window": (lambda model: None, sliding(5)),
    "sink": (lambda model: None, with_sink(1.5)),
    "NoPE": (without_positions, PLAIN),
    "LayerNorm": (with_layer_norm, PLAIN),
    "experts": (with_experts, PLAIN),
}


@pytest.fixture(params=CHANGES)
def changed(request) -> tuple[Llama, Attend]:
    torch.manual_seed(0)
    change, attend = CHANGES[request.param]
    model = random_model(tiny_config(num_hidden_layers=4))
    change(model)
    return model, attend


@torch.no_grad()
def test_each_change_generates_on_pages_as_in_a_plain_forward_pass(changed):
    model, attend = changed
    prompt = torch.randint(model.config.vocab_size, (70,)).tolist()
    original = random_model(tiny_config(num_hidden_layers=4))
    tokens = torch.tensor([prompt])
    assert not torch.allclose(model(tokens, attend=attend), original(tokens, attend=eager))
    cache = PagedCache(
        model.config, 8, 64, dtype=torch.float32, attend=partial(per_sequence, attend)
    )
    sampling = Sampling(temperature=0, max_new_tokens=12, logprobs=0)
    text = prompt
    for token in generate(model, prompt, sampling, cache=cache, chunk=16):
        logits = model(torch.tensor([text]), attend=attend)[0, -1]
        assert token.id == int(logits.argmax())
        expected = float(logits.log_softmax(-1)[token.id])
        assert token.logprobs is not None
        assert abs(token.logprobs.chosen - expected) < 1e-4
        text = [*text, token.id]


def test_a_window_ignores_older_tokens_and_a_sink_takes_a_share():
    q, k, v = (torch.randn(1, 9, heads, 10) for heads in (6, 2, 2))
    far = v.clone()
    far[:, 0] += 100
    assert torch.equal(sliding(5)(q, k, v)[:, 5:], sliding(5)(q, k, far)[:, 5:])
    assert not torch.allclose(sliding(5)(q, k, v)[:, 4], sliding(5)(q, k, far)[:, 4])
    assert_near(sliding(9)(q, k, v), eager(q, k, v), within=2e-6)
    assert_near(with_sink(-40.0)(q, k, v), eager(q, k, v), within=2e-6)
    ones = torch.ones_like(v)
    shares = with_sink(0.0)(q, torch.zeros_like(k), ones)[0, :, 0, 0]
    assert torch.allclose(shares, torch.arange(1, 10) / torch.arange(2, 11))


def test_each_change_is_short():
    source = Path(__file__).read_text("utf-8")
    parts = source.partition("PLAIN: Attend")[0].split("\n# ")
    assert len([part for part in parts if part[:2].strip(". ").isdigit()]) == 5
    assert all(part.count("\n") < 30 for part in parts[1:])
