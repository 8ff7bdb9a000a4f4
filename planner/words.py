"""Numbers and strategies as people say them."""

from __future__ import annotations

from collections import Counter

from .strategies import Configuration, Method, Strategy, StrategyRun, TargetModules

MOST_SHOWN = 3
"""Kinds of strategies that are named in a summary."""
METHODS: dict[Method, str] = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA", "full": "every weight learns"}


def gib(num_bytes: float) -> str:
    """Bytes as GiB with two digits."""
    return f"{num_bytes / 2**30:.2f} GiB"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """``1 step``, ``2 steps``."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def usd(amount: float | None) -> str:
    """Dollars and cents; a dash where there is no price."""
    return "-" if amount is None else f"${amount:,.2f}"


def strategies(configuration: Configuration) -> str:
    """All layers' strategies in words."""
    if len(configuration.layers) == 1:
        return str(configuration.layers[0].strategy)
    return "; ".join(f"{span(run)} {run.strategy}" for run in configuration.layers)


def layout(configuration: Configuration) -> list[str]:
    """Which layers have which strategy, a line for each run of layers, or, where they alternate, for each strategy."""
    runs: dict[Strategy, list[str]] = {}
    for run in configuration.layers:
        runs.setdefault(run.strategy, []).append(span(run))
    if len(configuration.layers) <= 2 * len(runs):
        return [f"{span(run):<7}{run.strategy}" for run in configuration.layers]
    return [f"{strategy}: {', '.join(spans)}" for strategy, spans in runs.items()]


def learned(method: Method, rank: int | None) -> str:
    """What learns."""
    return METHODS[method] if rank is None else f"{METHODS[method]} rank {rank}"


def targets(target_modules: TargetModules) -> str:
    """What has an adapter."""
    if isinstance(target_modules, tuple):
        *others, last = target_modules
        return f"{', '.join(others)} and {last}" if others else last
    return {"all-linear": "every linear layer", "attention": "attention's linear layers"}[target_modules]


def span(run: StrategyRun) -> str:
    """Which layers, by their numbers."""
    return str(run.first) if run.first == run.last else f"{run.first}-{run.last}"


def summary(configuration: Configuration) -> str:
    """How many layers have each strategy."""
    if len(configuration.layers) == 1:
        return str(configuration.layers[0].strategy)
    held = Counter(str(one) for one in configuration.strategies()).most_common()
    shown = held if len(held) <= MOST_SHOWN else held[: MOST_SHOWN - 1]
    parts = [f"{count} x {name}" for name, count in shown]
    return "; ".join(parts + [f"{len(held) - len(shown)} more kinds"] * (len(held) > len(shown)))
