"""What a comparison's numbers rest on, in sentences: each price's date and source, and what was assumed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shallowflow.profiles.specs import StoragePrices, StorageSpec

from . import words
from .outlook import Circumstances, Outlook


def notes(outlooks: Sequence[Outlook], storage: StorageSpec, circumstances: Circumstances) -> Iterator[str]:
    """What *outlooks* rest on."""
    for date, source in dict.fromkeys((outlook.price_date, outlook.price_source) for outlook in outlooks):
        instances = dict.fromkeys(o.instance.partition(".")[0] for o in outlooks if o.price_source == source)
        yield f"Prices of {', '.join(instances)}: {date}; {source}."
    for kind in (storage.volume, storage.bucket):
        yield _stored(kind, {outlook.region for outlook in outlooks})
    yield (
        f"Each instance starts with {words.duration(circumstances.setup_seconds)} of set-up, which is assumed and not "
        "measured, and downloads the weights at its disk's or its network's lasting rate; both are billed."
    )
    machines = max((outlook.num_machines for outlook in outlooks), default=1)
    if machines > 1:
        yield (
            f"{machines} instances work together, over the slowest network among those with as many GPUs. Where one is "
            "interrupted, all are taken to be replaced, and its own first hour alone is free."
        )
    if any(outlook.market == "spot" for outlook in outlooks):
        yield from _interruptions(outlooks, circumstances)
    yield "Hours and dollars are for the plans' predicted seconds, whose own error is left out of them."


def _interruptions(outlooks: Sequence[Outlook], circumstances: Circumstances) -> Iterator[str]:
    if circumstances.hazard is not None:
        yield f"Interruptions: {circumstances.hazard.source}."
    else:
        yield (
            "Interruptions: the share of instances that Spot Advisor says were reclaimed in a month, taken for those "
            f"that ran all of it; the {circumstances.case} of its range. Real rates can be far higher: in a trace of "
            "g4dn nodes of 2020, one in two hours."
        )
    saved = circumstances.noticed_share
    lost = "what was trained since the last checkpoint"
    if saved:
        lost = f"at most two minutes where its notice works ({saved:.0%}), else {lost}"
    yield (
        f"An interruption loses {lost}, takes another set-up, and waits "
        f"{words.duration(circumstances.waiting_seconds)} for a replacement, which is assumed. AWS bills nothing for "
        "an instance that it interrupts within its first hour."
    )
    if not saved:
        yield "Notices are not counted on: AWS calls them best effort; --notices says what share of them works."


def _stored(kind: StoragePrices, regions: set[str]) -> str:
    without = sorted(regions - set(kind.usd_per_gb_month))
    left_out = f" None is known for {', '.join(without)}, where it is left out." if without else ""
    return f"{kind.name}: {kind.date}; {kind.source}.{left_out}"
