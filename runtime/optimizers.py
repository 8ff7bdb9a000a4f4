"""The optimizers that a plan can name, and what of their state is kept when a run is interrupted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch

from shallowflow.planner.strategies import Optimizer

from . import quantized

_TABLES = ("qmap1", "qmap2")
"""bitsandbytes' tables of the 256 values that 8 bits stand for: constants, which all parameters share."""


def make(name: Optimizer, parameters: Sequence[torch.nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """AdamW without weight decay over *parameters*.

    With ``adamw8bit``, tensors of fewer than 4096 elements keep their state in fp32, as bitsandbytes has it.
    """
    if name == "adamw8bit":
        made: torch.optim.Optimizer = _adamw_8bit()(parameters, lr=learning_rate, weight_decay=0.0)
        return made
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, foreach=True)


@cache
def _adamw_8bit() -> Any:
    """bitsandbytes' optimizer, whose own ``step`` waits for the device once for every parameter."""
    base: Any = quantized.bitsandbytes().optim.AdamW8bit

    class AdamW8bit(base):  # type: ignore[misc]
        """The same update, launched without waiting."""

        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            assert closure is None
            for group_index, group in enumerate(self.param_groups):
                for index, parameter in enumerate(group["params"]):
                    if parameter.grad is None:
                        continue
                    if not self.state[parameter]:
                        self.init_state(group, parameter, group_index, index)
                    self.update_step(group, parameter, group_index, index)

    return AdamW8bit


def state(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every tensor and number of the state, named by the parameter's number and by what it is."""
    found: dict[str, torch.Tensor] = {}
    for index, parameter in enumerate(_parameters(optimizer)):
        kept: Mapping[str, Any] = optimizer.state.get(parameter, {})
        found |= {f"{index}.{key}": torch.as_tensor(value) for key, value in kept.items() if key not in _TABLES}
    return found


def restore(optimizer: torch.optim.Optimizer, saved: Mapping[str, torch.Tensor]) -> None:
    """Give *optimizer* the state *saved*.

    Raises:
        ValueError: it is of another optimizer.
    """
    parameters = _parameters(optimizer)
    by_parameter: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in saved.items():
        index, _, key = name.partition(".")
        by_parameter.setdefault(int(index), {})[key] = tensor
    keys = {"state1", "state2"} if hasattr(optimizer, "fill_qmap") else {"exp_avg", "exp_avg_sq"}
    if any(number >= len(parameters) or not keys <= set(kept) for number, kept in by_parameter.items()):
        raise ValueError("it holds the state of another optimizer")
    for number, kept in by_parameter.items():
        _put(optimizer, parameters[number], kept)


def _put(optimizer: Any, parameter: torch.nn.Parameter, kept: Mapping[str, torch.Tensor]) -> None:
    """One parameter's state; AdamW counts its steps in a tensor on the host, bitsandbytes in a number."""
    own = {key: value.to(parameter.device) for key, value in kept.items() if key != "step"}
    if "state1" not in kept:
        optimizer.state[parameter] = {"step": kept["step"].clone(), **own}
        return
    optimizer.state[parameter] = {"step": int(kept["step"]), **own}
    if kept["state1"].dtype == torch.uint8:
        if not optimizer.name2qmap:
            optimizer.fill_qmap()
        tables = {name: table.to(parameter.device) for name, table in optimizer.name2qmap.items()}
        optimizer.name2qmap.update(tables)
        optimizer.state[parameter] |= {"qmap1": tables["dynamic"], "qmap2": tables["udynamic"]}


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
