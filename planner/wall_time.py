"""Hours on the wall: what a training run takes beside its steps."""

from __future__ import annotations

from .plan import WallTime

START_SECONDS = 6.0
"""Python with PyTorch, transformers, PEFT and bitsandbytes imported; 5.6 to 5.9 s on a 2-core cloud machine with its
files cached. A GPU's context and a cold disk come on top."""

TOKENS_PER_SECOND = 680e3
"""Tokenizing English text on one core (SmolLM2's fast tokenizer, 105,000 tokens in 0.155 s)."""

DISK_BYTES_PER_SECOND = 131e6
"""AWS's gp3 volumes without extra throughput, 125 MiB/s; instances that have less are priced at theirs."""

CHECKPOINT_BYTES_PER_PARAMETER = 2
"""Of the published weights that are read: bf16 or fp16."""

SAVE_SECONDS = 600.0
"""Between two checkpoints: what a lost machine costs at most, besides starting again."""

MOST_SAVING = 0.05
"""Of the time between two checkpoints, for writing one: where that takes longer, they are further apart."""

NUM_EVALUATIONS = 2
"""Before and after training."""


def least_beside_seconds(num_parameters: int, total_tokens: int, host_to_device_bytes_per_second: float) -> float:
    """What a run takes at least beside its steps, whatever is chosen."""
    return wall_time(
        num_parameters=num_parameters,
        total_tokens=total_tokens,
        training_seconds=0.0,
        evaluation_seconds=0.0,
        saved_bytes=0,
        checkpoint_bytes=0,
        host_to_device_bytes_per_second=host_to_device_bytes_per_second,
    ).total_seconds


def wall_time(
    *,
    num_parameters: int,
    total_tokens: int,
    training_seconds: float,
    evaluation_seconds: float,
    saved_bytes: int,
    checkpoint_bytes: int,
    host_to_device_bytes_per_second: float,
    disk_bytes_per_second: float = DISK_BYTES_PER_SECOND,
) -> WallTime:
    """What each part of a run takes; set-up of a machine, downloads and interruptions are left out.

    Args:
        evaluation_seconds: of all evaluations together.
        saved_bytes: what was learned, written at the end.
        checkpoint_bytes: of one checkpoint; the last is written when training ends.
    """
    read = num_parameters * CHECKPOINT_BYTES_PER_PARAMETER
    each = checkpoint_bytes / disk_bytes_per_second
    num_checkpoints = training_seconds // save_interval_seconds(each) + (training_seconds > 0)
    return WallTime(
        start_seconds=START_SECONDS,
        load_seconds=read / disk_bytes_per_second + read / host_to_device_bytes_per_second,
        tokenize_seconds=total_tokens / TOKENS_PER_SECOND,
        training_seconds=training_seconds,
        evaluation_seconds=evaluation_seconds,
        save_seconds=saved_bytes / disk_bytes_per_second + num_checkpoints * each,
    )


def save_interval_seconds(saving_seconds: float) -> float:
    """How far checkpoints are apart that take so long to write."""
    return max(SAVE_SECONDS, saving_seconds / MOST_SAVING)
