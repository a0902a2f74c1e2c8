"""A planned step through the model: eagerly, compiled, or as CUDA graphs.

A step is two calls of different shape. Prompts go first and leave nothing but their keys and
values; all logits come from the second, where every row is one token of a sequence, its newest or
a draft of one. Which rows share a call, and which graph runs it, is no concern of anyone else.
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

from llama32.adapt.packed import PackedLinear
from llama32.attention import Attend
from llama32.batch import Batch, Span
from llama32.cache import PagedCache
from llama32.config import LlamaConfig
from llama32.engine import memory
from llama32.engine.drawing import Drawn, draw
from llama32.engine.request import Request
from llama32.engine.rows import rows_of
from llama32.engine.scheduler import Step, Work
from llama32.engine.settings import EngineSettings
from llama32.flash import fixed_shape, flash
from llama32.int8_cache import Int8Cache
from llama32.model import Llama
from llama32.paged import QUERY_BLOCK

# Those of a batch that a kernel reads, to be copied into a graph's buffers.
TENSORS = "tokens", "positions", "slots", "last", "query_starts", "lengths", "page_table"


class Runner:
    """Runs steps of one model over one paged cache, whose pages the scheduler hands out."""

    def __init__(self, model: Llama, settings: EngineSettings) -> None:
        self.model = model
        self.page_size = memory.page_size(model, settings)
        self.num_pages = memory.num_pages(model, settings)
        weight = model.norm.weight
        self._device = weight.device
        kind = PagedCache if settings.cache_dtype is None else Int8Cache
        self.cache = kind(
            model.config,
            self.num_pages + 1,
            self.page_size,
            dtype=weight.dtype,
            device=self._device,
        )
        self._spare = self.num_pages  # a page that nobody is given: rows of no sequence write there
        on_gpu, has_flash = self._device.type == "cuda", self.cache.attend is flash
        has_graphs, deterministic = decoding(settings, on_gpu=on_gpu, has_flash=has_flash)
        self._graphs: dict[tuple[int, int], Graph] | None = {} if has_graphs else None
        self._is_static = has_graphs
        self._is_compiled = settings.compiled
        self._model = model
        if settings.compiled:  # only now, since to mention the compiler is to import it
            self._model = with_compiled_layers(model)
            self._uncompiled_call: Any = torch.compiler.disable(call)
        self._sizes = graph_rows(settings.max_rows) if has_graphs else []
        self.prompt_rows, self.decode_rows, self.deterministic = rows_of(
            model, deterministic, self._sizes
        )

    @property
    def config(self) -> LlamaConfig:
        """What the model says of itself."""
        return self.model.config

    @torch.inference_mode()
    def run(self, step: Step) -> list[Drawn]:
        """One step; the next tokens, in order, of each request whose last known one was in it."""
        for spans, rows in self.prompt_rows.calls([to_span(work) for work in step.prefill]):
            self._read_prompts(spans, rows)
        spans = [to_span(work) for work in step.decode]
        singles = [
            Span([token], span.start + i, span.pages)
            for span in spans
            for i, token in enumerate(span.tokens)
        ]
        parts = [self._decode(*call) for call in self.decode_rows.calls(singles)]
        if not parts:
            return []
        logits = torch.cat(parts) if len(parts) > 1 else parts[0]
        ends = accumulate(len(span.tokens) for span in spans)
        asking: list[Request] = []
        wanted: list[int] = []  # rows: of its newest token, and of each draft
        for (request, _, stop), end in zip(step.decode, ends, strict=True):
            if stop >= request.length:
                asking.append(request)
                wanted.extend(range(end - 1 - len(request.drafts), end))
        return draw(logits if len(wanted) == len(logits) else logits[wanted], asking)

    @torch.inference_mode()
    def warm_up(self, on_progress: Callable[[int, int], object]) -> None:
        """Run every shape once, so that no request has to wait for the compiler. To that, a single
        row is a shape, and any other count is another."""
        blank = Span([0], 0, [self._spare])
        sizes = self._sizes or ([1, 2] if self._is_compiled else [])
        for done, rows in enumerate(sizes):
            on_progress(done, len(sizes))
            self._decode([blank] * rows, rows)
        on_progress(len(sizes), len(sizes))

    def forget(self) -> None:
        """The model has changed: graphs hold the tensors that it had, compiled layers its parts."""
        if self._graphs is not None:
            self._graphs.clear()
        if self._is_compiled:
            self._model = with_compiled_layers(self.model)

    def fingerprint(self) -> Hashable:
        """Differs when weights were changed in place, or parts or hooks put in or taken out.

        Only a change through `Tensor.data` goes unseen.
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

    def _read_prompts(self, spans: Sequence[Span], rows: int) -> None:
        batch = Batch.pack(spans, self.page_size, self._device, rows=rows, spare=self._spare)
        # With one query flash attention takes another way, and whether it does must not depend on
        # the company.
        batch = replace(batch, max_query=max(batch.max_query, QUERY_BLOCK))
        self._call(batch, self.cache.attends(batch), rows=slice(0))  # no logits

    def _decode(self, spans: Sequence[Span], rows: int) -> Float[Tensor, "B V"]:
        """Logits after spans of one token each."""
        if not self._is_static:
            batch = Batch.pack(spans, self.page_size, self._device, rows=rows, spare=self._spare)
            return self._call(batch, self.cache.attends(batch))[: len(spans)]
        batch = self._padded(spans, rows)
        if self._graphs is None:
            return self._forward(batch)[: len(spans)]
        shape = rows, batch.page_table.shape[1]
        if shape not in self._graphs:
            self._graphs[shape] = Graph(self._forward, batch)
        return self._graphs[shape].replay(batch)[: len(spans)]

    def _forward(self, batch: Batch) -> Float[Tensor, "N V"]:
        """Decoding by nothing but tensors whose shapes are those of the batch."""
        batch = replace(batch)  # without what was derived of it before: a graph must do that anew
        attend = fixed_shape(self.cache.attend)
        attends = [replace(layer, attend=attend) for layer in self.cache.attends(batch)]
        return self._call(batch, attends)

    def _call(self, batch: Batch, attends: Sequence[Any], **given: Any) -> Float[Tensor, "N V"]:
        """The model itself."""
        if self._is_compiled:
            attends = [Uncompiled(attend, self._uncompiled_call) for attend in attends]
        return self._model(batch.tokens, batch.positions, attends, **given)

    def _padded(self, spans: Sequence[Span], rows: int) -> Batch:
        """Padded with sequences of one token, and tables to a power of two."""
        blank = Span([0], 0, [self._spare])
        spans = [*spans, *[blank] * (rows - len(spans))]
        batch = Batch.pack(spans, self.page_size, self._device, spare=self._spare)
        width = batch.page_table.shape[1]
        wide = max(2, 1 << (width - 1).bit_length())
        table = pad(batch.page_table, (0, wide - width), value=self._spare)
        return replace(batch, page_table=table, max_length=wide * self.page_size)


def with_compiled_layers(model: Llama) -> Llama:
    """The same model, but that each layer is compiled, all by the same code, for any count of rows.
    Their attentions are left out: they go from one sequence to the next, each of another length.

    The whole model as one graph takes three times as long to compile, for each count of rows, and
    decodes 8 requests 40% slower on a CPU: then each has to read as many pages as the longest.
    """
    on_cpu = model.norm.weight.device.type == "cpu"
    if on_cpu and any(isinstance(part, PackedLinear) for part in model.modules()):
        raise ValueError(
            "compiled: not with `optimize` on a CPU, whose products no compiler can see into; one "
            "of the two is enough"
        )
    shallow = copy(model)
    compiled: list[Any] = [torch.compile(layer, dynamic=True) for layer in model.layers]
    shallow._modules = {**model._modules, "layers": nn.ModuleList(compiled)}
    return shallow


@dataclass
class Uncompiled:
    """An attention that the compiler leaves alone, by `call` being such a function."""

    attend: Attend
    call: Callable[[Attend, Tensor, Tensor, Tensor], Tensor]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.call(self.attend, q, k, v)


def call(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Only that."""
    return attend(q, k, v)


class Graph:
    """One decode shape as a CUDA graph: contents go into its buffers, then it is replayed."""

    def __init__(self, forward: Callable[[Batch], Tensor], batch: Batch) -> None:
        self._buffers = replace(
            batch, **{name: getattr(batch, name).clone() for name in TENSORS}, spans=()
        )
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries set themselves up before anything is recorded
            forward(self._buffers)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = forward(self._buffers)

    def replay(self, batch: Batch) -> Float[Tensor, "N V"]:
        """The logits after each row."""
        for name in TENSORS:
            getattr(self._buffers, name).copy_(getattr(batch, name), non_blocking=True)
        self._graph.replay()
        return self._logits.clone()  # the next replay writes into the same


def decoding(
    settings: EngineSettings, *, on_gpu: bool, has_flash: bool
) -> tuple[bool, bool | None]:
    """Whether it runs as CUDA graphs, and whether it is to be deterministic (None: where free).

    Of compiled code nobody can tell. Without flash attention a graph gives every sequence the keys
    of the longest, masked, and a row's bits may depend on how many that are.
    """
    has_graphs = settings.cuda_graphs
    if settings.cache_dtype is not None:  # it reads as many pages as there are
        if has_graphs:
            raise ValueError("cache_dtype: not together with `cuda_graphs`")
        has_graphs = False
    if has_graphs is None:
        has_graphs = on_gpu and (has_flash or not settings.deterministic)
    if has_graphs and not on_gpu:
        raise ValueError("cuda_graphs: they need CUDA, and the model is not there")
    if not settings.compiled and (has_flash or not has_graphs):
        return has_graphs, settings.deterministic
    if settings.deterministic:
        raise ValueError(
            "deterministic: not together with `compiled`, nor with `cuda_graphs` where flash "
            "attention does not run (it takes 16 bits and heads of at most 128)"
        )
    return has_graphs, False


def graph_rows(max_rows: int) -> list[int]:
    """The decode shapes worth a graph: few, made when they are first needed."""
    return [rows for rows in (1, 8, 64) if rows < max_rows] + [max_rows]


def to_span(work: Work) -> Span:
    """What is to be computed of a request, as the model's side knows it."""
    request, start, stop = work
    return Span(request.ids(start, stop), start, request.pages)
