"""The model that ships: all files, the layout of a real Llama 3.2, and readable stories."""

import json
from pathlib import Path

import pytest
import torch
import transformers

import llama32
from llama32.checkpoint.hub import resolve
from llama32.checkpoint.reader import inspect
from tests.closeness import assert_near

TINY = resolve("tiny")
GREEDY = {"temperature": 0, "max_new_tokens": 60}


@pytest.fixture(scope="module")
def tiny() -> llama32.LLM:
    return llama32.load("tiny", dtype=torch.float32)  # rounds equally on every machine


def test_tiny_ships_with_the_package_in_at_most_8_mb():
    assert Path(llama32.__file__).parent / "tiny" == TINY
    files = {path.name: path.stat().st_size for path in TINY.iterdir()}
    assert files.keys() == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) <= 8_000_000


def test_tiny_has_the_layout_of_a_real_llama_3_2(tiny):
    config = json.loads((TINY / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rope_scaling"]["rope_type"] == "llama3"
    assert config["tie_word_embeddings"] is True
    assert config["torch_dtype"] == "bfloat16"
    assert inspect(TINY).dtype == torch.bfloat16
    special = tiny.tokenizer.special
    assert len(special) == 256
    assert special["<|eot_id|>"] - special["<|begin_of_text|>"] == 9
    assert tiny.config.vocab_size == tiny.tokenizer.vocab_size
    assert tiny.defaults.temperature == 0.6
    assert set(tiny.eos_ids) == {special[f"<|{e}|>"] for e in ("end_of_text", "eom_id", "eot_id")}


def test_tiny_continues_a_story(tiny):
    result = tiny.generate("Once upon a time", **GREEDY)
    assert result.text.startswith(", there was a ")
    assert result.text.count(".") >= 2
    assert result.text.isascii()


def test_tiny_answers_a_request_and_stops(tiny):
    request = {"role": "user", "content": "Tell me a story about a dog and a ball."}
    result = tiny.chat([request], temperature=0, max_new_tokens=600, date="26 Jul 2024")
    assert result.finish_reason == "stop"
    assert "dog" in result.text
    assert "ball" in result.text
    assert result.message == {"role": "assistant", "content": result.text, "tool_calls": []}
    assert len(result.text) > 200


def test_tiny_answers_a_second_request(tiny):
    dialog = [{"role": "user", "content": "Tell me a story about a cat."}]
    dialog.append(tiny.chat(dialog, temperature=0, date="26 Jul 2024").message)
    dialog.append({"role": "user", "content": "Now tell me a story about a boat."})
    result = tiny.chat(dialog, temperature=0, date="26 Jul 2024")
    assert "boat" in result.text


def test_the_same_seed_tells_the_same_story(tiny):
    tell = {"seed": 5, "max_new_tokens": 40}
    first = tiny.generate("One day", **tell).text
    assert tiny.generate(["Lily", "One day"], **tell)[1].text == first
    assert tiny.generate("One day", **(tell | {"seed": 6})).text != first


def test_transformers_loads_tiny_and_agrees(tiny):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    ids = tokenizer("Once upon a time, there was a dog named Max.")["input_ids"]
    assert ids == tiny.tokenizer.encode("Once upon a time, there was a dog named Max.", bos=True)
    ours = llama32.load_model(TINY, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits
        assert_near(ours(torch.tensor([ids])), expected, within=2e-5)


@pytest.mark.parametrize("with_system", [True, False])
def test_the_chat_template_agrees_with_chat(tiny, with_system):
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    dialog = [{"role": "system", "content": " You tell stories. "}] * with_system + [
        {"role": "user", "content": "Tell me a story.\n"},
        {"role": "assistant", "content": "Once upon a time."},
        {"role": "user", "content": "Another!"},
    ]
    for prompt in (True, False):
        expected = tokenizer.apply_chat_template(
            dialog, add_generation_prompt=prompt, date_string="26 Jul 2024", tokenize=False
        )
        ids = tiny.chat_format.encode(dialog, date="26 Jul 2024", add_generation_prompt=prompt)
        assert tiny.tokenizer.decode(ids) == expected
        assert tokenizer(expected, add_special_tokens=False)["input_ids"] == ids
