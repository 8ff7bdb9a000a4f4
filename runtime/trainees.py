"""From weights on disk to a model that trains: whole, layer by layer where they are shared, or one stage of it."""

from __future__ import annotations

import torch

from shallowflow.planner.plan import Plan
from shallowflow.planner.strategies import Configuration

from . import build, pipeline
from .ranks import Ranks
from .request import RunRequest, learning_rate
from .stages import share_of
from .step import Trainee, make_trainee
from .weights import WeightsSource, begin_loading, load_share, load_weights


def loaded(
    plan: Plan,
    request: RunRequest,
    source: WeightsSource,
    configuration: Configuration,
    device: torch.device,
    ranks: Ranks,
) -> Trainee:
    """The base of *source* with what *configuration* says; its first random numbers are those of the request's seed."""
    rate = learning_rate(plan, request)
    facts = (source, plan.model_config, build.weights_dtype(configuration, plan.compute_dtype), plan.num_parameters)
    if configuration.num_stages > 1:
        return _stage(plan, request, source, configuration, device, ranks)
    if configuration.sharding == "weights":
        model, fill = begin_loading(*facts)
        torch.manual_seed(request.seed)
        return make_trainee(model, configuration, plan.compute_dtype, device, rate, ranks, fill)
    model = load_weights(*facts)
    torch.manual_seed(request.seed)
    return make_trainee(model, configuration, plan.compute_dtype, device, rate, ranks)


def _stage(
    plan: Plan,
    request: RunRequest,
    source: WeightsSource,
    configuration: Configuration,
    device: torch.device,
    ranks: Ranks,
) -> Trainee:
    """The stage of this process among those of the others; no other layer is read."""
    staged = ranks.staged(configuration.num_stages)
    staged.connect(device)  # among those with the same stage
    share = share_of(configuration, staged.stage)
    assert share is not None
    model = load_share(source, plan.model_config, plan.compute_dtype, plan.num_parameters, share)
    torch.manual_seed(request.seed)
    rate = learning_rate(plan, request)
    made = make_trainee(model, configuration, plan.compute_dtype, device, rate, staged, share=share)
    return pipeline.connected(made, share, staged, build.DTYPES[plan.compute_dtype])
