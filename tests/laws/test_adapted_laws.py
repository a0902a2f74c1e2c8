"""The same answer in any company, for layers in every form that a CPU has."""

import random

import pytest
import torch

from llama32 import load_model
from llama32.adapt import optimize as module
from llama32.adapt.optimize import FORMS
from llama32.adapt.quantize import SCHEMES
from llama32.engine.engine import Engine
from llama32.engine.settings import EngineSettings
from llama32.model import Llama
from llama32.settings import Sampling


def model_in(form: type, monkeypatch) -> Llama:
    """tiny with all layers in that form; skips where there are none that it fits."""
    monkeypatch.setattr(module, "FORMS", (form,))
    monkeypatch.setattr(module, "time_of", lambda parts, x: float(type(parts[0]) is not form))
    for scheme in (None, *SCHEMES):
        model = load_model("tiny", dtype=torch.bfloat16, quantize=scheme, optimize=True)
        if sum(type(part) is form for part in model.modules()) > 20:
            return model
    pytest.skip("not on this machine")


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_alone_is_among_neighbours_in_every_form(form, monkeypatch):
    model = model_in(form, monkeypatch)
    r = random.Random(3)
    asked = [
        (
            [r.randrange(2000) for _ in range(r.choice([1, 2, 63, 64, 65, 100, 130]))],
            Sampling(
                temperature=i % 2, seed=i, max_new_tokens=1 + i % 9, logprobs=1, ignore_eos=True
            ),
        )
        for i in range(24)
    ]

    def run(engine: Engine, some: list) -> list:
        requests = [engine.add(*one) for one in some]
        while engine.is_busy:
            engine.step()
        return [[(t.id, t.logprobs) for t in request.tokens] for request in requests]

    settings = EngineSettings(deterministic=True, cache_tokens=64 * 128)
    alone = []
    for one in asked:
        alone += run(Engine.of(model, settings), [one])
    assert run(Engine.of(model, settings), asked) == alone
