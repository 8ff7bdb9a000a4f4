"""What each layer of a model costs under every strategy: traced once, then a function of batch, rank and length."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shallowflow.planner.allowed import every_strategy
from shallowflow.planner.costs import StepProfile
from shallowflow.planner.layer_cost import LENGTH_STRIDE, LayerKind, LengthProfile, ModelProfile, layer_cost
from shallowflow.planner.plan import Workload
from shallowflow.planner.strategies import PARTIAL, Method, Strategy, TargetModules
from shallowflow.profiles.load import load_gpu, load_model
from shallowflow.session import Progress, RequestError, Session
from shallowflow.workloads import check_method, check_sizes

USUAL_RANK = 16


def profile(
    model: str | Path,
    gpu: str = "t4",
    *,
    sequence_length: int = 2048,
    micro_batch_size: int = 1,
    rank: int | None = None,
    adapter: Method = "lora",
    target_modules: TargetModules = "all-linear",
    progress: Progress = lambda _message: None,
) -> ModelProfile:
    """What one layer of each kind of *model* costs on *gpu* under every strategy.

    Args:
        model: a shipped name, or a path of a folder or ``config.json``.
        gpu: a shipped name.
        rank: of the adapter; None for the usual one, or for none, where every weight learns.
        progress: told what is being worked on.

    Raises:
        FactsError: model or GPU is unknown, or the configuration is broken.
        RequestError: the sizes are none, or contradict the model.
    """
    session = Session(load_model(str(model)), load_gpu(gpu), progress, adapter, target_modules)
    return model_profile(session, sequence_length, micro_batch_size, rank)


def model_profile(session: Session, sequence_length: int, micro_batch_size: int, rank: int | None) -> ModelProfile:
    """``profile`` of a model that is found already."""
    check_method(Workload(rank=rank, adapter=session.adapter, target_modules=session.target_modules))
    if session.adapter != "full" and rank is None:
        rank = USUAL_RANK
    if min(sequence_length - 1, micro_batch_size, rank or 1) < 1:
        raise RequestError(
            f"a micro-batch of {micro_batch_size} sequences of {sequence_length} tokens at rank {rank} is none"
        )
    check_sizes(session.model, sequence_length, rank)
    refused: dict[Strategy, str] = {}
    kinds: list[LayerKind] = []
    numbers = session.layer_kinds()
    for kind in sorted(set(numbers)):
        traced: dict[Strategy, StepProfile] = {}
        for strategy in every_strategy(session.gpu, session.adapter):
            try:
                traced[strategy] = session.profile(strategy, sequence_length, kind)
            except RequestError as error:
                if strategy.activations not in PARTIAL:
                    raise
                refused[strategy] = str(error.__cause__ or error)
        found = tuple((s, layer_cost(p, micro_batch_size, rank or 0, session.gpu)) for s, p in traced.items())
        layers = tuple(number for number, like in enumerate(numbers) if like == kind)
        same = next((index for index, other in enumerate(kinds) if other.costs == found), None)
        if same is None:
            kinds.append(LayerKind(layers=layers, costs=found))
        else:  # as where a sliding window is longer than the sequence
            kinds[same] = replace(kinds[same], layers=tuple(sorted((*kinds[same].layers, *layers))))
    return ModelProfile(
        model_name=session.model.name,
        gpu=session.gpu.name,
        sequence_length=sequence_length,
        micro_batch_size=micro_batch_size,
        rank=rank,
        adapter=session.adapter,
        target_modules=None if session.adapter == "full" else session.target_modules,
        kinds=tuple(kinds),
        refused=tuple(refused.items()),
    )


def length_profile(
    session: Session,
    strategy: Strategy,
    shortest: int,
    longest: int,
    like_layer: int = 0,
) -> LengthProfile:
    """Profiles of layers like *like_layer* at every length from *shortest* to *longest* in steps of LENGTH_STRIDE.

    Four lengths are traced: three fix the polynomials, one between them tells whether they hold.

    Raises:
        Unlike: they do not, as where a sliding window begins.
        RequestError: there are fewer than four such lengths.
    """
    steps = (longest - shortest) // LENGTH_STRIDE
    if shortest < 2 or steps < 3:
        raise RequestError(
            f"lengths from {shortest} to {longest} have fewer than four steps of {LENGTH_STRIDE} tokens; "
            f"try {shortest + 3 * LENGTH_STRIDE} as the longest"
        )
    lengths = [shortest + LENGTH_STRIDE * step for step in (0, steps // 3, 2 * steps // 3, steps)]
    return LengthProfile.fitted({n: session.profile(strategy, n, like_layer) for n in lengths})
