"""A really trained Llama of 260,000 parameters tells the story that was published of it."""

import json
import re

import numpy as np
import pytest
import torch

from llama32.checkpoint import load_model
from llama32.generate import generate
from llama32.settings import Sampling


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_its_published_text_comes_out_exactly(reference, layout):
    folder = reference / "stories260K"
    expected = json.loads((folder / "expected.json").read_text())
    begin, *ids = expected["greedy_ids_from_bos"]
    greedy = Sampling(temperature=0, max_new_tokens=len(ids))
    tokens = generate(load_model(folder / layout), [begin], greedy)
    assert [token.id for token in tokens] == ids

    pieces = [piece for piece, _ in json.loads((folder / "vocab.json").read_text())]
    spelled = "".join(pieces[id] for id in ids)
    text = re.sub("<0x(..)>", lambda byte: chr(int(byte[1], 16)), spelled)
    assert text.strip() == expected["text"]


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_its_logits_are_those_of_transformers(reference, layout):
    folder = reference / "stories260K"
    expected = np.load(folder / "expected.npz")
    with torch.no_grad():
        logits = load_model(folder / layout)(torch.from_numpy(expected["ids"]).long())
    theirs = torch.from_numpy(expected["logits"])
    torch.testing.assert_close(logits, theirs, atol=1e-4, rtol=0)
