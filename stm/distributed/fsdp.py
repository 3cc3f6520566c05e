"""FSDP2: each process holds a part of every weight, gradient and optimiser state, for models that no single device holds.

Each transformer block is a group, gathered before it runs and let go after it; all other parameters are one more group.
Outside this module and the clipping of the gradient, nothing knows of it: checkpoints and final weights are whole, as
those of a run of one process.
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
    """The transformer blocks: members of a ModuleList that are themselves made of modules."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    return [block for part in lists for block in part if any(True for _ in block.children())]


def shard(module: nn.Module, process: Process, precision: str) -> None:
    """Shards a module in place. Its weights must be the same on all processes; build the optimiser afterwards.

    With `bf16`, blocks are gathered in that precision, which is what autocast computes in (their norms are rounded too);
    all else, and every sum of gradients, stays float32. Scalars cannot be cut: each process keeps them whole, see
    `average_scalars`.
    """
    mesh = init_device_mesh(process.device.type, (process.count,))
    # Inputs are left as they are: the masks are drawn from the batch's noise.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None,
        reduce_dtype=torch.float32 if precision == "bf16" else None,
        cast_forward_inputs=False,
    )
    for block in find_blocks(module):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    scalars = {parameter for parameter in module.parameters() if parameter.ndim == 0}
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    fully_shard(module, mesh=mesh, mp_policy=whole, ignored_params=scalars)


def average_scalars(module: nn.Module, process: Process) -> None:
    """Averages over the processes the gradients that FSDP leaves alone; call it after the last pass of a step."""
    if not isinstance(module, FSDPModule):
        return
    gradients = [p.grad for p in module.parameters() if not isinstance(p, DTensor) and p.grad is not None]
    if gradients:
        for gradient, mean in zip(gradients, process.mean(torch.stack(gradients)), strict=True):
            gradient.copy_(mean)


def whole_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[State, State]:
    """The state of module and optimiser with whole tensors. All processes must call it; where the module is sharded, only the
    first gets them, on the CPU.
    """
    if not isinstance(module, FSDPModule):
        return module.state_dict(), optimizer.state_dict()
    # torch's own `get_optimizer_state_dict` makes up a state for parameters that had no gradient yet, and a resumed run
    # would then differ from an undisturbed one.
    found = optimizer.state_dict()
    state = {number: {name: _gather(v) for name, v in values.items()} for number, values in found["state"].items()}
    return get_model_state_dict(module, options=_ON_FIRST), {**found, "state": state}


def load_whole_state(module: nn.Module, optimizer: torch.optim.Optimizer, model: State, state: State) -> None:
    """Takes over what `whole_state` gave, in a run of any number of processes, sharded or not."""
    if not isinstance(module, FSDPModule):
        module.load_state_dict(model)
        optimizer.load_state_dict(state)
        return
    set_model_state_dict(module, model, options=StateDictOptions(full_state_dict=True))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parts = {
        number: {name: _cut(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": parts})


def make_whole(module: nn.Module, process: Process) -> None:
    """Gives the first process the whole parameters, on the CPU, so that it can write them. All must call it, and the module
    runs no more.
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


def _gather(value: Any) -> Any:
    if not isinstance(value, DTensor):
        return value
    whole = value.full_tensor()
    return whole.cpu() if torch.distributed.get_rank() == 0 else whole.new_empty(0)


def _cut(value: Any, parameter: Tensor) -> Any:
    """This process's part of a value that has the parameter's shape; the count of steps is a scalar."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
