"""Capture or edit the tensors inside a forward pass.

    with capture(model, "layers.*.mlp", "layers.7.mid") as seen:
        model(tokens)
    seen["layers.0.mlp"]  # (B, T, E)

    with edit(model, "layers.5", lambda x: x + direction):
        llm.generate("Once upon a time")

The name of a module means the module's output. A few more tensors have names, too:

| name | tensor | shape |
|---|---|---|
| `embed` | token embeddings, the first residual stream | `*B E` |
| `layers.i.pre` | residual stream before the layer | `*B E` |
| `layers.i.attn_norm` | input of attention | `*B E` |
| `layers.i.attn.q`, `.k`, `.v` | queries, keys (both rotated), values | `*B H D`, `*B K D` |
| `layers.i.attn.heads` | mixed values of each head, before `o_proj` | `*B H D` |
| `layers.i.attn` | output of attention, added to the stream | `*B E` |
| `layers.i.mid` | residual stream between attention and mlp | `*B E` |
| `layers.i.mlp_norm` | input of the mlp | `*B E` |
| `layers.i.mlp.gate_proj`, `.up_proj` | the two wide projections | `*B F` |
| `layers.i.mlp` | output of the mlp, added to the stream | `*B E` |
| `layers.i` | residual stream after the layer | `*B E` |
| `norm` | final norm, the input of `lm_head` | `*R E` |
| `logits` | output of the model | `*R V` |

`*B` is (B, T), or (N,) with a KV cache. The attention pattern of a plain forward pass is
`pattern(seen["layers.3.attn.q"], seen["layers.3.attn.k"])`; to change a pattern, pass your own
attention to the model. In a name `*` matches any one part, as in "layers.*.attn.heads".
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn

from llama32.attention import Attend
from llama32.model import Llama

EditFn = Callable[[Tensor], Tensor]
ATTENTION_TENSORS = "q", "k", "v", "heads"


class HookPoint(NamedTuple):
    """The place of a tensor: a module, and its "output", "input" or one of ATTENTION_TENSORS."""

    module: str
    kind: str


def hook_points(model: Llama) -> dict[str, HookPoint]:
    """Return all hook points of a model by name."""
    points = {name: HookPoint(name, "output") for name, _ in model.named_modules() if name}
    for i in range(len(model.layers)):
        points[f"layers.{i}.pre"] = HookPoint(f"layers.{i}", "input")
        points[f"layers.{i}.mid"] = HookPoint(f"layers.{i}.mlp_norm", "input")
        for kind in ATTENTION_TENSORS:
            points[f"layers.{i}.attn.{kind}"] = HookPoint(f"layers.{i}.attn", kind)
    return points | {"logits": HookPoint("lm_head", "output")}


def matching(model: Llama, pattern: str) -> dict[str, HookPoint]:
    """Return the hook points that match a name; ValueError if none does."""
    wanted, points = pattern.split("."), hook_points(model)
    matches = {
        name: point
        for name, point in points.items()
        if len(parts := name.split(".")) == len(wanted) and all(map(fnmatchcase, parts, wanted))
    }
    if not matches:
        similar = ", ".join(get_close_matches(pattern, points, n=3, cutoff=0.3))
        raise ValueError(f"{pattern!r} matches nothing in this model; similar names: {similar}")
    return matches


class Activations(Mapping[str, Tensor]):
    """Captured tensors of the last forward pass by name; `passes` has all forward passes."""

    def __init__(self, names: Sequence[str]) -> None:
        self.passes: dict[str, list[Tensor]] = {name: [] for name in names}

    def __getitem__(self, name: str) -> Tensor:
        if not self.passes[name]:
            raise KeyError(f"{name}: the model has not run inside the `capture` block")
        return self.passes[name][-1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)


@contextmanager
def capture(model: Llama, *names: str) -> Iterator[Activations]:
    """Capture tensors of every forward pass inside the block.

    Captured tensors are not detached, so gradients flow. An edited tensor is captured as edited.
    """
    points: dict[str, HookPoint] = {}
    for name in names:
        points |= matching(model, name)
    seen = Activations([*points])
    with ExitStack() as stack:
        for name, point in points.items():
            hook = register_hook(model, point, recorder(seen.passes[name]), prepend=False)
            stack.callback(hook.remove)
        yield seen


@contextmanager
def edit(model: Llama, name: str, change: EditFn) -> Iterator[None]:
    """Replace x by `change(x)` in every forward pass inside the block.

    If several edits change one tensor, the innermost runs first. Raises ValueError for `mid`, a sum
    that is not passed between modules: edit the summand `layers.i.attn` instead.
    """
    points = matching(model, name)
    if mids := [name for name in points if name.endswith(".mid")]:
        raise ValueError(f"{mids[0]} is a sum; edit {mids[0].removesuffix('mid')}attn instead")
    with ExitStack() as stack:
        for name, point in points.items():
            hook = register_hook(model, point, checked_edit(name, change), prepend=True)
            stack.callback(hook.remove)
        yield


def recorder(passes: list[Tensor]) -> EditFn:
    """Return an edit that appends x to `passes` and changes nothing."""

    def apply(x: Tensor) -> Tensor:
        passes.append(x)
        return x

    return apply


def checked_edit(name: str, change: EditFn) -> EditFn:
    """Return `change` with a check: ValueError if the result is no tensor of the same shape."""

    def apply(x: Tensor) -> Tensor:
        y = change(x)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"edit of {name}: expected a tensor {tuple(x.shape)}, got {got}")
        return y.type_as(x)  # an fp32 direction may be added to a bf16 stream

    return apply


@dataclass
class HookedAttention:
    """An attention with edits of queries, keys, values and mixed values."""

    attend: Attend
    edits: Mapping[str, Sequence[EditFn]]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = self._edit("q", q), self._edit("k", k), self._edit("v", v)
        return self._edit("heads", self.attend(q, k, v))

    def _edit(self, kind: str, x: Tensor) -> Tensor:
        for change in self.edits.get(kind, ()):
            x = change(x)
        return x


def register_hook(model: Llama, point: HookPoint, change: EditFn, *, prepend: bool) -> Any:
    """Apply `change` to the tensor at `point`, before earlier hooks if `prepend`.

    Returns a handle with `remove()`.
    """
    module = model.get_submodule(point.module)
    if point.kind == "output":

        def after(module: nn.Module, args: Any, x: Tensor) -> Tensor:
            return change(x)

        return module.register_forward_hook(after, prepend=prepend)

    def before(module: nn.Module, args: Any) -> Any:
        if point.kind == "input":
            return change(args[0]), *args[1:]
        x, cos_sin, attend = args  # of Attention.forward; hooks run in order, and so do the edits
        if not isinstance(attend, HookedAttention):
            attend = HookedAttention(attend, {})
        edits = (*attend.edits.get(point.kind, ()), change)
        return x, cos_sin, HookedAttention(attend.attend, {**attend.edits, point.kind: edits})

    return module.register_forward_pre_hook(before, prepend=prepend)
