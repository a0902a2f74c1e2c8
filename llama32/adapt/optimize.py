"""The fastest form of each layer for the machine at hand, found by a short trial.

Nothing here knows a processor by name. Forms that the machine cannot do are left out. The others
are timed on a piece of a weight, and the best takes the place of every layer of that kind. Only
among forms that compute the same, though: which rounding a quantized layer gets is not left to a
race. It takes the first in the list that fits.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llama32.adapt.fused import parts, siblings
from llama32.adapt.packed import FBGEMMLinear, OneDNNLinear, PackedLinear, TiledLinear
from llama32.adapt.packed_gpu import CUDAFloat8Linear, CUDAInt4Linear, CUDAInt8Linear
from llama32.adapt.packed_int import (
    CPUInt4Linear,
    FBGEMMInt7Linear,
    FBGEMMInt8Linear,
    OneDNNInt8Linear,
    RowInt8Linear,
    WeightOnlyInt8Linear,
)
from llama32.adapt.quantized import Layer, QuantizedLinear, joined, some_rows
from llama32.adapt.tied import linear_layers
from llama32.model import Llama

Form = type[PackedLinear]
FORMS: tuple[Form, ...] = (
    OneDNNLinear,
    FBGEMMLinear,
    TiledLinear,
    OneDNNInt8Linear,
    FBGEMMInt8Linear,
    FBGEMMInt7Linear,
    WeightOnlyInt8Linear,
    CPUInt4Linear,
    CUDAInt8Linear,
    CUDAInt4Linear,
    CUDAFloat8Linear,
)
ROWS = 1, 8, 128  # one request decoding, several, and a prompt: what a form is judged by
MANY = 128
TURNS = 3
TRIAL_ROWS, TRIAL_COPIES = 4096, 4  # of a weight: more than a processor's cache holds


@dataclass(frozen=True)
class Trial:
    """How long a form took for each of `ROWS`, in seconds."""

    form: Form | None  # None: the layer as it is
    seconds: tuple[float, ...]

    @property
    def title(self) -> str:
        return self.form.title if self.form else "as it is"


@dataclass(frozen=True)
class Choice:
    """Which form the layers of one kind got, and what was tried."""

    kind: str
    trials: Sequence[Trial]

    @property
    def best(self) -> Trial:
        """The fastest on the whole: no number of rows counts for more than another."""
        return min(self.trials, key=lambda trial: math.prod(trial.seconds))

    def __str__(self) -> str:
        best, plain = self.best, self.trials[0]
        if len(self.trials) == 1:
            return f"{self.kind}: {best.title}"
        times = zip(ROWS, plain.seconds, best.seconds, strict=True)
        gains = ", ".join(f"{before / after:.1f}x at {n}" for n, before, after in times)
        others = ", ".join(t.title for t in self.trials if t is not best)
        return f"{self.kind}: {best.title} ({gains} rows), of {len(self.trials)} tried: {others}"


@dataclass
class Optimizer:
    """Puts the fastest form in the place of one layer after the other, and keeps why."""

    choices: dict[str, Choice] = field(default_factory=dict)

    def replace(self, model: Llama, name: str) -> None:
        """The linear layer of that name. Those that are given the same input are replaced together,
        when all of their weights are there."""
        layer = model.get_submodule(name)
        if not isinstance(layer, Layer):
            return
        group = {each: model.get_submodule(each) for each in siblings(name)}
        if any(isinstance(x, Layer) and x.weight.device.type == "meta" for x in group.values()):
            return
        if not group or {type(x) for x in group.values()} != {type(layer)}:
            group = {name: layer}
        layers = [x for x in group.values() if isinstance(x, Layer)]
        whole = joined(layers)
        form = self.choose(layer, model.norm.weight.dtype).best.form
        if form is None or not form.fits(whole):  # what it was chosen by may be of other sizes
            return
        for each, part in group.items():
            if part._forward_hooks or part._forward_pre_hooks:
                raise ValueError(f"optimize: {each} has hooks that would be lost; take them off")
        is_fine = issubclass(form, RowInt8Linear) and name.endswith(form.FINE)
        pack = partial(form, **{"fine": True} if is_fine else {})
        if len(group) == 1:
            model.set_submodule(name, pack(layer))
        else:
            sizes = [len(x.weight) for x in layers]
            for each, part in zip(group, parts(pack(whole), sizes), strict=True):
                model.set_submodule(each, part)

    def choose(self, layer: Layer, dtype: torch.dtype) -> Choice:
        """By a trial on the first layer of its kind."""
        kind = kind_of(layer)
        if kind not in self.choices:
            self.choices[kind] = Choice(kind, try_all(layer, dtype))
        return self.choices[kind]

    def __str__(self) -> str:
        return "\n".join(map(str, self.choices.values()))


def optimize(model: Llama) -> Optimizer:
    """Replace every linear layer by its fastest form on this machine; print what comes back to see
    which that is.

    For use, not for training: the weights are no parameters any more, and cannot be saved. What is
    computed is the same within the rounding of the dtype; int8 layers round their activations, too,
    which costs another 1%. Layer after layer is let go when its form is there, so memory peaks at
    the model and its largest layer. An embedding that was tied to the head is a copy beside it now;
    `load(..., optimize=True)` packs what it reads, and leaves the embedding in its file.
    """
    optimizer = Optimizer()
    for name in linear_layers(model):
        optimizer.replace(model, name)
    model.requires_grad_(False)
    return optimizer


def kind_of(layer: Layer) -> str:
    """Layers of a kind are given the same form."""
    return f"{type(layer).__name__}, {str(layer.weight.dtype).removeprefix('torch.')}"


def cut(layer: Layer, size: int) -> Iterator[Layer]:
    """A layer as several, each with so many of its rows."""
    for start in range(0, len(layer.weight), size):
        yield some_rows(layer, slice(start, start + size))


@torch.inference_mode()
def try_all(layer: Layer, dtype: torch.dtype) -> list[Trial]:
    """The layer as it is and every form that fits: in turns, and of three turns the best."""
    parts = list(islice(cut(layer, TRIAL_ROWS), TRIAL_COPIES))
    fitting = [form for form in FORMS if form.fits(parts[0])]
    if isinstance(layer, QuantizedLinear):
        return [Trial(fitting[0] if fitting else None, (0.0,) * len(ROWS))]
    tried: dict[Form | None, Sequence[nn.Module]] = {None: parts}
    tried |= {form: [form(part) for part in parts] for form in fitting}
    best = {form: [math.inf] * len(ROWS) for form in tried}
    for i, n in enumerate(ROWS if fitting else ()):
        x = torch.randn(n, layer.in_features).to(layer.weight.device, dtype)
        for _ in range(TURNS):
            for form, its_parts in tried.items():
                best[form][i] = min(best[form][i], time_of(its_parts, x))
    return [Trial(form, tuple(seconds)) for form, seconds in best.items()]


def time_of(parts: Sequence[nn.Module], x: Float[Tensor, "rows in"]) -> float:
    """Seconds for a product with each; where many rows make memory no matter, with one."""
    used = parts if len(x) < MANY else parts[:1]
    start = time.perf_counter()
    for part in used:
        part(x)
    return (time.perf_counter() - start) / len(used)
