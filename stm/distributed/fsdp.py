"""FSDP2: each process holds a shard of all weights, gradients and optimiser state, for models too large for one device.

Each transformer block is one group, gathered before it runs and freed afterwards; all remaining parameters form one
additional group. Only this module and gradient clipping depend on sharding: checkpoints and final weights contain whole
tensors, as in a run with a single process.
"""

from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from stm.distributed.process import Process

State = dict[str, Any]
_ON_FIRST = StateDictOptions(full_state_dict=True, cpu_offload=True)


def find_blocks(module: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks: the members of ModuleLists that have submodules themselves."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    return [block for part in lists for block in part if any(True for _ in block.children())]


def shard(module: nn.Module, process: Process, precision: str) -> None:
    """Shard a module in place. Its weights must be equal on all processes; build the optimiser afterwards.

    With `bf16`, blocks are gathered in bfloat16, in which autocast computes anyway (their norms are rounded, too);
    the other parameters and all gradient sums stay float32. Scalars cannot be sharded: each process keeps its own copy, see
    `average_scalars`.
    """
    mesh = init_device_mesh(process.device.type, (process.count,))
    # Inputs are not cast: masks are sampled from the batch's noise, and rounding it would change them.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None,
        reduce_dtype=torch.float32 if precision == "bf16" else None,
        cast_forward_inputs=False,
    )
    for block in find_blocks(module):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    scalars = {parameter for parameter in module.parameters() if parameter.ndim == 0}
    float32_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    fully_shard(module, mesh=mesh, mp_policy=float32_policy, ignored_params=scalars)


def average_scalars(module: nn.Module, process: Process) -> None:
    """Average over the processes the gradients that FSDP does not handle; call it after the last pass of a step."""
    if not isinstance(module, FSDPModule):
        return
    gradients = [p.grad for p in module.parameters() if not isinstance(p, DTensor) and p.grad is not None]
    if gradients:
        for gradient, mean in zip(gradients, process.mean(torch.stack(gradients)), strict=True):
            gradient.copy_(mean)


def whole_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[State, State]:
    """Return the state dicts of the module and the optimiser with whole tensors.

    All processes must call it. If the module is sharded, only the first process gets the tensors, on the CPU.
    """
    if not isinstance(module, FSDPModule):
        return module.state_dict(), optimizer.state_dict()
    # torch's `get_optimizer_state_dict` creates a state for parameters that have had no gradient yet, and a resumed run would
    # then differ from an uninterrupted one.
    sharded = optimizer.state_dict()
    state = {number: {name: _gather(v) for name, v in values.items()} for number, values in sharded["state"].items()}
    return get_model_state_dict(module, options=_ON_FIRST), {**sharded, "state": state}


def load_whole_state(module: nn.Module, optimizer: torch.optim.Optimizer, model: State, state: State) -> None:
    """Load the result of `whole_state` into a run with any number of processes, sharded or not."""
    if not isinstance(module, FSDPModule):
        module.load_state_dict(model)
        optimizer.load_state_dict(state)
        return
    set_model_state_dict(module, model, options=StateDictOptions(full_state_dict=True))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parts = {
        number: {name: _shard_like(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": parts})


def make_whole(module: nn.Module, process: Process) -> None:
    """Gather the whole parameters on the CPU of the first process, which can then write them.

    All processes must call it; the module cannot be run afterwards.
    """
    if not isinstance(module, FSDPModule):
        return
    weights: dict[str, Any] = get_model_state_dict(module, options=_ON_FIRST)
    if not process.first:
        return
    for name, parameter in list(module.named_parameters()):
        parent, _, own = name.rpartition(".")
        whole = nn.Parameter(weights[name], requires_grad=parameter.requires_grad)
        module.get_submodule(parent).register_parameter(own, whole)


@torch.no_grad()
def copy_whole(module: nn.Module, target: nn.Module) -> None:
    """Copy the weights of a sharded module into a whole one of the same structure, on every process.

    All processes must call it. One tensor is whole at a time, beside those of `target`.
    """
    tensors = _tensors(target)
    for name, value in _tensors(module).items():
        tensors[name].copy_(value.full_tensor() if isinstance(value, DTensor) else value)


@torch.no_grad()
def spread_whole(module: nn.Module, target: nn.Module, process: Process) -> None:
    """Copy the weights that `make_whole` has left on the first process into a whole module of every process.

    All processes must call it.
    """
    whole = _tensors(module) if process.first else {}
    for name, tensor in _tensors(target).items():
        if process.first:
            tensor.copy_(whole[name])
        torch.distributed.broadcast(tensor, 0)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers, each once: of tied ones, a sharded module's other names keep what `make_whole` has replaced."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _gather(value: Any) -> Any:
    if not isinstance(value, DTensor):
        return value
    whole = value.full_tensor()
    # The other processes return an empty tensor, so that only the first one has a whole copy in memory.
    return whole.cpu() if torch.distributed.get_rank() == 0 else whole.new_empty(0)


def _shard_like(value: Any, parameter: Tensor) -> Any:
    """Return this process's shard of a value with the parameter's shape; other values, such as the step, stay whole."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
