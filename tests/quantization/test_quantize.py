"""The choice of quantized layers, and the loss of accuracy."""

import pytest
import torch
from torch import nn
from torch.nn.functional import kl_div

from llama32 import Sampling, load_model, quantize
from llama32.generate import generate
from llama32.model import Llama
from llama32.quantization.quantized_linear import Float8Linear, Int4Linear, Int8Linear
from llama32.quantization.tied_embedding import QuantizedEmbedding
from tests.checkpoints import random_model, tiny_config

TOKENS = torch.arange(120).view(2, 60)
SCHEMES = [("int8", Int8Linear), ("int4", Int4Linear), ("fp8", Float8Linear)]


def small_model(**changes) -> Llama:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    return random_model(tiny_config(**(sizes | changes)))


def module_types(model: Llama) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


@pytest.mark.parametrize(("scheme", "kind"), SCHEMES)
def test_all_layers_are_quantized_and_the_head_to_int8(scheme, kind):
    model = small_model()
    assert quantize(model, scheme) is model
    kinds = module_types(model)
    assert nn.Linear not in kinds.values()
    assert kinds["layers.1.mlp.down_proj"] is kinds["layers.0.attn.q_proj"] is kind
    assert type(model.lm_head) is Int8Linear


def test_widths_that_are_no_multiple_of_the_int4_group_get_int8():
    model = quantize(small_model(intermediate_size=112), "fp8")
    assert type(model.get_submodule("layers.0.mlp.down_proj")) is Float8Linear
    model = quantize(small_model(intermediate_size=112), "int4")
    kinds = module_types(model)
    assert kinds["layers.0.mlp.up_proj"] is Int4Linear
    assert kinds["layers.0.mlp.down_proj"] is Int8Linear


def test_a_tied_embedding_reads_rows_of_the_head():
    model = small_model()
    rows = Int8Linear.from_float(model.embed.weight).dequantized()
    quantize(model, "int4")
    assert isinstance(model.embed, QuantizedEmbedding)
    assert model.embed.layer is model.lm_head
    assert torch.equal(model.embed(TOKENS), rows[TOKENS])


def test_an_untied_embedding_stays_as_it_is():
    model = quantize(small_model(tie_word_embeddings=False), "int8")
    assert type(model.embed) is nn.Embedding


def test_quantization_in_chunks_of_rows_gives_the_same_integers(monkeypatch):
    monkeypatch.setattr("llama32.quantization.quantize.CHUNK_ROWS", 7)
    model = small_model()
    expected = Int4Linear.from_float(model.get_parameter("layers.0.mlp.up_proj.weight"))
    quantize(model, "int4")
    layer = model.get_submodule("layers.0.mlp.up_proj")
    assert isinstance(layer, Int4Linear)
    assert torch.equal(layer.dequantized(), expected.dequantized())


def test_a_quantized_model_is_not_quantized_again():
    model = quantize(small_model(), "int8")
    before = [*model.modules()]
    quantize(model, "int4")
    assert [*model.modules()] == before


def test_an_unknown_scheme_is_named():
    with pytest.raises(ValueError, match="no scheme 'int3', only int8, int4, fp8"):
        quantize(small_model(), "int3")


def test_a_cast_of_the_model_does_not_cast_scales():
    model = quantize(small_model(), "int8")
    before = model.get_buffer("layers.0.attn.q_proj.scale").clone()
    model.bfloat16()
    assert torch.equal(model.get_buffer("layers.0.attn.q_proj.scale"), before)
    assert model(TOKENS).dtype == torch.bfloat16


def divergence(model: Llama, reference: Llama, tokens: torch.Tensor) -> tuple[float, float]:
    """Return the mean KL from the reference's next-token distribution, and the share of tokens
    with the same argmax."""
    with torch.inference_mode():
        logits, expected = model(tokens).float(), reference(tokens).float()
    kl = kl_div(logits.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none")
    agreement = (logits.argmax(-1) == expected.argmax(-1)).float().mean()
    return kl.sum(-1).mean().item(), agreement.item()


@pytest.mark.parametrize("name", ["tiny", "stories260K"])
def test_int8_is_close_to_fp32(name, request):
    """Mean KL below 1e-3 and the same argmax for 95% of tokens, also with int8 activations."""
    folder = name if name == "tiny" else request.getfixturevalue("reference") / name / "hf"
    fp32 = load_model(folder, dtype=torch.float32)
    tokens = torch.tensor([sample_text(fp32, seed) for seed in range(4)])
    optimized = load_model(folder, dtype=torch.float32, quantize="int8", optimize=True)
    kl, agreement = divergence(optimized, fp32, tokens)
    assert kl < 1e-3
    assert agreement > 0.95
    plain = load_model(folder, dtype=torch.float32, quantize="int8")
    assert divergence(plain, fp32, tokens)[0] < 1e-3


def sample_text(model: Llama, seed: int) -> list[int]:
    """Return a text of the model, and so of a kind that the model knows."""
    settings = Sampling(temperature=1.0, seed=seed, max_new_tokens=100, ignore_eos=True)
    return [1, *(token.id for token in generate(model, [1], settings))]
