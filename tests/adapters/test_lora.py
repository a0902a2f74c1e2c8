"""Adapters: fresh, attached, merged and detached; and files shared with PEFT."""

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llama32 import (
    Engine,
    Llama,
    Sampling,
    add_lora,
    attach_lora,
    load_lora,
    load_model,
    merge_lora,
    quantize,
    remove_lora,
    save,
    save_lora,
    unmerge_lora,
    using_lora,
)
from llama32.adapters.lora import ALL_LINEAR, LoRA
from tests.checkpoints import random_model, tiny_config
from tests.closeness import assert_near


@pytest.fixture
def model() -> Llama:
    return random_model(tiny_config(head_dim=8))  # 6 heads of 8, as transformers derives


@pytest.fixture
def tokens(model) -> torch.Tensor:
    return torch.randint(
        model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1)
    )


def trained(lora: LoRA, seed: int = 0) -> LoRA:
    """Fill every B with noise, as if after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, weights in lora.items():
            weights.b.normal_(std=0.3, generator=generator)
    return lora


def train(model: Llama, lora: LoRA, tokens: torch.Tensor, lr: float) -> list[float]:
    """Train for 30 steps and return the losses."""
    optimizer = torch.optim.AdamW(lora.parameters(), lr=lr)
    losses = []
    for _ in range(30):
        logits = model(tokens[:, :-1]).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def test_a_fresh_adapter_changes_no_bit(model, tokens):
    plain = model(tokens)
    add_lora(model, ALL_LINEAR, rank=4)
    assert torch.equal(model(tokens), plain)


def test_only_the_adapter_is_trained(model, tokens):
    lora = add_lora(model, ("q_proj", "down_proj"), rank=4)
    assert {p for p in model.parameters() if p.requires_grad} == {*lora.parameters()}
    assert len([*lora.parameters()]) == 2 * 2 * 3
    before = {name: x.clone() for name, x in model.state_dict().items() if ".lora." not in name}
    losses = train(model, lora, tokens, 0.05)
    assert losses[-1] < losses[0] / 2
    after = model.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())


def test_an_adapter_is_attached_and_detached(model, tokens):
    plain = model(tokens)
    lora = trained(add_lora(model))
    adapted = model(tokens)
    assert not torch.allclose(adapted, plain)
    remove_lora(model, lora)
    assert torch.equal(model(tokens), plain)
    assert not [name for name, _ in model.named_modules() if ".lora" in name]
    with using_lora(model, lora):
        assert torch.equal(model(tokens), adapted)
    assert torch.equal(model(tokens), plain)
    with pytest.raises(ZeroDivisionError), using_lora(model, lora):
        raise ZeroDivisionError
    assert torch.equal(model(tokens), plain)


def test_several_adapters_are_selected_per_call_or_add_up(model, tokens):
    one, two = (trained(add_lora(model, rank=r), seed=r) for r in (2, 5))
    both = model(tokens)
    remove_lora(model, one)
    with_two = model(tokens)
    remove_lora(model, two)
    with using_lora(model, two):
        assert torch.equal(model(tokens), with_two)
    with using_lora(model, one):
        with_one = model(tokens)
        with using_lora(model, two):
            assert torch.equal(model(tokens), both)
    assert not torch.allclose(with_one, with_two)


def test_a_merged_adapter_computes_the_same_and_unmerges_to_the_last_bit(model, tokens, tmp_path):
    plain = model(tokens)
    lora = trained(add_lora(model, ALL_LINEAR, rank=4))
    adapted = model(tokens)
    merge_lora(model, lora)
    assert_near(model(tokens), adapted, within=2e-5)
    save(model, tmp_path)
    assert torch.equal(load_model(tmp_path)(tokens), model(tokens))
    unmerge_lora(model, lora)
    assert torch.equal(model(tokens), adapted)
    remove_lora(model, lora)
    assert torch.equal(model(tokens), plain)
    merge_lora(model, lora)  # also if not attached
    assert_near(model(tokens), adapted, within=2e-5)
    unmerge_lora(model, lora)
    assert torch.equal(model(tokens), plain)


def test_a_merged_layer_can_be_adapted_and_quantized(model, tokens):
    merge_lora(model, trained(add_lora(model, ALL_LINEAR, rank=4)))
    again = add_lora(model, ALL_LINEAR, rank=2)
    remove_lora(model, again)
    quantize(model, "int8")
    assert not [name for name, part in model.named_modules() if type(part) is torch.nn.Linear]
    model(tokens)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_an_adapter_is_trained_on_quantized_weights(scheme):
    """QLoRA, Dettmers et al. 2023."""
    model = quantize(random_model(tiny_config(hidden_size=64, intermediate_size=128)), scheme)
    tokens = torch.randint(160, (2, 9), generator=torch.Generator().manual_seed(1))
    plain = model(tokens)
    lora = add_lora(model, ALL_LINEAR, rank=4)
    assert torch.equal(model(tokens), plain)
    losses = train(model, lora, tokens, 0.02)
    assert losses[-1] < losses[0] / 2
    with pytest.raises(ValueError, match="allowed: floating-point weights"):
        merge_lora(model, lora)


def test_the_engine_drops_cached_prefixes_when_the_adapter_changes(model):
    prompt = [5 + i % 90 for i in range(140)]
    engine = Engine.of(model)
    sampling = Sampling(temperature=0, max_new_tokens=6, ignore_eos=True)

    def run() -> tuple[list[int], int]:
        request = engine.add(prompt, sampling)
        while engine.is_busy:
            engine.step()
        return request.output, request.num_cached

    plain, _ = run()
    assert run() == (plain, 128)
    lora = trained(add_lora(model, ALL_LINEAR, rank=4))
    adapted, cached = run()
    assert (adapted != plain, cached) == (True, 0)
    assert run() == (adapted, 128)
    remove_lora(model, lora)
    assert run() == (plain, 0)


def hub_model(model: Llama, folder: Path) -> Any:
    save(model, folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def test_peft_reads_our_files(model, tokens, tmp_path):
    peer = hub_model(model, tmp_path / "base")
    lora = trained(add_lora(model, ALL_LINEAR, rank=4, alpha=6.0))
    save_lora(lora, tmp_path / "adapter", base_model="someone/base")
    with warnings.catch_warnings(action="ignore"):  # PEFT warns about transformers
        adapted = peft.PeftModel.from_pretrained(peer, tmp_path / "adapter")
    with torch.no_grad():
        assert_near(adapted(tokens).logits, model(tokens), within=2e-5)
    again = load_lora(tmp_path / "adapter")
    expected = model(tokens)
    remove_lora(model, lora)
    with using_lora(model, again):
        assert torch.equal(model(tokens), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 5}},
        {"target_modules": ["lm_head", "o_proj"]},
    ],
    ids=["plain", "rslora", "patterns", "head"],
)
def test_files_of_peft_are_read(model, tokens, tmp_path, changes):
    peer = hub_model(model, tmp_path / "base")
    settings = {
        "r": 4,
        "lora_alpha": 9,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        **changes,
    }
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    with warnings.catch_warnings(action="ignore"):  # PEFT warns about tied heads
        adapted = peft.get_peft_model(peer, config)
        adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with using_lora(model, load_lora(tmp_path / "adapter")), torch.no_grad():
        assert_near(model(tokens), adapted(tokens).logits, within=2e-5)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
    ],
)
def test_an_error_names_the_field_of_a_lora_variant(model, tmp_path, changes, match):
    save_lora(add_lora(model), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=match):
        load_lora(tmp_path)


def test_an_error_names_the_damaged_part(model, tmp_path):
    save_lora(add_lora(model), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(iter(tensors))
    save_file({name: x for name, x in tensors.items() if name != first}, file)
    with pytest.raises(ValueError, match="needs lora_A and lora_B of the same rank"):
        load_lora(tmp_path)
    save_file(
        {**tensors, "base_model.model.model.vision.lora_A.weight": tensors[first].clone()}, file
    )
    with pytest.raises(ValueError, match="vision"):
        load_lora(tmp_path)
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="adapter_model"):
        load_lora(tmp_path)


def test_a_wrong_size_or_target_raises_an_error_and_changes_nothing(model, tokens):
    plain = model(tokens)
    other = add_lora(random_model(tiny_config()), rank=2)
    with pytest.raises(
        ValueError, match=r"layers\.0\.attn\.q_proj is \(60, 48\) in the adapter, \(48, 48\)"
    ):
        attach_lora(model, other)
    for targets, rank in ((("cat_proj",), 4), ((), 4), (("q_proj",), 0)):
        with pytest.raises(ValueError, match="add_lora"):
            add_lora(model, targets, rank)
    lora = add_lora(model)
    remove_lora(model, lora)
    for undo in (remove_lora, unmerge_lora):
        with pytest.raises(ValueError, match="adapter"):
            undo(model, lora)
    assert torch.equal(model(tokens), plain)
