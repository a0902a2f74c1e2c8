"""Which form a layer gets, and that the model stays the one it was."""

import pytest
import torch
from torch import nn

from llama32 import Engine, EngineSettings, Sampling, load_model
from llama32.adapt import optimize as module
from llama32.adapt.optimize import ROWS, Choice, Optimizer, Trial, cut, optimize
from llama32.adapt.packed import FBGEMMLinear, OneDNNLinear, PackedLinear, TiledLinear
from llama32.adapt.packed_int import CPUInt4Linear, OneDNNInt8Linear, WeightOnlyInt8Linear
from llama32.adapt.quantize import quantize
from llama32.adapt.quantized import Int4Linear, Int8Linear
from llama32.adapt.tied import StoredEmbedding
from llama32.model import Llama
from llama32.saving import save
from tests.checkpoints import random_model, tiny_config, write_meta

TOKENS = torch.arange(120).view(2, 60)


def small(**changes) -> Llama:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "vocab_size": 160}
    return random_model(tiny_config(**(sizes | changes)), dtype=torch.bfloat16)


def leaves(model: Llama) -> dict[str, type]:
    return {
        name: type(part)
        for name, part in model.named_modules()
        if not [*part.children()] and not name.startswith("embed")
    }


@pytest.fixture
def only(monkeypatch):
    """Leaves one form to choose, and makes it the fastest."""

    def leave(form: type[PackedLinear]) -> None:
        monkeypatch.setattr(module, "FORMS", (form,))
        monkeypatch.setattr(module, "time_of", lambda parts, x: float(type(parts[0]) is not form))

    return leave


def test_the_fastest_on_the_whole_is_taken():
    slow, fast = (2.0, 2.0, 2.0), (1.0, 1.0, 3.0)
    choice = Choice("Linear, bfloat16", [Trial(None, slow), Trial(OneDNNLinear, fast)])
    assert choice.best.form is OneDNNLinear
    assert str(choice) == (
        "Linear, bfloat16: oneDNN (2.0x at 1, 2.0x at 8, 0.7x at 128 rows), of 2 tried: as it is"
    )
    mixed = Choice("Linear, bfloat16", [Trial(None, slow), Trial(TiledLinear, (1.0, 1.0, 9.0))])
    assert mixed.best.form is None


@pytest.mark.parametrize("form", [OneDNNLinear, FBGEMMLinear, TiledLinear])
@pytest.mark.parametrize("tied", [True, False])
def test_every_linear_layer_is_replaced_and_logits_stay(form, tied, only):
    model = small(tie_word_embeddings=tied)
    if not form.fits(model.lm_head):
        pytest.skip("not on this machine")
    wide = model.float()(TOKENS)
    plain = model.bfloat16()(TOKENS).float()
    only(form)
    optimizer = optimize(model)
    kinds = set(leaves(model).values())
    assert form in kinds
    assert nn.Linear not in kinds
    packed = model(TOKENS).float()
    assert (packed - wide).norm() <= 2 * (plain - wide).norm()
    assert [*optimizer.choices] == ["Linear, bfloat16"]
    assert len(optimizer.choices["Linear, bfloat16"].trials) == 2
    assert not packed.requires_grad


def test_an_embedding_that_was_tied_keeps_its_rows_when_the_head_is_packed(only):
    model = small()
    weight = model.embed.weight
    only(TiledLinear)
    optimize(model)
    assert type(model.lm_head) is TiledLinear
    assert model.embed.weight is weight


def test_what_has_no_faster_form_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(module, "FORMS", ())
    model = small()
    before = leaves(model)
    assert str(optimize(model)) == "Linear, bfloat16: as it is"
    assert leaves(model) == before


def test_forms_are_tried_on_pieces_of_the_model_in_turns(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "TRIAL_ROWS", 40)
    monkeypatch.setattr(module, "FORMS", (TiledLinear,))
    monkeypatch.setattr(module, "time_of", lambda parts, x: seen.append((parts, x)) or 1.0)
    trials = module.try_all(small().lm_head, torch.bfloat16)
    assert [trial.form for trial in trials] == [None, TiledLinear]
    assert [len(x) for _, x in seen] == [n for n in ROWS for _ in range(module.TURNS * 2)]
    assert [type(parts[0]) for parts, _ in seen[:4]] == [nn.Linear, TiledLinear] * 2
    assert len(seen[0][0]) == 4


def test_a_layer_that_the_form_of_its_kind_does_not_fit_stays_as_it_is(only):
    model = quantize(small(intermediate_size=108), "int8")
    only(WeightOnlyInt8Linear)
    optimize(model)
    kinds = leaves(model)
    assert kinds["layers.0.attn.o_proj"] is WeightOnlyInt8Linear
    assert kinds["layers.0.mlp.down_proj"] is Int8Linear
    assert model(TOKENS).isfinite().all()


def test_layers_are_not_joined_to_what_their_form_does_not_fit(only):
    """Queries alone would be rows enough for int4; with keys and values they are some too many."""
    model = quantize(
        small(num_attention_heads=4, num_key_value_heads=2, head_dim=20, vocab_size=160), "int4"
    )
    model.set_submodule("layers.0.attn.v_proj", Int4Linear.of(torch.randn(20, 64)))
    only(CPUInt4Linear)
    Optimizer().replace(model, "layers.0.attn.q_proj")
    assert type(model.layers[0].attn.q_proj) is Int4Linear


def test_a_layer_is_cut_into_rows():
    for layer in (small().lm_head, Int8Linear.of(small().lm_head.weight)):
        x = torch.randn(3, 64).bfloat16()
        parts = [part(x) for part in cut(layer, 100)]
        assert [part.shape[-1] for part in parts] == [100, 60]
        torch.testing.assert_close(torch.cat(parts, -1), layer(x))


def test_a_layer_with_hooks_is_not_taken_away_from_under_them(only):
    model = small()
    only(TiledLinear)
    hook = model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj has hooks that would be lost"):
        optimize(model)
    hook.remove()
    optimize(model)


def test_what_is_optimized_already_stays():
    model = small()
    optimize(model)
    before = [*model.modules()]
    optimize(model)
    assert [*model.modules()] == before


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_layers_get_the_first_form_that_fits_and_no_race_decides(scheme, monkeypatch):
    monkeypatch.setattr(module, "time_of", None)
    model = quantize(small(), scheme)
    plain = model(TOKENS).float()
    optimizer = optimize(model)
    kinds = {"int8": {"Int8Linear, int8"}, "int4": {"Int8Linear, int8", "Int4Linear, uint8"}}
    assert optimizer.choices.keys() == kinds[scheme]
    assert not {Int8Linear, Int4Linear} & set(leaves(model).values())
    assert (model(TOKENS).float() - plain).norm() < 0.1 * plain.norm()


def test_down_projections_and_the_head_are_rounded_finely(only):
    model = quantize(small(tie_word_embeddings=False), "int8")
    if not OneDNNInt8Linear.fits(model.lm_head):
        pytest.skip("not on this machine")
    optimize(model)
    packed = {n: part for n, part in model.named_modules() if isinstance(part, OneDNNInt8Linear)}
    assert len(packed) == 3 * 4 + 1  # queries, keys and values are one, and so are gate and up
    fine = {name for name, part in packed.items() if part.fine}
    assert fine == {"lm_head", *(f"layers.{i}.mlp.down_proj" for i in range(3))}


def test_a_packed_model_runs_in_the_engine_as_it_does_alone():
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


def test_a_packed_model_cannot_be_saved_and_says_why(tmp_path, only):
    model = small()
    only(TiledLinear)
    optimize(model)
    with pytest.raises(ValueError, match="save it before it is optimized"):
        save(model, tmp_path)


@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
def test_an_optimizer_packs_while_loading_and_leaves_the_embedding_in_its_file(
    scheme, only, tmp_path
):
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
    files = [loaded]
    if scheme is not None:
        files.append(load_model(tmp_path / "quantized", optimize=True))
    for loaded in files:
        embed: nn.Module = loaded.embed
        assert type(embed) is StoredEmbedding
        assert not [*embed.parameters(), *embed.buffers()]
        assert torch.equal(loaded.embed(TOKENS), embeddings)
        assert loaded.embed(TOKENS).dtype == embeddings.dtype
        assert leaves(loaded) == leaves(model)
        assert torch.equal(loaded(TOKENS), model(TOKENS))


def test_stored_rows_come_in_the_dtype_that_was_asked_for(tmp_path):
    model = small()
    save(model, tmp_path)
    loaded = load_model(tmp_path, dtype=torch.float32, optimize=True)
    assert torch.equal(loaded.embed(TOKENS), model.embed(TOKENS).float())
    assert loaded.embed(TOKENS[:, :0]).shape == (2, 0, 64)
    assert loaded.embed(TOKENS[0, 3]).shape == (64,)


@pytest.mark.parametrize("layout", ["untied", "meta"])
def test_an_embedding_stays_in_memory_where_it_is_not_tied_or_no_row_of_a_file(layout, tmp_path):
    if layout == "meta":
        write_meta(small(), tmp_path)
        loaded = load_model(tmp_path, optimize=True)
    else:
        save(small(tie_word_embeddings=False), tmp_path)
        loaded = load_model(tmp_path, optimize=True)
    assert type(loaded.embed) is nn.Embedding
    assert loaded(TOKENS).isfinite().all()


def test_two_optimizers_of_one_kind_choose_once(monkeypatch):
    calls = []
    monkeypatch.setattr(
        module, "try_all", lambda layer, dtype: calls.append(layer) or [Trial(None, (1.0,) * 3)]
    )
    optimizer = Optimizer()
    model = small()
    for name in ("lm_head", "layers.0.mlp.up_proj"):
        optimizer.replace(model, name)
    assert len(calls) == 1
