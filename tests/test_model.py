"""The model: norm, layers, logits, tied weights and parameter counts."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from llama32.attention import eager, fused
from llama32.model import Llama, RMSNorm
from llama32.rope import rotary_cos_sin
from tests.checkpoints import random_model, tiny_config
from tests.closeness import assert_near

TOKENS = torch.randint(100, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> Llama:
    return random_model(tiny_config(vocab_size=100))


def test_rms_norm_is_the_formula():
    norm = RMSNorm(6, eps=0.1)
    nn.init.uniform_(norm.weight)
    x = torch.randn(3, 6)
    expected = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


def test_rms_norm_sums_in_fp32():
    norm = RMSNorm(4096, eps=1e-5).half()
    x = torch.full((1, 4096), 300.0, dtype=torch.float16)  # its squares overflow fp16
    assert torch.equal(norm(x), torch.ones_like(x))


def test_the_model_is_causal(model):
    changed = TOKENS.clone()
    changed[:, 7] += 1
    with torch.no_grad():
        before, after = model(TOKENS), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7], after[:, 7])


def test_only_the_tokens_at_logits_at_get_logits(model):
    with torch.no_grad():
        everything = model(TOKENS[0])
        rows = model(TOKENS[0], logits_at=torch.tensor([3, 11]))
        last = model(TOKENS[0], logits_at=slice(-1, None))
        none = model(TOKENS[0], logits_at=torch.tensor([], dtype=torch.long))
    assert rows.shape == (2, 100)
    assert_near(rows, everything[[3, 11]], within=1e-5)
    assert_near(last, everything[-1:], within=1e-5)
    assert none.shape == (0, 100)


def test_the_model_compiles_as_one_graph_for_every_type_of_logits_at():
    """In a fresh process: the compiler cannot trace the shape checks of the tests."""
    code = "from tests.test_model import compile_and_compare; compile_and_compare()"
    subprocess.run([sys.executable, "-c", code], check=True)


def compile_and_compare() -> None:
    model = random_model(tiny_config(num_hidden_layers=1))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for logits_at in (..., slice(-1, None), torch.tensor([0])):
        expected = model(TOKENS, logits_at=logits_at)
        assert torch.equal(compiled(TOKENS, logits_at=logits_at), expected)


def test_positions_count_from_zero_unless_given(model):
    with torch.no_grad():
        assert torch.equal(model(TOKENS), model(TOKENS, torch.arange(12)))
        assert torch.equal(model(TOKENS), model(TOKENS, torch.arange(12).expand(2, 12)))
        shifted = model(TOKENS, torch.arange(12) + 5)
        stretched = model(TOKENS, torch.arange(12) * 2)
    assert_near(shifted, model(TOKENS), within=2e-5)
    assert not torch.allclose(stretched, shifted, atol=1e-2)


def test_attention_is_an_argument(model):
    calls = []

    def mine(q, k, v):
        calls.append((q.shape, k.shape, v.shape))
        return eager(q, k, v)

    with torch.no_grad():
        given, expected = model(TOKENS, attend=mine), model(TOKENS, attend=fused)
    assert_near(given, expected, within=1e-5)
    c = model.config
    kv = (2, 12, c.num_key_value_heads, c.head_dim)
    assert calls == [((2, 12, c.num_attention_heads, c.head_dim), kv, kv)] * c.num_hidden_layers


def test_one_attention_per_layer_and_not_one_more(model):
    with pytest.raises(ValueError, match="zip"):
        model(TOKENS, None, [eager] * (model.config.num_hidden_layers + 1))


def test_tied_weights_are_one_tensor():
    tied, untied = (random_model(tiny_config(tie_word_embeddings=t)) for t in (True, False))
    assert tied.lm_head.weight is tied.embed.weight
    assert untied.lm_head.weight is not untied.embed.weight
    assert tied.bfloat16().lm_head.weight is tied.embed.weight


def test_attention_with_half_the_heads_runs_the_same_code(model):
    """Sizes come from the weights: two tensor-parallel shards sum to the whole layer."""
    attn = model.layers[0].attn
    x = torch.randn(5, model.config.hidden_size)
    cos_sin = rotary_cos_sin(torch.arange(5), model.inv_freq)

    def half(i: int):
        shard = Llama(model.config).layers[0].attn
        for name in ("q_proj", "k_proj", "v_proj"):
            part = getattr(attn, name).weight.chunk(2, dim=0)[i]
            getattr(shard, name).weight = nn.Parameter(part)
        shard.o_proj.weight = nn.Parameter(attn.o_proj.weight.chunk(2, dim=1)[i])
        return shard

    with torch.no_grad():
        summed = half(0)(x, cos_sin, eager) + half(1)(x, cos_sin, eager)
        assert_near(summed, attn(x, cos_sin, eager), within=1e-5)


def test_every_parameter_gets_a_gradient(model):
    model(TOKENS).square().mean().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().sum() > 0, name


def test_the_published_shapes_have_the_published_parameter_counts():
    for shape, count in (
        ({"hidden_size": 2048, "num_hidden_layers": 16, "head_dim": 64}, 1_235_814_400),
        (
            {
                "hidden_size": 3072,
                "num_hidden_layers": 28,
                "head_dim": 128,
                "num_attention_heads": 24,
            },
            3_212_749_824,
        ),
    ):
        sizes = {
            "vocab_size": 128256,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        }
        with torch.device("meta"):
            model = Llama(tiny_config(**(sizes | shape)))
        assert sum(weight.numel() for weight in model.parameters()) == count
