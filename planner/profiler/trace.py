"""Follow a real training step on ``meta`` tensors: every allocation, every free, every operator."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from . import autocast, in_place, kernels, operators, shapes
from .allocator import EMPTY_CACHE
from .kernels import Target

aten = torch.ops.aten
RECOMPUTED = "recomputed activations"
Phase = str
"""``load``, ``forward``, ``backward``, ``optimizer`` or ``other``."""


@dataclass(slots=True)
class Trace:
    """What happened, in order.

    Attributes:
        events: ``i + 1`` where allocation ``i`` was made, ``-(i + 1)`` where it was freed.
        sizes: bytes asked for, per allocation, before any rounding.
        phases, modules: per allocation, the phase and the path of the module whose forward or backward pass made it.
        stages: per allocation, the category that its birth suggests.
        owners: the path of the module that a parameter, its gradient or its optimizer state belongs to.
        categories: per allocation, what it turned out to be, where that is known.
        marks: (number of events before it, label).
        ops: (number of events before it, cost) of every operator that runs on the device.
    """

    events: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    owners: dict[int, str] = field(default_factory=dict)
    categories: dict[int, str] = field(default_factory=dict)
    marks: list[tuple[int, str]] = field(default_factory=list)
    ops: list[tuple[int, operators.OpCost]] = field(default_factory=list)


class Recorder(TorchDispatchMode):
    """Write down every storage's birth and death while ``meta`` code runs.

    A storage is an allocation when first seen and freed when Python and autograd let go of it, which
    happens at the same points of the program as it does on a real device.
    """

    def __init__(self, target: Target) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.target = target
        self.trace = Trace()
        self.phase: Phase = "load"
        self.gradient_numbers: dict[int, int] = {}
        self._live: dict[int, int] = {}
        self._sharers: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._modules: list[str] = [""]
        self._names: dict[int, str] = {}
        self._parameters: dict[int, str] = {}
        self._head: int | None = None
        self._decoder: int | None = None
        self._past_head = False
        self._backward_module = ""
        self.workspaces: dict[tuple[str, str], int] = {}
        self.needed_workspaces: set[tuple[str, str]] = set()
        in_place.owned_by_autograd_alone()  # seen now, because a mode that is on would record it

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: nothing here is ever compiled, and the wrapper that would keep Dynamo out costs more than the rest."""
        return False

    def allocate(self, num_bytes: int, category: str | None = None) -> int:
        """Note an allocation of *num_bytes* and return its number."""
        trace = self.trace
        number = len(trace.sizes)
        trace.sizes.append(num_bytes)
        trace.phases.append(self.phase)
        backward = self.phase == "backward" and len(self._modules) == 1
        trace.modules.append(self._backward_module if backward else self._modules[-1])
        trace.stages.append(self._stage())
        if category:
            trace.categories[number] = category
        trace.events.append(number + 1)
        return number

    def free(self, number: int) -> None:
        """Note that allocation *number* ended."""
        self.trace.events.append(-(number + 1))

    def follow(self, tensor: torch.Tensor, category: str | None = None) -> int | None:
        """Track the storage of *tensor* from now on and return its allocation's number; None if it takes no memory.

        *category* names what it is, also when it has been tracked for long.
        """
        storage = tensor.untyped_storage()
        key = storage._cdata
        number = self._live.get(key)
        if number is None:
            if not self._on_device(tensor) or not (num_bytes := storage.nbytes()):
                return None
            number = self.allocate(num_bytes)
            self._watch(storage, number)
        if category:
            self.trace.categories[number] = category
        return number

    def _on_device(self, tensor: torch.Tensor) -> bool:
        """Whether *tensor* takes the device's memory: a CPU target's own tensors may be real; pages are the host's."""
        real = self.target.device_type == "cpu" and tensor.device.type == "cpu"
        return (tensor.is_meta or real) and not getattr(tensor, "is_paged", False)

    def _watch(self, storage: torch.UntypedStorage, number: int) -> None:
        key = storage._cdata
        self._live[key] = number
        self._sharers[number] = self._sharers.get(number, 0) + 1
        self._watched[key] = weakref.ref(storage, lambda _: self._forget(key))

    def _share(self, moved: torch.Tensor, original: torch.Tensor) -> None:
        """Let *moved* be the memory of *original*: what goes from the CPU to the CPU stays where it is."""
        number = self.follow(original)
        if number is not None and moved.untyped_storage()._cdata not in self._live:
            self._watch(moved.untyped_storage(), number)

    def _stage(self) -> str:
        if self.phase == "load":
            return "inputs"
        if self.phase == "optimizer":
            return "temporaries"
        if self.phase == "backward" and (len(self._modules) > 1 or torch.is_grad_enabled()):
            return RECOMPUTED
        if self._past_head:
            return "logits and loss"
        return "activations" if self.phase == "forward" else "temporaries"

    def empty_cache(self) -> None:
        """Note that cached segments are given back."""
        self.trace.events.append(EMPTY_CACHE)

    def mark(self, label: str) -> None:
        """Name the present moment."""
        self.trace.marks.append((len(self.trace.events), label))

    def name_modules(self, model: torch.nn.Module) -> None:
        """Let allocations carry the path of the module that makes them."""
        self._names.update({id(module): name for name, module in model.named_modules()})
        self._parameters.update({id(p): name.rpartition(".")[0] for name, p in model.named_parameters()})
        find_head = getattr(model, "get_output_embeddings", None)
        head = find_head() if find_head else None
        self._head = self._head if head is None else id(head)
        find_decoder = getattr(model, "get_decoder", None)
        self._decoder = id(find_decoder()) if find_decoder else self._decoder

    def owned(self, parameter: torch.Tensor, tensor: torch.Tensor, category: str) -> None:
        """Say that *tensor* is *category* and belongs to the module of *parameter*."""
        number = self.follow(tensor, category)
        if number is not None and id(parameter) in self._parameters:
            self.trace.owners[number] = self._parameters[id(parameter)]

    def enter_module(self, module: torch.nn.Module, args: object) -> None:
        """Global forward pre-hook."""
        self._modules.append(self._names.get(id(module), self._modules[-1]))
        if id(module) == self._head:
            self._past_head = True
            for tensor in _differentiable(args):
                tensor.register_hook(self._before_head)

    def leave_module(self, module: torch.nn.Module, _args: object, output: object) -> None:
        """Global forward hook, called when the forward raised, too."""
        if len(self._modules) > 1:
            self._modules.pop()
        if id(module) == self._decoder:  # a loss in chunks calls no head
            self._past_head = True
            hidden = next(iter(output.values()), None) if isinstance(output, dict) else output
            for tensor in _differentiable(hidden):
                tensor.register_hook(self._before_head)
        if id(module) in self._names:
            for tensor in _differentiable(output):
                tensor.register_hook(functools.partial(self._enter_backward, self._names[id(module)]))

    def _before_head(self, _gradient: torch.Tensor) -> None:
        self._past_head = False

    def _enter_backward(self, module: str, _gradient: torch.Tensor) -> None:
        self._backward_module = module

    def _notice_backward(self) -> None:
        running = torch._C._current_graph_task_id() != -1
        if running and self.phase == "forward":
            self.phase = "backward"
            self._backward_module = ""
            self.mark("backward")
        elif not running and self.phase == "backward":
            self.phase = "forward"
            self._past_head = False
            self.mark("end backward")

    def _forget(self, key: int) -> None:
        del self._watched[key]
        number = self._live.pop(key)
        self._sharers[number] -= 1
        if not self._sharers[number]:
            del self._sharers[number]
            self.free(number)

    def reserve_workspaces(self, thread: str, num_bytes: Mapping[str, int]) -> None:
        """Note a library's workspaces for *thread* when it first needs them; they stay for the life of the process."""
        for library, size in num_bytes.items():
            if size and (thread, library) not in self.workspaces:
                self.workspaces[thread, library] = self.allocate(size, "workspace")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if autocast.is_on():  # what is recorded is below autocast, but would be dispatched from the top once more
            with autocast.off():
                return self.__torch_dispatch__(func, types, args, kwargs)
        kwargs = kwargs or {}
        self._notice_backward()
        answer = kernels.ANSWERS.get(func)
        if answer is not None:
            return answer(*args, **kwargs)
        func = in_place.really(func, args, kwargs)
        rule = kernels.BEFORE_RESULT.get(func)
        temporaries = [self.allocate(n, "temporaries") for n in rule(self.target, args, kwargs)] if rule else []
        out, launches = shapes.call(func, kernels.REPLACEMENTS.get(func, func), args, kwargs)
        if func is aten._to_copy.default and self.target.device_type == "cpu" and _moves(args[0], out):
            self._share(out, args[0])
        if self.target.device_type == "cpu" or not operators.leaves_device(func):
            self._follow_all(out)
        if operators.makes_weights(func) and (number := self.follow(out)) is not None:
            self.trace.stages[number] = "temporaries"  # in a recomputed layer, too
        gathered = operators.filled(func, args)
        if gathered is not None:
            self.follow(gathered, "gathered weights")
        if operators.is_matrix_product(func):
            thread = "autograd" if self.phase == "backward" else "main"
            wanted = kernels.library_workspaces(self.target, func, args, kwargs)
            self.reserve_workspaces(thread, wanted)
            self.needed_workspaces.update((thread, library) for library in wanted)
        rule = kernels.AFTER_RESULT.get(func)
        temporaries += [self.allocate(n, "temporaries") for n in rule(self.target, args, kwargs)] if rule else []
        for number in temporaries:
            self.free(number)
        self.trace.ops += [(len(self.trace.events), launch) for launch in launches]
        return out

    def _follow_all(self, out: Any) -> None:
        if isinstance(out, torch.Tensor):
            self.follow(out)
        elif isinstance(out, (tuple, list)):
            for item in out:
                self._follow_all(item)


def device_type(tensor: torch.Tensor) -> str:
    """The kind of device that *tensor* is on, or would be on where what runs is recorded for a target."""
    recorders = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, Recorder)]
    return recorders[-1].target.device_type if tensor.is_meta and recorders else tensor.device.type


def _moves(original: torch.Tensor, copy: torch.Tensor) -> bool:
    """Whether *copy* is on another device and else the same."""
    return original.device != copy.device and original.dtype == copy.dtype


def _differentiable(values: object) -> Iterator[torch.Tensor]:
    """The tensors among *values* that a gradient flows to."""
    if isinstance(values, torch.Tensor):
        if values.requires_grad:
            yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            if isinstance(value, torch.Tensor) and value.requires_grad:
                yield value
