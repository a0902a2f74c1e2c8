"""Sampling settings: accepted values, refusals and checkpoint defaults."""

import math
import pickle
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from llama32.sampling_params import Sampling


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("temperature", value) for value in (-0.1, math.nan, math.inf, "0.7", None, 10**400)],
        *[("top_k", value) for value in (0, -1, 1.5, 2**31, "many")],
        *[("top_p", value) for value in (0, -0.5, 1.01, math.nan, "0.9")],
        *[("min_p", value) for value in (-0.01, 1.01, math.nan, [])],
        *[("repetition_penalty", value) for value in (0, -1.0, math.inf, math.nan, 1e-30)],
        *[("presence_penalty", value) for value in (math.inf, -math.inf, math.nan, None)],
        *[("frequency_penalty", value) for value in (math.inf, -math.inf, math.nan, "2")],
        *[("logit_bias", value) for value in (None, 3, {-1: 1}, {"5": 1}, {5: 101}, {5: math.nan})],
        *[("stop", value) for value in ("", ["a", ""], None, 3, [3], b"end")],
        *[("stop_ids", value) for value in ([-1], [1.5], "12", 7, None)],
        *[("ignore_eos", value) for value in (None, 1, "no")],
        *[("seed", value) for value in (2**64, -(2**63) - 1, 0.5, "7", math.nan)],
        *[("max_new_tokens", value) for value in (0, -1, 2.5, None, math.inf)],
        *[("logprobs", value) for value in (-1, 0.5, "all")],
    ],
)
def test_an_invalid_value_is_refused_in_one_line_with_field_and_value(field, value):
    with pytest.raises(ValueError, match=f"^Sampling: {field} is .*, allowed: ") as error:
        Sampling(**{field: value})
    assert repr(value) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("temperature", 0), ("temperature", 1e-9), ("top_p", 1), ("min_p", 0), ("min_p", 1)],
        *[("seed", 2**64 - 1), ("seed", -(2**63)), ("max_new_tokens", 10**9), ("logprobs", 0)],
        *[("presence_penalty", -2), ("repetition_penalty", 0.5), ("logit_bias", {0: -100, 9: 100})],
    ],
)
def test_the_limits_of_each_range_are_allowed(field, value):
    assert getattr(Sampling(**{field: value}), field) == value


def test_numpy_numbers_become_plain_numbers():
    fields: Any = {"temperature": np.float32(0.5), "top_k": np.int64(3), "seed": np.uint64(7)}
    sampling = Sampling(**fields)
    kinds = [type(value) for value in (sampling.temperature, sampling.top_k, sampling.seed)]
    assert kinds == [float, int, int]


def test_stop_may_be_a_text_or_a_list_and_is_stored_as_a_tuple():
    assert Sampling(stop="end").stop == ("end",)
    assert Sampling(stop=["a", "b"]).stop == ("a", "b")
    assert Sampling(stop_ids=[3, 4]).stop_ids == (3, 4)


def test_replace_keeps_the_other_fields_and_checks_the_new_one():
    sampling = Sampling(temperature=0.5, stop=["x"], logit_bias={3: 1}, seed=1)
    assert replace(sampling, seed=2) == Sampling(
        temperature=0.5, stop=("x",), logit_bias={3: 1.0}, seed=2
    )
    with pytest.raises(ValueError, match="top_p"):
        replace(sampling, top_p=2.0)


def test_settings_share_no_dict_with_the_caller_or_each_other():
    bias = {3: 1.0}
    sampling = Sampling(logit_bias=bias)
    bias[4] = 1.0
    assert sampling.logit_bias == {3: 1.0}
    assert Sampling().logit_bias is not Sampling().logit_bias


def test_settings_survive_pickling_and_asdict():
    sampling = Sampling(top_k=5, stop="x", logit_bias={3: 1.0})
    assert pickle.loads(pickle.dumps(sampling)) == sampling
    assert Sampling(**asdict(sampling)) == sampling


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (
            {
                "bos_token_id": 128000,
                "do_sample": True,
                "eos_token_id": [128001, 128008, 128009],
                "temperature": 0.6,
                "top_p": 0.9,
                "transformers_version": "4.45.0.dev0",
            },
            Sampling(temperature=0.6, top_p=0.9),
        ),
        ({}, Sampling(temperature=0)),
        ({"do_sample": False, "repetition_penalty": 1.1}, Sampling(temperature=0)),
        ({"do_sample": True}, Sampling()),
        ({"do_sample": True, "top_k": 0, "top_p": None}, Sampling()),
        ({"do_sample": True, "top_k": 50, "min_p": 0.1}, Sampling(top_k=50, min_p=0.1)),
    ],
)
def test_a_generation_config_becomes_settings(data, expected):
    penalty = data.get("repetition_penalty", 1.0)
    assert Sampling.from_generation_config(data) == replace(expected, repetition_penalty=penalty)


def test_without_do_sample_a_generation_config_is_greedy():
    sampling = Sampling.from_generation_config({"temperature": 0.6, "top_p": 0.9})
    assert sampling.temperature == 0
    assert sampling.stages == frozenset()


def test_an_error_names_the_generation_config():
    with pytest.raises(ValueError, match=r"^generation_config.json: Sampling: top_p is 3, "):
        Sampling.from_generation_config({"do_sample": True, "top_p": 3})
