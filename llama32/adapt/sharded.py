"""Sharded training: weights, gradients and optimizer state shared out over processes.

    mesh = init_device_mesh("cuda", (8,))
    shard(model, mesh)                                  # before the optimizer is made
    optimizer = torch.optim.AdamW(model.parameters())
    loss = sum_over_my_tokens / targets_of_all_processes
    ...
    state = gather(model, optimizer)                    # whole, in rank 0; elsewhere empty
    scatter(model, optimizer, state)                    # and back, into as many as there are then

Each process has its own rows of the batch, and a slice of every weight. A layer's weights are put
together just before it runs and let go of behind it, forward and backward, so that a process never
has more than a few layers whole. PyTorch's FSDP2 does it, from outside; on GPUs it has not run yet.
(ZeRO, Rajbhandari et al. 2020; FSDP, Zhao et al. 2023)
"""

from typing import Any

import torch
from torch import distributed
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from llama32.model import Llama
from llama32.stored import few

State = dict[str, dict[str, Any]]


def shard(model: Llama, mesh: DeviceMesh) -> Llama:
    """Leave of each weight only the slice of this process, in place. Everything that goes by the
    model's parameters, an optimizer above all, is made afterwards.

    Gradients are added up over the processes, not averaged. So each takes the sum of its own
    losses, and divides by the number of targets in all of them: then a token counts the same
    wherever it is, as if one process had all rows. All have to run as often, forward and backward.
    An adapter in the model is sharded with it. What `clip_grad_norm_` returns is in slices, too:
    `.full_tensor()` is the number.
    """
    for part in (*model.layers, model):
        sharded = fully_shard(part, mesh=mesh)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    return model


def gather(model: Llama, optimizer: torch.optim.Optimizer) -> State:
    """What is trained and how far its optimizer is, whole, on the CPU of rank 0. All have to ask
    for it, and the others get nothing.

    "model" has the weights that are not frozen, by the names that they have in a model that is not
    sharded: its `load_state_dict` takes them, and `llama32.save` writes it. A model in one process
    gives the same. As with any `state_dict`, some tensors are still those in use: save or copy them
    before the next step.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights, progress = get_state_dict(model, optimizer, options=options)
    names = trained(model)
    kept = {name: weight for name, weight in weights.items() if name in names}
    return {"model": kept, "optimizer": progress}


def scatter(model: Llama, optimizer: torch.optim.Optimizer, state: State) -> None:
    """Put back what was gathered, from rank 0, into a model of any number of processes. The
    optimizer goes on with tensors of the state, which is then used up."""
    if (given := state["model"].keys()) and (odd := given ^ trained(model)):
        raise ValueError(f"scatter: the state is not of what is trained here: {few(odd)}")
    options = StateDictOptions(
        full_state_dict=True,
        broadcast_from_rank0=distributed.is_initialized(),
        ignore_frozen_params=True,
        strict=False,  # the frozen ones are not in it
    )
    # One after the other: `set_state_dict` leaves out the weights where it is given none.
    weights = dict(state["model"])  # a copy, since it is filled up with slices
    set_model_state_dict(model, weights, options=options)
    progress: Any = state["optimizer"]
    set_optimizer_state_dict(model, optimizer, progress, options=options)


def trained(model: Llama) -> set[str]:
    """The names of the weights that are not frozen; one that is tied has both of its names."""
    weights = model.named_parameters(remove_duplicate=False)
    return {name for name, weight in weights if weight.requires_grad}
