"""Option groups shared by commands: model, sampling, output.

A group of options is a callable. The parameters of the callable become command-line options, and
the command receives the returned object, so every option is declared once.
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

from llama32.checkpoint import hub
from llama32.cli.terminal import BYTES, SHAPES, consume, note, progress_bar, speed_line, write
from llama32.engine.settings import EngineSettings
from llama32.llm.llm import LLM
from llama32.llm.loading import load
from llama32.llm.result import Result
from llama32.llm.stream import Stream
from llama32.sampling_params import Sampling

CommandFunction = Callable[..., None]


def options(**groups: Callable[..., Any]) -> Callable[[CommandFunction], CommandFunction]:
    """Replace command parameters by the option groups of the same names."""
    shared = {name: inspect.signature(group).parameters for name, group in groups.items()}

    def decorate(command: CommandFunction) -> CommandFunction:
        @wraps(command)
        def run(**values: Any) -> None:
            for name, group in groups.items():
                values[name] = group(**{option: values.pop(option) for option in shared[name]})
            command(**values)

        own = inspect.signature(command).parameters.values()
        parameters = [parameter for parameter in own if parameter.name not in groups]
        parameters += [parameter for group in shared.values() for parameter in group.values()]
        by_name = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in parameters]
        run.__signature__ = inspect.Signature(by_name)  # pyright: ignore[reportAttributeAccessIssue]
        return run

    return decorate


model_option = partial(Option, rich_help_panel="Model")
engine_option = partial(Option, rich_help_panel="Engine")
sampling_option = partial(Option, rich_help_panel="Sampling (default: the checkpoint's settings)")


class Dtype(StrEnum):
    """Dtypes of weights and activations."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class QuantizationScheme(StrEnum):
    """Quantization schemes of weights."""

    int8 = "int8"
    int4 = "int4"
    fp8 = "fp8"


RopeFactor = Annotated[
    float | None,
    model_option(
        help="RoPE scaling factor, for Meta's layout only. [default: 32 for Llama 3.2, else 8]"
    ),
]


@dataclass
class ModelOptions:
    """Options that select the model, device, dtype and optimizations."""

    model: Annotated[str, model_option("--model", "-m", help="A folder, a Hub id, or tiny.")] = (
        "tiny"
    )
    device: Annotated[
        str | None, model_option(help="cpu, cuda, cuda:1, ... [default: the GPU if present]")
    ] = None
    dtype: Annotated[
        Dtype | None, model_option(help="Dtype of weights and activations. [default: as stored]")
    ] = None
    rope_factor: RopeFactor = None
    quantize: Annotated[
        QuantizationScheme | None,
        model_option(help="Quantize the weights; combine with --optimize for speed."),
    ] = None
    optimize: Annotated[
        bool,
        model_option("--optimize", help="Time the kernels of each layer and use the fastest."),
    ] = False
    lora: Annotated[
        Path | None, model_option(help="Folder of an adapter to merge into the weights.")
    ] = None
    compile: Annotated[
        bool, model_option("--compile", help="Compile the layers with torch.compile first.")
    ] = False

    def load(
        self,
        chat_style: str | None = None,
        *,
        engine: EngineSettings | None = None,
        bars: bool,
    ) -> LLM:
        """Load the model with a progress bar; downloads show their own bars."""
        try:
            torch.ones(1, device=self.device).item()
        except (RuntimeError, AssertionError) as error:  # unknown or absent device
            reason = str(error).partition("\n")[0]
            raise ValueError(f"--device {self.device}: {reason}") from None
        folder = hub.resolve(self.model)
        with progress_bar("loading", BYTES, bars) as on_progress:
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
            with progress_bar("compiling", SHAPES, bars) as on_progress:
                llm.warm_up(on_progress)
        return llm


def engine_settings(
    max_running: Annotated[
        int,
        engine_option(
            min=1, help="Maximum number of requests that run at once; more requests wait."
        ),
    ] = EngineSettings.max_running,
    cache_tokens: Annotated[
        int | None,
        engine_option(min=1, help="Tokens in the KV cache. [default: by free memory]"),
    ] = None,
    cache_dtype: Annotated[
        str | None, engine_option(help="int8: half the cache memory, with rounded keys and values.")
    ] = None,
) -> EngineSettings:
    """Return the engine settings that `serve` offers as options."""
    return EngineSettings(**locals())


def sampling_changes(
    temperature: Annotated[
        float | None,
        sampling_option(help="0: always the most probable token; higher: more random."),
    ] = None,
    top_p: Annotated[
        float | None, sampling_option(help="Sample from the most probable tokens up to this mass.")
    ] = None,
    top_k: Annotated[
        int | None, sampling_option(help="Sample from this many of the most probable tokens.")
    ] = None,
    min_p: Annotated[
        float | None,
        sampling_option(help="Minimum probability relative to the most probable token."),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        sampling_option(help="Above 1: tokens of prompt and output become less probable."),
    ] = None,
    presence_penalty: Annotated[
        float | None,
        sampling_option(help="Subtract this from the logit of every token in the output."),
    ] = None,
    frequency_penalty: Annotated[
        float | None, sampling_option(help="Subtract this from the logit once per occurrence.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, sampling_option("--max-new-tokens", "-n", help="Maximum number of new tokens.")
    ] = None,
    seed: Annotated[
        int | None, sampling_option(help="Seed of the sampler; the same seed gives the same text.")
    ] = None,
    stop: Annotated[
        list[str] | None, sampling_option(help="Stop before this text; repeatable.")
    ] = None,
    ignore_eos: Annotated[
        bool | None, sampling_option("--ignore-eos", help="Continue after end-of-text tokens.")
    ] = None,
    logprobs: Annotated[
        int | None,
        sampling_option(help="With --json: log-probabilities, also of this many top tokens."),
    ] = None,
) -> dict[str, Any]:
    """Return the `Sampling` fields set on the command line, validated before a model loads."""
    changes = {name: value for name, value in locals().items() if value not in (None, [])}
    Sampling(**changes)
    return changes


@dataclass
class OutputOptions:
    """Output format of an answer."""

    as_json: Annotated[bool, Option("--json", help="Print a JSON object instead of text.")] = False
    quiet: Annotated[bool, Option("--quiet", "-q", help="Hide progress bars and speed.")] = False

    @property
    def show_bars(self) -> bool:
        return not self.quiet

    def show(self, start: Callable[..., Stream], model: str, echo: str = "") -> Result:
        """Print the streamed answer to stdout and its speed to stderr."""
        if self.as_json:
            result, timings = consume(start, lambda piece: None, bars=self.show_bars)
            fields = {name: value for name, value in asdict(result).items() if value is not None}
            print_json({"model": model, **fields, "timings": asdict(timings)})
            return result
        result, timings = consume(start, write, echo=echo, bars=self.show_bars)
        write("\n")
        calls = (result.message or {}).get("tool_calls", ())
        for call in (call["function"] for call in calls):
            arguments = ", ".join(f"{name}={value!r}" for name, value in call["arguments"].items())
            note(f"calls {call['name']}({arguments})")
        if result.finish_reason == "abort":
            note("interrupted")
        if not self.quiet:
            note(speed_line(result, timings))
        return result


def print_json(value: dict[str, Any]) -> None:
    """Print a JSON object on a single line."""
    write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
