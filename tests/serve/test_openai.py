"""OpenAI's own Python client against a running server."""

from collections.abc import Iterator

import pytest
from openai import OpenAI

from llama32.llm import LLM
from llama32.loading import load
from tests.serving import Served, serving


@pytest.fixture(scope="module")
def llm() -> LLM:
    return load("tiny")


@pytest.fixture(scope="module")
def served(llm) -> Iterator[Served]:
    with serving(llm) as server:
        yield server


@pytest.fixture(scope="module")
def client(served) -> OpenAI:
    return served.client()


def test_the_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
