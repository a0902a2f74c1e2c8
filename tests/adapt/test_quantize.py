"""Which layers are quantized, and what that costs in accuracy."""

import pytest
import torch
from torch import nn
from torch.nn.functional import kl_div

from llama32 import Sampling, load_model, quantize
from llama32.adapt.quantized import Float8Linear, Int4Linear, Int8Linear
from llama32.adapt.tied import QuantizedEmbedding
from llama32.generate import generate
from llama32.model import Llama
from tests.checkpoints import random_model, tiny_config

TOKENS = torch.arange(120).view(2, 60)
FORMS = [("int8", Int8Linear), ("int4", Int4Linear), ("fp8", Float8Linear)]


def small(**changes) -> Llama:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    return random_model(tiny_config(**(sizes | changes)))


@pytest.mark.parametrize(("scheme", "form"), FORMS)
def test_all_layers_are_quantized_and_the_head_in_eight_bits(scheme, form):
    model = small()
    assert quantize(model, scheme) is model
    kinds = {name: type(part) for name, part in model.named_modules()}
    assert nn.Linear not in kinds.values()
    assert kinds["layers.1.mlp.down_proj"] is kinds["layers.0.attn.q_proj"] is form
    assert type(model.lm_head) is Int8Linear


def test_rows_that_groups_of_int4_do_not_fill_get_int8():
    model = quantize(small(intermediate_size=112), "fp8")
    assert type(model.get_submodule("layers.0.mlp.down_proj")) is Float8Linear
    model = quantize(small(intermediate_size=112), "int4")
    kinds = {name: type(part) for name, part in model.named_modules()}
    assert kinds["layers.0.mlp.up_proj"] is Int4Linear
    assert kinds["layers.0.mlp.down_proj"] is Int8Linear


def test_a_tied_embedding_reads_the_head():
    model = small()
    rows = Int8Linear.of(model.embed.weight).dequantized()
    quantize(model, "int4")
    assert isinstance(model.embed, QuantizedEmbedding)
    assert model.embed.layer is model.lm_head
    assert torch.equal(model.embed(TOKENS), rows[TOKENS])


def test_an_embedding_of_its_own_stays_as_it_is():
    model = quantize(small(tie_word_embeddings=False), "int8")
    assert type(model.embed) is nn.Embedding


def test_large_matrices_are_quantized_in_pieces_to_the_same_integers(monkeypatch):
    monkeypatch.setattr("llama32.adapt.quantize.PIECE", 7)
    model = small()
    whole = Int4Linear.of(model.get_parameter("layers.0.mlp.up_proj.weight"))
    quantize(model, "int4")
    found = model.get_submodule("layers.0.mlp.up_proj")
    assert isinstance(found, Int4Linear)
    assert torch.equal(found.dequantized(), whole.dequantized())


def test_a_quantized_model_is_quantized_no_further():
    model = quantize(small(), "int8")
    before = [*model.modules()]
    quantize(model, "int4")
    assert [*model.modules()] == before


def test_an_unknown_scheme_is_named():
    with pytest.raises(ValueError, match="no scheme 'int3', only int8, int4, fp8"):
        quantize(small(), "int3")


def test_a_quantized_model_moves_and_casts_with_its_scales_as_they_are():
    model = quantize(small(), "int8")
    before = model.get_buffer("layers.0.attn.q_proj.scale").clone()
    model.bfloat16()
    assert torch.equal(model.get_buffer("layers.0.attn.q_proj.scale"), before)
    assert model(TOKENS).dtype == torch.bfloat16


def divergence(model: Llama, wide: Llama, tokens: torch.Tensor) -> tuple[float, float]:
    """Mean KL of the model's next-token distribution from the wide one's, and how often the
    likeliest token is the same."""
    with torch.inference_mode():
        found, wanted = model(tokens).float(), wide(tokens).float()
    kl = kl_div(found.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none")
    return kl.sum(-1).mean().item(), (found.argmax(-1) == wanted.argmax(-1)).float().mean().item()


@pytest.mark.parametrize("name", ["tiny", "stories260K"])
def test_int8_is_within_its_gates_of_fp32(name, request):
    """Also when activations are rounded: mean KL under 1e-3, the same choice in over 95%."""
    folder = name if name == "tiny" else request.getfixturevalue("reference") / name / "hf"
    wide = load_model(folder, dtype=torch.float32)
    tokens = torch.tensor([list(wide_text(wide, seed)) for seed in range(4)])
    fast = load_model(folder, dtype=torch.float32, quantize="int8", optimize=True)
    kl, agreement = divergence(fast, wide, tokens)
    assert kl < 1e-3
    assert agreement > 0.95
    plain = load_model(folder, dtype=torch.float32, quantize="int8")
    assert divergence(plain, wide, tokens)[0] < 1e-3


def wide_text(model: Llama, seed: int) -> list[int]:
    """A text of its own, so that it is of the kind that it knows."""
    settings = Sampling(temperature=1.0, seed=seed, max_new_tokens=100, ignore_eos=True)
    return [1, *(token.id for token in generate(model, [1], settings))]
