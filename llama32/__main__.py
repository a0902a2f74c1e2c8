"""The command line: `llama32 --help` lists its commands.

What the library finds wrong with a request becomes one line and exit status 2. Any other exception
is a bug and shows its traceback.
"""

import json
import os
import platform
import shlex
import sys
import warnings
from functools import partial
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from typer import Argument, Option
from typer.core import TyperGroup

from llama32 import evaluate, hub
from llama32.bench.command import bench
from llama32.dialog import Dialog, converse, piped_turns
from llama32.engine.settings import EngineSettings
from llama32.info import describe, tables
from llama32.options import (
    Output,
    RopeFactor,
    Source,
    engine_settings,
    options,
    print_json,
    sampling_changes,
)
from llama32.serve.settings import ServeSettings
from llama32.terminal import TOKENS, bar, complain, note, out, read_file, read_text, show_log, warn
from llama32.train.command import finetune
from llama32.transcript import Result

MENDABLE = (ValueError, OSError, FloatingPointError, MemoryError, torch.OutOfMemoryError)


class Commands(TyperGroup):
    """The commands. What a user can mend is told in one line, and so are warnings."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = warn
            try:
                return super().invoke(ctx)
            except BrokenPipeError:  # whoever reads has seen enough; typer ends without a word
                raise
            except (*MENDABLE, RuntimeError) as error:
                if not isinstance(error, MENDABLE) and "DefaultCPUAllocator" not in str(error):
                    raise
                complain(error)
                raise typer.Exit(2) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,  # every Tab would wait for torch
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(wanted: bool | None) -> None:
    """What a bug report should begin with."""
    if wanted:
        try:
            own = installed_version("llama32")
        except PackageNotFoundError:
            own = "(not installed)"
        print(f"llama32 {own}, torch {torch.__version__}, Python {platform.python_version()}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool | None,
        Option("--version", callback=show_version, is_eager=True, help="Show the version."),
    ] = None,
) -> None:
    """Llama 3.2 in pure PyTorch. Where no --model is named, tiny answers, which comes along."""
    # Large pages, where Linux has them: weights are packed in half the time, and read faster.
    # PyTorch looks once, when it first takes memory.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character shows "?"
        stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]


@app.command()
@options(source=Source, changes=sampling_changes, output=Output)
def generate(
    source: Source,
    changes: dict[str, Any],
    output: Output,
    prompt: Annotated[str | None, Argument(help="The text to go on with.")] = None,
) -> None:
    """Continue a text.

    Without PROMPT, or for -, it is read from standard input (UTF-8; a line break at its end does
    not count). A terminal shows the PROMPT in front of what comes. Elsewhere only the new text is
    printed, and a line break.
    """
    text = read_text(prompt, "PROMPT")
    llm = source.load(bars=output.bars)
    echo = text if prompt == text and out.is_terminal else ""
    result = output.show(partial(llm.stream, text, **changes), source.model, echo)
    exit_if_interrupted(result)


@app.command()
@options(source=Source, changes=sampling_changes, output=Output)
def chat(
    source: Source,
    changes: dict[str, Any],
    output: Output,
    message: Annotated[str | None, Argument(help="A message, to get one answer.")] = None,
    system: Annotated[str | None, Option(help="What the model is told before all else.")] = None,
    tools: Annotated[
        Path | None,
        Option(help="JSON descriptions of functions it may call.", exists=True, dir_okay=False),
    ] = None,
    date: Annotated[str | None, Option(help='What it takes for today, "26 Jul 2024".')] = None,
    chat_style: Annotated[str | None, Option(help="hub or meta, where it is not known.")] = None,
) -> None:
    """Talk with a model.

    With MESSAGE (- reads it from standard input) it answers once. Without, a dialog begins: Ctrl-C
    stops an answer, /help tells the rest. Where standard input is no terminal, each of its lines is
    a turn.
    """
    one = None if message is None else read_text(message, "MESSAGE")
    is_typed = one is None and sys.stdin.isatty()
    if is_typed and output.as_json:
        raise typer.BadParameter("give a MESSAGE, or pipe the turns in", param_hint="--json")
    functions = read_tools(tools) if tools else None
    llm = source.load(chat_style, bars=output.bars)
    greeting = [{"role": "user", "content": "Hi"}]  # what cannot work is refused before one types
    llm.require_chat().encode(greeting, tools=functions, date=date)
    show = partial(output.show, model=source.model)
    dialog = Dialog(llm, show, system, tools=functions, date=date, **changes)
    if is_typed:
        note(f"{source.model}: Ctrl-C stops an answer, Ctrl-D leaves, /help tells more")
        converse(dialog)
        return
    for turn in piped_turns() if one is None else [one]:
        exit_if_interrupted(dialog.answer(turn))


@app.command()
@options(source=Source, settings=ServeSettings, engine=engine_settings)
def serve(source: Source, settings: ServeSettings, engine: EngineSettings) -> None:
    """Answer OpenAI's clients, and show what goes on inside at the address it tells.

    Ctrl-C ends it once what runs has come to its end; a second one at once.
    """
    try:
        from llama32.serve.app import create_app
        from llama32.serve.server import run
    except ImportError as error:
        raise ValueError(f'{error}; pip install "llama32[serve]"') from None
    show_log()
    app = create_app(source.load(engine=engine, bars=True), settings, source.model)
    run(app, settings, lambda url: note(f"{source.model}: {url}/v1 for clients, {url}/ to look"))


app.command()(finetune)


def read_tools(file: Path) -> list[Any]:
    """A list of descriptions, or a single one."""
    try:
        tools = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from None
    return tools if isinstance(tools, list) else [tools]


def exit_if_interrupted(result: Result) -> None:
    """Tell the shell of a Ctrl-C as programs that die of it do."""
    if result.finish_reason == "abort":
        raise typer.Exit(130)


@app.command()
def info(
    model: Annotated[str, Argument(help="A folder, a Hub id, or tiny.")] = "tiny",
    context: Annotated[
        int | None, Option(min=1, help="Tokens to size the KV cache for.", show_default="all")
    ] = None,
    rope_factor: RopeFactor = None,
    as_json: Annotated[bool, Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Tell what a model is and what it takes to run it. Its weights are not loaded."""
    facts = describe(hub.resolve(model), rope_factor=rope_factor, context=context)
    if as_json:
        print_json(facts)
        return
    out.print(facts["found"], soft_wrap=not out.is_terminal)
    for table in tables(facts):
        out.print()
        out.print(table)


@app.command()
@options(source=Source, output=Output)
def perplexity(
    source: Source,
    output: Output,
    file: Annotated[Path, Argument(help="A text in UTF-8; - is standard input.")],
    context: Annotated[int | None, Option(help="Tokens; by default 2048 or the model's.")] = None,
    stride: Annotated[int | None, Option(help="Tokens; by default half the context.")] = None,
) -> None:
    """Tell how well a model predicts a text, read in windows that begin --stride tokens apart."""
    text = read_file(file)
    llm = source.load(bars=output.bars)
    with bar("reading", TOKENS, output.bars) as move:
        found = evaluate.perplexity(llm, text, context=context, stride=stride, on_progress=move)
    if output.as_json:
        print_json({"model": source.model, **found.facts})
    else:
        print(found)


app.command()(bench)


@app.command("download")
def fetch(
    repo: Annotated[str, Argument(help="Such as meta-llama/Llama-3.2-1B-Instruct.")],
    to: Annotated[Path | None, Option(help="A folder, in place of the Hub's cache.")] = None,
    revision: Annotated[str | None, Option(help="A branch, tag or commit.")] = None,
) -> None:
    """Fetch a model from the Hub, and print the folder where it lies."""
    from llama32.download import download

    folder = download(repo, to, revision)
    print(folder)
    command = "chat" if describe(folder)["chat_format"] else 'generate "Once upon a time"'
    model = shlex.quote(str(folder)) if to or revision else repo
    note(f"next: llama32 {command} --model {model}")


def main() -> None:
    """What `llama32` runs."""
    app(prog_name="llama32")


if __name__ == "__main__":
    main()
