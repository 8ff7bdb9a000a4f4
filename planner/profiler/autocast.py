"""Autocast on ``meta``: the casts that it makes on the target, and the casts of weights that it keeps.

PyTorch's own casts skip ``meta`` tensors. The same policies (ATen's autocast_mode.cpp) are therefore registered for a
dispatch key that PyTorch itself leaves empty, and that key is switched on where autocast is on for the target's device.
CALLS is a table as in ``kernels``.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from .kernels import Target

aten = torch.ops.aten
Policy = Literal["lower", "single", "sum in single", "promote"]
_KEY = "AutocastHPU"
_KEYS = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _KEY))

_PRODUCTS = (
    "addbmm", "addmm", "baddbmm", "bmm", "conv1d", "conv1d.padding", "conv2d", "conv2d.padding", "conv3d",
    "conv3d.padding", "conv_tbc", "conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input",
    "linalg_vecdot", "linear", "matmul", "mm", "prelu", "scaled_dot_product_attention",
)  # fmt: skip
_LOSSES = (
    "binary_cross_entropy_with_logits", "cosine_embedding_loss", "hinge_embedding_loss", "huber_loss", "kl_div",
    "l1_loss", "margin_ranking_loss", "mse_loss", "multi_margin_loss", "multilabel_margin_loss", "nll_loss",
    "nll_loss2d", "poisson_nll_loss", "smooth_l1_loss", "soft_margin_loss", "triplet_margin_loss",
)  # fmt: skip
_CUDA: dict[Policy, tuple[str, ...]] = {
    "lower": (*_PRODUCTS, "addmv", "addr", "chain_matmul", "convolution", "einsum", "linalg_multi_dot", "mv"),
    "single": (
        *_LOSSES, "cdist", "cosine_similarity", "exp", "expm1", "group_norm", "layer_norm", "log", "log10", "log1p",
        "log2", "logsumexp", "native_layer_norm", "pow.Scalar", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "reciprocal",
        "rms_norm", "rsqrt", "softplus",
    ),
    "sum in single": (
        "cumprod", "cumsum", "linalg_vector_norm", "log_softmax.int", "prod", "prod.dim_int", "softmax.int", "sum",
        "sum.dim_IntList",
    ),
    "promote": ("addcdiv", "addcmul", "atan2", "cross", "dot", "index_put", "scatter_add", "tensordot"),
}  # fmt: skip
_CPU: dict[Policy, tuple[str, ...]] = {
    "lower": _PRODUCTS,
    "single": (*_LOSSES, "binary_cross_entropy", "cdist", "cross_entropy_loss", "prod", "prod.dim_int"),
    "promote": ("cat", "index_copy", "stack"),
}


@dataclass
class _State:
    """For which target autocast is on, if it is, and the casts of weights that it keeps."""

    target: Target | None = None
    casts: dict[int, tuple[weakref.ref[torch.Tensor], torch.Tensor]] = field(default_factory=dict)


_state = _State()


def is_on() -> bool:
    """Whether autocast is on for the target's device."""
    return _state.target is not None


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Cast nothing inside, as in a kernel."""
    before, _state.target = _state.target, None
    try:
        with torch._C._ExcludeDispatchKeyGuard(_KEYS):
            yield
    finally:
        _state.target = before


@functools.cache
def _policies(device_type: str) -> dict[Any, Policy]:
    """What this PyTorch does with each operator on a device: of the table, what it has kernels for."""
    table, key = (_CPU, "AutocastCPU") if device_type == "cpu" else (_CUDA, "AutocastCUDA")
    found: dict[Any, Policy] = {}
    for policy, names in table.items():
        for name in names:
            packet, _, overload = name.partition(".")
            operator = getattr(getattr(aten, packet, None), overload or "default", None)
            if operator is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key):
                found[operator] = policy
    return found


@functools.cache
def _register() -> tuple[torch.library.Library, torch.library.Library]:
    """The kernels, which stay registered while the answer, remembered here, lives; other operators pass the key by."""
    others = torch.library.Library("_", "IMPL", _KEY)
    others.fallback(torch.library.fallthrough_kernel)
    library = torch.library.Library("aten", "IMPL")
    for operator in {**_policies("cpu"), **_policies("cuda")}:
        library.impl(operator, functools.partial(_cast_and_call, operator), _KEY)
    return library, others


def _cast_and_call(operator: Any, *args: Any, **kwargs: Any) -> Any:
    target = _state.target
    policy = _policies(target.device_type).get(operator) if target else None
    with off():
        if target is None or policy is None:
            return operator(*args, **kwargs)
        if policy == "sum in single":
            return _in_single(target, operator, args, kwargs)
        lower = torch.get_autocast_dtype(target.device_type)
        dtype = lower if policy == "lower" else torch.float32
        if policy == "promote" and not any(t.dtype == torch.float32 for t in _eligible((args, kwargs))):
            dtype = lower
        return operator(*_cast(args, dtype, lower), **_cast(kwargs, dtype, lower))


def _in_single(target: Target, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A result in fp32, unless the caller wants another; CUDA's softmax of fp16 casts inside its kernel."""
    if not any(True for _ in _eligible(args[:1])):
        return operator(*args, **kwargs)
    names = [argument.name for argument in operator._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    if given.get("dtype") is None:
        given["dtype"] = torch.float32
    fused = {aten.softmax.int: aten._softmax, aten.log_softmax.int: aten._log_softmax}.get(operator)
    half = args[0].dtype == torch.float16 and given["dtype"] == torch.float32
    if fused is not None and half and target.device_type == "cuda":
        return fused(args[0], given["dim"], True)
    positional = [given.pop(name) for name in names[: len(args)]]
    return operator(*positional, **given)


def _eligible(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        if values.is_meta and values.is_floating_point() and values.dtype != torch.float64:
            yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _eligible(value)
    elif isinstance(values, dict):
        yield from _eligible(list(values.values()))


def _cast(value: Any, dtype: torch.dtype, lower: torch.dtype) -> Any:
    """Every eligible tensor in *value* as *dtype*; a trained fp32 weight is cast once (``cached_cast``)."""
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(item, dtype, lower) for item in value)
    if isinstance(value, dict):
        return {key: _cast(item, dtype, lower) for key, item in value.items()}
    if not any(True for _ in _eligible(value)) or value.dtype == dtype:
        return value
    weight = value.requires_grad and value.is_leaf and value.dtype == torch.float32 and not value._is_view()
    if dtype != lower or not weight or not torch.is_autocast_cache_enabled():
        return value.to(dtype)
    known = _state.casts.get(id(value))
    if known is None or known[0]() is not value:
        known = _state.casts[id(value)] = weakref.ref(value), value.to(dtype)
    return known[1]


def as_cast(call: Callable[..., Any]) -> Callable[..., Any]:
    """*call*, an entry of CALLS for a function whose operator autocast runs in lower precision."""

    @functools.wraps(call)
    def casting(target: Target, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not is_on():
            return call(target, original, *args, **kwargs)
        lower = torch.get_autocast_dtype(target.device_type)
        with off():
            return call(target, original, *_cast(args, lower, lower), **_cast(kwargs, lower, lower))

    return casting


def _start(
    target: Target, original: Callable[..., None], self: Any, device_type: str, *args: Any, **kwargs: Any
) -> None:
    """``torch.autocast(device)`` of a step that was given ``meta`` for its device."""
    original(self, target.device_type if device_type == "meta" else device_type, *args, **kwargs)


def _enable(target: Target, original: Callable[..., None], *args: Any) -> None:
    original(*args)
    if len(args) == 2 and args[0] == target.device_type:
        _register()
        _state.target = target if args[1] else None
        torch._C._dispatch_tls_set_dispatch_key_excluded(_KEY, not args[1])
        torch._C._dispatch_tls_set_dispatch_key_included(_KEY, bool(args[1]))


def _clear(_target: Target, original: Callable[[], None]) -> None:
    original()
    _state.casts.clear()


def _has_bfloat16(target: Target, original: Callable[..., bool], including_emulation: bool = True) -> bool:
    if target.compute_capability is None:
        return original(including_emulation)
    return including_emulation or target.compute_capability >= (8, 0)


def _no_cuda(target: Target, original: Callable[[], bool]) -> bool:
    return target.device_type != "cuda" and original()


CALLS: dict[tuple[Any, str], Callable[..., Any]] = {
    (torch.autocast, "__init__"): _start,
    (torch, "set_autocast_enabled"): _enable,
    (torch, "clear_autocast_cache"): _clear,
    (torch.cuda, "is_bf16_supported"): _has_bfloat16,
    (torch.cuda.amp.common, "amp_definitely_not_available"): _no_cuda,
}
