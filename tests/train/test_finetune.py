import json
import logging
from pathlib import Path

import pytest
import torch

import llama32
from llama32 import add_lora
from llama32.checkpoint import hub
from llama32.cli.finetune import TrainingOptions
from llama32.train.data import Example
from llama32.train.finetune import finetune, fingerprint, split_held_out
from llama32.train.loop import CurvePoint
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


def test_an_adapter_learns_the_common_pattern_of_the_examples(tmp_path, data):
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
    def train(records: list) -> None:
        llm = load()
        add_lora(llm.model, rank=1, targets=["q_proj"])
        finetune(llm, records, tmp_path, held_out=RECORDS[-2:], context=512, epochs=1)

    train(RECORDS[:8])
    train(RECORDS[:8])
    with pytest.raises(ValueError, match=r"training.pt is of a run with data"):
        train(RECORDS[:9])


def test_a_random_share_is_held_out_in_order():
    examples = [Example([i], [True]) for i in range(40)]
    training, held_out = split_held_out(examples, 0.1, seed=0)
    assert len(held_out) == 4
    assert sorted(training + held_out) == examples
    assert training == [example for example in examples if example not in held_out]
    assert held_out == sorted(held_out)
    assert split_held_out(examples, 0.1, seed=1)[1] != held_out
    with pytest.raises(ValueError, match="held_out is 1"):
        split_held_out(examples, 1.0, seed=0)


def test_truncated_and_dropped_examples_are_logged(tmp_path, caplog):
    llm = load()
    add_lora(llm.model, rank=1, targets=["q_proj"])
    caplog.set_level(logging.INFO)
    long = {"messages": [{"role": "user", "content": "so " * 90}, RECORDS[0]["messages"][1]]}
    records = [{"text": "so " * 90}, {"text": "Once"}, long]
    finetune(llm, records, tmp_path, held_out=0.0, context=64, epochs=1)
    assert "; 1 examples are cut to 64 tokens; 1 are left out, because the cut" in caplog.text


def test_an_invalid_context_or_batch_is_refused(tmp_path):
    with pytest.raises(ValueError, match="context is 2000, allowed: 1 to the model's 1024"):
        finetune(load(), RECORDS, tmp_path, context=2000)
    with pytest.raises(ValueError, match="batch 0, epochs 3; both are 1 or more"):
        finetune(load(), RECORDS, tmp_path, batch=0)


def test_an_empty_list_of_records_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to learn"):
        finetune(load(), [], tmp_path, held_out=0.0)


def test_the_command_writes_an_adapter_that_other_commands_accept(tmp_path, data, caplog):
    out = tmp_path / "poet"
    rate = ("--rate", 5e-3, "--batch", 1, "--epochs", 9, "--context", 128)
    first = run("finetune", data, "-o", out, "--fp32", "--rank", 4, "--held-out", 0.1, *rate)
    assert first.exit_code == 0, first.output
    assert "held-out loss, nats per token: " in first.stdout
    assert "22 examples, 1,193 tokens, 20% of them with a loss" in caplog.text
    assert f"next: llama32 chat --model tiny --lora {out}" in first.stderr
    files = "adapter_config.json adapter_model.safetensors curve.png training.pt"
    assert sorted(path.name for path in out.iterdir()) == files.split()
    answer = run("chat", ASK[0]["content"], "--lora", out, "--temperature", 0, "-n", 40)
    assert answer.stdout.startswith("Listen!")
    again = run("finetune", data, "-o", out, "--fp32", "--rank", 4, "--held-out", 0.1, *rate)
    assert again.stdout == first.stdout


def test_the_command_trains_all_weights_into_a_new_checkpoint(tmp_path, data):
    out = tmp_path / "whole"
    result = run("finetune", data, "-o", out, "--full", "--epochs", 1, "--context", 512)
    assert result.exit_code == 0, result.output
    trained, base = llama32.load(out), llama32.load("tiny")
    assert trained.model.config == base.model.config
    assert trained.chat(ASK, max_new_tokens=4, seed=0).ids
    assert not torch.equal(trained.model.embed.weight, base.model.embed.weight)


def test_load_merges_an_adapter_before_quantizing(tmp_path):
    lora = add_lora(llama32.load_model("tiny"), rank=2, targets=["q_proj", "down_proj", "lm_head"])
    for _, pair in lora.items():
        torch.nn.init.normal_(pair.b, std=0.1)
    llama32.save_lora(lora, tmp_path)
    for scheme in (None, "int8"):
        expected = llama32.load_model("tiny")
        llama32.merge_lora(expected, lora)
        if scheme is not None:
            llama32.quantize(expected, scheme)
        merged = llama32.load_model("tiny", lora=tmp_path, quantize=scheme)
        tokens = torch.arange(20)
        assert torch.equal(merged(tokens), expected(tokens))


def test_an_adapter_of_another_model_is_refused_before_weights_are_read(tmp_path):
    lora = add_lora(llama32.load_model("tiny"), rank=2)
    pairs = dict(lora.items())
    wrong = llama32.LoRA({"layers.9.attn.q_proj": pairs["layers.0.attn.q_proj"]})
    with pytest.raises(ValueError, match=r"does not fit: layers.9.attn.q_proj is \(256, 256\)"):
        llama32.load_model("tiny", lora=wrong)


def test_the_command_refuses_models_that_cannot_be_trained(tmp_path, data):
    out = ("-o", tmp_path)
    assert "--optimize packs weights" in error_of(run("finetune", data, *out, "--optimize"))
    assert "leave out --quantize" in error_of(
        run("finetune", data, *out, "--full", "--quantize", "int8")
    )
    assert "would depend on the merged one" in error_of(
        run("finetune", data, *out, "--lora", tmp_path)
    )
    assert "no linear layer is called" in run("finetune", data, *out, "--target", "x_proj").stderr
    assert hub.resolve("tiny").exists()


def test_the_fingerprint_of_the_data_is_that_of_version_0_1_0():
    """Computed by the old code, whose `Example` had a field `learned`."""
    examples = [Example([1, 2, 3], [False, True, True]), Example([7, 8], [False, True])]
    old = "ebb348def555ace92bca1cb47685108ed2820c6280f2faacc206552fc02aa21b"
    assert fingerprint(examples, context=64, batch=8, micro_batch=2) == old
    old = "647beeea6aa5f0be3b1a1583bc212e609ddd33b0c421a0076a53b1cc764e7ade"
    assert fingerprint(examples[:1], context=64, batch=8, micro_batch=2) == old


def test_old_keywords_warn_and_train_the_same_run(tmp_path):
    def train(**settings) -> list:
        llm = load()
        add_lora(llm.model, rank=1, targets=["q_proj"])
        return finetune(llm, RECORDS[:8], tmp_path, held_out=0.0, epochs=1, **settings)

    with pytest.warns(DeprecationWarning, match=r"is now (micro_batch|activation)") as warned:
        curve = train(at_once=2, recompute=True)
    assert sorted(str(warning.message) for warning in warned) == [
        "at_once is now micro_batch",
        "recompute is now activation_checkpointing",
    ]
    assert train(micro_batch=2, activation_checkpointing=True) == curve
    with pytest.raises(ValueError, match=r"training.pt is of a run with data"):
        train(activation_checkpointing=True)
    with pytest.raises(TypeError, match="at_once is the old name of micro_batch"):
        train(at_once=2, micro_batch=2)


OLD_FLAGS = [
    ({"old_micro_batch": 2}, ("--at-once", 2), "--at-once is now --micro-batch"),
    (
        {"old_activation_checkpointing": True},
        ("--recompute",),
        "--recompute is now --activation-checkpointing",
    ),
]


@pytest.mark.parametrize(("options", "flags", "warning"), OLD_FLAGS)
def test_old_flags_warn_and_set_the_new_options(
    tmp_path, data, monkeypatch, options, flags, warning
):
    name = next(iter(options)).removeprefix("old_")
    with pytest.warns(DeprecationWarning, match=warning):
        settings = TrainingOptions(**options).settings(full=False)
    assert settings == TrainingOptions(**{name: options["old_" + name]}).settings(full=False)

    received = {}

    def record(llm, records, folder, **settings) -> list[CurvePoint]:
        received.update(settings)
        return [CurvePoint(0, None, None)]

    monkeypatch.setattr("llama32.train.finetune.finetune", record)
    result = run("finetune", data, "-o", tmp_path, *flags)
    assert result.exit_code == 0, result.output
    assert f"warning: {warning}\n" in result.stderr
    assert received == settings
    assert flags[0] not in run("finetune", "--help").stdout
