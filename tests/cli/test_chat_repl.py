from pathlib import Path

import pytest

from llama32.cli.chat_repl import Dialog, run_repl
from llama32.cli.options import OutputOptions
from llama32.llm.llm import LLM
from llama32.llm.loading import load
from llama32.model import Llama
from llama32.text.chat import Chat
from tests.alphabet import ALPHABET, alphabet_checkpoint

CONTEXT = 2048


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint whose answer is the alphabet."""
    return alphabet_checkpoint(tmp_path_factory.mktemp("abc"), max_position_embeddings=CONTEXT)


def typed(monkeypatch, *lines: str) -> None:
    """Make `input` return the lines, then raise EOFError as for Ctrl-D."""
    remaining = [*lines]

    def read(prompt: str) -> str:
        if not remaining:
            raise EOFError
        return remaining.pop(0)

    monkeypatch.setattr("builtins.input", read)


def talk(folder: Path, **settings) -> Dialog:
    show = lambda start: OutputOptions().show(start, model="alphabet")  # noqa: E731
    return Dialog(load(folder), show, "Be brief.", **settings)


def roles(dialog: Dialog) -> list[str]:
    return [message["role"] for message in dialog.messages]


def test_a_dialog_keeps_the_history_until_a_reset(folder, monkeypatch, capsys):
    dialog = talk(folder, max_new_tokens=3)
    typed(monkeypatch, "Hello", "", "And?")
    run_repl(dialog)
    assert roles(dialog) == ["system", "user", "assistant", "user", "assistant"]
    assert capsys.readouterr().out == "ABC\n\nABC\n\n\n"
    typed(monkeypatch, "/reset", "Hello", "/exit", "never sent")
    run_repl(dialog)
    assert roles(dialog) == ["system", "user", "assistant"]
    assert dialog.messages[-1]["content"] == "ABC"


def test_unknown_commands_print_help_and_do_not_reach_the_model(folder, monkeypatch, capsys):
    dialog = talk(folder)
    for command in ("/help", "/", "/rest"):
        typed(monkeypatch, command)
        run_repl(dialog)
        assert "/reset " in capsys.readouterr().err
    assert roles(dialog) == ["system"]
    typed(monkeypatch, "/etc/hosts: what is it?")
    run_repl(dialog)
    assert roles(dialog) == ["system", "user", "assistant"]


def test_a_dialog_longer_than_the_context_continues_after_a_reset(folder, monkeypatch, capsys):
    dialog = talk(folder, max_new_tokens=3)
    typed(monkeypatch, "Hello", "long " * CONTEXT, "And?", "/reset", "Hello")
    run_repl(dialog)
    captured = capsys.readouterr()
    assert captured.out == "ABC\n\n\nABC\n\nABC\n\n\n"
    assert f"in the model's context of {CONTEXT}" in captured.err
    assert "; /reset starts a new dialog\n" in captured.err
    assert roles(dialog) == ["system", "user", "assistant"]


def test_an_answer_that_fills_the_context_prints_a_note(folder, monkeypatch, capsys):
    dialog = talk(folder)
    room = CONTEXT - len(dialog.llm.chat_format.encode([*dialog.messages, user("")]))
    typed(monkeypatch, "x" * (room - 5))
    run_repl(dialog)
    captured = capsys.readouterr()
    assert captured.out.startswith("ABCDE\n")
    assert f"the context of {CONTEXT} tokens is full; /reset starts a new dialog" in captured.err


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def test_an_interrupted_answer_stays_in_the_dialog(folder, monkeypatch, capsys):
    pieces = []

    def interrupted(piece: str) -> None:
        pieces.append(piece)
        if piece == "C":
            raise KeyboardInterrupt

    dialog = talk(folder)
    typed(monkeypatch, "Hello")
    with monkeypatch.context() as patch:
        patch.setattr("llama32.cli.options.write", interrupted)
        run_repl(dialog)
    assert dialog.messages[-1] == {"role": "assistant", "content": "ABC", "tool_calls": []}
    assert "interrupted\n" in capsys.readouterr().err
    typed(monkeypatch, "Go on")
    run_repl(dialog)
    assert capsys.readouterr().out.startswith(ALPHABET)


@pytest.mark.parametrize(("owner", "method"), [(LLM, "stream_chat"), (Llama, "forward")])
def test_a_turn_without_an_answer_is_dropped(folder, monkeypatch, capsys, owner, method):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, method, interrupt)
    dialog = talk(folder)
    typed(monkeypatch, "Hello")
    run_repl(dialog)
    assert "interrupted\n" in capsys.readouterr().err
    assert roles(dialog) == ["system"]


def test_several_tool_calls_stay_in_the_history_as_text(tmp_path, monkeypatch):
    def parse(self, ids) -> tuple[dict, None]:
        calls = [{"function": {"name": name, "arguments": {}}} for name in "fg"]
        return {"role": "assistant", "content": "", "tool_calls": calls}, None

    monkeypatch.setattr(Chat, "parse_with_problem", parse)
    dialog = talk(alphabet_checkpoint(tmp_path, says="[f(),g"))
    typed(monkeypatch, "Hello", "And?")
    run_repl(dialog)
    assert roles(dialog) == ["system", "user", "assistant", "user", "assistant"]
    assert dialog.messages[2] == {"role": "assistant", "content": "[f(),g"}
