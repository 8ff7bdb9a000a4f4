"""Remember what an operator returns for given shapes, so that ``meta`` works it out once.

Most of a trace is the same few hundred calls again and again, and PyTorch's shape functions are Python: a call
costs 50 to 100 microseconds, a remembered answer five.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import operators

_Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]
_Known = tuple[list[_Layout | None], bool, tuple[operators.OpCost, ...]]

_known: dict[Any, _Known] = {}
_known_writes: dict[Any, tuple[operators.OpCost, ...]] = {}
_targets: dict[Any, tuple[int, str] | None] = {}
_fresh: dict[Any, bool] = dict.fromkeys((torch.ops.aten.nonzero.default, torch.ops.aten.eq.Scalar), False)
"""Whether an operator's answer is remembered; those that ``data_dependent`` gives from more than shapes are not."""


def _returns_fresh(func: Any) -> bool:
    """Whether every result of *func* is memory of its own: no view, nothing written in place."""
    fresh = _fresh.get(func)
    if fresh is None:
        schema = func._schema
        fresh = bool(schema.returns) and not schema.is_mutable and all(r.alias_info is None for r in schema.returns)
        _fresh[func] = fresh
    return fresh


class _Unknown(Exception):
    """An argument that no shape describes."""


def _describe(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if not value.is_meta:
            raise _Unknown
        return (value.shape, value.stride(), value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple([_describe(item) for item in value])
    return (value.__class__, value)


def _written(func: Any) -> tuple[int, str] | None:
    """The place and name of the one argument that *func* writes to and returns; None where that is not all it does."""
    if func not in _targets:
        schema, found = func._schema, None
        if (
            len(schema.returns) == 1
            and schema.returns[0].alias_info is not None
            and schema.returns[0].alias_info.is_write
        ):
            places = [n for n, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
            found = (places[0], schema.arguments[places[0]].name) if len(places) == 1 else None
        _targets[func] = found
    return _targets[func]


def _write(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[operators.OpCost, ...]]:
    """Run *func*, which writes to an argument, or return that where it is known that nothing else comes of it."""
    place, name = _written(func) or (0, "")
    target = kwargs[name] if name in kwargs else args[place]
    try:
        key = (func, torch.get_default_dtype(), _describe(args), tuple([(k, _describe(v)) for k, v in kwargs.items()]))
        launches = _known_writes.get(key)
    except (_Unknown, TypeError):
        out = func(*args, **kwargs)
        return out, operators.costs(func, args, kwargs, out)
    if launches is not None:
        return target, launches
    before = _describe(target), target.untyped_storage()._cdata, target.untyped_storage().nbytes()
    out = func(*args, **kwargs)
    launches = operators.costs(func, args, kwargs, out)
    if out is target and before == (_describe(out), out.untyped_storage()._cdata, out.untyped_storage().nbytes()):
        _known_writes[key] = launches
    return out, launches


def _shares_memory(results: tuple[Any, ...], args: tuple[Any, ...]) -> bool:
    inputs = {t.untyped_storage()._cdata for t in operators.tensors(args)}
    return any(t.untyped_storage()._cdata in inputs for t in operators.tensors(results))


def call(
    func: Any, implementation: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[operators.OpCost, ...]]:
    """Run *implementation* of *func* on ``meta`` tensors, or return what it is known to return.

    The second result is what the call launches.
    """
    if operators.is_view(func):
        return implementation(*args, **kwargs), ()
    if not _returns_fresh(func):
        if implementation is func and _written(func) is not None:
            return _write(func, args, kwargs)
        out = implementation(*args, **kwargs)
        return out, operators.costs(func, args, kwargs, out)
    try:
        described = tuple([(k, _describe(v)) for k, v in kwargs.items()])
        key = (func, torch.get_default_dtype(), _describe(args), described)  # factories take the default without a word
        known = _known.get(key)
    except (_Unknown, TypeError):
        out = implementation(*args, **kwargs)
        return out, operators.costs(func, args, kwargs, out)
    if known is not None:
        layouts, single, launches = known
        made = [x if x is None else torch.empty_strided(x[0], x[1], dtype=x[2], device="meta") for x in layouts]
        return (made[0] if single else tuple(made)), launches
    out = implementation(*args, **kwargs)
    launches = operators.costs(func, args, kwargs, out)
    single = not isinstance(out, (tuple, list))
    results = (out,) if single else tuple(out)
    if _shares_memory(results, args):  # where the schema does not say so
        _fresh[func] = False
    elif all(r is None or (isinstance(r, torch.Tensor) and r.is_meta) for r in results):
        _known[key] = ([None if r is None else (r.shape, r.stride(), r.dtype) for r in results], single, launches)
    return out, launches
