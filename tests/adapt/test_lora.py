"""Adapters: a fresh one is the base, a merged one the adapted, and PEFT has the same files."""

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
    load_lora,
    load_model,
    merge_lora,
    put_lora,
    quantize,
    remove_lora,
    save,
    save_lora,
    unmerge_lora,
    using_lora,
)
from llama32.adapt.lora import LINEARS, LoRA
from tests.checkpoints import random_model, tiny_config


@pytest.fixture
def model() -> Llama:
    return random_model(tiny_config(head_dim=8))  # 6 heads of 8: as transformers sizes them, too


@pytest.fixture
def tokens(model) -> torch.Tensor:
    return torch.randint(
        model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1)
    )


def trained(lora: LoRA, seed: int = 0) -> LoRA:
    """As after some training: no B is zero any more."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, pair in lora.items():
            pair.b.normal_(std=0.3, generator=draw)
    return lora


def train(model: Llama, lora: LoRA, tokens: torch.Tensor, lr: float) -> list[float]:
    """A few steps; the losses."""
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


def test_a_fresh_adapter_is_the_base_to_the_last_bit(model, tokens):
    plain = model(tokens)
    add_lora(model, LINEARS, rank=4)
    assert torch.equal(model(tokens), plain)


def test_only_the_adapter_is_trained(model, tokens):
    lora = add_lora(model, ("q_proj", "down_proj"), rank=4)
    assert {p for p in model.parameters() if p.requires_grad} == {*lora.parameters()}
    assert len([*lora.parameters()]) == 2 * 2 * 3
    before = {name: x.clone() for name, x in model.state_dict().items() if "pair" not in name}
    losses = train(model, lora, tokens, 0.05)
    assert losses[-1] < losses[0] / 2
    after = model.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())


def test_an_adapter_comes_and_goes(model, tokens):
    plain = model(tokens)
    lora = trained(add_lora(model))
    adapted = model(tokens)
    assert not torch.allclose(adapted, plain)
    remove_lora(model, lora)
    assert torch.equal(model(tokens), plain)
    assert not [name for name, _ in model.named_modules() if "pair" in name]
    with using_lora(model, lora):
        assert torch.equal(model(tokens), adapted)
    assert torch.equal(model(tokens), plain)
    with pytest.raises(ZeroDivisionError), using_lora(model, lora):
        raise ZeroDivisionError
    assert torch.equal(model(tokens), plain)


def test_several_are_chosen_per_call_or_add_up(model, tokens):
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


def test_a_merged_adapter_is_the_adapted_model_and_is_taken_back_exactly(model, tokens, tmp_path):
    plain = model(tokens)
    lora = trained(add_lora(model, LINEARS, rank=4))
    adapted = model(tokens)
    merge_lora(model, lora)
    assert torch.allclose(model(tokens), adapted, atol=1e-4)
    save(model, tmp_path)
    assert torch.equal(load_model(tmp_path)(tokens), model(tokens))
    unmerge_lora(model, lora)
    assert torch.equal(model(tokens), adapted)
    remove_lora(model, lora)
    assert torch.equal(model(tokens), plain)
    merge_lora(model, lora)  # also from beside the model
    assert torch.allclose(model(tokens), adapted, atol=1e-4)
    unmerge_lora(model, lora)
    assert torch.equal(model(tokens), plain)


def test_a_merged_layer_is_like_any_other(model, tokens):
    merge_lora(model, trained(add_lora(model, LINEARS, rank=4)))
    again = add_lora(model, LINEARS, rank=2)
    remove_lora(model, again)
    quantize(model, "int8")
    assert not [name for name, part in model.named_modules() if type(part) is torch.nn.Linear]
    model(tokens)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_weights_in_few_bits_carry_an_adapter(scheme):
    """QLoRA, Dettmers et al. 2023."""
    model = quantize(random_model(tiny_config(hidden_size=64, intermediate_size=128)), scheme)
    tokens = torch.randint(160, (2, 9), generator=torch.Generator().manual_seed(1))
    plain = model(tokens)
    lora = add_lora(model, LINEARS, rank=4)
    assert torch.equal(model(tokens), plain)
    losses = train(model, lora, tokens, 0.02)
    assert losses[-1] < losses[0] / 2
    with pytest.raises(ValueError, match="not in floats"):
        merge_lora(model, lora)


def test_the_engine_notices_another_adapter(model):
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
    lora = trained(add_lora(model, LINEARS, rank=4))
    adapted, cached = run()
    assert (adapted != plain, cached) == (True, 0)
    assert run() == (adapted, 128)
    remove_lora(model, lora)
    assert run() == (plain, 0)


def hub_model(model: Llama, folder: Path) -> Any:
    save(model, folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def test_peft_reads_ours(model, tokens, tmp_path):
    theirs = hub_model(model, tmp_path / "base")
    lora = trained(add_lora(model, LINEARS, rank=4, alpha=6.0))
    save_lora(lora, tmp_path / "adapter", base_model="someone/base")
    with warnings.catch_warnings(action="ignore"):  # PEFT's own, of transformers
        adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.allclose(adapted(tokens).logits, model(tokens), atol=1e-4)
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
def test_we_read_peft_s(model, tokens, tmp_path, changes):
    theirs = hub_model(model, tmp_path / "base")
    given = {"r": 4, "lora_alpha": 9, "target_modules": ["q_proj", "v_proj", "up_proj"], **changes}
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **given)
    with warnings.catch_warnings(action="ignore"):  # of tied heads
        adapted = peft.get_peft_model(theirs, config)
        adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with using_lora(model, load_lora(tmp_path / "adapter")), torch.no_grad():
        assert torch.allclose(model(tokens), adapted(tokens).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(model, tmp_path, changes, match):
    save_lora(add_lora(model), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=match):
        load_lora(tmp_path)


def test_broken_files_are_refused_by_name(model, tmp_path):
    save_lora(add_lora(model), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(iter(tensors))
    save_file({name: x for name, x in tensors.items() if name != first}, file)
    with pytest.raises(ValueError, match="do not belong together"):
        load_lora(tmp_path)
    save_file(
        {**tensors, "base_model.model.model.vision.lora_A.weight": tensors[first].clone()}, file
    )
    with pytest.raises(ValueError, match="vision"):
        load_lora(tmp_path)
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="adapter_model"):
        load_lora(tmp_path)


def test_what_does_not_fit_is_refused_and_nothing_changes(model, tokens):
    plain = model(tokens)
    other = add_lora(random_model(tiny_config()), rank=2)
    with pytest.raises(
        ValueError, match=r"layers\.0\.attn\.q_proj is \(60, 48\) in it, \(48, 48\)"
    ):
        put_lora(model, other)
    for targets, rank in ((("cat_proj",), 4), ((), 4), (("q_proj",), 0)):
        with pytest.raises(ValueError, match="add_lora"):
            add_lora(model, targets, rank)
    lora = add_lora(model)
    remove_lora(model, lora)
    for undo in (remove_lora, unmerge_lora):
        with pytest.raises(ValueError, match="adapter"):
            undo(model, lora)
    assert torch.equal(model(tokens), plain)
