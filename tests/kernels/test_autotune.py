"""Autotuning: the selected kernels, and an unchanged model otherwise."""

import pytest
import torch
from torch import nn

from llama32 import Engine, EngineSettings, Sampling, load_model
from llama32.checkpoint.writer import save
from llama32.kernels import autotune
from llama32.kernels.autotune import ROWS, Autotuner, KernelChoice, Timing, optimize, split_rows
from llama32.kernels.packed_int import CPUInt4Linear, OneDNNInt8Linear, WeightOnlyInt8Linear
from llama32.kernels.packed_linear import FBGEMMLinear, OneDNNLinear, PackedLinear, TiledLinear
from llama32.model import Llama
from llama32.quantization.quantize import quantize
from llama32.quantization.quantized_linear import Int4Linear, Int8Linear
from llama32.quantization.tied_embedding import StoredEmbedding
from tests.checkpoints import random_model, tiny_config, write_meta

TOKENS = torch.arange(120).view(2, 60)


def small(**changes) -> Llama:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "vocab_size": 160}
    return random_model(tiny_config(**(sizes | changes)), dtype=torch.bfloat16)


def leaf_types(model: Llama) -> dict[str, type]:
    return {
        name: type(part)
        for name, part in model.named_modules()
        if not [*part.children()] and not name.startswith("embed")
    }


@pytest.fixture
def only(monkeypatch):
    """Return a function to make a kernel the only candidate, and the fastest."""

    def restrict(kernel: type[PackedLinear]) -> None:
        monkeypatch.setattr(autotune, "KERNELS", (kernel,))
        monkeypatch.setattr(
            autotune, "time_products", lambda parts, x: float(type(parts[0]) is not kernel)
        )

    return restrict


def test_the_kernel_with_the_best_product_of_timings_is_selected():
    slow, fast = (2.0, 2.0, 2.0), (1.0, 1.0, 3.0)
    choice = KernelChoice("Linear, bfloat16", [Timing(None, slow), Timing(OneDNNLinear, fast)])
    assert choice.best.kernel is OneDNNLinear
    assert str(choice) == (
        "Linear, bfloat16: oneDNN (2.0x at 1, 2.0x at 8, 0.7x at 128 rows), of 2 timed: unpacked"
    )
    mixed = KernelChoice(
        "Linear, bfloat16", [Timing(None, slow), Timing(TiledLinear, (1.0, 1.0, 9.0))]
    )
    assert mixed.best.kernel is None


@pytest.mark.parametrize("kernel", [OneDNNLinear, FBGEMMLinear, TiledLinear])
@pytest.mark.parametrize("tied", [True, False])
def test_every_linear_layer_is_replaced_and_logits_stay(kernel, tied, only):
    model = small(tie_word_embeddings=tied)
    if not kernel.supports(model.lm_head):
        pytest.skip("not on this machine")
    upcast = model.float()(TOKENS)
    plain = model.bfloat16()(TOKENS).float()
    only(kernel)
    tuner = optimize(model)
    kinds = set(leaf_types(model).values())
    assert kernel in kinds
    assert nn.Linear not in kinds
    packed = model(TOKENS).float()
    assert (packed - upcast).norm() <= 2 * (plain - upcast).norm()
    assert [*tuner.choices] == ["Linear, bfloat16"]
    assert len(tuner.choices["Linear, bfloat16"].timings) == 2
    assert not packed.requires_grad


def test_a_tied_embedding_keeps_its_weight_when_the_head_is_packed(only):
    model = small()
    weight = model.embed.weight
    only(TiledLinear)
    optimize(model)
    assert type(model.lm_head) is TiledLinear
    assert model.embed.weight is weight


def test_a_layer_without_a_supported_kernel_stays_unpacked(monkeypatch):
    monkeypatch.setattr(autotune, "KERNELS", ())
    model = small()
    before = leaf_types(model)
    assert str(optimize(model)) == "Linear, bfloat16: unpacked"
    assert leaf_types(model) == before


def test_kernels_are_timed_on_slices_of_the_weight_in_turns(monkeypatch):
    timed = []
    monkeypatch.setattr(autotune, "SAMPLE_ROWS", 40)
    monkeypatch.setattr(autotune, "KERNELS", (TiledLinear,))
    monkeypatch.setattr(autotune, "time_products", lambda parts, x: timed.append((parts, x)) or 1.0)
    timings = autotune.time_kernels(small().lm_head, torch.bfloat16)
    assert [timing.kernel for timing in timings] == [None, TiledLinear]
    assert [len(x) for _, x in timed] == [n for n in ROWS for _ in range(autotune.REPEATS * 2)]
    assert [type(parts[0]) for parts, _ in timed[:4]] == [nn.Linear, TiledLinear] * 2
    assert len(timed[0][0]) == 4


def test_a_layer_stays_unpacked_if_the_kernel_of_its_kind_does_not_support_it(only):
    model = quantize(small(intermediate_size=108), "int8")
    only(WeightOnlyInt8Linear)
    optimize(model)
    kinds = leaf_types(model)
    assert kinds["layers.0.attn.o_proj"] is WeightOnlyInt8Linear
    assert kinds["layers.0.mlp.down_proj"] is Int8Linear
    assert model(TOKENS).isfinite().all()


def test_layers_are_not_fused_if_the_kernel_does_not_support_the_result(only):
    """int4 needs a multiple of 16 rows: q_proj has 80, the fused layer 140."""
    model = quantize(
        small(num_attention_heads=4, num_key_value_heads=2, head_dim=20, vocab_size=160), "int4"
    )
    model.set_submodule("layers.0.attn.v_proj", Int4Linear.from_float(torch.randn(20, 64)))
    only(CPUInt4Linear)
    Autotuner().replace(model, "layers.0.attn.q_proj")
    assert type(model.layers[0].attn.q_proj) is Int4Linear


def test_a_layer_is_split_by_rows():
    for layer in (small().lm_head, Int8Linear.from_float(small().lm_head.weight)):
        x = torch.randn(3, 64).bfloat16()
        parts = [part(x) for part in split_rows(layer, 100)]
        assert [part.shape[-1] for part in parts] == [100, 60]
        torch.testing.assert_close(torch.cat(parts, -1), layer(x))


def test_a_layer_with_hooks_is_not_replaced(only):
    model = small()
    only(TiledLinear)
    hook = model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj has hooks that would be lost"):
        optimize(model)
    hook.remove()
    optimize(model)


def test_optimizing_twice_changes_nothing():
    model = small()
    optimize(model)
    before = [*model.modules()]
    optimize(model)
    assert [*model.modules()] == before


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_layers_get_the_first_supported_kernel_without_timing(scheme, monkeypatch):
    monkeypatch.setattr(autotune, "time_products", None)
    model = quantize(small(), scheme)
    plain = model(TOKENS).float()
    tuner = optimize(model)
    kinds = {"int8": {"Int8Linear, int8"}, "int4": {"Int8Linear, int8", "Int4Linear, uint8"}}
    assert tuner.choices.keys() == kinds[scheme]
    assert not {Int8Linear, Int4Linear} & set(leaf_types(model).values())
    assert (model(TOKENS).float() - plain).norm() < 0.1 * plain.norm()


def test_down_projections_and_the_head_use_residual_quantization(only):
    model = quantize(small(tie_word_embeddings=False), "int8")
    if not OneDNNInt8Linear.supports(model.lm_head):
        pytest.skip("not on this machine")
    optimize(model)
    packed = {n: part for n, part in model.named_modules() if isinstance(part, OneDNNInt8Linear)}
    assert len(packed) == 3 * 4 + 1  # q, k and v are fused, and so are gate and up
    residual = {name for name, part in packed.items() if part.residual}
    assert residual == {"lm_head", *(f"layers.{i}.mlp.down_proj" for i in range(3))}


def test_a_packed_model_is_batch_invariant_in_the_engine():
    model = small(tie_word_embeddings=False)
    optimize(model)
    engine = Engine.of(model, EngineSettings(cache_tokens=1024, deterministic=True))
    prompts = [[5, 9, 13 + i] * (i + 1) for i in range(5)]
    greedy = Sampling(temperature=0, max_new_tokens=6)
    alone = []
    for prompt in prompts:
        alone.append(engine.add(prompt, greedy))
        while engine.is_busy:
            engine.step()
    together = [engine.add(prompt, greedy) for prompt in prompts]
    while engine.is_busy:
        engine.step()
    assert [r.output for r in together] == [r.output for r in alone]


def test_saving_a_packed_model_raises_an_error(tmp_path, only):
    model = small()
    only(TiledLinear)
    optimize(model)
    with pytest.raises(ValueError, match="save the model before it is optimized"):
        save(model, tmp_path)


@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
def test_loading_packs_layers_and_leaves_the_embedding_in_its_file(scheme, only, tmp_path):
    model = small()
    if scheme is None:
        only(TiledLinear)
    save(model, tmp_path)
    loaded = load_model(tmp_path, quantize=scheme, optimize=True)
    assert not any(weight.requires_grad for weight in loaded.parameters())
    if scheme is not None:
        quantize(model, scheme)
        save(model, tmp_path / "quantized")
    embeddings = model.embed(TOKENS)
    optimize(model)
    models = [loaded]
    if scheme is not None:
        models.append(load_model(tmp_path / "quantized", optimize=True))
    for loaded in models:
        embed: nn.Module = loaded.embed
        assert type(embed) is StoredEmbedding
        assert not [*embed.parameters(), *embed.buffers()]
        assert torch.equal(loaded.embed(TOKENS), embeddings)
        assert loaded.embed(TOKENS).dtype == embeddings.dtype
        assert leaf_types(loaded) == leaf_types(model)
        assert torch.equal(loaded(TOKENS), model(TOKENS))


def test_embedding_rows_from_the_file_have_the_requested_dtype(tmp_path):
    model = small()
    save(model, tmp_path)
    loaded = load_model(tmp_path, dtype=torch.float32, optimize=True)
    assert torch.equal(loaded.embed(TOKENS), model.embed(TOKENS).float())
    assert loaded.embed(TOKENS[:, :0]).shape == (2, 0, 64)
    assert loaded.embed(TOKENS[0, 3]).shape == (64,)


@pytest.mark.parametrize("layout", ["untied", "meta"])
def test_an_embedding_stays_in_memory_if_untied_or_in_the_meta_layout(layout, tmp_path):
    if layout == "meta":
        write_meta(small(), tmp_path)
        loaded = load_model(tmp_path, optimize=True)
    else:
        save(small(tie_word_embeddings=False), tmp_path)
        loaded = load_model(tmp_path, optimize=True)
    assert type(loaded.embed) is nn.Embedding
    assert loaded(TOKENS).isfinite().all()


def test_two_layers_of_a_kind_are_timed_once(monkeypatch):
    calls = []
    monkeypatch.setattr(
        autotune,
        "time_kernels",
        lambda layer, dtype: calls.append(layer) or [Timing(None, (1.0,) * 3)],
    )
    tuner = Autotuner()
    model = small()
    for name in ("lm_head", "layers.0.mlp.up_proj"):
        tuner.replace(model, name)
    assert len(calls) == 1
