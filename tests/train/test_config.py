import math

import pytest
import torch

from llama32.train.config import TrainConfig, initialize, learning_rate
from llama32.train.loop import next_token_loss
from tests.checkpoints import random_model, tiny_config


def test_the_learning_rate_rises_then_falls_to_the_final_rate():
    config = TrainConfig(steps=100, warmup=10, peak_rate=1.0, final_rate=0.1)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[9] == max(rates) == 1.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)


@torch.no_grad()
def test_fresh_weights_predict_almost_uniformly():
    model = random_model(tiny_config(vocab_size=100))
    initialize(model, seed=1)
    rows = torch.arange(1000).view(10, 100) % 100
    assert next_token_loss(model, rows).item() == pytest.approx(math.log(100), abs=0.1)
    assert model.layers[0].attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    scaled = 0.02 / math.sqrt(2 * len(model.layers))
    assert model.layers[0].mlp.down_proj.weight.std().item() == pytest.approx(scaled, rel=0.1)
