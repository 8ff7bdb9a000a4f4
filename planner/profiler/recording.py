"""Make code run as on the target, and record it: PyTorch's own hooks, and its functions' versions for the device."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from . import data_dependent, kernels
from .kernels import Target
from .trace import Recorder


def _substituted(substitute: Callable[..., Any], target: Target, original: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:  # a function and no partial, so that it can be a method
        return substitute(target, original, *args, **kwargs)

    return call


@contextlib.contextmanager
def _as_on(target: Target) -> Iterator[None]:
    """Put the target's versions of a few functions in place of PyTorch's.

    Where they stand, not by a function mode: a mode is off inside every call that it handles, and would miss what
    ``multi_head_attention_forward`` or a backward pass calls in turn.
    """
    replaced = [(home, name, getattr(home, name)) for home, name in kernels.CALLS]
    for (home, name), substitute in kernels.CALLS.items():
        setattr(home, name, _substituted(substitute, target, getattr(home, name)))
    try:
        yield
    finally:
        for home, name, original in replaced:
            setattr(home, name, original)


@contextlib.contextmanager
def _emptying(recorder: Recorder) -> Iterator[None]:
    """Note calls of ``torch.cuda.empty_cache``, which does nothing where CUDA was never started."""
    original = torch.cuda.empty_cache
    torch.cuda.empty_cache = recorder.empty_cache
    try:
        yield
    finally:
        torch.cuda.empty_cache = original


@functools.cache
def _warm_up() -> None:
    """Make PyTorch load its shape functions now.

    The first call of some operators on ``meta`` imports them, past an exception whose traceback keeps the caller's
    tensors alive in a cycle, which nothing would collect while a step is recorded.
    """
    matrix = torch.empty((2, 2), device="meta", requires_grad=True)
    bias = torch.empty(2, device="meta")
    torch.nn.functional.linear(matrix, matrix, bias).sum().backward()
    gc.collect()


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[Recorder]:
    """Record what runs inside, with modules and phases told apart by PyTorch's own global hooks.

    The cyclic garbage collector is off meanwhile: what it would free, and when, depends on all that Python did before.
    """
    modules = torch.nn.modules.module

    def start_optimizer(optimizer: torch.optim.Optimizer, _args: object, _kwargs: object) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    number = recorder.follow(parameter.grad, "gradients")
                    recorder.owned(parameter, parameter.grad, "gradients")
                    if number is not None:
                        recorder.gradient_numbers[id(parameter)] = number
        recorder.phase = "optimizer"
        recorder.mark("optimizer")

    def end_optimizer(optimizer: torch.optim.Optimizer, _args: object, _kwargs: object) -> None:
        for parameter, state in optimizer.state.items():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    recorder.owned(parameter, value, "optimizer")
        recorder.mark("end optimizer")
        recorder.phase = "forward"

    handles = [
        modules.register_module_forward_pre_hook(recorder.enter_module),
        modules.register_module_forward_hook(recorder.leave_module, always_call=True),
        register_optimizer_step_pre_hook(start_optimizer),
        register_optimizer_step_post_hook(end_optimizer),
    ]
    _warm_up()
    data_dependent.forget()
    collecting, swapping = gc.isenabled(), torch.__future__.get_swap_module_params_on_conversion()
    gc.disable()
    torch.__future__.set_swap_module_params_on_conversion(True)  # or moving a model to `meta` would untie tied weights
    try:
        with _as_on(recorder.target), _emptying(recorder), recorder:
            yield recorder
    finally:
        if collecting:
            gc.enable()
        torch.__future__.set_swap_module_params_on_conversion(swapping)
        for handle in handles:
            handle.remove()


def record_steps(step: Callable[[], Any], recorder: Recorder, num_steps: int = 2) -> None:
    """Run *step* under *recorder*: the first step creates optimizer state, the last shows the steady peak."""
    for index in range(num_steps):
        recorder.phase = "forward"
        recorder.mark(f"step {index}")
        step()
    recorder.mark("end")
