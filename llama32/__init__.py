"""Llama 3.2 in pure PyTorch: to read, to import, to modify.

Shapes have the same letters everywhere:

    B  sequences in a batch          H  query heads             V  vocabulary
    T  new tokens of a sequence      K  key and value heads     L  layers
    S  tokens in context             D  size of a head          P  pages of the cache
    N  packed tokens of a step       R  rotary pairs, D / 2     C  token slots of a page
    E  width of the residual stream  F  width of the mlp
"""

import warnings
from typing import TYPE_CHECKING, Any

from llama32.adapters.lora import (
    LoRA,
    add_lora,
    attach_lora,
    merge_lora,
    remove_lora,
    unmerge_lora,
    using_lora,
)
from llama32.adapters.peft import load_lora, save_lora
from llama32.attention import eager, fused, mix, pattern
from llama32.checkpoint.reader import inspect
from llama32.checkpoint.writer import save
from llama32.config import LlamaConfig, RopeScaling
from llama32.engine.async_engine import AsyncEngine
from llama32.engine.draft_model import DraftModel
from llama32.engine.engine import Engine
from llama32.engine.prompt_lookup import PromptLookup
from llama32.engine.settings import EngineSettings
from llama32.evaluation.perplexity import Perplexity, perplexity, token_losses
from llama32.interp.hooks import capture, edit
from llama32.kernels.autotune import optimize
from llama32.llm.llm import LLM
from llama32.llm.loading import load, load_model
from llama32.llm.result import Result
from llama32.llm.stream import Stream
from llama32.model import Llama
from llama32.quantization.quantize import quantize
from llama32.sampling_params import Grammar, Sampling
from llama32.text.chat import Chat
from llama32.text.tokenizer import Tokenizer

__all__ = [
    "LLM",
    "AsyncEngine",
    "Chat",
    "DraftModel",
    "Engine",
    "EngineSettings",
    "Grammar",
    "Llama",
    "LlamaConfig",
    "LoRA",
    "Perplexity",
    "PromptLookup",
    "Result",
    "RopeScaling",
    "Sampling",
    "Stream",
    "Tokenizer",
    "add_lora",
    "attach_lora",
    "capture",
    "eager",
    "edit",
    "fused",
    "inspect",
    "load",
    "load_lora",
    "load_model",
    "merge_lora",
    "mix",
    "optimize",
    "pattern",
    "perplexity",
    "quantize",
    "remove_lora",
    "save",
    "save_lora",
    "token_losses",
    "unmerge_lora",
    "using_lora",
]

DEPRECATED = {"put_lora": "attach_lora"}  # old names and new names

if not TYPE_CHECKING:  # a type checker would accept any name

    def __getattr__(name: str) -> Any:
        """Return a deprecated name's successor, with a DeprecationWarning."""
        if name not in DEPRECATED:
            raise AttributeError(f"module 'llama32' has no attribute {name!r}")
        new = DEPRECATED[name]
        message = f"llama32.{name} is deprecated and goes away in release 0.3: use llama32.{new}"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return globals()[new]
