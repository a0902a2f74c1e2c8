"""The server that has to survive: one for each module of tests."""

from collections.abc import Iterator

import pytest

from llama32.engine.settings import EngineSettings
from llama32.llm.llm import LLM
from llama32.llm.loading import load
from tests.rawhttp import ask
from tests.serving import COMPLETE, HELLO, Served, serving


@pytest.fixture(scope="module")
def llm() -> LLM:
    return load("tiny", engine=EngineSettings(cache_tokens=8192))


@pytest.fixture(scope="module")
def served(llm) -> Iterator[Served]:
    with serving(llm) as server:
        yield server


@pytest.fixture(scope="module")
def hello(served) -> str:
    """What a good request is answered before anything has happened."""
    return ask(served.port, COMPLETE, HELLO).text
