"""Looking inside and changing it: every name means the tensor that the table says."""

import re

import pytest
import torch
from torch.nn import functional as F

from llama32 import Engine, Sampling, capture, edit, fused, mix, pattern
from llama32.adapt import trace
from llama32.model import Llama
from llama32.rope import rotate, rotation
from tests.checkpoints import random_model, tiny_config


@pytest.fixture(scope="module")
def model() -> Llama:
    return random_model(tiny_config(num_hidden_layers=3))


@pytest.fixture
def tokens(model) -> torch.Tensor:
    return torch.randint(
        model.config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(1)
    )


def num_hooks(model: Llama) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b)


def test_every_name_is_the_tensor_that_the_table_says(model, tokens):
    """By going through a layer by hand."""
    with capture(
        model, "embed", "norm", "logits", "layers.*", "layers.*.*", "layers.*.*.*"
    ) as seen:
        logits = model(tokens)
    assert equal(seen["embed"], model.embed(tokens))
    assert equal(seen["embed"], seen["layers.0.pre"])
    by = rotation(torch.arange(7), model.rotary_speeds)
    for i, layer in enumerate(model.layers):
        at = f"layers.{i}"
        x = seen[f"{at}.pre"]
        normed = layer.attn_norm(x)
        assert equal(seen[f"{at}.attn_norm"], normed)
        q, k, v = (
            project(normed).unflatten(-1, (-1, model.config.head_dim))
            for project in (layer.attn.q_proj, layer.attn.k_proj, layer.attn.v_proj)
        )
        assert equal(seen[f"{at}.attn.q"], rotate(q, by))
        assert equal(seen[f"{at}.attn.k"], rotate(k, by))
        assert equal(seen[f"{at}.attn.v"], v)
        heads = fused(rotate(q, by), rotate(k, by), v)
        assert equal(seen[f"{at}.attn.heads"], heads)
        assert equal(seen[f"{at}.attn"], layer.attn.o_proj(heads.flatten(-2)))
        assert equal(seen[f"{at}.mid"], x + seen[f"{at}.attn"])
        assert equal(seen[f"{at}.mlp_norm"], layer.mlp_norm(seen[f"{at}.mid"]))
        gate, up = seen[f"{at}.mlp.gate_proj"], seen[f"{at}.mlp.up_proj"]
        assert equal(seen[f"{at}.mlp"], layer.mlp.down_proj(F.silu(gate) * up))
        assert equal(seen[at], seen[f"{at}.mid"] + seen[f"{at}.mlp"])
    assert equal(seen["norm"], model.norm(seen["layers.2"]))
    assert equal(seen["logits"], logits)


def test_the_table_has_only_names_that_there_are(model):
    """Each row, for the first layer."""
    rows = re.findall(r"^\| (`.*?) \|", trace.__doc__ or "", re.M)
    assert len(rows) == 13
    for row in rows:
        first, *more = re.findall(r"`(.*?)`", row)
        first = first.replace(".i", ".0")
        stem = first.rpartition(".")[0]
        for name in (first, *(f"{stem}{one}" for one in more)):
            assert name in trace.places(model), name


def test_a_pattern_follows_from_what_was_captured(model, tokens):
    seen_by_mine = []

    def mine(q, k, v):
        seen_by_mine.append(p := pattern(q, k))
        return mix(p, v)

    with capture(model, "layers.*.attn.*") as seen:
        model(tokens, attend=mine)
    for i, p in enumerate(seen_by_mine):
        assert equal(p, pattern(seen[f"layers.{i}.attn.q"], seen[f"layers.{i}.attn.k"]))


def test_a_star_is_one_part_of_a_name(model):
    assert [*trace.matching(model, "layers.*")] == ["layers.0", "layers.1", "layers.2"]
    assert [*trace.matching(model, "layers.*.mlp")] == [f"layers.{i}.mlp" for i in range(3)]
    assert "layers.1.attn.heads" in trace.matching(model, "layers.*.attn.*")


@pytest.mark.parametrize("use", [capture, lambda m, name: edit(m, name, lambda x: x)])
def test_a_name_that_means_nothing_is_refused_with_its_neighbours(model, use):
    with (
        pytest.raises(ValueError, match=r"near to it: .*layers\.0\.mlp"),
        use(model, "layer.0.mlp"),
    ):
        pass
    assert num_hooks(model) == 0


def test_before_the_model_ran_there_is_nothing_to_see(model, tokens):
    with capture(model, "embed") as seen:
        with pytest.raises(KeyError, match="has not run"):
            seen["embed"]
        model(tokens)
        model(tokens[:, :3])
    assert [x.shape[1] for x in seen.passes["embed"]] == [7, 3]
    assert seen["embed"].shape[1] == 3
    model(tokens)
    assert len(seen.passes["embed"]) == 2  # after the block nobody listens


def test_what_is_captured_carries_gradients(model, tokens):
    with capture(model, "layers.1") as seen:
        loss = model(tokens).sum()
    (grad,) = torch.autograd.grad(loss, seen["layers.1"])
    assert grad.shape == seen["layers.1"].shape
    assert grad.any()


@pytest.mark.parametrize(
    "name", ["embed", "layers.1", "layers.1.pre", "layers.1.mlp", "layers.*.attn", "norm", "logits",
             "layers.0.attn.q", "layers.0.attn.k", "layers.2.attn.v", "layers.1.attn.heads"]
)  # fmt: skip
def test_an_edit_is_seen_by_all_that_comes_after_and_gone_after_the_block(model, tokens, name):
    plain = model(tokens)
    with edit(model, name, lambda x: x * 0.5):
        changed = model(tokens)
    assert not torch.allclose(changed, plain)
    assert equal(model(tokens), plain)
    assert num_hooks(model) == 0
    with edit(model, name, lambda x: x):
        assert equal(model(tokens), plain)


@pytest.mark.parametrize("name", ["layers.1.mlp", "layers.1.pre", "layers.1.attn.v"])
@pytest.mark.parametrize("capture_first", [False, True])
def test_what_is_edited_is_captured_as_edited(model, tokens, name, capture_first):
    with capture(model, name) as seen:
        model(tokens)
    halved = seen[name] * 0.5

    def halve():
        return edit(model, name, lambda x: x * 0.5)

    if capture_first:
        with capture(model, name) as seen, halve():
            model(tokens)
    else:
        with halve(), capture(model, name) as seen:
            model(tokens)
    assert equal(seen[name], halved)


def test_hooks_are_gone_after_an_error(model, tokens):
    def fail(x):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), capture(model, "layers.*.*"), edit(model, "norm", fail):
        model(tokens)
    assert num_hooks(model) == 0


@pytest.mark.parametrize(
    ("change", "got"), [(lambda x: None, "NoneType"), (lambda x: x[:1], r"\(1,")]
)
def test_an_edit_that_gives_something_else_is_refused(model, tokens, change, got):
    refused = pytest.raises(ValueError, match=f"edit of layers.1: .*got {got}")
    with refused, edit(model, "layers.1", change):
        model(tokens)


def test_the_middle_of_a_layer_can_be_seen_but_not_edited(model):
    refused = pytest.raises(ValueError, match=r"edit layers\.0\.attn instead")
    with refused, edit(model, "layers.0.mid", lambda x: x):
        pass


def test_packed_and_cached_passes_are_seen_and_edited_too(model):
    """Through the engine: the prompt, then each token."""
    prompt = [5, 7, 11, 13, 17]
    engine = Engine.of(model)

    def run() -> list[int]:
        request = engine.add(prompt, Sampling(temperature=0, max_new_tokens=4, ignore_eos=True))
        while engine.is_busy:
            engine.step()
        return request.output

    with capture(model, "layers.2", "layers.0.attn.heads") as seen:
        output = run()
    rows = torch.cat([x for x in seen.passes["layers.2"]])
    with capture(model, "layers.2") as whole:
        model(torch.tensor([prompt + output[:-1]]))
    assert torch.allclose(rows[:8], whole["layers.2"][0], atol=1e-4)
    assert seen["layers.0.attn.heads"].shape[1:] == (
        model.config.num_attention_heads,
        model.config.head_dim,
    )
    with edit(model, "layers.1", lambda x: -x):
        edited = run()
        expected = []
        for _ in range(4):
            expected.append(int(model(torch.tensor([prompt + expected]))[0, -1].argmax()))
    assert edited == expected != output
    assert run() == output
