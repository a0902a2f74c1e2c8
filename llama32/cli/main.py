"""The command line: `llama32 --help` lists the commands.

An error that a user can fix becomes one line and exit status 2. Any other exception is a bug and
shows a traceback.
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

from llama32.checkpoint import hub
from llama32.cli.bench import bench
from llama32.cli.chat_repl import Dialog, piped_messages, run_repl
from llama32.cli.finetune import finetune
from llama32.cli.info import describe, tables
from llama32.cli.options import (
    ModelOptions,
    OutputOptions,
    RopeFactor,
    engine_settings,
    options,
    print_json,
    sampling_changes,
)
from llama32.cli.terminal import (
    TOKENS,
    note,
    out,
    print_error,
    print_warning,
    progress_bar,
    read_file,
    read_text,
    show_log,
)
from llama32.engine.settings import EngineSettings
from llama32.evaluation.perplexity import perplexity as evaluate_perplexity
from llama32.llm.result import Result
from llama32.serve.settings import ServeSettings

USER_ERRORS = (ValueError, OSError, FloatingPointError, MemoryError, torch.OutOfMemoryError)


class CommandGroup(TyperGroup):
    """Commands that print user errors and warnings as single lines."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = print_warning
            warnings.filterwarnings("default", "--.* is now --", DeprecationWarning)  # old flags
            try:
                return super().invoke(ctx)
            except BrokenPipeError:  # the reader closed the pipe; typer exits silently
                raise
            except (*USER_ERRORS, RuntimeError) as error:
                if not isinstance(error, USER_ERRORS) and "DefaultCPUAllocator" not in str(error):
                    raise
                print_error(error)
                raise typer.Exit(2) from None


app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,  # completion would import torch at every Tab
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(wanted: bool | None) -> None:
    """Print the versions for a bug report."""
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
    """Llama 3.2 in pure PyTorch. The default --model is tiny, which ships with the package."""
    # Huge pages on Linux halve the time to pack weights and speed up reads. PyTorch reads the
    # variable once, at its first allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    for stream in (sys.stdout, sys.stderr):  # "?" for characters that the terminal lacks
        stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]


@app.command()
@options(source=ModelOptions, changes=sampling_changes, output=OutputOptions)
def generate(
    source: ModelOptions,
    changes: dict[str, Any],
    output: OutputOptions,
    prompt: Annotated[str | None, Argument(help="The text to continue.")] = None,
) -> None:
    """Continue a text.

    Without PROMPT, or with -, the text comes from standard input (UTF-8; a final line break is
    ignored). A terminal shows PROMPT before the new text; a file or pipe receives only the new
    text and a line break.
    """
    text = read_text(prompt, "PROMPT")
    llm = source.load(bars=output.show_bars)
    echo = text if prompt == text and out.is_terminal else ""
    result = output.show(partial(llm.stream, text, **changes), source.model, echo)
    exit_if_interrupted(result)


@app.command()
@options(source=ModelOptions, changes=sampling_changes, output=OutputOptions)
def chat(
    source: ModelOptions,
    changes: dict[str, Any],
    output: OutputOptions,
    message: Annotated[str | None, Argument(help="A message for a single answer.")] = None,
    system: Annotated[str | None, Option(help="System message.")] = None,
    tools: Annotated[
        Path | None,
        Option(help="JSON file of functions that the model may call.", exists=True, dir_okay=False),
    ] = None,
    date: Annotated[
        str | None, Option(help='Date for the model, as in "26 Jul 2024". [default: today]')
    ] = None,
    chat_style: Annotated[
        str | None, Option(help="hub or meta, for checkpoints without a chat template.")
    ] = None,
) -> None:
    """Chat with a model.

    MESSAGE (- for standard input) gets a single answer. Without MESSAGE a dialog starts: Ctrl-C
    stops an answer, /help lists the commands. If standard input is not a terminal, every line is a
    turn.
    """
    text = None if message is None else read_text(message, "MESSAGE")
    is_typed = text is None and sys.stdin.isatty()
    if is_typed and output.as_json:
        raise typer.BadParameter("give a MESSAGE, or pipe the turns in", param_hint="--json")
    functions = read_tools(tools) if tools else None
    llm = source.load(chat_style, bars=output.show_bars)
    greeting = [{"role": "user", "content": "Hi"}]  # refuse before the first turn
    llm.require_chat().encode(greeting, tools=functions, date=date)
    show = partial(output.show, model=source.model)
    dialog = Dialog(llm, show, system, tools=functions, date=date, **changes)
    if is_typed:
        note(f"{source.model}: Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands")
        run_repl(dialog)
        return
    for turn in piped_messages() if text is None else [text]:
        exit_if_interrupted(dialog.answer(turn))


@app.command()
@options(source=ModelOptions, settings=ServeSettings, engine=engine_settings)
def serve(source: ModelOptions, settings: ServeSettings, engine: EngineSettings) -> None:
    """Serve an OpenAI-compatible API, and a page that shows tokens and the KV cache.

    Ctrl-C stops the server after running requests have ended; a second Ctrl-C stops at once.
    """
    try:
        from llama32.serve.app import create_app
        from llama32.serve.server import run
    except ImportError as error:
        raise ValueError(f'{error}; pip install "llama32[serve]"') from None
    show_log()
    app = create_app(source.load(engine=engine, bars=True), settings, source.model)
    run(
        app,
        settings,
        lambda url: note(f"{source.model}: {url}/v1 for clients, {url}/ for the page"),
    )


app.command()(finetune)


def read_tools(file: Path) -> list[Any]:
    """Read a JSON file with a tool description or a list of descriptions."""
    try:
        tools = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from None
    return tools if isinstance(tools, list) else [tools]


def exit_if_interrupted(result: Result) -> None:
    """Exit with status 130 after Ctrl-C, as interrupted programs do."""
    if result.finish_reason == "abort":
        raise typer.Exit(130)


@app.command()
def info(
    model: Annotated[str, Argument(help="A folder, a Hub id, or tiny.")] = "tiny",
    context: Annotated[
        int | None,
        Option(
            min=1,
            help="Size the KV cache for this many tokens.",
            show_default="the model's context",
        ),
    ] = None,
    rope_factor: RopeFactor = None,
    as_json: Annotated[bool, Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Show a model's config, sizes and settings, without loading its weights."""
    facts = describe(hub.resolve(model), rope_factor=rope_factor, context=context)
    if as_json:
        print_json(facts)
        return
    out.print(facts["found"], soft_wrap=not out.is_terminal)
    for table in tables(facts):
        out.print()
        out.print(table)


@app.command()
@options(source=ModelOptions, output=OutputOptions)
def perplexity(
    source: ModelOptions,
    output: OutputOptions,
    file: Annotated[Path, Argument(help="A UTF-8 text file; - for standard input.")],
    context: Annotated[
        int | None, Option(help="Tokens per window. [default: 2048 or the model's context]")
    ] = None,
    stride: Annotated[
        int | None, Option(help="Tokens between windows. [default: half the context]")
    ] = None,
) -> None:
    """Measure the perplexity of a text in windows that start --stride tokens apart."""
    text = read_file(file)
    llm = source.load(bars=output.show_bars)
    with progress_bar("reading", TOKENS, output.show_bars) as move:
        result = evaluate_perplexity(llm, text, context=context, stride=stride, on_progress=move)
    if output.as_json:
        print_json({"model": source.model, **result.facts})
    else:
        print(result)


app.command()(bench)


@app.command("download")
def download_model(
    repo: Annotated[str, Argument(help="A Hub id, as in meta-llama/Llama-3.2-1B-Instruct.")],
    to: Annotated[Path | None, Option(help="Target folder instead of the Hub's cache.")] = None,
    revision: Annotated[str | None, Option(help="A branch, tag or commit.")] = None,
) -> None:
    """Download a model from the Hub and print its folder."""
    from llama32.checkpoint.download import download

    folder = download(repo, to, revision)
    print(folder)
    command = "chat" if describe(folder)["chat_format"] else 'generate "Once upon a time"'
    model = shlex.quote(str(folder)) if to or revision else repo
    note(f"next: llama32 {command} --model {model}")


def main() -> None:
    """Run the `llama32` command line."""
    app(prog_name="llama32")
