import dataclasses
import inspect
import os
import platform
from pathlib import Path

import pytest
import torch
from typer.testing import Result

import llama32
from llama32.cli.options import sampling_changes
from llama32.llm.loading import load
from llama32.sampling_params import Sampling
from tests.alphabet import ALPHABET, alphabet_checkpoint
from tests.checkpoints import edit_tensors, random_model, tiny_config, write_meta
from tests.commands import error_of, json_of, run

CONTEXT = 2048


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint whose answer is the alphabet."""
    return alphabet_checkpoint(tmp_path_factory.mktemp("abc"), max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def caller(tmp_path_factory) -> Path:
    """A checkpoint whose answer is a tool call."""
    return alphabet_checkpoint(tmp_path_factory.mktemp("call"), says="[f(x=1)]")


def test_help_shows_every_command_also_without_arguments():
    for result in (run("--help"), run("-h"), run()):
        for command in ("generate", "chat", "info", "perplexity", "download"):
            assert command in result.stdout + result.stderr


def test_huge_pages_are_requested_unless_the_user_sets_the_variable(monkeypatch):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    run("info", "--help")
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    run("info", "--help")
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"


def test_the_version_names_llama32_torch_and_python():
    printed = run("--version").stdout
    for part in ("llama32", torch.__version__, platform.python_version()):
        assert part in printed


def test_user_errors_are_one_line_and_bugs_show_a_traceback(folder, monkeypatch):
    def failing_with(error: Exception) -> Result:
        def load(*_, **__):
            raise error

        monkeypatch.setattr("llama32.cli.options.load", load)
        return run("generate", "a", "-m", folder)

    for user_error in (ValueError, FileNotFoundError, OSError, MemoryError, FloatingPointError):
        assert error_of(failing_with(user_error("what\nand where"))) == "error: what and where"
    assert error_of(failing_with(MemoryError())) == "error: out of memory"
    full = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    assert "can't allocate" in error_of(failing_with(full))
    for bug in (RuntimeError("shapes"), KeyError("k"), TypeError()):
        assert failing_with(bug).exception is bug


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line(tmp_path):
    def spoil(tensors):
        tensors["model.norm.weight"].fill_(float("nan"))

    edit_tensors(alphabet_checkpoint(tmp_path), spoil)
    result = run("generate", "a", "-m", tmp_path)
    assert result.exit_code == 2
    warning, error = result.stderr.splitlines()
    assert warning == f"warning: {tmp_path}: NaN or infinity in model.norm.weight"
    assert error.startswith("error: the model's logits hold nan")


# generate


def test_the_new_text_goes_to_stdout_and_the_speed_to_stderr(folder):
    result = run("generate", "a", "-m", folder, "-n", 3)
    assert (result.exit_code, result.stdout) == (0, "bcd\n")
    assert "prompt: 2 tokens, " in result.stderr
    assert "; text: 3 tokens, " in result.stderr
    assert result.stderr.endswith(" tokens/s\n")


def test_quiet_leaves_stderr_empty(folder):
    assert run("generate", "a", "-m", folder, "-n", 3, "--quiet").stderr == ""


@pytest.mark.parametrize("args", [[], ["-"]])
def test_a_prompt_can_be_piped_in(folder, args):
    result = run("generate", *args, "-m", folder, "-n", 2, stdin="xé\n\n")
    assert result.stdout == "AB\n"  # the final line break is ignored
    assert "prompt: 5 tokens" in result.stderr


def test_json_is_a_single_object_with_all_fields(folder):
    [printed] = json_of(run("generate", "a", "-m", folder, "-n", 3, "--json"))
    timings = printed.pop("timings")
    assert printed == {
        "model": str(folder),
        "text": "bcd",
        "ids": [*b"bcd"],
        "finish_reason": "length",
        "usage": {"prompt_tokens": 2, "completion_tokens": 3, "cached_tokens": 0},
    }
    assert {*timings} == {
        "prefill_seconds",
        "decode_seconds",
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
    }
    assert min(timings.values()) > 0


def test_json_holds_logprobs_on_request(folder):
    [printed] = json_of(run("generate", "a", "-m", folder, "-n", 2, "--json", "--logprobs", 1))
    assert [{*token["top"]} for token in printed["logprobs"]] == [{"98"}, {"99"}]


def test_every_sampling_setting_that_fits_a_command_line_is_an_option():
    fields = {field.name for field in dataclasses.fields(Sampling)}
    fields -= {"logit_bias", "stop_ids", "grammar"}
    assert {*inspect.signature(sampling_changes).parameters} == fields


def test_only_given_options_reach_the_sampler(folder, monkeypatch):
    received = []
    add = llama32.Engine.add

    def record(engine, ids, sampling, **options):
        received.append(sampling)
        return add(engine, ids, sampling, **options)

    monkeypatch.setattr(llama32.Engine, "add", record)
    given = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "max_new_tokens": 4,
        "seed": 0,
        "logprobs": 0,
    }
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    run("generate", "a", "-m", folder, *options, "--stop", "xx", "--stop", "yy", "--ignore-eos")
    run("generate", "a", "-m", folder)
    assert received == [
        Sampling(**given, stop=["xx", "yy"], ignore_eos=True),
        load(folder).defaults,
    ]


def test_model_options_reach_load(folder, monkeypatch):
    received = {}

    def record(where, **options):
        received.update(options)
        return load(where, **options)

    monkeypatch.setattr("llama32.cli.options.load", record)
    result = run("generate", "a", "-m", folder, "--dtype", "bfloat16", "--device", "cpu", "-n", 1)
    assert result.stdout == "b\n"
    assert (received["dtype"], received["device"]) == (torch.bfloat16, "cpu")
    meta = write_meta(random_model(tiny_config()), folder / "meta")
    run("generate", "a", "-m", meta, "--rope-factor", 16)
    assert received["rope_factor"] == 16


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["a", "--model", "no/such/folder"], "no/such/folder: no such folder"),
        (["a", "--temperature=-1"], "temperature is -1.0, allowed: 0"),
        (["a", "--top-p", "2"], "top_p is 2.0"),
        (["a", "--stop", ""], "stop is"),
        (["a", "--device", "toaster"], "--device toaster: Expected one of cpu"),
        (["a", "--device", "meta"], "--device meta: "),
        (["", "--model", "FOLDER"], "prompt: it is empty"),
        (["a" * CONTEXT, "--model", "FOLDER"], "leave no room for an answer in the model's"),
        (["caf\udce9", "--model", "FOLDER"], "PROMPT: not UTF-8 (byte 0xe9 at 3)"),
        (["a", "--model", "FOLDER", "--rope-factor", "8"], "rope_factor is for Meta's layout"),
    ],
)
def test_invalid_options_are_refused_in_one_line(folder, args, complaint):
    args = [str(folder) if arg == "FOLDER" else arg for arg in args]
    assert complaint in error_of(run("generate", *args))


def test_invalid_utf8_is_refused(folder):
    line = error_of(run("generate", "-m", folder, stdin=b"abc\xff"))
    assert line == "error: stdin: not UTF-8 (byte 0xff at 3); convert it first"
    line = error_of(run("chat", "-m", folder, stdin=b"\n\xff\n"))
    assert line == "error: stdin, line 2: not UTF-8 (byte 0xff at 0); convert it first"


def test_chat_refuses_a_base_model_before_the_first_turn(tmp_path):
    alphabet_checkpoint(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert "has no chat format" in error_of(run("chat", "-m", tmp_path))
    assert run("chat", "Hi", "-m", tmp_path, "--chat-style", "hub", "-q").stdout == ALPHABET + "\n"


# chat


def test_a_message_gets_one_answer(folder):
    result = run("chat", "Hello", "-m", folder, "-n", 5)
    assert (result.exit_code, result.stdout) == (0, "ABCDE\n")
    assert "text: 5 tokens" in result.stderr


def test_json_holds_the_message_and_its_tool_calls(caller, tmp_path):
    (tmp_path / "tools.json").write_text('{"type": "function", "function": {"name": "f"}}')
    args = ("chat", "Hello", "-m", caller, "--tools", tmp_path / "tools.json")
    [printed] = json_of(run(*args, "--json"))
    [call] = printed["message"]["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": {"x": 1}}
    assert printed["finish_reason"] == "stop"
    assert "calls f(x=1)" in run(*args).stderr.splitlines()


def test_chat_options_reach_the_prompt(folder, tmp_path):
    def length(*args) -> int:
        [printed] = json_of(run("chat", "Hello", "-m", folder, "-n", 1, "--json", *args))
        return printed["usage"]["prompt_tokens"]

    (tmp_path / "tools.json").write_text('[{"name": "f"}]')
    chat = load(folder).chat_format
    hello = {"role": "user", "content": "Hello"}
    plain = len(chat.encode([hello], date="26 Jul 2024"))
    brief = [{"role": "system", "content": "Be brief."}, hello]
    tooled = chat.encode([hello], tools=[{"name": "f"}], date="26 Jul 2024")
    assert length() == plain
    assert length("--date", "4 July 2024") == plain
    assert length("--date", "soon") == plain - len("26 Jul 2024") + len("soon")
    assert length("--system", "Be brief.") == len(chat.encode(brief, date="26 Jul 2024"))
    assert length("--tools", tmp_path / "tools.json") == len(tooled)
    assert length("--chat-style", "meta") < plain


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"a":', "tools.json: not valid JSON"),
        (b"\xff", "tools.json: not valid JSON"),
        ("[3]", "tools: expected a list of dicts"),
    ],
)
def test_a_broken_file_of_tools_is_refused(folder, tmp_path, content, complaint):
    file = tmp_path / "tools.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert complaint in error_of(run("chat", "Hi", "-m", folder, "--tools", file))


def test_each_line_piped_in_is_a_turn_of_one_dialog(folder):
    args = ("chat", "-m", folder, "-n", 5)
    assert run(*args, stdin="Hello\n\nAnd?\n").stdout == "ABCDE\nABCDE\n"
    first, second = json_of(run(*args, "--json", stdin="Hello\nAnd?\n"))
    chat = load(folder).chat_format
    history = [{"role": "user", "content": "Hello"}, first["message"]]
    history += [{"role": "user", "content": "And?"}]
    assert second["usage"]["prompt_tokens"] == len(chat.encode(history))


# perplexity


def test_the_perplexity_command_prints_the_result_of_the_library(folder, tmp_path):
    file = tmp_path / "text"
    file.write_text("abcdef, Ästhetik\n")
    expected = llama32.perplexity(load(folder), file.read_text())
    result = run("perplexity", file, "-m", folder)
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{expected}\n", "")
    for part in (
        f"perplexity {expected.perplexity:.3f},",
        "(18 tokens, context 2,048, stride 1,024)",
    ):
        assert part in result.stdout


def test_window_options_and_json_of_the_perplexity_command(folder):
    args = ("perplexity", "-", "-m", folder, "--context", 8, "--stride", 3, "--json")
    [printed] = json_of(run(*args, stdin="abcdeé\n" * 3))
    expected = llama32.perplexity(load(folder), "abcdeé\n" * 3, context=8, stride=3)
    assert printed == {
        "model": str(folder),
        "perplexity": expected.perplexity,
        "nats_per_token": expected.nats_per_token,
        "bits_per_byte": expected.bits_per_byte,
        "num_tokens": 24,
        "num_bytes": 24,
        "context": 8,
        "stride": 3,
    }


@pytest.mark.parametrize(
    ("text", "args", "complaint"),
    [
        (b"", [], "text: it is empty"),
        (b"a\xff", [], "stdin: not UTF-8 (byte 0xff at 1)"),
        (b"abc", ["--stride", 0], "stride is 0, allowed: 1 to the context, 2048"),
        (b"abc", ["--context", CONTEXT + 1], "context is 2049, allowed: 1 to the model's 2048"),
    ],
)
def test_invalid_texts_and_windows_are_refused_in_one_line(folder, text, args, complaint):
    assert complaint in error_of(run("perplexity", "-", "-m", folder, *args, stdin=text))


def test_a_missing_or_binary_file_is_named(folder, tmp_path):
    file = tmp_path / "text"
    assert f"No such file or directory: '{file}'" in error_of(run("perplexity", file, "-m", folder))
    file.write_bytes(b"\xff")
    assert f"{file}: not UTF-8" in error_of(run("perplexity", file, "-m", folder))


# download, and the model that ships with the package


def test_a_download_prints_the_folder_and_the_next_command(folder, tmp_path, monkeypatch):
    received = []

    def download(repo, to, revision):
        received.append((repo, to, revision))
        return folder

    monkeypatch.setattr("llama32.checkpoint.download.download", download)
    result = run("download", "some/model")
    assert (result.exit_code, result.stdout) == (0, f"{folder}\n")
    assert result.stderr == "next: llama32 chat --model some/model\n"
    result = run("download", "some/model", "--to", tmp_path, "--revision", "v1")
    assert result.stderr == f"next: llama32 chat --model {folder}\n"
    assert received == [("some/model", None, None), ("some/model", tmp_path, "v1")]


@pytest.mark.skipif(
    not (Path(llama32.__file__).parent / "tiny" / "model.safetensors").exists(),
    reason="the model that ships is not in this tree",
)
def test_the_default_model_tells_a_story():
    story = run("generate", "Once upon a time", "-n", 20, "--seed", 1).stdout
    assert len(story.split()) > 5
