import json
import logging
from pathlib import Path

import pytest
import torch

import llama32
from llama32 import add_lora, hub
from llama32.train.data import Example
from llama32.train.finetune import finetune, split
from tests.commands import error_of, run

STORIES = ["The dog ran home.", "A cat sat on a mat.", "The sun was hot.", "It was a red ball."]
RECORDS = [
    {
        "messages": [
            {"role": "user", "content": f"Story {number}, please."},
            {"role": "assistant", "content": f"Listen! {STORIES[number % 4]}"},
        ]
    }
    for number in range(24)
]
ASK = [{"role": "user", "content": "A story about a fish, please."}]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "stories.jsonl"
    file.write_text("\n".join(map(json.dumps, RECORDS)))
    return file


def load() -> llama32.LLM:
    return llama32.load("tiny", dtype=torch.float32)


def test_an_adapter_learns_what_the_examples_have_in_common(tmp_path, data):
    llm = load()
    assert not llm.chat(ASK, temperature=0, max_new_tokens=8).text.startswith("Listen!")
    add_lora(llm.model, rank=4)
    curve = finetune(llm, data, tmp_path, batch=1, context=128, epochs=9, peak_rate=5e-3)
    first, *_, last = (point.held_out for point in curve)
    assert first
    assert last
    assert last < 0.5 * first
    assert (tmp_path / "curve.png").read_bytes()[1:4] == b"PNG"
    answer = llm.chat(ASK, temperature=0, max_new_tokens=40)
    assert answer.text.startswith("Listen!")
    assert answer.finish_reason == "stop"


def test_a_run_is_not_resumed_with_other_records(tmp_path):
    def go(records: list) -> None:
        llm = load()
        add_lora(llm.model, rank=1, targets=["q_proj"])
        finetune(llm, records, tmp_path, held_out=RECORDS[-2:], context=512, epochs=1)

    go(RECORDS[:8])
    go(RECORDS[:8])
    with pytest.raises(ValueError, match=r"training.pt is of a run with data"):
        go(RECORDS[:9])


def test_a_share_is_held_out_by_chance_and_kept_in_order():
    examples = [Example([i], [True]) for i in range(40)]
    kept, apart = split(examples, 0.1, seed=0)
    assert len(apart) == 4
    assert sorted(kept + apart) == examples
    assert kept == [example for example in examples if example not in apart]
    assert apart == sorted(apart)
    assert split(examples, 0.1, seed=1)[1] != apart
    with pytest.raises(ValueError, match="held_out is 1"):
        split(examples, 1.0, seed=0)


def test_what_was_too_long_is_told(tmp_path, caplog):
    llm = load()
    add_lora(llm.model, rank=1, targets=["q_proj"])
    caplog.set_level(logging.INFO)
    long = {"messages": [{"role": "user", "content": "so " * 90}, RECORDS[0]["messages"][1]]}
    records = [{"text": "so " * 90}, {"text": "Once"}, long]
    finetune(llm, records, tmp_path, held_out=0.0, context=64, epochs=1)
    assert "; 1 examples are cut to 64 tokens; 1 are left out, too long for" in caplog.text


def test_what_the_model_or_the_loop_cannot_do_is_refused(tmp_path):
    with pytest.raises(ValueError, match="context is 2000, allowed: 1 to the model's 1024"):
        finetune(load(), RECORDS, tmp_path, context=2000)
    with pytest.raises(ValueError, match="batch 0, epochs 3; both are 1 or more"):
        finetune(load(), RECORDS, tmp_path, batch=0)


def test_without_examples_there_is_nothing_to_do(tmp_path):
    with pytest.raises(ValueError, match="nothing to learn"):
        finetune(load(), [], tmp_path, held_out=0.0)


def test_the_command_leaves_an_adapter_that_other_commands_take(tmp_path, data, caplog):
    out = tmp_path / "poet"
    rate = ("--rate", 5e-3, "--batch", 1, "--epochs", 9, "--context", 128)
    told = run("finetune", data, "-o", out, "--fp32", "--rank", 4, "--held-out", 0.1, *rate)
    assert told.exit_code == 0, told.output
    assert "held-out loss, nats per token: " in told.stdout
    assert "22 examples, 1,193 tokens, 20% of them to be learned" in caplog.text
    assert f"next: llama32 chat --model tiny --lora {out}" in told.stderr
    left = "adapter_config.json adapter_model.safetensors curve.png training.pt"
    assert sorted(path.name for path in out.iterdir()) == left.split()
    said = run("chat", ASK[0]["content"], "--lora", out, "--temperature", 0, "-n", 40)
    assert said.stdout.startswith("Listen!")
    again = run("finetune", data, "-o", out, "--fp32", "--rank", 4, "--held-out", 0.1, *rate)
    assert again.stdout == told.stdout


def test_the_command_trains_all_weights_into_a_checkpoint_of_its_own(tmp_path, data):
    out = tmp_path / "whole"
    told = run("finetune", data, "-o", out, "--full", "--epochs", 1, "--context", 512)
    assert told.exit_code == 0, told.output
    trained, base = llama32.load(out), llama32.load("tiny")
    assert trained.model.config == base.model.config
    assert trained.chat(ASK, max_new_tokens=4, seed=0).ids
    assert not torch.equal(trained.model.embed.weight, base.model.embed.weight)


def test_an_adapter_that_is_given_to_load_is_merged_also_before_quantizing(tmp_path):
    lora = add_lora(llama32.load_model("tiny"), rank=2, targets=["q_proj", "down_proj", "lm_head"])
    for _, pair in lora.items():
        torch.nn.init.normal_(pair.b, std=0.1)
    llama32.save_lora(lora, tmp_path)
    for scheme in (None, "int8"):
        by_hand = llama32.load_model("tiny")
        llama32.merge_lora(by_hand, lora)
        if scheme is not None:
            llama32.quantize(by_hand, scheme)
        given = llama32.load_model("tiny", lora=tmp_path, quantize=scheme)
        tokens = torch.arange(20)
        assert torch.equal(given(tokens), by_hand(tokens))


def test_an_adapter_of_another_model_is_refused_before_anything_is_read(tmp_path):
    lora = add_lora(llama32.load_model("tiny"), rank=2)
    pairs = dict(lora.items())
    wrong = llama32.LoRA({"layers.9.attn.q_proj": pairs["layers.0.attn.q_proj"]})
    with pytest.raises(ValueError, match=r"does not fit: layers.9.attn.q_proj is \(256, 256\)"):
        llama32.load_model("tiny", lora=wrong)


def test_the_command_refuses_what_cannot_be_trained(tmp_path, data):
    out = ("-o", tmp_path)
    assert "--optimize packs weights" in error_of(run("finetune", data, *out, "--optimize"))
    assert "leave out --quantize" in error_of(
        run("finetune", data, *out, "--full", "--quantize", "int8")
    )
    assert "of no use without that one" in error_of(run("finetune", data, *out, "--lora", tmp_path))
    assert "no linear layer is called" in run("finetune", data, *out, "--target", "x_proj").stderr
    assert hub.resolve("tiny").exists()
