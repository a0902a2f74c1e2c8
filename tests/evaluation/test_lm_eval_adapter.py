"""The adapter compared with lm-eval's own adapter for transformers, on the same weights."""

import json
import logging
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

import llama32
from llama32.evaluation.lm_eval_adapter import Harness, score_continuation, to_sampling
from llama32.llm.loading import load
from llama32.sampling_params import Sampling
from tests.alphabet import alphabet_checkpoint
from tests.checkpoints import random_model, tiny_config
from tests.tokenizers import write_tokenizer_json

TINY = Path(llama32.__file__).parent / "tiny"
CONTEXT = 1024
DATE = "26 Jul 2024"
DIALOG = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Tell me a story about a dog, a ball and 猫."},
]


@pytest.fixture(scope="module")
def ours() -> Harness:
    return Harness(load("tiny", dtype=torch.float32), batch_size=3, date=DATE)


@pytest.fixture(scope="module")
def hub() -> tuple[Any, Any]:
    """The same model and tokenizer in transformers."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def theirs(hub) -> HFLM:
    model, tokenizer = hub
    args = {"date_string": DATE}
    return HFLM(model, tokenizer=tokenizer, batch_size=2, chat_template_args=args)


@pytest.fixture(scope="module")
def theirs_bare(hub) -> HFLM:
    """Adds no begin token to a rolled text, except the prefix that starts the first window."""
    model, tokenizer = hub
    return HFLM(model, tokenizer=tokenizer, batch_size=2, add_bos_token=False)


@pytest.fixture(scope="module")
def abc(tmp_path_factory) -> Harness:
    """A model that predicts the next byte, and after A the alphabet."""
    folder = alphabet_checkpoint(tmp_path_factory.mktemp("abc"), max_position_embeddings=64)
    return Harness(load(folder), batch_size=2)


def ask(model: Any, kind: Any, *arguments: tuple) -> list:
    requests = [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]
    return getattr(model, kind)(requests, disable_tqdm=True)


def assert_same(found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    # Relative, because lm-eval's adapter sums in fp32: a step is 1.2e-7 of the sum.
    assert [p for p, _ in found] == pytest.approx([p for p, _ in expected], rel=1e-6, abs=1e-4)


def until(text: str | list[str], max_tokens: int = 24, **options: Any) -> dict[str, Any]:
    return {"until": text, "max_gen_toks": max_tokens, **options}


PAIRS = {
    "plain": ("Once upon a time, there was a little", " girl"),
    "of the same context": ("Once upon a time, there was a little", " dog"),
    "of several tokens": ("Once upon a time", ", there was a little girl named Lily."),
    "greedy but for its last token": ("Once upon a time", ", there was a little girl named Zo"),
    "without a context": ("", "One day"),
    "after spaces": ("The dog  ", "ran"),
    "after nothing but a space": (" ", "ran"),
    "with tokens that merge": ("She saw a wonder", "ful dog and a cat"),
    "not ASCII": ("Ein Märchen: 猫", " und 犬 🐕"),
    "longer than the context": ("One day, a dog ran. " * 300, " It was fun."),
    "as long as the context": ("", " dog" * CONTEXT),
    "with the text of a control token": ("The dog", " ran<|reserved_special_token_9|"),
}


def test_likelihoods_equal_transformers(ours, theirs):
    found, expected = (ask(lm, "loglikelihood", *PAIRS.values()) for lm in (ours, theirs))
    assert_same(found, expected)
    assert {greedy for _, greedy in found} == {True, False}


def test_a_longer_text_is_cut_from_the_left_with_a_warning(ours, caplog):
    with caplog.at_level(logging.WARNING, "llama32.evaluation.lm_eval_adapter"):
        ask(ours, "loglikelihood", PAIRS["as long as the context"])
        assert not caplog.messages
        ask(ours, "loglikelihood", PAIRS["longer than the context"])
        ask(ours, "generate_until", (PAIRS["longer than the context"][0], until(".", 4)))
    assert caplog.messages == [
        f"2106 tokens are cut to the last {CONTEXT + 1}",
        f"2102 tokens are cut to the last {CONTEXT - 4}",
    ]


def test_rolled_likelihoods_equal_transformers(ours, theirs_bare):
    texts = ["Once upon a time", "Ein Märchen: 猫 🐕", "", "One day, a dog ran. " * 320]
    arguments = [(text,) for text in texts]
    found, expected = (ask(lm, "loglikelihood_rolling", *arguments) for lm in (ours, theirs_bare))
    assert len(ours.tok_encode(texts[-1])) > 2 * CONTEXT
    assert found == pytest.approx(expected, abs=1e-3, rel=1e-6)
    assert found[2] == 0


def test_a_rolled_likelihood_has_the_begin_token_once(ours, theirs, theirs_bare):
    """Equal to `llama32.token_losses`. With default settings lm-eval's adapter predicts a begin
    token after the begin token."""
    text = "Once upon a time, there was a dog."
    ids = ours.llm.encode(text)
    assert ids.count(ours.prefix_token_id) == 1
    losses = llama32.token_losses(ours.llm.model, ids)
    [[found], [once], [twice]] = (
        ask(lm, "loglikelihood_rolling", (text,)) for lm in (ours, theirs_bare, theirs)
    )
    assert found == pytest.approx(-losses.double().sum().item(), rel=1e-6, abs=1e-4)
    assert found == pytest.approx(once, rel=1e-6, abs=1e-4)
    assert twice < once - 1


def test_generated_texts_equal_transformers(ours, theirs):
    arguments = [
        ("Once upon a time", until(".")),
        ("Once upon a time", until(["lly ", "le gi"])),  # begins and ends inside of tokens
        ("One day", until([])),
        ("One day", until(["\n", "girl"], 40, do_sample=False, temperature=0.7)),
        ("Ein Märchen von 猫 und Hund 🐕", until("\n\n")),  # the answer is a control token
        ("One day, a dog ran. " * 300, until(".", 100)),  # cut from the left
    ]
    found, expected = (ask(lm, "generate_until", *arguments) for lm in (ours, theirs))
    assert found == expected
    assert len({*found}) == len(found)


def test_stop_strings_may_span_tokens_and_are_not_part_of_the_text(abc):
    asked = [("A", until("FG")), ("A", until(["KLM", "HI"])), ("\n", until(["", "\0"], 99))]
    assert ask(abc, "generate_until", *asked[:2]) == ["BCDE", "BCDEFG"]
    abc_context = abc.max_length
    with pytest.raises(ValueError, match=f"max_gen_toks 99 leaves no room .* of {abc_context}"):
        ask(abc, "generate_until", asked[2])
    assert ask(abc, "generate_until", ("\n", until(["", "\0"], 60))) == [
        "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    ]


def test_generation_kwargs_reach_the_sampler(abc, monkeypatch):
    received = []
    generate = llama32.LLM.generate

    def record(llm, prompts, sampling, **options):
        received.extend(sampling)
        return generate(llm, prompts, sampling, **options)

    monkeypatch.setattr(llama32.LLM, "generate", record)
    settings = {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 3}
    ask(abc, "generate_until", ("A", until("Q", 5, **settings)), ("A", {"max_new_tokens": 4}))
    del settings["do_sample"]
    assert received == [
        Sampling(**settings, stop="Q", max_new_tokens=5),
        Sampling(temperature=0, max_new_tokens=4),
    ]
    assert to_sampling({}) == Sampling(temperature=0, max_new_tokens=256)


def test_unsupported_generation_kwargs_are_refused(abc):
    with pytest.raises(
        ValueError, match="generation_kwargs: num_beams, penalty_alpha not supported"
    ):
        ask(abc, "generate_until", ("A", until("Q", num_beams=4, penalty_alpha=0.6)))


def test_a_request_that_fails_fails_the_evaluation():
    model = random_model(tiny_config(vocab_size=2304))
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    broken = Harness(llama32.LLM(model, load("tiny").tokenizer, None))
    with pytest.raises(FloatingPointError):
        ask(broken, "generate_until", ("A", until("Q")))
    with pytest.raises(FloatingPointError):
        ask(broken, "loglikelihood", ("A", " b"))


def test_an_empty_list_of_requests_gives_an_empty_list(abc):
    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        assert ask(abc, kind) == []


def test_low_precision_ends_at_the_logits():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    logprobs = logits.float().log_softmax(-1)
    found, _ = score_continuation(logits, [7, 9])
    assert found == pytest.approx((logprobs[1, 7] + logprobs[2, 9]).item(), abs=1e-5)


def test_a_continuation_without_tokens_of_its_own_is_refused(ours):
    with pytest.raises(ValueError, match=r"0 tokens.*start the continuation with a space"):
        ask(ours, "loglikelihood", ("She saw a wonder", "ful"))
    with pytest.raises(ValueError, match=f"1025 tokens, allowed: 1 to {CONTEXT}"):
        ask(ours, "loglikelihood", ("", " dog" * (CONTEXT + 1)))


def test_choices_of_one_token_share_a_row_and_padding_changes_nothing(ours, monkeypatch):
    pairs = [("The dog", f" {word}") for word in ("ran", "sat", "saw", "was happy today")]
    pairs += [("One day, the little cat", " ran"), ("", "A")]
    alone = [ask(ours, "loglikelihood", pair)[0] for pair in pairs]
    shapes, rows = [], []
    forward = type(ours.llm.model).forward

    def record(model, tokens, *args, **kwargs):
        logits = forward(model, tokens, *args, **kwargs)
        shapes.append(tuple(tokens.shape))
        rows.append(len(logits))
        return logits

    monkeypatch.setattr(type(ours.llm.model), "forward", record)
    assert_same(ask(ours, "loglikelihood", *pairs), alone)
    # Four inputs, the longest first; a single input answers three requests.
    assert shapes == [(3, len(ours.tok_encode("One day, the little cat"))), (1, 1)]
    happy = len(ours.tok_encode(" was happy today", add_special_tokens=False))
    assert sum(rows) == 1 + happy + 1 + 1


# the begin token, and chat


def test_texts_are_encoded_as_in_transformers_with_one_begin_token(ours, theirs):
    rendered = ours.apply_chat_template(DIALOG)
    for text in ("A dog", "", " ", "Märchen 猫", "A <|reserved", rendered, rendered + "Once"):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
        assert ours.tok_encode(text).count(ours.prefix_token_id) == 1
    assert ours.tok_encode("A dog", False) == theirs.tok_encode("A dog", False)
    assert (ours.prefix_token_id, ours.max_length) == (theirs.prefix_token_id, theirs.max_length)


def test_control_tokens_are_encoded_only_in_a_rendered_chat(ours):
    end = ours.llm.tokenizer.special["<|eot_id|>"]
    assert end in ours.tok_encode(ours.apply_chat_template(DIALOG))
    assert end not in ours.tok_encode("A dog.<|eot_id|>")
    assert ours.prefix_token_id not in ours.tok_encode(ours.bos_text, add_special_tokens=False)


@pytest.mark.parametrize("prompted", [True, False])
def test_a_chat_is_rendered_as_by_the_template(ours, theirs, prompted):
    dialog = DIALOG if prompted else [*DIALOG, {"role": "assistant", "content": "Once upon"}]
    text = ours.apply_chat_template(dialog, add_generation_prompt=prompted)
    assert text == theirs.apply_chat_template(dialog, add_generation_prompt=prompted)
    if prompted:
        chat = ours.llm.require_chat()
        assert ours.tok_encode(text) == chat.encode(dialog, date=DATE)


def test_without_a_begin_token_the_config_or_the_end_token_is_the_prefix(tmp_path):
    write_tokenizer_json(
        tmp_path, [(b"a", b"b")], added=[{"id": 257, "content": "<|end_of_text|>"}]
    )
    tokenizer = llama32.Tokenizer.load(tmp_path)
    by_config = [
        Harness(
            llama32.LLM(random_model(tiny_config(vocab_size=300, bos_token_id=id)), tokenizer, None)
        )
        for id in (7, None)
    ]
    assert [lm.prefix_token_id for lm in by_config] == [7, 257]
    for lm in by_config:
        assert lm.tok_encode("abc") == [256, ord("c")]
        prefixed = torch.tensor([lm.prefix_token_id, 256])
        logprobs = lm.llm.model(prefixed).log_softmax(-1)
        expected = logprobs[0, 256] + logprobs[1, ord("c")]
        [found] = ask(lm, "loglikelihood_rolling", ("abc",))
        [(alone, _)] = ask(lm, "loglikelihood", ("", "abc"))
        assert found == alone == pytest.approx(expected.item(), abs=1e-5)
        empty, spaces = ask(lm, "loglikelihood", ("", " c"), (" ", "c"))
        assert empty == spaces
        assert len(ask(lm, "generate_until", ("", until("b", 3)))) == 1


# construction


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"batch_size": 0}, "batch_size is 0, allowed: 1 or more"),
        ({"batch_size": "auto"}, "batch_size is 'auto', allowed"),
        ({"dtype": "auto"}, "dtype is 'auto', allowed: float32, bfloat16, float16"),
        ({"max_length": 1}, "max_length is 1, allowed: 2 to the model's 64"),
        ({"max_length": 65}, "max_length is 65, allowed: 2 to the model's 64"),
        ({"device": "cpu"}, "device: the model is loaded already"),
        ({"dtype": "float32"}, "dtype: the model is loaded already"),
    ],
)
def test_invalid_options_are_refused(abc, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        Harness(abc.llm, **options)


def test_a_model_without_a_tokenizer_is_refused(abc):
    with pytest.raises(ValueError, match="no tokenizer"):
        Harness(llama32.LLM(abc.llm.model, None, None))


def test_a_shorter_max_length_limits_every_forward_pass(abc, monkeypatch):
    lengths = []
    forward = type(abc.llm.model).forward
    short = Harness(abc.llm, max_length=8)

    def record(model, tokens, *args, **kwargs):
        lengths.append(tokens.shape[-1])
        return forward(model, tokens, *args, **kwargs)

    monkeypatch.setattr(type(abc.llm.model), "forward", record)
    ask(short, "loglikelihood", ("abcdefghijkl", "mn"))
    ask(short, "loglikelihood_rolling", ("abcdefghijklmnopq",))
    assert set(lengths) == {8}


def test_answers_are_stored_in_the_cache_of_the_harness(abc, tmp_path, monkeypatch):
    pairs = [("ab", "cd"), ("abc", "x")]
    answers = ask(abc, "loglikelihood", *pairs)
    caching = CachingLM(Harness(abc.llm), str(tmp_path / "answers.db"))
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    caching.lm.loglikelihood(
        requests
    )  # as after an interrupted run: `caching` has not seen the answers
    monkeypatch.setattr(type(abc.llm.model), "forward", None)
    assert caching.loglikelihood(requests) == answers
    caching.dbdict.close()


# whole evaluations

CHOICES = [
    {"begin": "Once upon a time, there was a", "ends": [" girl", " park", " ran"], "gold": 0},
    {"begin": "Tom had a red", "ends": [" ball", " said", " happy dog"], "gold": 0},
    {"begin": "They were very", "ends": [" park", " happy", "."], "gold": 1},
    {"begin": "Das Märchen 猫:", "ends": [" und", " 犬", " the end"], "gold": 2},
]
TASKS: dict[str, dict[str, Any]] = {
    "ends": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{begin}}",
        "doc_to_choice": "ends",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "num_fewshot": 1,
        "fewshot_config": {"sampler": "first_n"},
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "goes_on": {
        "output_type": "generate_until",
        "doc_to_text": "{{begin}}",
        "doc_to_target": "{{ends[gold]}}",
        "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
    "rolls": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{begin}}{{ends[gold]}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> TaskManager:
    """Three tasks, with data in local files."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in CHOICES)
    (folder / "choices.jsonl").write_text(lines, "utf-8")
    files = {"data_files": {"test": str(folder / "choices.jsonl")}, "cache_dir": str(folder)}
    for name, task in TASKS.items():
        whole = {"task": name, "dataset_path": "json", "dataset_kwargs": files}
        whole |= {"test_split": "test", "fewshot_split": "test"} | task
        (folder / f"{name}.yaml").write_text(json.dumps(whole))  # JSON is YAML
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(model: Any, tasks: TaskManager, names: list[str], **options: Any) -> tuple[dict, dict]:
    """Return metrics and answers, both by task."""
    options = {"tasks": names, "task_manager": tasks, "bootstrap_iters": 0} | options
    found: Any = lm_eval.simple_evaluate(model=model, **options)
    answers = {
        name: [sample["filtered_resps"] for sample in samples]
        for name, samples in found["samples"].items()
    }
    return found["results"], answers


@pytest.mark.parametrize("chat", [False, True])
def test_a_whole_evaluation_equals_transformers(ours, theirs, theirs_bare, tasks, chat):
    options = {"apply_chat_template": chat, "fewshot_as_multiturn": chat}
    names = ["ends", "goes_on"]
    (found, answers), (expected, their_answers) = (
        evaluate(lm, tasks, names, **options) for lm in (ours, theirs)
    )
    for name, expected_answers in their_answers.items():
        for answer, reference in zip(answers[name], expected_answers, strict=True):
            assert_same(answer, reference) if name == "ends" else assert_same_text(
                answer, reference
            )
    for name in names:
        assert found[name] == expected[name]
    if not chat:
        (found, _), (expected, _) = (evaluate(lm, tasks, ["rolls"]) for lm in (ours, theirs_bare))
        for metric in ("word_perplexity,none", "bits_per_byte,none"):
            assert found["rolls"][metric] == pytest.approx(expected["rolls"][metric], rel=1e-5)


def assert_same_text(found: list[str], expected: list[str]) -> None:
    assert found == expected
    assert found[0]


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_the_registered_name_works_and_falls_back_to_the_cpu(tasks, device, monkeypatch):
    """The command line of lm-eval asks for cuda by default."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = {"model_args": f"model={TINY},dtype=float32,date={DATE}", "batch_size": 2}
    by_name, answers = evaluate("llama32", tasks, ["ends"], **options, device=device)
    direct, same = evaluate(Harness(load("tiny", dtype=torch.float32)), tasks, ["ends"])
    assert by_name == direct
    for answer, reference in zip(answers["ends"], same["ends"], strict=True):
        assert_same(answer, reference)
