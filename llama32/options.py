"""What commands have in common: options that say which model, how to sample, how to print.

A group of options is a callable: its parameters are the options, and what it returns is handed to
the command, so that none of them is written twice.
"""

import inspect
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any

import torch
from typer import Option

from llama32 import hub
from llama32.engine.settings import EngineSettings
from llama32.llm import LLM
from llama32.loading import load
from llama32.settings import Sampling
from llama32.stream import Stream
from llama32.terminal import BYTES, SHAPES, bar, listen, note, speed, write
from llama32.transcript import Result

Command = Callable[..., None]


def options(**groups: Callable[..., Any]) -> Callable[[Command], Command]:
    """Put groups of options in the place of a command's parameters of the same names."""
    shared = {name: inspect.signature(group).parameters for name, group in groups.items()}

    def decorate(command: Command) -> Command:
        @wraps(command)
        def run(**given: Any) -> None:
            for name, group in groups.items():
                given[name] = group(**{option: given.pop(option) for option in shared[name]})
            command(**given)

        own = inspect.signature(command).parameters.values()
        parameters = [parameter for parameter in own if parameter.name not in groups]
        parameters += [parameter for group in shared.values() for parameter in group.values()]
        named = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in parameters]
        run.__signature__ = inspect.Signature(named)  # pyright: ignore[reportAttributeAccessIssue]
        return run

    return decorate


about_model = partial(Option, rich_help_panel="Model")
about_engine = partial(Option, rich_help_panel="Engine")
about_sampling = partial(Option, rich_help_panel="Sampling (where not given, as the model says)")


class Dtype(StrEnum):
    """What weights and activations can be held in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Scheme(StrEnum):
    """What weights can be quantized to."""

    int8 = "int8"
    int4 = "int4"
    fp8 = "fp8"


RopeFactor = Annotated[
    float | None,
    about_model(help="RoPE scaling of a checkpoint in Meta's layout, which does not tell it."),
]


@dataclass
class Source:
    """Which model, and where it is to run."""

    model: Annotated[str, about_model("--model", "-m", help="A folder, a Hub id, or tiny.")] = (
        "tiny"
    )
    device: Annotated[
        str | None, about_model(help="cpu, cuda, ...: by default the GPU if there is one.")
    ] = None
    dtype: Annotated[Dtype | None, about_model(help="By default as it is stored.")] = None
    rope_factor: RopeFactor = None
    quantize: Annotated[
        Scheme | None, about_model(help="Keep the weights in fewer bits; with --optimize.")
    ] = None
    optimize: Annotated[
        bool, about_model("--optimize", help="Take the fastest form of each layer, found by trial.")
    ] = False
    lora: Annotated[
        Path | None, about_model(help="An adapter's folder, to be merged into the weights.")
    ] = None
    compile: Annotated[
        bool, about_model("--compile", help="Run through torch.compile, once it has compiled.")
    ] = False

    def load(
        self,
        chat_style: str | None = None,
        *,
        engine: EngineSettings | None = None,
        bars: bool,
    ) -> LLM:
        """Load it, with a progress bar; a download brings its own."""
        try:
            torch.ones(1, device=self.device).item()
        except (RuntimeError, AssertionError) as error:  # as torch refuses an unknown or absent one
            reason = str(error).partition("\n")[0]
            raise ValueError(f"--device {self.device}: {reason}") from None
        folder = hub.resolve(self.model)
        with bar("loading", BYTES, bars) as on_progress:
            llm = load(
                folder,
                device=self.device,
                dtype=getattr(torch, self.dtype) if self.dtype else None,
                rope_factor=self.rope_factor,
                quantize=self.quantize,
                optimize=self.optimize,
                lora=self.lora,
                chat_style=chat_style,
                on_progress=on_progress,
                engine=replace(engine or EngineSettings(), compiled=self.compile),
            )
        if self.compile:
            with bar("compiling", SHAPES, bars) as on_progress:
                llm.warm_up(on_progress)
        return llm


def engine_settings(
    max_running: Annotated[
        int, about_engine(min=1, help="Requests that run at once; more wait.")
    ] = EngineSettings.max_running,
    cache_tokens: Annotated[
        int | None, about_engine(min=1, help="Size of the KV cache; by default what memory allows.")
    ] = None,
    cache_dtype: Annotated[
        str | None, about_engine(help="int8 halves the memory of the cache, and rounds it.")
    ] = None,
) -> EngineSettings:
    """Those of the settings that a server needs."""
    return EngineSettings(**locals())


def sampling_changes(
    temperature: Annotated[
        float | None, about_sampling(help="0 always takes the likeliest token; higher is bolder.")
    ] = None,
    top_p: Annotated[
        float | None, about_sampling(help="Draw from the likeliest that reach this probability.")
    ] = None,
    top_k: Annotated[
        int | None, about_sampling(help="Draw from this many of the likeliest.")
    ] = None,
    min_p: Annotated[
        float | None, about_sampling(help="Draw from those at least this likely, the best being 1.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, about_sampling(help="Above 1, tokens of prompt and text get less likely.")
    ] = None,
    presence_penalty: Annotated[
        float | None, about_sampling(help="Lower the logit of each token in the text by this.")
    ] = None,
    frequency_penalty: Annotated[
        float | None, about_sampling(help="The same, for every time that it occurs.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, about_sampling("--max-new-tokens", "-n", help="End after this many.")
    ] = None,
    seed: Annotated[int | None, about_sampling(help="The same seed gives the same text.")] = None,
    stop: Annotated[
        list[str] | None, about_sampling(help="End before this text; may be given repeatedly.")
    ] = None,
    ignore_eos: Annotated[
        bool | None, about_sampling("--ignore-eos", help="Go on where the model would end.")
    ] = None,
    logprobs: Annotated[
        int | None,
        about_sampling(help="With --json: of each token, and this many of the likeliest."),
    ] = None,
) -> dict[str, Any]:
    """The fields of `Sampling` that were given, checked before a model is loaded."""
    given = {name: value for name, value in locals().items() if value not in (None, [])}
    Sampling(**given)
    return given


@dataclass
class Output:
    """How an answer is printed."""

    as_json: Annotated[bool, Option("--json", help="Print a JSON object in place of text.")] = False
    quiet: Annotated[bool, Option("--quiet", "-q", help="No progress bars, no speed.")] = False

    @property
    def bars(self) -> bool:
        return not self.quiet

    def show(self, start: Callable[..., Stream], model: str, echo: str = "") -> Result:
        """Print the answer that `start` streams, and its speed to stderr."""
        if self.as_json:
            result, timings = listen(start, lambda piece: None, bars=self.bars)
            given = {name: value for name, value in asdict(result).items() if value is not None}
            print_json({"model": model, **given, "timings": asdict(timings)})
            return result
        result, timings = listen(start, write, echo=echo, bars=self.bars)
        write("\n")
        calls = (result.message or {}).get("tool_calls", ())
        for call in (call["function"] for call in calls):
            given = ", ".join(f"{name}={value!r}" for name, value in call["arguments"].items())
            note(f"calls {call['name']}({given})")
        if result.finish_reason == "abort":
            note("interrupted")
        if not self.quiet:
            note(speed(result, timings))
        return result


def print_json(value: dict[str, Any]) -> None:
    """One object on one line."""
    write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
