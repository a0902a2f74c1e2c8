import math
from dataclasses import FrozenInstanceError
from types import SimpleNamespace
from typing import Any

import pytest

from llama32.engine.prompt_lookup import PromptLookup
from llama32.engine.settings import EngineSettings

COUNTS = ["max_running", "prefill_tokens", "cache_tokens", "cache_bytes", "page_size"]


def test_without_a_word_sizes_are_left_to_the_machine_and_decoding_is_plain():
    settings = EngineSettings()
    assert (settings.max_running, settings.prefill_tokens) == (64, 512)
    assert (settings.cache_tokens, settings.cache_bytes, settings.page_size) == (None, None, None)
    assert settings.memory_fraction == 0.9
    assert settings.deterministic is None
    assert settings.compiled is False
    assert settings.cuda_graphs is None
    assert settings.speculation is None
    assert settings.cache_dtype is None


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", COUNTS)
def test_a_count_below_one_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}, allowed: 1 or more"):
        EngineSettings(**{name: value})


@pytest.mark.parametrize("value", [1.5, "8"])
@pytest.mark.parametrize("name", COUNTS)
def test_what_is_no_whole_number_is_refused_by_name(name, value):
    """Bypasses the type checks of the tests, which would refuse first."""
    fields: Any = SimpleNamespace(**{**vars(EngineSettings()), name: value})
    with pytest.raises(ValueError, match=f"{name} is {value!r}, allowed: 1 or more"):
        EngineSettings.__post_init__(fields)


@pytest.mark.parametrize("name", COUNTS)
def test_one_is_enough(name):
    least: Any = {name: 1}
    assert getattr(EngineSettings(**least), name) == 1


@pytest.mark.parametrize("value", [0.0, -0.5, 1.01, math.nan])
def test_a_share_of_memory_that_is_none_is_refused_by_name(value):
    with pytest.raises(ValueError, match=rf"memory_fraction is {value!r}, allowed: above 0"):
        EngineSettings(memory_fraction=value)


def test_all_memory_may_be_taken():
    assert EngineSettings(memory_fraction=1.0).memory_fraction == 1


def test_of_the_two_sizes_of_the_cache_only_one_may_be_given():
    with pytest.raises(ValueError, match="give cache_tokens or cache_bytes, not both"):
        EngineSettings(cache_tokens=64, cache_bytes=1 << 20)


def test_settings_go_by_name_and_stay_as_they_are():
    with pytest.raises(TypeError):
        EngineSettings(8)
    with pytest.raises(FrozenInstanceError):
        EngineSettings().max_running = 8


def test_drafts_are_rows_besides_those_that_run():
    assert EngineSettings(max_running=5).max_rows == 5
    assert EngineSettings(max_running=5, speculation=PromptLookup(num_tokens=3)).max_rows == 20


def test_a_cache_of_another_dtype_is_refused():
    assert EngineSettings(cache_dtype="int8").cache_dtype == "int8"
    with pytest.raises(ValueError, match="cache_dtype is 'fp8', allowed: 'int8' or None"):
        EngineSettings(cache_dtype="fp8")
