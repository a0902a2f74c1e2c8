import math

import pytest
import torch
from transformers import LlamaConfig as HubConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llama32.rope import rotary_speeds, rotate, rotation
from tests.checkpoints import HUB_LLAMA3, random_model, tiny_config


def test_the_bent_speeds_are_bit_for_bit_those_of_transformers():
    config = tiny_config(head_dim=64)
    hub = HubConfig(hidden_size=64, num_attention_heads=1, rope_parameters=HUB_LLAMA3)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](hub, torch.device("cpu"))
    assert torch.equal(rotary_speeds(config), expected)


def test_the_bend_leaves_fast_pairs_alone_and_divides_slow_ones_by_the_factor():
    bent, plain = (
        rotary_speeds(tiny_config(head_dim=64, rope_theta=500000.0, **change))
        for change in ({}, {"rope_scaling": None})
    )
    turns = 8192 * plain / (2 * math.pi)
    assert torch.equal(bent[turns > 4], plain[turns > 4])
    assert torch.equal(bent[turns < 1], plain[turns < 1] / 32)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert ((bent < plain) & (bent > plain / 32))[between].all()
    assert (bent.diff() < 0).all()


def test_products_depend_on_the_distance_only():
    config = tiny_config(head_dim=16)
    speeds = rotary_speeds(config)
    q, k = torch.randn(2, 1, 1, 16)

    def product(i: int, j: int) -> torch.Tensor:
        turned_q, turned_k = (
            rotate(x, rotation(torch.tensor([at]), speeds)) for x, at in ((q, i), (k, j))
        )
        return (turned_q * turned_k).sum()

    torch.testing.assert_close(product(17, 5), product(1012, 1000), atol=1e-4, rtol=0)
    assert not torch.isclose(product(17, 5), product(17, 6), atol=1e-3)


@pytest.mark.parametrize("position", [0, 8192, 20_000, 131_071, 1_000_000])
def test_angles_are_those_of_fp64_at_any_position(position):
    speeds = rotary_speeds(tiny_config(head_dim=64))
    cos, sin = rotation(torch.tensor([position]), speeds)
    angles = position * speeds.double()
    # Half a unit in the last place of the angle is all that fp32 can lose.
    within = max(position * 2.0**-24, 2e-7)
    torch.testing.assert_close(cos.flatten().double(), angles.cos(), atol=within, rtol=0)
    torch.testing.assert_close(sin.flatten().double(), angles.sin(), atol=within, rtol=0)


def test_rotating_keeps_the_dtype_and_the_length():
    by = rotation(torch.arange(5), rotary_speeds(tiny_config(head_dim=16)))
    x = torch.randn(5, 3, 16)
    assert rotate(x.bfloat16(), by).dtype == torch.bfloat16
    torch.testing.assert_close(rotate(x, by).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotate(x, by)[0], x[0])


def test_a_cast_of_the_model_leaves_the_speeds_in_fp32():
    model = random_model(tiny_config())
    before = model.rotary_speeds.clone()
    assert torch.equal(model.bfloat16().rotary_speeds, before)
    assert model.half().rotary_speeds.dtype == torch.float32


def test_a_model_made_on_the_meta_device_has_real_speeds_once_it_is_moved():
    with torch.device("meta"):
        from llama32.model import Llama

        model = Llama(tiny_config())
    assert torch.equal(model.to_empty(device="cpu").rotary_speeds, rotary_speeds(tiny_config()))
