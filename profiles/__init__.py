"""Facts: what is known of GPUs, instances and models, each with its source, and nothing that decides."""

from .load import (
    BadFacts,
    FactsError,
    UnknownName,
    gpu_names,
    instance_names,
    load_gpu,
    load_instance,
    load_instances,
    load_model,
    model_names,
    validate_config,
)
from .specs import GpuSpec, InstanceSpec, ModelSpec, Price, Source, Trust

__all__ = [
    "BadFacts",
    "FactsError",
    "GpuSpec",
    "InstanceSpec",
    "ModelSpec",
    "Price",
    "Source",
    "Trust",
    "UnknownName",
    "gpu_names",
    "instance_names",
    "load_gpu",
    "load_instance",
    "load_instances",
    "load_model",
    "model_names",
    "validate_config",
]
