"""The model against transformers' Llama: logits, loss, every gradient, long positions, bf16."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig as HubConfig
from transformers import LlamaForCausalLM

from llama32.attention import eager, fused
from llama32.checkpoint.layouts import name_map
from llama32.checkpoint.reader import read_model
from llama32.config import LLAMA3_ROPE_SCALING
from llama32.generate import generate
from llama32.model import Llama
from llama32.sampling_params import Sampling
from llama32.train.loop import next_token_loss
from tests.checkpoints import HUB_LLAMA3, HUB_PLAIN
from tests.closeness import assert_near

SHAPES = {
    "tied, one to one, llama3": {"rope_parameters": HUB_LLAMA3},
    "untied, one to one": {"rope_parameters": HUB_PLAIN, "tie_word_embeddings": False},
    "tied, three to one": {
        "rope_parameters": HUB_LLAMA3,
        "hidden_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "untied, eight to one": {
        "rope_parameters": HUB_LLAMA3,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
    },
    "head_dim of its own": {
        "rope_parameters": HUB_LLAMA3,
        "head_dim": 22,
        "num_key_value_heads": 2,
    },
}


def hub_model(seed: int = 0, **changes) -> LlamaForCausalLM:
    """Return a small random model of transformers, with weights large enough to show errors."""
    sizes = {
        "vocab_size": 131,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "initializer_range": 0.08,
        "attn_implementation": "eager",
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(HubConfig(**(sizes | changes)))
    for name, weight in model.named_parameters():
        if "norm" in name:  # ones would hide a missing norm
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model.eval()


def ours(theirs: LlamaForCausalLM, folder: Path) -> Llama:
    theirs.save_pretrained(folder)
    return read_model(folder)


@pytest.fixture(params=SHAPES.values(), ids=list(SHAPES))
def pair(request, tmp_path) -> tuple[LlamaForCausalLM, Llama]:
    theirs = hub_model(**request.param)
    return theirs, ours(theirs, tmp_path)


def test_logits_agree_with_transformers(pair):
    theirs, model = pair
    tokens = torch.randint(131, (2, 50))
    with torch.no_grad():
        expected = theirs(tokens).logits
        for attend in (eager, fused):
            assert_near(model(tokens, attend=attend), expected, within=2e-5)


FAR = {
    "around 8,192": torch.arange(8170, 8234),
    "around 20,000": torch.arange(20_000, 20_064),
    "up to 131,071": torch.arange(131_008, 131_072),
    "all over": torch.linspace(0, 131_071, 64).long(),  # distances that show the RoPE factor
}


@pytest.mark.parametrize("positions", FAR.values(), ids=list(FAR))
def test_logits_agree_at_long_positions(pair, positions):
    theirs, model = pair
    tokens = torch.randint(131, (1, 64))
    with torch.no_grad():
        expected = theirs(tokens, position_ids=positions[None]).logits
        assert_near(model(tokens, positions), expected, within=2e-5)


def test_another_rope_factor_changes_the_logits_at_long_positions(tmp_path):
    theirs = hub_model(rope_parameters=HUB_LLAMA3)
    other = replace(
        ours(theirs, tmp_path).config, rope_scaling=replace(LLAMA3_ROPE_SCALING, factor=8.0)
    )
    model = Llama(other)
    model.load_state_dict(read_model(tmp_path).state_dict())
    tokens = torch.randint(131, (1, 64))
    with torch.no_grad():
        expected = theirs(tokens, position_ids=FAR["all over"][None]).logits
        assert (model(tokens, FAR["all over"]) - expected).abs().max() > 1e-2


def test_the_loss_and_every_gradient_agree(pair):
    theirs, model = pair
    tokens = torch.randint(131, (2, 40))
    expected = theirs(tokens, labels=tokens).loss
    expected.backward()
    loss = next_token_loss(model, tokens)
    loss.backward()
    assert_near(loss, expected, within=1e-5)
    hub_names = name_map("hub", model.config.num_hidden_layers)
    gradients = {name: weight.grad for name, weight in theirs.named_parameters()}
    for name, weight in model.named_parameters():
        expected = gradients.pop(hub_names[name])
        torch.testing.assert_close(weight.grad, expected, atol=1e-4, rtol=1e-4)
    assert not gradients


def test_greedy_tokens_agree_over_200_steps(pair):
    theirs, model = pair
    prompt = torch.randint(131, (1, 7))
    expected = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=200,
        min_new_tokens=200,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    greedy = Sampling(temperature=0, max_new_tokens=200)
    ids = [token.id for token in generate(model, prompt[0].tolist(), greedy)]
    assert ids == expected[0, 7:].tolist()


def test_bf16_errs_at_most_twice_as_much_as_transformers_in_bf16(pair):
    theirs, model = pair
    tokens = torch.randint(131, (4, 50))
    with torch.no_grad():
        exact = theirs(tokens).logits
        theirs_off = (theirs.bfloat16()(tokens).logits.float() - exact).abs()
        ours_off = (model.bfloat16()(tokens).float() - exact).abs()
    assert ours_off.mean() <= 2 * theirs_off.mean()
    assert ours_off.max() <= 2 * theirs_off.max()
