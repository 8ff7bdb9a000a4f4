"""Frozen matrices shared out over processes: each keeps its part of every one, and gathers one before it is used.

That is FSDP2's ``fully_shard`` with ``reshard_after_forward=True``, for every linear module by itself and for tensors
of any format: a matrix and its quantization constants are one run of bytes, gathered at once into memory of which they
are views. FSDP2 gathers into one buffer and copies each parameter out of it, on streams of their own whose memory the
allocator keeps apart, and knows parameters only, which a quantized module's constants are not.

While a matrix is used, the next one of its layer is on its way. Nothing of a layer is gathered while another computes:
what a layer takes does not depend on its neighbours, which is what plans of mixed layers are composed from. So the
first matrix of each pass is waited for. The adapters are not shared out: with them whole
in every process, updates, checkpoints and the loss scale are what they are without sharding.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from shallowflow.planner.strategies import Strategy

from . import activations, build, gathers, quantized
from .quantized import Use
from .ranks import Ranks

ALIGNMENT = 512
"""Bytes: of each tensor in what is gathered, and of each process's part; the caching allocator's own."""

Fill = Callable[[torch.nn.Module], None]
"""Gives a module's parameters that are on ``meta`` their values."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A tensor within the bytes of a matrix: the attributes that hold it, from the module on."""

    places: tuple[str, ...]
    first_byte: int
    dtype: torch.dtype
    shape: torch.Size

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        num_bytes = self.shape.numel() * self.dtype.itemsize
        return whole[self.first_byte : self.first_byte + num_bytes].view(self.dtype).view(self.shape)


@dataclass(slots=True)
class _Queue:
    """What is on its way, or is held for its next use: of all matrices at most one."""

    ranks: Ranks
    matrix: Matrix | None = None
    whole: torch.Tensor | None = None
    works: Sequence[gathers.Work] | None = None

    def send_for(self, matrix: Matrix) -> None:
        """Begin to gather *matrix*, unless it is on its way; what nobody came for is let go of."""
        if self.matrix is matrix:
            return
        self._arrive()
        part: torch.Tensor = matrix.module.get_buffer(PART)
        self.whole = torch.empty(part.numel() * self.ranks.size, dtype=torch.uint8, device=part.device)
        self.matrix, self.works = matrix, gathers.begin(part, self.whole, self.ranks)

    def take(self, matrix: Matrix) -> torch.Tensor:
        """All bytes of *matrix*, once they are there."""
        self.send_for(matrix)
        whole = self._arrive()
        assert whole is not None
        return whole

    def keep(self, matrix: Matrix, whole: torch.Tensor) -> None:
        """Hold *matrix*, which is *whole*, until it is used again."""
        self._arrive()
        self.matrix, self.whole = matrix, whole

    def _arrive(self) -> torch.Tensor | None:
        whole, works = self.whole, self.works
        self.matrix = self.whole = self.works = None
        if whole is not None and works is not None:
            gathers.end(whole, works)
        return whole


@dataclass(slots=True, eq=False)
class Matrix:
    """The weight of a *module*, of which this process has a part.

    Attributes:
        following: by its use, the matrix that is used next in the same layer, and for what.
        goes_back: whether a gradient will go through it: the input of a model's first ones needs none.
    """

    module: torch.nn.Module
    pieces: tuple[_Piece, ...]
    queue: _Queue
    following: dict[Use, tuple[Matrix, Use]] = field(default_factory=dict)
    goes_back: bool = False

    @contextlib.contextmanager
    def gathered(self, use: Use) -> Iterator[None]:
        """The module has its whole weight, and what follows *use* is on its way."""
        whole = self.queue.take(self)
        following = self._next(use)
        if following is not None and following is not self:
            self.queue.send_for(following)
        for piece in self.pieces:
            self._put(piece, piece.of(whole))
        try:
            yield
        finally:
            self.let_go()
            if following is self:
                self.queue.keep(self, whole)

    @property
    def is_divided(self) -> bool:
        """Whether there is more than one part."""
        return self.queue.ranks.size > 1

    def parts(self, *, backward: bool = False) -> Iterator[tuple[int, torch.Tensor]]:
        """The first row of each process's part of an unquantized matrix, and its rows; with *backward* last ones first.

        The next is on its way while one is used, so its user must have let go of it when it asks for another.
        """
        part, (piece,) = self.module.get_buffer(PART), self.pieces
        num_rows, *row = piece.shape
        each = part.numel() // (math.prod(row) * piece.dtype.itemsize)
        sources = [rank for rank in range(self.queue.ranks.size) if rank * each < num_rows]
        coming = self._send_for_part(sources[-1 if backward else 0])
        for source in reversed(sources) if backward else sources:
            here, works = coming
            gathers.end(here, works)
            following = source + (-1 if backward else 1)
            if following in sources:
                coming = self._send_for_part(following)
            first = source * each
            yield first, here.view(piece.dtype).view(-1, *row)[: num_rows - first]
            del here

    def _send_for_part(self, source: int) -> tuple[torch.Tensor, Sequence[gathers.Work]]:
        part = self.module.get_buffer(PART)
        received = torch.empty_like(part)
        return received, gathers.begin_one(part, received, source, self.queue.ranks)

    def _next(self, use: Use) -> Matrix | None:
        matrix, its_use = self.following.get(use, (None, use))
        return None if matrix is None or (its_use == "backward" and not matrix.goes_back) else matrix

    def let_go(self) -> None:
        """Leave the module without its weight."""
        for piece in self.pieces:
            self._put(piece, torch.empty(0, dtype=piece.dtype, device=self.module.get_buffer(PART).device))

    def _put(self, piece: _Piece, tensor: torch.Tensor) -> None:
        """Objects that hold tensors are looked up each time: moving a module to a device makes new ones."""
        for place in piece.places:
            path, _, name = place.rpartition(".")
            setattr(operator.attrgetter(path)(self.module), name, tensor)
        if "state.CB" in piece.places:  # or bitsandbytes would take them from the weight, as at the first use
            weight: Any = self.module.weight
            weight.CB = weight.SCB = None


PART = "part"
"""The buffer of a module that holds this process's part; it moves with the module and is in no state that is saved."""


def share_out(
    model: torch.nn.Module,
    strategies: Sequence[Strategy],
    compute_dtype: str,
    ranks: Ranks,
    fill: Fill = lambda _module: None,
) -> None:
    """Give each decoder layer of *model* its weight format and leave this process its part of every matrix.

    Layer by layer, each filled just before, so that no more than one is ever whole.

    Raises:
        ValueError: the model has another number of layers.
    """
    queue = _Queue(ranks)
    for layer, strategy in build.layers_with(model, strategies):
        fill(layer)
        build.apply_format(layer, strategy, compute_dtype)
        for module in list(layer.modules()):
            if quantized.has_weight(module):
                _share(module, queue)
    fill(model)
    ends: Any = model
    embedding, head = ends.get_input_embeddings(), ends.get_output_embeddings()
    shared = _share(embedding, queue)
    if head is not None and quantized.has_weight(head):
        if head.weight is embedding.weight:
            _gather_for(head, shared)
        else:
            _share(head, queue)


def _share(module: torch.nn.Module, queue: _Queue) -> Matrix:
    pieces: list[_Piece] = []
    tensors: list[torch.Tensor] = []
    end = 0
    for places, tensor in quantized.held(module):
        pieces.append(_Piece(places, end, tensor.dtype, tensor.shape))
        tensors.append(tensor)
        end += _up(tensor.nbytes, ALIGNMENT)
    row = 1 if quantized.is_quantized(module) else pieces[0].shape[1:].numel() * pieces[0].dtype.itemsize
    end = _up(end, math.lcm(ALIGNMENT, row) * queue.ranks.size)  # with whole rows in each part
    mine = _part(pieces, tensors, end // queue.ranks.size, queue.ranks.rank)
    module.register_buffer(PART, mine, persistent=False)
    made = Matrix(module, tuple(pieces), queue)
    made.let_go()
    weight: Any = module.weight
    if isinstance(module, Conv1D):  # whose shape PEFT takes from its weight; ``line_up`` lets go of that, too
        weight.data = torch.empty((), dtype=weight.dtype, device=weight.device).expand(pieces[0].shape)
    _gather_for(module, made)
    return made


def _part(pieces: Sequence[_Piece], tensors: Sequence[torch.Tensor], size: int, rank: int) -> torch.Tensor:
    """The *size* bytes that are *rank*'s, of *tensors* laid out as *pieces*."""
    mine = torch.empty(size, dtype=torch.uint8, device=tensors[0].device)
    if not mine.is_meta:
        mine.zero_()
        first = rank * size
        for piece, tensor in zip(pieces, tensors, strict=True):
            flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
            low, high = max(first, piece.first_byte), min(first + size, piece.first_byte + flat.numel())
            if low < high:
                mine[low - first : high - first] = flat[low - piece.first_byte : high - piece.first_byte]
    return mine


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _gather_for(module: Any, matrix: Matrix) -> None:
    """Let *module* gather *matrix* whenever it, or ``quantized.weight_of``, needs it."""
    module.shared_out = matrix
    plain = type(module) is torch.nn.Embedding and matrix.is_divided
    forward = functools.partial(_embedded, matrix) if plain else functools.partial(_forward, module, module.forward)
    module.forward = forward


def _embedded(matrix: Matrix, tokens: torch.Tensor) -> torch.Tensor:
    """The rows of *tokens*, from one part after the other, so that an embedding is never there whole."""
    found: torch.Tensor | None = None
    for first, rows in matrix.parts():
        here = (tokens >= first) & (tokens < first + len(rows))
        taken = torch.nn.functional.embedding((tokens - first).clamp_(0, len(rows) - 1), rows)
        found = taken if found is None else torch.where(here.unsqueeze(-1), taken, found)
        del rows, taken
    assert found is not None
    return found


def _forward(module: Any, forward: Callable[..., Any], x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    module.shared_out.goes_back = x.requires_grad
    if torch.is_grad_enabled() and x.requires_grad:
        apply: Callable[..., Any] = _Frozen.apply
        return apply(x, module, forward)
    with quantized.whole(module, quantized.ahead()):
        return forward(x, *args, **kwargs)


class _Frozen(torch.autograd.Function):
    """A frozen linear module's product, whose gradient needs its weight once more; autograd would hold it meanwhile."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: torch.nn.Module, forward: Callable[..., torch.Tensor]) -> Any:
        ctx.module, ctx.shape, ctx.dtype = module, x.shape, x.dtype
        with quantized.whole(module, quantized.ahead()):
            return forward(x)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient = outer[0].reshape(-1, outer[0].size(-1))
        return torch.mm(gradient, quantized.weight_of(ctx.module, ctx.dtype)).view(ctx.shape), None, None


def line_up(layers: Sequence[torch.nn.Module], strategies: Sequence[Strategy]) -> None:
    """Tell every matrix of *layers* which is used after it, as their *strategies* have it; adapters are in place.

    Taken from the order in which a layer's modules are listed; where a model uses them in another, matrices are
    gathered when they are needed, and those sent for in vain are let go of.
    """
    for layer, strategy in zip(layers, strategies, strict=True):
        order = _matrices(layer)
        again = _matrices(activations.part(layer, strategy.recomputes)) if strategy.recomputes else []
        _chain("forward", order)
        _chain("recomputed forward", again)
        if len(again) > 1:  # recomputation ends ahead of its last product, whose weight is then for its gradient
            again[-2].following["recomputed forward"] = again[-1], "backward"
        _chain("backward", order[::-1])
        if again:
            for matrix in order[order.index(again[-1]) + 1 :][:1]:
                matrix.following["backward"] = again[0], "recomputed forward"
            if not strategy.reuses_weights:
                again[-1].following["recomputed forward"] = again[-1], "backward"
        for matrix in order:
            matrix.following["twice"] = matrix, "forward"
            matrix.let_go()


def _matrices(module: torch.nn.Module) -> list[Matrix]:
    found = [getattr(one, "shared_out", None) for one in module.modules()]
    return [matrix for matrix in found if isinstance(matrix, Matrix)]


def _chain(use: Use, order: Sequence[Matrix]) -> None:
    for matrix, following in itertools.pairwise(order):
        matrix.following[use] = following, use
