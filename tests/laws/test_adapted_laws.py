"""Batch invariance with every kernel of a CPU."""

import random

import pytest
import torch

from llama32 import load_model
from llama32.engine.engine import Engine
from llama32.engine.settings import EngineSettings
from llama32.kernels import autotune as module
from llama32.kernels.autotune import KERNELS
from llama32.model import Llama
from llama32.quantization.quantize import SCHEMES
from llama32.sampling_params import Sampling


def model_in(form: type, monkeypatch) -> Llama:
    """Return tiny with a kernel in all layers; skip if the machine lacks the kernel."""
    monkeypatch.setattr(module, "KERNELS", (form,))
    monkeypatch.setattr(module, "time_products", lambda parts, x: float(type(parts[0]) is not form))
    for scheme in (None, *SCHEMES):
        model = load_model("tiny", dtype=torch.bfloat16, quantize=scheme, optimize=True)
        if sum(type(part) is form for part in model.modules()) > 20:
            return model
    pytest.skip("not on this machine")


def outcomes(model: Llama, **given) -> tuple[list, list]:
    """Return the outcomes of many kinds of requests, each alone and all together."""
    r = random.Random(3)
    inputs = [
        (
            [r.randrange(2000) for _ in range(r.choice([1, 2, 63, 64, 65, 100, 130]))],
            Sampling(
                temperature=i % 2, seed=i, max_new_tokens=1 + i % 9, logprobs=1, ignore_eos=True
            ),
        )
        for i in range(24)
    ]

    def run(engine: Engine, some: list) -> list:
        requests = [engine.add(*request_input) for request_input in some]
        while engine.is_busy:
            engine.step()
        return [[(t.id, t.logprobs) for t in request.tokens] for request in requests]

    settings = EngineSettings(deterministic=True, cache_tokens=64 * 128, **given)
    alone = []
    for request_input in inputs:
        alone += run(Engine.of(model, settings), [request_input])
    return alone, run(Engine.of(model, settings), inputs)


@pytest.mark.parametrize("form", KERNELS, ids=lambda form: form.__name__)
def test_alone_is_among_neighbours_in_every_form(form, monkeypatch):
    alone, together = outcomes(model_in(form, monkeypatch))
    assert together == alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alone_is_among_neighbours_with_a_cache_of_bytes(dtype):
    model = load_model("tiny", dtype=dtype)
    alone, together = outcomes(model, cache_dtype="int8")
    assert together == alone
    assert together != outcomes(model)[1]
