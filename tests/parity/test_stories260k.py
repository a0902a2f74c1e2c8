"""A trained Llama of 260,000 parameters generates the published story."""

import json
import re

import numpy as np
import pytest
import torch

from llama32.checkpoint.reader import read_model
from llama32.generate import generate
from llama32.sampling_params import Sampling
from tests.closeness import assert_near


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_the_published_text_is_generated_exactly(reference, layout):
    folder = reference / "stories260K"
    expected = json.loads((folder / "expected.json").read_text())
    begin, *ids = expected["greedy_ids_from_bos"]
    greedy = Sampling(temperature=0, max_new_tokens=len(ids))
    tokens = generate(read_model(folder / layout), [begin], greedy)
    assert [token.id for token in tokens] == ids

    pieces = [piece for piece, _ in json.loads((folder / "vocab.json").read_text())]
    joined = "".join(pieces[id] for id in ids)
    text = re.sub("<0x(..)>", lambda byte: chr(int(byte[1], 16)), joined)
    assert text.strip() == expected["text"]


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_logits_agree_with_transformers(reference, layout):
    folder = reference / "stories260K"
    expected = np.load(folder / "expected.npz")
    with torch.no_grad():
        logits = read_model(folder / layout)(torch.from_numpy(expected["ids"]).long())
    theirs = torch.from_numpy(expected["logits"])
    assert_near(logits, theirs, within=2e-5)
