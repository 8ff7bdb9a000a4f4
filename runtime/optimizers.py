"""The optimizers that a plan can name, and what of their state is kept when a run is interrupted."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any

import torch

from shallowflow.planner.strategies import Optimizer

from . import quantized

_TABLES = ("qmap1", "qmap2")
"""bitsandbytes' tables of the 256 values that 8 bits stand for: constants, which all parameters share."""
BLOCK = 256
"""Values that share a scale (bitsandbytes' ``Optimizer2State.init_state``)."""


def make(name: Optimizer, parameters: Sequence[torch.nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """AdamW without weight decay over *parameters*.

    With ``adamw8bit``, tensors of fewer than 4096 elements keep their state in fp32, as bitsandbytes has it.
    """
    if name == "adamw8bit":
        made: torch.optim.Optimizer = _adamw_8bit()(parameters, lr=learning_rate, weight_decay=0.0)
        return made
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, foreach=True)


def make_full(name: Optimizer, model: torch.nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """The same for all of *model*'s weights, with no temporaries that would be as large as they.

    With ``adamw8bit``, embeddings keep their state in fp32: rows of rare tokens, which share a scale with others, lose
    theirs (8-bit Optimizers via Block-wise Quantization, Dettmers et al., 2022, section 2.3).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "adamw8bit":
        made: Any = make(name, parameters, learning_rate)
        made.precise = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
        optimizer: torch.optim.Optimizer = made
        return optimizer
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)


@cache
def _adamw_8bit() -> Any:
    """bitsandbytes' optimizer, whose own ``step`` waits for the device once for every parameter."""
    base: Any = quantized.bitsandbytes().optim.AdamW8bit

    class AdamW8bit(base):  # type: ignore[misc]
        """The same update, launched without waiting; *precise* parameters, by identity, keep their state in fp32."""

        precise: Collection[int] = ()

        def get_config(self, gindex: int, pindex: int, group: Any) -> Any:
            config = super().get_config(gindex, pindex, group)
            return {**config, "optim_bits": 32} if id(group["params"][pindex]) in self.precise else config

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


def state(optimizer: torch.optim.Optimizer, numbers: Sequence[int] | None = None) -> dict[str, torch.Tensor]:
    """Every tensor and number of the state, named by the parameter's number and by what it is.

    *numbers* are those of the parameters; None counts them.
    """
    parameters = _parameters(optimizer)
    found: dict[str, torch.Tensor] = {}
    for index, parameter in zip(range(len(parameters)) if numbers is None else numbers, parameters, strict=True):
        kept: Mapping[str, Any] = optimizer.state.get(parameter, {})
        found |= {f"{index}.{key}": torch.as_tensor(value) for key, value in kept.items() if key not in _TABLES}
    return found


def restore(
    optimizer: torch.optim.Optimizer,
    saved: Mapping[str, torch.Tensor],
    numbers: Sequence[int] | None = None,
    in_all: int | None = None,
) -> None:
    """Give *optimizer* the state *saved*; one of the other optimizer is brought into this one's format.

    Its parameters have these *numbers* of those *in_all*; None for no others.

    Raises:
        ValueError: it is of other parameters.
    """
    parameters, in_8_bits = _parameters(optimizer), hasattr(optimizer, "fill_qmap")
    by_parameter: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in saved.items():
        index, _, key = name.partition(".")
        by_parameter.setdefault(int(index), {})[key] = tensor
    most = len(parameters) if in_all is None else in_all
    if by_parameter and max(by_parameter) >= most:
        raise ValueError(f"it holds an optimizer's state of more than {most} parameters")
    own_numbers = range(len(parameters)) if numbers is None else numbers
    mine = dict(zip(own_numbers, parameters, strict=True))
    for number, kept in by_parameter.items():
        if number not in mine:
            continue
        parameter = mine[number]
        own = {key: value.to(parameter.device) for key, value in kept.items() if key != "step"}
        if in_8_bits:
            optimizer.state[parameter] = _for_8_bits(optimizer, own, parameter) | {"step": int(kept["step"])}
        else:
            device = parameter.device if optimizer.defaults["fused"] else "cpu"
            step = kept["step"].to(device, torch.float32, copy=True)
            optimizer.state[parameter] = _for_adamw(own) | {"step": step}


def _for_8_bits(optimizer: Any, kept: Mapping[str, torch.Tensor], parameter: torch.Tensor) -> dict[str, Any]:
    """The two moments as bitsandbytes keeps them, with its tables; small and *precise* ones stay in fp32."""
    if "exp_avg" not in kept and kept["state1"].dtype == torch.float32:
        return dict(kept)
    is_precise = id(parameter) in optimizer.precise or parameter.numel() < optimizer.args.min_8bit_size
    if "exp_avg" in kept and is_precise:
        return {"state1": kept["exp_avg"], "state2": kept["exp_avg_sq"]}
    tables = _tables(optimizer, next(iter(kept.values())).device)
    if "state1" in kept:
        return {**kept, **tables}
    quantize = quantized.bitsandbytes().functional.quantize_blockwise
    first, scales = quantize(kept["exp_avg"], code=tables["qmap1"], blocksize=BLOCK)
    second, squares = quantize(kept["exp_avg_sq"], code=tables["qmap2"], blocksize=BLOCK)
    return {"state1": first, "absmax1": scales.absmax, "state2": second, "absmax2": squares.absmax, **tables}


def _for_adamw(kept: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The two moments as AdamW keeps them."""
    if "exp_avg" in kept:
        return dict(kept)
    if kept["state1"].dtype == torch.float32:
        return {"exp_avg": kept["state1"], "exp_avg_sq": kept["state2"]}
    restored = quantized.bitsandbytes().functional.dequantize_blockwise
    tables = _tables(_adamw_8bit()([torch.zeros(1)]), kept["state1"].device)
    return {
        "exp_avg": restored(kept["state1"], absmax=kept["absmax1"], code=tables["qmap1"], blocksize=BLOCK),
        "exp_avg_sq": restored(kept["state2"], absmax=kept["absmax2"], code=tables["qmap2"], blocksize=BLOCK),
    }


def _tables(optimizer: Any, device: torch.device) -> dict[str, torch.Tensor]:
    """bitsandbytes' tables for both moments, one copy for all parameters."""
    if not optimizer.name2qmap:
        optimizer.fill_qmap()
    optimizer.name2qmap.update({name: table.to(device) for name, table in optimizer.name2qmap.items()})
    return {"qmap1": optimizer.name2qmap["dynamic"], "qmap2": optimizer.name2qmap["udynamic"]}


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
