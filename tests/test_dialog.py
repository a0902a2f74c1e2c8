from pathlib import Path

import pytest

from llama32.chat import Chat
from llama32.dialog import Dialog, converse
from llama32.llm import LLM
from llama32.loading import load
from llama32.model import Llama
from llama32.options import Output
from tests.alphabet import ALPHABET, alphabet_checkpoint

CONTEXT = 2048


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint that says the alphabet."""
    return alphabet_checkpoint(tmp_path_factory.mktemp("abc"), max_position_embeddings=CONTEXT)


def typed(monkeypatch, *lines: str) -> None:
    """What `input` will give; then comes Ctrl-D."""
    left = [*lines]

    def read(prompt: str) -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    monkeypatch.setattr("builtins.input", read)


def talk(folder: Path, **settings) -> Dialog:
    show = lambda start: Output().show(start, model="alphabet")  # noqa: E731
    return Dialog(load(folder), show, "Be brief.", **settings)


def roles(dialog: Dialog) -> list[str]:
    return [message["role"] for message in dialog.messages]


def test_a_dialog_remembers_until_it_is_reset(folder, monkeypatch, capsys):
    dialog = talk(folder, max_new_tokens=3)
    typed(monkeypatch, "Hello", "", "And?")
    converse(dialog)
    assert roles(dialog) == ["system", "user", "assistant", "user", "assistant"]
    assert capsys.readouterr().out == "ABC\n\nABC\n\n\n"
    typed(monkeypatch, "/reset", "Hello", "/exit", "never said")
    converse(dialog)
    assert roles(dialog) == ["system", "user", "assistant"]
    assert dialog.messages[-1]["content"] == "ABC"


def test_commands_are_told_and_are_not_for_the_model(folder, monkeypatch, capsys):
    dialog = talk(folder)
    for command in ("/help", "/", "/rest"):
        typed(monkeypatch, command)
        converse(dialog)
        assert "/reset " in capsys.readouterr().err
    assert roles(dialog) == ["system"]
    typed(monkeypatch, "/etc/hosts: what is it?")
    converse(dialog)
    assert roles(dialog) == ["system", "user", "assistant"]


def test_a_dialog_longer_than_the_context_goes_on_after_a_reset(folder, monkeypatch, capsys):
    dialog = talk(folder, max_new_tokens=3)
    typed(monkeypatch, "Hello", "long " * CONTEXT, "And?", "/reset", "Hello")
    converse(dialog)
    said = capsys.readouterr()
    assert said.out == "ABC\n\n\nABC\n\nABC\n\n\n"
    assert f"in the model's context of {CONTEXT}" in said.err
    assert "; /reset starts a new dialog\n" in said.err
    assert roles(dialog) == ["system", "user", "assistant"]


def test_an_answer_that_fills_the_context_says_so(folder, monkeypatch, capsys):
    dialog = talk(folder)
    room = CONTEXT - len(dialog.llm.chat_format.encode([*dialog.messages, user("")]))
    typed(monkeypatch, "x" * (room - 5))
    converse(dialog)
    said = capsys.readouterr()
    assert said.out.startswith("ABCDE\n")
    assert f"the context of {CONTEXT} tokens is full; /reset starts a new dialog" in said.err


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def test_an_interrupted_answer_is_kept_as_far_as_it_came(folder, monkeypatch, capsys):
    pieces = []

    def interrupted(piece: str) -> None:
        pieces.append(piece)
        if piece == "C":
            raise KeyboardInterrupt

    dialog = talk(folder)
    typed(monkeypatch, "Hello")
    with monkeypatch.context() as patch:
        patch.setattr("llama32.options.write", interrupted)
        converse(dialog)
    assert dialog.messages[-1] == {"role": "assistant", "content": "ABC", "tool_calls": []}
    assert "interrupted\n" in capsys.readouterr().err
    typed(monkeypatch, "Go on")
    converse(dialog)
    assert capsys.readouterr().out.startswith(ALPHABET)


@pytest.mark.parametrize(("place", "method"), [(LLM, "stream_chat"), (Llama, "forward")])
def test_a_turn_without_any_answer_is_forgotten(folder, monkeypatch, capsys, place, method):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(place, method, interrupt)
    dialog = talk(folder)
    typed(monkeypatch, "Hello")
    converse(dialog)
    assert "interrupted\n" in capsys.readouterr().err
    assert roles(dialog) == ["system"]


def test_several_tool_calls_stay_in_the_history_as_text(tmp_path, monkeypatch):
    def read(self, ids) -> tuple[dict, None]:
        calls = [{"function": {"name": name, "arguments": {}}} for name in "fg"]
        return {"role": "assistant", "content": "", "tool_calls": calls}, None

    monkeypatch.setattr(Chat, "read", read)
    dialog = talk(alphabet_checkpoint(tmp_path, says="[f(),g"))
    typed(monkeypatch, "Hello", "And?")
    converse(dialog)
    assert roles(dialog) == ["system", "user", "assistant", "user", "assistant"]
    assert dialog.messages[2] == {"role": "assistant", "content": "[f(),g"}
