"""RoPE against transformers, fp64 and the properties of a rotation."""

import math

import pytest
import torch
from transformers import LlamaConfig as HubConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llama32.rope import apply_rotary, compute_inv_freq, rotary_cos_sin
from tests.checkpoints import HUB_LLAMA3, random_model, tiny_config
from tests.closeness import assert_near


def test_scaled_inv_freq_has_the_bits_of_transformers():
    config = tiny_config(head_dim=64)
    hub = HubConfig(hidden_size=64, num_attention_heads=1, rope_parameters=HUB_LLAMA3)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](hub, torch.device("cpu"))
    assert torch.equal(compute_inv_freq(config), expected)


def test_scaling_keeps_fast_pairs_and_divides_slow_pairs_by_the_factor():
    scaled, plain = (
        compute_inv_freq(tiny_config(head_dim=64, rope_theta=500000.0, **change))
        for change in ({}, {"rope_scaling": None})
    )
    num_rotations = 8192 * plain / (2 * math.pi)
    assert torch.equal(scaled[num_rotations > 4], plain[num_rotations > 4])
    assert torch.equal(scaled[num_rotations < 1], plain[num_rotations < 1] / 32)
    between = (num_rotations > 1) & (num_rotations < 4)
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 32))[between].all()
    assert (scaled.diff() < 0).all()


def test_products_depend_on_the_distance_only():
    config = tiny_config(head_dim=16)
    inv_freq = compute_inv_freq(config)
    q, k = torch.randn(2, 1, 1, 16)

    def product(i: int, j: int) -> torch.Tensor:
        rotated_q, rotated_k = (
            apply_rotary(x, rotary_cos_sin(torch.tensor([position]), inv_freq))
            for x, position in ((q, i), (k, j))
        )
        return (rotated_q * rotated_k).sum()

    assert_near(product(17, 5), product(1012, 1000), within=2e-5)
    assert not torch.isclose(product(17, 5), product(17, 6), atol=1e-3)


@pytest.mark.parametrize("position", [0, 8192, 20_000, 131_071, 1_000_000])
def test_angles_equal_fp64_at_any_position(position):
    inv_freq = compute_inv_freq(tiny_config(head_dim=64))
    cos, sin = rotary_cos_sin(torch.tensor([position]), inv_freq)
    angles = position * inv_freq.double()
    # fp32 loses at most half a unit in the last place of the angle.
    within = max(position * 2.0**-24, 2e-7)
    torch.testing.assert_close(cos.flatten().double(), angles.cos(), atol=within, rtol=0)
    torch.testing.assert_close(sin.flatten().double(), angles.sin(), atol=within, rtol=0)


def test_rotation_keeps_dtype_and_length():
    cos_sin = rotary_cos_sin(torch.arange(5), compute_inv_freq(tiny_config(head_dim=16)))
    x = torch.randn(5, 3, 16)
    assert apply_rotary(x.bfloat16(), cos_sin).dtype == torch.bfloat16
    torch.testing.assert_close(apply_rotary(x, cos_sin).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(apply_rotary(x, cos_sin)[0], x[0])


def test_a_cast_of_the_model_keeps_inv_freq_in_fp32():
    model = random_model(tiny_config())
    before = model.inv_freq.clone()
    assert torch.equal(model.bfloat16().inv_freq, before)
    assert model.half().inv_freq.dtype == torch.float32


def test_a_model_moved_from_the_meta_device_has_inv_freq():
    with torch.device("meta"):
        from llama32.model import Llama

        model = Llama(tiny_config())
    assert torch.equal(model.to_empty(device="cpu").inv_freq, compute_inv_freq(tiny_config()))
