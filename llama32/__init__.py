"""Llama 3.2 in pure PyTorch: to read, to import, to bend.

Shapes are written with the same letters everywhere:

    B  sequences in a batch          H  query heads             V  vocabulary
    T  new tokens of a sequence      K  key and value heads     L  layers
    S  its tokens in context         D  size of a head          P  pages of the cache
    N  packed tokens of a step       R  rotary pairs, D / 2     C  token slots of a page
    E  width of the residual stream  F  width of the mlp
"""

from llama32.adapt.lora import (
    LoRA,
    add_lora,
    merge_lora,
    put_lora,
    remove_lora,
    unmerge_lora,
    using_lora,
)
from llama32.adapt.optimize import optimize
from llama32.adapt.peft import load_lora, save_lora
from llama32.adapt.quantize import quantize
from llama32.adapt.trace import capture, edit
from llama32.attention import eager, fused, mix, pattern
from llama32.chat import Chat
from llama32.checkpoint import inspect
from llama32.config import LlamaConfig, RopeScaling
from llama32.engine.asynchronous import AsyncEngine
from llama32.engine.draft import DraftModel
from llama32.engine.engine import Engine
from llama32.engine.lookup import PromptLookup
from llama32.engine.settings import EngineSettings
from llama32.evaluate import Perplexity, perplexity, token_losses
from llama32.llm import LLM
from llama32.loading import load, load_model
from llama32.model import Llama
from llama32.saving import save
from llama32.settings import Grammar, Sampling
from llama32.stream import Stream
from llama32.tokenizer import Tokenizer
from llama32.transcript import Result

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
    "put_lora",
    "quantize",
    "remove_lora",
    "save",
    "save_lora",
    "token_losses",
    "unmerge_lora",
    "using_lora",
]
