"""A work on every instance, in every region, on demand and spot: what it would take and cost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import msgspec

from shallowflow.kept_plans import kept_or_made
from shallowflow.planner import assumed, hazard, outlook
from shallowflow.planner.allowed import HEADROOM, budget_bytes
from shallowflow.planner.bounds import MOST_GPUS
from shallowflow.planner.comparison import By, Comparison, OutOfReach, Planned, Unplanned, ordered, planned, within
from shallowflow.planner.hazard import Case, Hazard
from shallowflow.planner.outlook import Circumstances, Outlook, Way
from shallowflow.planner.plan import Plan, Workload
from shallowflow.planner.remedies import Infeasible, of_length
from shallowflow.planning import make_plan
from shallowflow.profiles.load import load_gpu, load_instance, load_instances, load_model, load_storage
from shallowflow.profiles.specs import GpuSpec, InstanceSpec, ModelSpec, StorageSpec
from shallowflow.refusals import smallest_process_bytes
from shallowflow.session import Progress, RequestError, Session
from shallowflow.workloads import check, workload_of

KNOBS = (
    "sequence_length",
    "global_batch_size",
    "rank",
    "min_rank",
    "adapter",
    "target_modules",
    "quantization",
    "optimizer",
    "objective",
    "micro_batch_size",
    "loss_chunks",
    "activations",
    "double_quantization",
    "packing",
    "max_weight_error",
    "headroom",
)
"""Of a workload, what may be asked about at several values."""
MOST_WORKS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What to compare.

    Attributes:
        works: by what differs in them; none of them says where it runs.
        instances, regions: to narrow to; all where empty. An instance may be a family, such as ``g5``.
        gpus: of each instance, how many are used; None for one, and for all.
        nodes: instances of a kind that work together.
        by: what comes first.
        deadline_hours, budget_usd: what nine of ten runs must keep.
        notes: on the works, which are carried along.
    """

    works: Mapping[str, Workload]
    instances: Sequence[str] = ()
    regions: Sequence[str] = ()
    gpus: int | None = None
    nodes: int = 1
    by: By = "money"
    deadline_hours: float | None = None
    budget_usd: float | None = None
    circumstances: Circumstances = field(default_factory=Circumstances)
    notes: tuple[str, ...] = ()


def whatif(
    model: str | Path,
    *,
    what_if: Mapping[str, Sequence[object]] | None = None,
    instances: Sequence[str] = (),
    regions: Sequence[str] = (),
    gpus: int | None = None,
    nodes: int = 1,
    by: By = "money",
    deadline_hours: float | None = None,
    budget_usd: float | None = None,
    interruptions: Case | float | Path = "middle",
    noticed_share: float = 0.0,
    setup_seconds: float = outlook.SETUP_SECONDS,
    waiting_seconds: float = outlook.WAITING_SECONDS,
    progress: Progress = lambda _message: None,
    **workload: Any,
) -> Comparison:
    """What fine-tuning *model* takes and costs on every shipped instance, in every region, on demand and spot.

    Args:
        what_if: fields of Workload, each with the values to try; every combination gets plans of its own.
        instances, regions, gpus, nodes, by, deadline_hours, budget_usd: see Asked.
        interruptions: which end of what is known of them, or how many per day, or a file with a region's history.
        noticed_share, setup_seconds, waiting_seconds: see Circumstances.
        workload: fields of Workload, such as ``sequence_length=1024``.

    Raises:
        FactsError, RequestError: as ``plan``; or a name is none of those shipped.
        Infeasible: nothing fits anywhere, or (OutOfReach) nothing keeps the deadline and the budget.
    """
    for name in ("region", "num_gpus", "num_machines", "deadline_hours", "budget_usd"):
        if name in workload:
            raise RequestError(
                f"{name} is no part of what is compared; give regions, gpus, nodes or the limits by themselves"
            )
    works = combinations(workload_of(workload), what_if or {})
    case, known = circumstances_of(interruptions)
    asked = Asked(
        works=works,
        instances=instances,
        regions=regions,
        gpus=gpus,
        nodes=nodes,
        by=by,
        deadline_hours=deadline_hours,
        budget_usd=budget_usd,
        circumstances=Circumstances(
            setup_seconds=setup_seconds,
            waiting_seconds=waiting_seconds,
            case=case,
            hazard=known,
            noticed_share=noticed_share,
        ),
    )
    return compare(load_model(str(model)), asked, progress=progress)


def circumstances_of(interruptions: Case | float | Path | str) -> tuple[Case, Hazard | None]:
    """The case, and the rate where one is given: a case's name, a number per day, or a history's file.

    Raises:
        RequestError: it is none of these, or the file tells no rate.
    """
    if interruptions in get_args(Case):
        return interruptions, None  # type: ignore[return-value]
    text = str(interruptions)
    if isinstance(interruptions, Path) or text.endswith(".csv"):
        try:
            return "middle", hazard.of_history(Path(text).read_text(encoding="utf-8").splitlines(), Path(text).name)
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"history {text} cannot be read: {getattr(error, 'strerror', None) or error}") from None
        except hazard.BadHistory as error:
            raise RequestError(str(error)) from None
    try:
        per_day = float(interruptions)
    except ValueError:
        per_day = -1.0
    if not 0 <= per_day <= hazard.MOST_PER_DAY:
        raise RequestError(
            f"interruptions {text!r} are none of {', '.join(get_args(Case))}, no number per day from 0 to "
            f"{hazard.MOST_PER_DAY}, and no history.csv"
        )
    return "middle", hazard.of_own(per_day)


def combinations(
    work: Workload, what_if: Mapping[str, Sequence[object]], at_length: Mapping[str, Workload] | None = None
) -> dict[str, Workload]:
    """*work* with every combination of the values of *what_if*, by what differs; *work* itself where nothing does.

    *at_length* is *work* at other sequence lengths, where documents are counted anew.

    Raises:
        RequestError: a name is none of KNOBS, or a value is not of its kind.
    """
    found: dict[str, Workload] = {}
    for values in itertools.product(*what_if.values()):
        changes = dict(zip(what_if, values, strict=True))
        changed = (at_length or {}).get(str(changes.get("sequence_length")), work)
        for name, value in changes.items():
            changed = changed_in(changed, name, value)
        found[", ".join(f"{name}={value}" for name, value in changes.items())] = changed
    if len(found) > MOST_WORKS:
        raise RequestError(f"{len(found)} combinations of values are asked about; give {MOST_WORKS} at most")
    return found


def changed_in(work: Workload, name: str, value: object) -> Workload:
    """*work* with another *value*, as it is or as text, of one of KNOBS."""
    if name not in KNOBS:
        raise RequestError(f"--what-if {name} is nothing that is compared; give one of {', '.join(KNOBS)}")
    try:
        converted = getattr(msgspec.convert({name: value}, type=Workload, strict=False), name)
    except msgspec.ValidationError as error:
        raise RequestError(f"--what-if {name}={value}: {str(error).partition(' - at')[0]}") from None
    if name == "sequence_length":
        return of_length(work, converted)
    return replace(work, **{name: converted})


def compare(model: ModelSpec, asked: Asked, *, progress: Progress = lambda _message: None) -> Comparison:
    """Everything that was *asked*, of one model: each kind and number of GPUs is planned once.

    Raises:
        RequestError: a name is none of those shipped, or no GPU can be planned for.
        Infeasible: nothing fits anywhere, or (OutOfReach) nothing keeps the limits.
    """
    _check(asked)
    instances = _instances(asked)
    storage = load_storage()
    found: list[Outlook] = []
    plans: list[Planned] = []
    unplanned: list[Unplanned] = []
    refusal: RequestError | Infeasible | None = None
    kinds = tuple(_kinds(instances, asked))
    for number, (gpu_name, count, what_if) in enumerate(kinds, 1):
        gpu, work = load_gpu(gpu_name), asked.works[what_if]
        spread = replace(work, num_gpus=count * asked.nodes, num_machines=asked.nodes)
        tell = _counting(progress, number, len(kinds))
        tell(" ".join(filter(None, (f"{spread.num_gpus} x {gpu.title}", what_if))))
        try:
            plan = _plan(model, gpu, spread, tell, with_remedies=len(kinds) == 1)
        except (RequestError, Infeasible) as error:
            refusal = error if refusal is None or isinstance(error, Infeasible) else refusal
            reason = " ".join(str(error).split("\n")[0].split())
            unplanned.append(Unplanned(gpu=gpu_name, num_gpus=spread.num_gpus, what_if=what_if, reason=reason))
            continue
        plans.append(planned(plan, what_if))
        for instance in instances:
            if instance.gpu == gpu_name and count in _counts(instance, asked):
                way = Way(plan=plan, gpu=gpu, instance=instance, what_if=what_if)
                found += _priced(way, storage, asked)
    if not plans and refusal is not None:
        raise refusal if len(unplanned) == 1 or isinstance(refusal, RequestError) else OutOfReach(_nowhere(unplanned))
    kept = within(ordered(found, asked.by), asked.deadline_hours, asked.budget_usd)
    return Comparison(
        model_name=model.name,
        total_tokens=next(iter(asked.works.values())).total_tokens,
        by=asked.by,
        outlooks=kept,
        num_ways=len(found),
        plans=tuple(plans),
        unplanned=tuple(unplanned),
        notes=(*asked.notes, *assumed.notes(kept, storage, asked.circumstances)),
    )


def _counting(progress: Progress, number: int, total: int) -> Progress:
    """*progress* with which of how many plans is being made."""
    return lambda detail: progress(f"plan {number} of {total}, {detail}")


def _check(asked: Asked) -> None:
    """RequestError where a number is none, or out of its range."""
    assumed_of = asked.circumstances
    if asked.by not in get_args(By):
        raise RequestError(f"sorted by {asked.by!r}; give one of {', '.join(get_args(By))}")
    if not 0 <= assumed_of.noticed_share <= 1:
        raise RequestError(f"a share of {assumed_of.noticed_share} of notices works; give a number from 0 to 1")
    if not 1 <= asked.nodes <= MOST_GPUS:
        raise RequestError(f"{asked.nodes} instances do not work together; give a number from 1 to {MOST_GPUS}")
    for name, seconds in (("set-up", assumed_of.setup_seconds), ("waiting", assumed_of.waiting_seconds)):
        if not 0 <= seconds < math.inf:
            raise RequestError(f"{seconds} seconds of {name} are no time; give a number from 0")
    for option, limit in (("--deadline-hours", asked.deadline_hours), ("--budget-usd", asked.budget_usd)):
        if limit is not None and not limit > 0:
            raise RequestError(f"{option} {limit} is no limit; give a number above 0")


def _instances(asked: Asked) -> list[InstanceSpec]:
    """Those asked for, with prices in the regions asked for alone."""
    shipped = load_instances()
    families = {instance.name.partition(".")[0] for instance in shipped}
    wanted = [name.strip().lower() for name in asked.instances]
    exact = {load_instance(name).name for name in wanted if name not in families}
    found = [i for i in shipped if not wanted or i.name in exact or i.name.partition(".")[0] in wanted]
    offered = sorted({price.region for instance in found for price in instance.prices})
    for region in asked.regions:
        if region not in offered:
            raise RequestError(f"no prices in region {region!r} of what is compared; known: {', '.join(offered)}")
    if asked.regions:
        found = [replace(i, prices=tuple(p for p in i.prices if p.region in asked.regions)) for i in found]
    found = [instance for instance in found if instance.prices]
    if asked.gpus is not None and not any(instance.num_gpus >= asked.gpus for instance in found):
        most = max(instance.num_gpus for instance in found)
        raise RequestError(f"no instance that is compared has {asked.gpus} GPUs; try --gpus {most}")
    return found


def _counts(instance: InstanceSpec, asked: Asked) -> tuple[int, ...]:
    """How many of an instance's GPUs are planned for."""
    if asked.gpus is None:
        return tuple(sorted({1, instance.num_gpus}))
    return (asked.gpus,) if asked.gpus <= instance.num_gpus else ()


def _kinds(instances: Sequence[InstanceSpec], asked: Asked) -> Iterator[tuple[str, int, str]]:
    """Each kind and number of GPUs, and each work, once."""
    pairs = sorted({(instance.gpu, count) for instance in instances for count in _counts(instance, asked)})
    for gpu, count in pairs:
        for what_if in asked.works:
            yield gpu, count, what_if


def _plan(model: ModelSpec, gpu: GpuSpec, work: Workload, progress: Progress, *, with_remedies: bool) -> Plan:
    """The best plan for *work*, wherever it runs, kept or made."""
    region = next(price.region for instance in load_instances(gpu.name) for price in instance.prices)
    work = replace(work, region=region, deadline_hours=None, budget_usd=None)
    check(work, model, gpu)
    return kept_or_made(model, gpu, work, lambda: _made(model, gpu, work, progress, with_remedies=with_remedies))


def _made(model: ModelSpec, gpu: GpuSpec, work: Workload, progress: Progress, *, with_remedies: bool) -> Plan:
    """The best plan for *work*.

    Where memory is short, because even the weights in 16 bits are too large or it was limited, the leanest
    configuration is traced first: to find out in a search that nothing fits, and what would, takes many times longer.
    """
    session = Session(model, gpu, progress, work.adapter, work.target_modules)
    budget = budget_bytes(gpu, work)
    if session.num_parameters() * 2 > budget or work.max_process_bytes is not None:
        least = smallest_process_bytes(session, work)
        if least > budget + gpu.context_bytes:
            headroom = HEADROOM if work.headroom is None else work.headroom
            needed = least if work.max_process_bytes else math.ceil(least / (1 - headroom))
            raise Infeasible(needed, work.max_process_bytes or gpu.memory_bytes, ())
    return make_plan(model, gpu, work, progress=progress, num_alternatives=0, with_remedies=with_remedies)


def _priced(way: Way, storage: StorageSpec, asked: Asked) -> list[Outlook]:
    return [
        found for price in way.instance.prices for found in outlook.outlooks(way, price, storage, asked.circumstances)
    ]


def _nowhere(unplanned: Sequence[Unplanned]) -> str:
    told = "; ".join(
        f"{one.num_gpus} x {one.gpu}{f', {one.what_if}' if one.what_if else ''}: {one.reason}" for one in unplanned
    )
    return f"no plan fits on any GPU that is compared: {told}"
