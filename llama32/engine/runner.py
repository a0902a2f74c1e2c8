"""The runner: scheduled steps through the model, eagerly, compiled or as CUDA graphs.

A step has two phases of different shape. Prefill comes first and only writes keys and values. All
logits come from decode, where every row is one token of a sequence: the last known token, a draft
or a token of a replay. Only this module knows how rows share model calls and graphs.
"""

from collections.abc import Callable, Hashable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

from llama32.attention import Attend
from llama32.cache.batch import Batch, Span
from llama32.cache.flash_attention import flash, static_shape_variant
from llama32.cache.int8_kv_cache import Int8Cache
from llama32.cache.kv_cache import PagedCache
from llama32.cache.paged_attention import QUERY_TILE
from llama32.config import LlamaConfig
from llama32.engine import cache_size
from llama32.engine.batch_invariance import plan_rows
from llama32.engine.request import Request
from llama32.engine.scheduler import Chunk, ScheduledStep
from llama32.engine.settings import EngineSettings
from llama32.engine.token_sampling import SampledToken, sample_next_tokens
from llama32.kernels.packed_linear import PackedLinear
from llama32.model import Llama

# The tensors of a batch that kernels read: copied into the buffers of a graph.
TENSORS = "tokens", "positions", "slots", "last_tokens", "query_starts", "lengths", "page_table"


class Runner:
    """Runs steps of a model over a paged cache, whose pages the scheduler allocates."""

    def __init__(self, model: Llama, settings: EngineSettings) -> None:
        self.model = model
        self.page_size = cache_size.page_size(model, settings)
        self.num_pages = cache_size.num_pages(model, settings)
        weight = model.norm.weight
        self._device = weight.device
        self._padding_page = self.num_pages  # never allocated: padding rows write there
        cache_class = PagedCache if settings.cache_dtype is None else Int8Cache
        self.cache = cache_class(
            model.config,
            self.num_pages + 1,
            self.page_size,
            dtype=weight.dtype,
            device=self._device,
        )
        on_gpu, has_flash = self._device.type == "cuda", self.cache.attend is flash
        has_graphs, deterministic = decode_mode(settings, on_gpu=on_gpu, has_flash=has_flash)
        self._graphs: dict[tuple[int, int], DecodeGraph] | None = {} if has_graphs else None
        self._has_static_shapes = has_graphs
        self._is_compiled = settings.compiled
        self._model = model
        if settings.compiled:  # not before: access to torch.compiler imports the compiler
            self._model = with_compiled_layers(model)
            self._uncompiled_call: Any = torch.compiler.disable(call_attention)
        self._graph_sizes = graph_sizes(settings.max_rows) if has_graphs else []
        self.prefill_planner, self.decode_planner, self.deterministic = plan_rows(
            model, deterministic, self._graph_sizes
        )

    @property
    def config(self) -> LlamaConfig:
        """The config of the model."""
        return self.model.config

    @torch.inference_mode()
    def run(self, step: ScheduledStep) -> list[SampledToken]:
        """Run a step; return the next tokens of each request computed to its last known token."""
        for call in self.prefill_planner.calls([to_span(chunk) for chunk in step.prefill]):
            self._prefill(*call)
        spans = [to_span(chunk) for chunk in step.decode]
        singles = [
            Span([token], span.start + i, span.pages)
            for span in spans
            for i, token in enumerate(span.tokens)
        ]
        outputs = [self._decode(*call) for call in self.decode_planner.calls(singles)]
        if not outputs:
            return []
        logits = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        ends = accumulate(len(span.tokens) for span in spans)
        requests: list[Request] = []
        token_rows: list[int] = []  # of the last known token and of each draft
        for (request, _, stop), end in zip(step.decode, ends, strict=True):
            if stop >= request.length:
                requests.append(request)
                token_rows.extend(range(end - 1 - len(request.drafts), end))
        if len(token_rows) < len(logits):
            logits = logits[token_rows]
        return sample_next_tokens(logits, requests)

    @torch.inference_mode()
    def warm_up(self, on_progress: Callable[[int, int], object]) -> None:
        """Run every decode shape once, to save requests the wait for the compiler.

        The compiler distinguishes two shapes: a single row, and any other count.
        """
        padding = Span([0], 0, [self._padding_page])
        sizes = self._graph_sizes or ([1, 2] if self._is_compiled else [])
        for done, num_rows in enumerate(sizes):
            on_progress(done, len(sizes))
            self._decode([padding] * num_rows, num_rows)
        on_progress(len(sizes), len(sizes))

    def reset_compiled(self) -> None:
        """Discard graphs and compiled layers, because the model has changed."""
        if self._graphs is not None:
            self._graphs.clear()
        if self._is_compiled:
            self._model = with_compiled_layers(self.model)

    def fingerprint(self) -> Hashable:
        """Return a value that changes with weights, modules and hooks of the model.

        In-place changes of weights count, except through `Tensor.data`.
        """
        modules = [
            (id(module), len(module._forward_hooks), len(module._forward_pre_hooks))
            for module in self.model.modules()
        ]
        weights = (
            (id(x), x.data_ptr(), None if x.is_inference() else x._version)
            for x in self.model.parameters()
        )
        return (*modules, *weights)

    def _prefill(self, spans: Sequence[Span], num_rows: int) -> None:
        batch = Batch.pack(
            spans, self.page_size, self._device, num_rows=num_rows, padding_page=self._padding_page
        )
        # Flash attention computes batches of single queries in a different way. The choice must not
        # depend on the batch.
        batch = replace(batch, max_query=max(batch.max_query, QUERY_TILE))
        self._call(batch, self.cache.attention_fns(batch), logits_at=slice(0))  # no logits

    def _decode(self, spans: Sequence[Span], num_rows: int) -> Float[Tensor, "B V"]:
        """Return the logits after spans of one token each."""
        if not self._has_static_shapes:
            batch = Batch.pack(
                spans,
                self.page_size,
                self._device,
                num_rows=num_rows,
                padding_page=self._padding_page,
            )
            return self._call(batch, self.cache.attention_fns(batch))[: len(spans)]
        batch = self._pad_batch(spans, num_rows)
        if self._graphs is None:
            return self._forward(batch)[: len(spans)]
        shape = num_rows, batch.page_table.shape[1]
        if shape not in self._graphs:
            self._graphs[shape] = DecodeGraph(self._forward, batch)
        return self._graphs[shape].replay(batch)[: len(spans)]

    def _forward(self, batch: Batch) -> Float[Tensor, "N V"]:
        """Decode with tensors of fixed shapes only."""
        batch = replace(batch)  # a copy without cached properties: a graph must compute them
        attend = static_shape_variant(self.cache.attend)
        attention_fns = [replace(layer, attend=attend) for layer in self.cache.attention_fns(batch)]
        return self._call(batch, attention_fns)

    def _call(
        self, batch: Batch, attention_fns: Sequence[Any], **options: Any
    ) -> Float[Tensor, "N V"]:
        """Call the model, with attention excluded from compilation."""
        if self._is_compiled:
            attention_fns = [
                UncompiledAttention(attend, self._uncompiled_call) for attend in attention_fns
            ]
        return self._model(batch.tokens, batch.positions, attention_fns, **options)

    def _pad_batch(self, spans: Sequence[Span], num_rows: int) -> Batch:
        """Pad with sequences of one token to `num_rows`, and page tables to a power of two."""
        padding = Span([0], 0, [self._padding_page])
        spans = [*spans, *[padding] * (num_rows - len(spans))]
        batch = Batch.pack(spans, self.page_size, self._device, padding_page=self._padding_page)
        width = batch.page_table.shape[1]
        padded_width = max(2, 1 << (width - 1).bit_length())
        table = pad(batch.page_table, (0, padded_width - width), value=self._padding_page)
        return replace(batch, page_table=table, max_length=padded_width * self.page_size)


def with_compiled_layers(model: Llama) -> Llama:
    """Return a copy of the model with compiled layers, which share code for all row counts.

    Attention is excluded, because attention loops over sequences of different lengths. The whole
    model as one graph takes three times as long to compile, for each row count, and decodes 8
    requests 40% slower on a CPU: every request then reads as many pages as the longest.
    """
    on_cpu = model.norm.weight.device.type == "cpu"
    if on_cpu and any(isinstance(part, PackedLinear) for part in model.modules()):
        raise ValueError(
            "compiled: not with `optimize` on a CPU, because torch.compile cannot trace its "
            "kernels; use only one of the two"
        )
    shallow = copy(model)
    compiled: list[Any] = [torch.compile(layer, dynamic=True) for layer in model.layers]
    shallow._modules = {**model._modules, "layers": nn.ModuleList(compiled)}
    return shallow


@dataclass
class UncompiledAttention:
    """An attention function called through `call`, which is excluded from compilation."""

    attend: Attend
    call: Callable[[Attend, Tensor, Tensor, Tensor], Tensor]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.call(self.attend, q, k, v)


def call_attention(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Call an attention function; `Runner` disables compilation here."""
    return attend(q, k, v)


class DecodeGraph:
    """A CUDA graph of a decode shape, replayed with new contents in the buffers."""

    def __init__(self, forward: Callable[[Batch], Tensor], batch: Batch) -> None:
        self._buffers = replace(
            batch, **{name: getattr(batch, name).clone() for name in TENSORS}, spans=()
        )
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries must initialize before the capture
            forward(self._buffers)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = forward(self._buffers)

    def replay(self, batch: Batch) -> Float[Tensor, "N V"]:
        """Return the logits after each row."""
        for name in TENSORS:
            getattr(self._buffers, name).copy_(getattr(batch, name), non_blocking=True)
        self._graph.replay()
        return self._logits.clone()  # the next replay overwrites the buffer


def decode_mode(
    settings: EngineSettings, *, on_gpu: bool, has_flash: bool
) -> tuple[bool, bool | None]:
    """Return whether to use CUDA graphs, and whether to be deterministic (None: at no cost).

    Compiled code is never known to be deterministic. Without flash attention, a graph gives every
    sequence as many keys as the longest has, masked, and a row's bits may depend on the number.
    """
    has_graphs = settings.cuda_graphs
    if settings.cache_dtype is not None:  # the shapes of its reads depend on the number of pages
        if has_graphs:
            raise ValueError("cache_dtype: not together with `cuda_graphs`; unset one of them")
        has_graphs = False
    if has_graphs is None:
        has_graphs = on_gpu and (has_flash or not settings.deterministic)
    if has_graphs and not on_gpu:
        raise ValueError("cuda_graphs: they need CUDA, and the model is on another device")
    if not settings.compiled and (has_flash or not has_graphs):
        return has_graphs, settings.deterministic
    if settings.deterministic:
        raise ValueError(
            "deterministic: not together with `compiled`, nor with `cuda_graphs` without flash "
            "attention, which needs a 16-bit dtype and heads of at most 128"
        )
    return has_graphs, False


def graph_sizes(max_rows: int) -> list[int]:
    """Return the row counts worth a graph: few, and captured on first use."""
    return [rows for rows in (1, 8, 64) if rows < max_rows] + [max_rows]


def to_span(chunk: Chunk) -> Span:
    """Convert a chunk of a request to a span of tokens and pages."""
    request, start, stop = chunk
    return Span(request.ids(start, stop), start, request.pages)
