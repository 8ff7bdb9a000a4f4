"""One stage of a model: some of its decoder layers, with the embedding before the first or the head after the last."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from shallowflow.planner.strategies import Configuration

from . import build


@dataclass(frozen=True, slots=True)
class Share:
    """What one stage holds.

    Attributes:
        number, of: which stage, and how many there are.
        parts: its decoder layers, by their numbers in the model that is cut; of interleaved stages in several parts,
            which a micro-batch comes to one after the other.
    """

    number: int
    of: int
    parts: tuple[range, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """Of all parts."""
        return tuple(itertools.chain.from_iterable(self.parts))

    def alone(self) -> Share:
        """The same of a model that has no other layers."""
        starts = itertools.accumulate((len(part) for part in self.parts), initial=0)
        return Share(self.number, self.of, tuple(range(a, b) for a, b in itertools.pairwise(starts)))

    @property
    def is_first(self) -> bool:
        """Whether it has the embedding."""
        return self.number == 0

    @property
    def is_last(self) -> bool:
        """Whether it has the norm after the layers, the head, and the loss."""
        return self.number == self.of - 1


def share_of(configuration: Configuration, stage: int) -> Share | None:
    """What *stage* of *configuration* holds; None where there is one stage, which is the model."""
    if configuration.num_stages == 1:
        return None
    return Share(stage, configuration.num_stages, configuration.parts_of(stage))


class Elsewhere(torch.nn.Module):
    """In the place of a module that is on another stage: what comes in goes out.

    It keeps the numbers of the layers, and so all that a configuration says of each, and the names of their parameters.
    """

    def forward(self, hidden: Any, *_args: Any, **_kwargs: Any) -> Any:
        """The same."""
        return hidden


def parts(model: PreTrainedModel, share: Share) -> dict[str, torch.nn.Module]:
    """The modules of *model* that hold parameters for *share*, by name.

    Raises:
        ValueError: the model is not made of an embedding, layers, a norm and a head.
    """
    first, layers, last = _pieces(model)
    found = {name: module for number, (name, module) in enumerate(layers.items()) if number in share.layers}
    return {**(first if share.is_first else {}), **found, **(last if share.is_last else {})}


def keep(adapted: Any, share: Share) -> None:
    """Put ``Elsewhere`` in the place of what *share* does not hold of a model with an adapter."""
    model: PreTrainedModel = adapted.get_base_model()
    kept = parts(model, share)
    for name in (name for pieces in _pieces(model) for name in pieces if name not in kept):
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, Elsewhere())


Places = list[tuple[torch.nn.Module, str, torch.nn.Module, torch.nn.Module]]
"""Where modules are, under which names, which, and what may stand there for a while."""


def without_others(adapted: Any, share: Share, part: int) -> Places:
    """What to put where for a pass through one *part* of a *share* alone."""
    if len(share.parts) == 1:
        return []
    model: PreTrainedModel = adapted.get_base_model()
    _, layers, last = _pieces(model)
    (parent,) = {name.rpartition(".")[0] for name in layers}
    held = model.get_submodule(parent)
    own = [module if number in share.parts[part] else Elsewhere() for number, module in enumerate(layers.values())]
    found: Places = [_place(model, parent, held, torch.nn.ModuleList(own))]
    if share.is_last and part < len(share.parts) - 1:
        head = model.get_output_embeddings()
        found += [_place(model, name, norm, Elsewhere()) for name, norm in last.items() if norm is not head]
    return found


def _place(
    model: torch.nn.Module, name: str, module: torch.nn.Module, other: torch.nn.Module
) -> tuple[torch.nn.Module, str, torch.nn.Module, torch.nn.Module]:
    parent, _, own = name.rpartition(".")
    return model.get_submodule(parent), own, module, other


@contextlib.contextmanager
def alone(places: Places) -> Iterator[None]:
    """Let what may stand there stand in these *places*."""
    try:
        for parent, name, _, other in places:
            setattr(parent, name, other)
        yield
    finally:
        for parent, name, module, _ in places:
            setattr(parent, name, module)


Pieces = dict[str, torch.nn.Module]


def _pieces(model: PreTrainedModel) -> tuple[Pieces, Pieces, Pieces]:
    """All that holds parameters, by name: the embedding, each layer, and the norm with the head."""
    names = {id(module): name for name, module in model.named_modules()}

    def named(modules: Iterable[torch.nn.Module]) -> Pieces:
        return {names[id(module)]: module for module in modules}

    decoder: Any = model.get_decoder()
    norms = [child for name, child in decoder.named_children() if "norm" in name]
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    found = named([embedding]), named(build.decoder_layers(model)), named([*norms, head])
    inside = {id(p) for pieces in found for module in pieces.values() for p in module.parameters()}
    if decoder is model or len(norms) != 1 or any(id(p) not in inside for p in model.parameters()):
        raise ValueError(f"{type(model).__name__} is not made of an embedding, layers, a norm and a head")
    return found
