"""The only reader of the shipped facts: GPUs, instances and models by name, as frozen values."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, get_args

from . import calibrated, snapshot
from .check import BadFacts, FactsError, UnknownName, validate_config
from .specs import GpuSpec, InstanceSpec, ModelSpec, Price, Source, StoragePrices, StorageSpec, Trust

__all__ = [
    "BadFacts",
    "FactsError",
    "UnknownName",
    "gpu_names",
    "instance_names",
    "load_gpu",
    "load_instance",
    "load_instances",
    "load_model",
    "load_storage",
    "model_names",
    "validate_config",
]

FACTS = Path(__file__).parent
LARGEST_CONFIG_BYTES = 10_000_000
MOST_LISTED = 20
BYTE_COUNTS = ("memory_bytes", "context_bytes", "cublas_workspace_bytes")
RATES = (
    "fp16_flops_per_second",
    "bf16_flops_per_second",
    "fp32_flops_per_second",
    "dram_bytes_per_second",
    "pcie_bytes_per_second",
    "int8_flops_per_second",
    "attention_fp16_flops_per_second",
    "attention_bf16_flops_per_second",
    "attention_fp32_flops_per_second",
    "fp32_matmul_bytes_per_second",
    "dequantized_elements_per_second",
    "kernel_gap_seconds",
    "kernel_launch_seconds",
    "quantized_launch_seconds",
    "step_error",
)


def gpu_names() -> list[str]:
    """The GPUs with facts, shipped or calibrated, as typed after ``--gpu``."""
    return sorted({path.stem for path in (*(FACTS / "gpus").glob("*.toml"), *calibrated.files())})


def load_gpu(name: str) -> GpuSpec:
    """The facts of one GPU, by its name or an alias, in any case and punctuation; calibrated ones before shipped ones.

    Raises:
        UnknownName: no GPU is called so.
        BadFacts: a calibrated profile is broken.
    """
    own = (_gpu(_read_toml(path), str(path)) for path in calibrated.files())
    for gpu in (*own, *_gpus()):
        if _letters(name) in map(_letters, (gpu.name, *gpu.aliases)):
            return replace(gpu, memory_bytes=_host_memory_bytes()) if gpu.device_type == "cpu" else gpu
    raise UnknownName(_unknown("GPU", name, gpu_names()))


def instance_names() -> list[str]:
    """The instance types with shipped facts."""
    return [instance.name for instance in _priced(snapshot.stamp())]


def load_instances(gpu: str | None = None) -> tuple[InstanceSpec, ...]:
    """Every instance type, or those that hold one kind of GPU; prices that the user took go before the shipped ones.

    Raises:
        BadFacts: the user's prices are broken.
    """
    wanted = None if gpu is None else load_gpu(gpu).name
    return tuple(instance for instance in _priced(snapshot.stamp()) if wanted in (None, instance.gpu))


def load_instance(name: str) -> InstanceSpec:
    """The facts of one instance type."""
    for instance in _priced(snapshot.stamp()):
        if instance.name == name.strip().lower():
            return instance
    raise UnknownName(_unknown("instance", name, instance_names()))


def load_storage(cloud: str = "aws") -> StorageSpec:
    """What storage costs at one provider; prices that the user took go before the shipped ones.

    Raises:
        BadFacts: the user's prices are broken.
    """
    return snapshot.storage_over(shipped_storage(cloud), snapshot.read())


@cache
def shipped_storage(cloud: str = "aws") -> StorageSpec:
    """What storage costs at one provider, as shipped."""
    path = FACTS / "storage" / f"{cloud}.toml"
    facts = _read_toml(path)
    try:
        return StorageSpec(cloud=facts["cloud"], volume=_storage(facts["volume"]), bucket=_storage(facts["bucket"]))
    except (KeyError, TypeError, ValueError) as error:
        raise BadFacts(f"{path.name}: incomplete or broken: {error}") from error


def _storage(facts: Mapping[str, Any]) -> StoragePrices:
    prices = {row["region"]: float(row["usd_per_gb_month"]) for row in facts["prices"]}
    for region, price in prices.items():
        if not (math.isfinite(price) and price > 0):
            raise ValueError(f"{region} = {price}")
    return StoragePrices(name=facts["name"], usd_per_gb_month=prices, date=facts["date"], source=facts["source"])


def model_names() -> list[str]:
    """The models with shipped facts, as named on the Hub; no file is opened."""
    return sorted((path.stem.replace("--", "/", 1) for path in (FACTS / "models").glob("*.json")), key=str.lower)


def load_model(name_or_path: str) -> ModelSpec:
    """The facts of a shipped model, or of the ``config.json`` at a path; the network is never asked."""
    if _is_path(name_or_path):
        return _model_at(Path(os.path.expanduser(name_or_path)))
    name = _model_name(name_or_path)
    path = FACTS / "models" / f"{name.replace('/', '--', 1)}.json"
    facts = _read_json(path)
    try:
        model = ModelSpec(
            name=name,
            config=facts["config"],
            num_parameters=facts["num_parameters"],
            num_parameters_source=facts["num_parameters_source"],
            gated=facts["gated"],
        )
    except (KeyError, TypeError) as error:
        raise BadFacts(f"{path.name}: incomplete: {error}") from error
    validate_config(model.config, name)
    return model


def _is_path(text: str) -> bool:
    """A path is marked as one; what merely exists on disk is one only if no shipped model is called so."""
    marked = text.endswith(".json") or text.startswith(("./", "../", "/", "~")) or text in (".", "..")
    return marked or (bool(text.strip()) and os.path.exists(text) and not _shipped(text))


def _shipped(text: str) -> bool:
    return any(_hyphened(text) in (_hyphened(name), _bare(_hyphened(name))) for name in model_names())


def _model_at(path: Path) -> ModelSpec:
    """The model whose configuration a user keeps at a path: a file, or a folder with a config.json."""
    file = path / "config.json" if os.path.isdir(path) else path
    if file != path and not os.path.isfile(file):
        raise BadFacts(f"{path}: this folder holds no config.json; give a folder as saved by save_pretrained")
    config = _read_json(file)
    validate_config(config, str(file))
    folder = file.resolve().parent
    name = folder.name if folder.name and file.name == "config.json" else file.stem
    return ModelSpec(name=name, config=config, location=str(folder))


def _model_name(text: str) -> str:
    """The one shipped model that this text means; another organisation's copy is another model."""
    known, wanted = model_names(), _hyphened(text)
    part = (lambda name: name) if "/" in wanted else _bare
    found = [name for name in known if part(_hyphened(name)) == wanted]
    if len(found) > 1:
        raise UnknownName(f"{text!r} names several models: {_listed(found)}; name one with its organisation")
    if not found:
        alike = [name for name in known if len(wanted) > 3 and _bare(wanted) in _hyphened(name)]
        message = _unknown("model", text, known, sorted(alike, key=len))
        raise UnknownName(f"{message} A path to a config.json, such as ./my-model, works too.")
    return found[0]


def _unknown(kind: str, name: str, known: list[str], near: Iterable[str] = ()) -> str:
    """What is unknown, and which known names are like it, or what is known when none is."""
    spelt = {key: full for full in known for key in (full.lower(), _bare(full.lower()))}
    close = difflib.get_close_matches(name.strip().lower(), spelt, n=3, cutoff=0.5)
    offered = list(dict.fromkeys([*near, *(spelt[key] for key in close)]))
    if offered:
        return f"unknown {kind} {name!r}; did you mean {_listed(offered[:3])}?"
    more = [f"and {len(known) - MOST_LISTED} more"] if len(known) > MOST_LISTED else []
    return f"unknown {kind} {name!r}; known: {', '.join([*known[:MOST_LISTED], *more]) or 'none'}."


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _bare(name: str) -> str:
    return name.rpartition("/")[2]


def _hyphened(name: str) -> str:
    return re.sub(r"[\s_]+", "-", name.strip().lower())


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


@cache
def _gpus() -> tuple[GpuSpec, ...]:
    return tuple(_gpu(_read_toml(path), path.name) for path in sorted((FACTS / "gpus").glob("*.toml")))


def _gpu(facts: Mapping[str, Any], where: str) -> GpuSpec:
    """One GPU from its file, where every number has its source beside it."""
    try:
        capability = facts.get("compute_capability")
        numbers: dict[str, Any] = {key: int(facts[key]["value"]) for key in BYTE_COUNTS}
        numbers.update({key: float(facts[key]["value"]) for key in RATES})
        for key, value in numbers.items():
            if not (math.isfinite(value) and value >= 0 and (value or not key.endswith("_per_second"))):
                raise ValueError(f"{key} = {value}")
        return GpuSpec(
            name=facts["name"],
            title=facts["title"],
            device_type=facts["device_type"],
            aliases=tuple(facts["aliases"]),
            compute_capability=None if capability is None else (capability[0], capability[1]),
            sources={key: _source(facts[key]) for key in (*BYTE_COUNTS, *RATES)},
            **numbers,
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise BadFacts(f"{where}: incomplete or broken: {error}; remove it, or calibrate again") from error


def _source(number: Mapping[str, Any]) -> Source:
    if number["trust"] not in get_args(Trust):
        raise ValueError(f"trust {number['trust']!r} is none of {', '.join(get_args(Trust))}")
    return Source(text=number["source"], trust=number["trust"])


def _host_memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError) as error:
        raise BadFacts("this system does not say how much memory it has; plan for a named GPU instead") from error


@lru_cache(maxsize=2)
def _priced(_stamp: tuple[str, int, int] | None) -> tuple[InstanceSpec, ...]:
    """Every instance with the prices that the user took, as long as their file stays what it is."""
    return snapshot.instances_over(shipped_instances(), snapshot.read())


@cache
def shipped_instances() -> tuple[InstanceSpec, ...]:
    """Every instance type as shipped."""
    return tuple(
        _instance(facts, family, path.name)
        for path in sorted((FACTS / "instances").glob("*.toml"))
        for family in [_read_toml(path)]
        for facts in family["instances"]
    )


def _instance(facts: Mapping[str, Any], family: Mapping[str, Any], where: str) -> InstanceSpec:
    """One instance type from its family's file, whose date and source hold where a price has none of its own."""
    shared = {key: family[key] for key in ("date", "source") if key in family}
    empty = {"spot_usd_per_hour": None, "interruption_bucket": None}
    try:
        prices = tuple(Price(**{**empty, **shared, **price}) for price in facts["prices"])
        shape = {key: value for key, value in facts.items() if key != "prices"}
        return InstanceSpec(cloud=family["cloud"], prices=prices, **shape)
    except (KeyError, TypeError) as error:
        raise BadFacts(f"{where}: incomplete: {error}") from error


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadFacts(f"{path.name}: not readable as TOML: {error}") from error


def _read_json(path: Path) -> Any:
    """What a JSON file says, or BadFacts with the place where it goes wrong."""
    try:
        if not os.path.isfile(path):
            raise BadFacts(f"{path}: no such file")
        if path.stat().st_size > LARGEST_CONFIG_BYTES:
            raise BadFacts(f"{path}: {path.stat().st_size:,} bytes is too large for a configuration (10 MB at most)")
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise BadFacts(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadFacts(f"{path}: not UTF-8 text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise BadFacts(f"{path}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise BadFacts(f"{path}: not a configuration: nested too deeply") from error
    except FactsError:
        raise
    except ValueError as error:
        raise BadFacts(f"{path}: not JSON: a number in it is too long") from error
