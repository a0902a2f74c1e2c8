"""Sharded training (FSDP): weights, gradients and optimizer state split over processes.

    mesh = init_device_mesh("cuda", (8,))
    shard(model, mesh)                                  # before the optimizer is made
    optimizer = torch.optim.AdamW(model.parameters())
    loss = sum_over_my_tokens / targets_of_all_processes
    ...
    state = gather(model, optimizer)                    # complete in rank 0, empty elsewhere
    scatter(model, optimizer, state)                    # the number of processes may differ

Each process has different rows of the batch, and a shard (a slice of the rows) of every weight.
Just before a layer runs, forward or backward, an all-gather collects the shards of its weights;
afterwards the full weights are freed, so a process never holds more than a few full layers. A
reduce-scatter sums the gradients and leaves each process the sums for its shard. PyTorch's FSDP2
wraps the unchanged model. Not yet run on GPUs.
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

from llama32.checkpoint.tensor_files import summarize
from llama32.model import Llama

State = dict[str, dict[str, Any]]


def shard(model: Llama, mesh: DeviceMesh) -> Llama:
    """Keep only this process's shard of each weight, in place.

    Create the optimizer afterwards, since the parameters are replaced. Attached adapters are
    sharded too. Gradients are summed over the processes, not averaged: let each process divide the
    sum of its losses by the number of targets in all processes, so that every token counts the
    same, as with all rows in a single process. All processes must run forward and backward equally
    often. `clip_grad_norm_` returns a sharded norm; `.full_tensor()` is the number.
    """
    for part in (*model.layers, model):
        sharded = fully_shard(part, mesh=mesh)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo only sums
    return model


def gather(model: Llama, optimizer: torch.optim.Optimizer) -> State:
    """Collect trained weights and optimizer state, unsharded, on the CPU of rank 0.

    All processes must call; the other ranks get empty dicts. "model" holds the weights that are
    not frozen, by their names in an unsharded model, ready for `load_state_dict` and
    `llama32.save`. An unsharded model in a single process gives the same result. As with any
    `state_dict`, some tensors are still in use: save or copy them before the next step.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights, optimizer_state = get_state_dict(model, optimizer, options=options)
    names = trainable_names(model)
    trained = {name: weight for name, weight in weights.items() if name in names}
    return {"model": trained, "optimizer": optimizer_state}


def scatter(model: Llama, optimizer: torch.optim.Optimizer, state: State) -> None:
    """Restore a gathered state from rank 0, into a model on any number of processes.

    The optimizer takes over tensors of the state: do not use the state again. Raises ValueError
    if the state holds other weights than the model trains.
    """
    if (names := state["model"].keys()) and (odd := names ^ trainable_names(model)):
        raise ValueError(
            f"scatter: state and model differ in the trained weights: {summarize(odd)}; attach the "
            "same adapters and freeze the same weights as in the saved run"
        )
    options = StateDictOptions(
        full_state_dict=True,
        broadcast_from_rank0=distributed.is_initialized(),
        ignore_frozen_params=True,
        strict=False,  # frozen weights are missing
    )
    # Two calls: `set_state_dict` skips the weights in ranks whose state is empty.
    weights = dict(state["model"])  # a copy, because the call adds shards to the dict
    set_model_state_dict(model, weights, options=options)
    optimizer_state: Any = state["optimizer"]
    set_optimizer_state_dict(model, optimizer, optimizer_state, options=options)


def trainable_names(model: Llama) -> set[str]:
    """Return the names of all weights that are not frozen; tied embeddings have two names."""
    weights = model.named_parameters(remove_duplicate=False)
    return {name for name, weight in weights if weight.requires_grad}
