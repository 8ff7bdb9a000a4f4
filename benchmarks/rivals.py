"""What other tools say of the recorded steps: their own code where it can be called, else their published rule."""

from __future__ import annotations

from typing import Any

from accelerate.commands.estimate import estimate_training_usage
from fitcheck import config_parser as fitcheck_config
from fitcheck.estimator import TrainingConfig, estimate
from fitcheck.gpu_db import get_gpu

from benchmarks.recorded import TARGETS, is_eager, is_quantized
from shallowflow.profiles import load_model

NAMES = ("accelerate", "DeepSpeed", "fitcheck")


def predictions(run: dict[str, Any]) -> dict[str, int]:
    """Bytes by tool, for *run*: the largest figure that each gives for training it on one GPU."""
    return {"accelerate": accelerate(run), "DeepSpeed": deepspeed(run), "fitcheck": fitcheck(run)}


def accelerate(run: dict[str, Any]) -> int:
    """``accelerate estimate-memory``'s "Training using Adam", which knows full training in fp16 mixed precision."""
    largest: int = max(estimate_training_usage(4 * int(run["params_total"]), "float16").values())
    return largest


def deepspeed(run: dict[str, Any]) -> int:
    """DeepSpeed's ``estimate_zero2_model_states_mem_needs`` on one GPU without offload: 4 + 16 bytes per parameter.

    Source: deepspeed/runtime/zero/stage_1_and_2.py. It leaves activations out, and says so.
    """
    return 20 * int(run["params_total"])


def fitcheck(run: dict[str, Any]) -> int:
    """The package fitcheck-llm, whose authors recorded these rows and calibrated it on many of them."""
    facts = dict(load_model(run["model_id"]).config)
    parsed = fitcheck_config._parse_fields(facts)
    config = fitcheck_config.ModelConfig(
        name=run["model_id"],
        num_params=fitcheck_config._count_params(parsed),
        **{name: getattr(parsed, name) for name in parsed.__dataclass_fields__},
    )
    training = TrainingConfig(
        precision="fp16",
        quantization="nf4" if is_quantized(run) else "none",
        batch_size=run["batch"],
        seq_len=run["max_seq"],
        lora_rank=run["lora_r"],
        lora_targets=TARGETS,
        grad_checkpoint=True,
        flash_attn=not is_eager(run),
    )
    return int(estimate(config, training, get_gpu("t4")).total_mib * 2**20)
