"""Capture and edit: every name in the table means the tensor described there."""

import re

import pytest
import torch
from torch.nn import functional as F

from llama32 import Engine, Sampling, capture, edit, fused, mix, pattern
from llama32.interp import hooks
from llama32.model import Llama
from llama32.rope import apply_rotary, rotary_cos_sin
from tests.checkpoints import random_model, tiny_config
from tests.closeness import assert_near


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


def test_every_name_is_the_tensor_in_the_table(model, tokens):
    """Compute every layer by hand and compare."""
    with capture(
        model, "embed", "norm", "logits", "layers.*", "layers.*.*", "layers.*.*.*"
    ) as seen:
        logits = model(tokens)
    assert torch.equal(seen["embed"], model.embed(tokens))
    assert torch.equal(seen["embed"], seen["layers.0.pre"])
    cos_sin = rotary_cos_sin(torch.arange(7), model.inv_freq)
    for i, layer in enumerate(model.layers):
        prefix = f"layers.{i}"
        x = seen[f"{prefix}.pre"]
        normed = layer.attn_norm(x)
        assert torch.equal(seen[f"{prefix}.attn_norm"], normed)
        q, k, v = (
            project(normed).unflatten(-1, (-1, model.config.head_dim))
            for project in (layer.attn.q_proj, layer.attn.k_proj, layer.attn.v_proj)
        )
        assert torch.equal(seen[f"{prefix}.attn.q"], apply_rotary(q, cos_sin))
        assert torch.equal(seen[f"{prefix}.attn.k"], apply_rotary(k, cos_sin))
        assert torch.equal(seen[f"{prefix}.attn.v"], v)
        heads = fused(apply_rotary(q, cos_sin), apply_rotary(k, cos_sin), v)
        assert torch.equal(seen[f"{prefix}.attn.heads"], heads)
        assert torch.equal(seen[f"{prefix}.attn"], layer.attn.o_proj(heads.flatten(-2)))
        assert torch.equal(seen[f"{prefix}.mid"], x + seen[f"{prefix}.attn"])
        assert torch.equal(seen[f"{prefix}.mlp_norm"], layer.mlp_norm(seen[f"{prefix}.mid"]))
        gate, up = seen[f"{prefix}.mlp.gate_proj"], seen[f"{prefix}.mlp.up_proj"]
        assert torch.equal(seen[f"{prefix}.mlp"], layer.mlp.down_proj(F.silu(gate) * up))
        assert torch.equal(seen[prefix], seen[f"{prefix}.mid"] + seen[f"{prefix}.mlp"])
    assert torch.equal(seen["norm"], model.norm(seen["layers.2"]))
    assert torch.equal(seen["logits"], logits)


def test_every_name_in_the_table_exists(model):
    """Check each row for the first layer."""
    rows = re.findall(r"^\| (`.*?) \|", hooks.__doc__ or "", re.M)
    assert len(rows) == 13
    for row in rows:
        first, *suffixes = re.findall(r"`(.*?)`", row)
        first = first.replace(".i", ".0")
        stem = first.rpartition(".")[0]
        for name in (first, *(f"{stem}{suffix}" for suffix in suffixes)):
            assert name in hooks.hook_points(model), name


def test_a_pattern_follows_from_captured_queries_and_keys(model, tokens):
    patterns = []

    def recording(q, k, v):
        patterns.append(p := pattern(q, k))
        return mix(p, v)

    with capture(model, "layers.*.attn.*") as seen:
        model(tokens, attend=recording)
    for i, p in enumerate(patterns):
        assert torch.equal(p, pattern(seen[f"layers.{i}.attn.q"], seen[f"layers.{i}.attn.k"]))


def test_a_star_matches_one_part_of_a_name(model):
    assert [*hooks.matching(model, "layers.*")] == ["layers.0", "layers.1", "layers.2"]
    assert [*hooks.matching(model, "layers.*.mlp")] == [f"layers.{i}.mlp" for i in range(3)]
    assert "layers.1.attn.heads" in hooks.matching(model, "layers.*.attn.*")


@pytest.mark.parametrize("use", [capture, lambda m, name: edit(m, name, lambda x: x)])
def test_an_unknown_name_is_refused_with_similar_names(model, use):
    with (
        pytest.raises(ValueError, match=r"similar names: .*layers\.0\.mlp"),
        use(model, "layer.0.mlp"),
    ):
        pass
    assert num_hooks(model) == 0


def test_activations_before_the_first_forward_pass_raise(model, tokens):
    with capture(model, "embed") as seen:
        with pytest.raises(KeyError, match="has not run"):
            seen["embed"]
        model(tokens)
        model(tokens[:, :3])
    assert [x.shape[1] for x in seen.passes["embed"]] == [7, 3]
    assert seen["embed"].shape[1] == 3
    model(tokens)
    assert len(seen.passes["embed"]) == 2  # no capture after the block


def test_captured_tensors_carry_gradients(model, tokens):
    with capture(model, "layers.1") as seen:
        loss = model(tokens).sum()
    (grad,) = torch.autograd.grad(loss, seen["layers.1"])
    assert grad.shape == seen["layers.1"].shape
    assert grad.any()


@pytest.mark.parametrize(
    "name", ["embed", "layers.1", "layers.1.pre", "layers.1.mlp", "layers.*.attn", "norm", "logits",
             "layers.0.attn.q", "layers.0.attn.k", "layers.2.attn.v", "layers.1.attn.heads"]
)  # fmt: skip
def test_an_edit_changes_the_logits_and_ends_with_the_block(model, tokens, name):
    plain = model(tokens)
    with edit(model, name, lambda x: x * 0.5):
        changed = model(tokens)
    assert not torch.allclose(changed, plain)
    assert torch.equal(model(tokens), plain)
    assert num_hooks(model) == 0
    with edit(model, name, lambda x: x):
        assert torch.equal(model(tokens), plain)


@pytest.mark.parametrize("name", ["layers.1.mlp", "layers.1.pre", "layers.1.attn.v"])
@pytest.mark.parametrize("capture_first", [False, True])
def test_an_edited_tensor_is_captured_as_edited(model, tokens, name, capture_first):
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
    assert torch.equal(seen[name], halved)


def test_hooks_are_removed_after_an_error(model, tokens):
    def fail(x):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), capture(model, "layers.*.*"), edit(model, "norm", fail):
        model(tokens)
    assert num_hooks(model) == 0


@pytest.mark.parametrize(
    ("change", "got"), [(lambda x: None, "NoneType"), (lambda x: x[:1], r"\(1,")]
)
def test_an_edit_with_another_shape_or_type_is_refused(model, tokens, change, got):
    refused = pytest.raises(ValueError, match=f"edit of layers.1: .*got {got}")
    with refused, edit(model, "layers.1", change):
        model(tokens)


def test_mid_can_be_captured_but_not_edited(model):
    refused = pytest.raises(ValueError, match=r"edit layers\.0\.attn instead")
    with refused, edit(model, "layers.0.mid", lambda x: x):
        pass


def test_forward_passes_of_the_engine_are_captured_and_edited(model):
    """Capture the prefill of a prompt, then the decode of each token."""
    prompt = [5, 7, 11, 13, 17]
    engine = Engine.of(model)

    def run() -> list[int]:
        request = engine.add(prompt, Sampling(temperature=0, max_new_tokens=4, ignore_eos=True))
        while engine.is_busy:
            engine.step()
        return request.output

    with capture(model, "layers.2", "layers.0.attn.heads") as seen:
        output = run()
    rows = torch.cat(seen.passes["layers.2"])
    with capture(model, "layers.2") as whole:
        model(torch.tensor([prompt + output[:-1]]))
    assert_near(rows[:8], whole["layers.2"][0], within=2e-5)
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
