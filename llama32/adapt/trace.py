"""Look at what is inside a forward pass, or change it, from outside.

    with capture(model, "layers.*.mlp", "layers.7.mid") as seen:
        model(tokens)
    seen["layers.0.mlp"]  # (B, T, E)

    with edit(model, "layers.5", lambda x: x + direction):
        llm.generate("Once upon a time")

A module's name means its output, and a few tensors that are no module's output have names, too:

| name | what | shape |
|---|---|---|
| `embed` | token embeddings: the residual stream at its source | `*B E` |
| `layers.i.pre` | residual stream before the layer | `*B E` |
| `layers.i.attn_norm` | what attention gets | `*B E` |
| `layers.i.attn.q`, `.k`, `.v` | queries, keys (both rotated), values | `*B H D`, `*B K D` |
| `layers.i.attn.heads` | what each head has mixed, before `o_proj` | `*B H D` |
| `layers.i.attn` | what attention adds to the stream | `*B E` |
| `layers.i.mid` | residual stream between attention and mlp | `*B E` |
| `layers.i.mlp_norm` | what the mlp gets | `*B E` |
| `layers.i.mlp.gate_proj`, `.up_proj` | its two views | `*B F` |
| `layers.i.mlp` | what it adds to the stream | `*B E` |
| `layers.i` | residual stream after the layer | `*B E` |
| `norm` | the stream as the unembedding sees it | `*R E` |
| `logits` | the output | `*R V` |

`*B` is (B, T), or (N,) where a cache is read. An attention pattern is
`pattern(seen["layers.3.attn.q"], seen["layers.3.attn.k"])` of a plain forward pass; to change one,
pass an attention of your own. In a name `*` stands for any one part, as in "layers.*.attn.heads".
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

Change = Callable[[Tensor], Tensor]
OF_ATTENTION = "q", "k", "v", "heads"


class Place(NamedTuple):
    """Where a tensor can be met: as a module's "output" or "input", or in its call of `attend`."""

    module: str
    what: str


def places(model: Llama) -> dict[str, Place]:
    """All names of a model."""
    found = {name: Place(name, "output") for name, _ in model.named_modules() if name}
    for i in range(len(model.layers)):
        found[f"layers.{i}.pre"] = Place(f"layers.{i}", "input")
        found[f"layers.{i}.mid"] = Place(f"layers.{i}.mlp_norm", "input")
        found |= {f"layers.{i}.attn.{one}": Place(f"layers.{i}.attn", one) for one in OF_ATTENTION}
    return found | {"logits": Place("lm_head", "output")}


def matching(model: Llama, pattern: str) -> dict[str, Place]:
    """Those that a name means; ValueError if there is none."""
    wanted, known = pattern.split("."), places(model)
    found = {
        name: place
        for name, place in known.items()
        if len(parts := name.split(".")) == len(wanted) and all(map(fnmatchcase, parts, wanted))
    }
    if not found:
        near = ", ".join(get_close_matches(pattern, known, n=3, cutoff=0.3))
        raise ValueError(f"{pattern!r} is nothing in this model; near to it: {near}")
    return found


class Seen(Mapping[str, Tensor]):
    """What was captured, by name: each as in the last forward pass. `passes` has all of them."""

    def __init__(self, names: Sequence[str]) -> None:
        self.passes: dict[str, list[Tensor]] = {name: [] for name in names}

    def __getitem__(self, name: str) -> Tensor:
        if not self.passes[name]:
            raise KeyError(f"{name}: the model has not run since")
        return self.passes[name][-1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)


@contextmanager
def capture(model: Llama, *names: str) -> Iterator[Seen]:
    """Keep these tensors of every forward pass within the block, as they are: still part of the
    graph where gradients are wanted. Of a tensor that is edited, too, it is the edited one."""
    found: dict[str, Place] = {}
    for name in names:
        found |= matching(model, name)
    seen = Seen([*found])
    with ExitStack() as stack:
        for name, place in found.items():
            stack.callback(hook(model, place, kept(seen.passes[name]), first=False).remove)
        yield seen


@contextmanager
def edit(model: Llama, name: str, change: Change) -> Iterator[None]:
    """Put `change(x)` in the place of x, in every forward pass within the block.

    Of several edits of one tensor the innermost comes first. `mid` cannot be edited, being a sum
    that nobody hands on: edit what is added, `layers.i.attn`.
    """
    found = matching(model, name)
    if unfit := [one for one in found if one.endswith(".mid")]:
        raise ValueError(f"{unfit[0]} is a sum; edit {unfit[0].removesuffix('mid')}attn instead")
    with ExitStack() as stack:
        for one, place in found.items():
            stack.callback(hook(model, place, checked(one, change), first=True).remove)
        yield


def kept(passes: list[Tensor]) -> Change:
    """No change: x is put down."""

    def apply(x: Tensor) -> Tensor:
        passes.append(x)
        return x

    return apply


def checked(name: str, change: Change) -> Change:
    """The same, but for what no model could go on with."""

    def apply(x: Tensor) -> Tensor:
        y = change(x)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"edit of {name}: expected a tensor {tuple(x.shape)}, got {got}")
        return y.type_as(x)  # a direction in fp32 may be added to bf16

    return apply


@dataclass
class Watched:
    """An attention whose tensors, by their names, go through functions on their way."""

    attend: Attend
    through: Mapping[str, Sequence[Change]]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = self._pass("q", q), self._pass("k", k), self._pass("v", v)
        return self._pass("heads", self.attend(q, k, v))

    def _pass(self, name: str, x: Tensor) -> Tensor:
        for change in self.through.get(name, ()):
            x = change(x)
        return x


def hook(model: Llama, place: Place, change: Change, *, first: bool) -> Any:
    """Let a tensor go through `change`, before all that is hooked there already if it is to be
    `first`; returns what `remove()` ends it."""
    module = model.get_submodule(place.module)
    if place.what == "output":

        def after(module: nn.Module, given: Any, x: Tensor) -> Tensor:
            return change(x)

        return module.register_forward_hook(after, prepend=first)

    def before(module: nn.Module, given: Any) -> Any:
        if place.what == "input":
            return change(given[0]), *given[1:]
        x, by, attend = given  # of an attention; the hooks run in their order, and so do changes
        its = attend if isinstance(attend, Watched) else Watched(attend, {})
        changes = (*its.through.get(place.what, ()), change)
        return x, by, Watched(its.attend, {**its.through, place.what: changes})

    return module.register_forward_pre_hook(before, prepend=first)
