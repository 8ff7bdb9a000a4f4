"""The same training step through other trainers, in the same run, for comparison."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import tempfile
import time
import warnings
from typing import Any

import torch
from torch.nn.attention import sdpa_kernel

from . import build, cells
from .cells import Cell
from .trial import NUM_TIMED_STEPS, NUM_WARMUP_STEPS, Rules, forget

COMPARED = (
    Cell(model="SmolLM2-135M", micro_batch_size=4),
    Cell(model="Llama-3.2-1B", recompute="all", micro_batch_size=2),
    Cell(model="Llama-3.2-1B", weight_format="nf4", recompute="all", micro_batch_size=2),
)
COMPARED_SMALL = (Cell(model="SmolLM2-135M", weight_format="fp32", num_layers=2, sequence_length=64),)


def with_trainer(cell: Cell, rules: Rules) -> dict[str, Any]:
    """*cell* through ``transformers.Trainer`` and PEFT: median seconds per step, tokens per second, peak bytes.

    The same random model, adapters, batch, recomputation and attention; fp16 is autocast with a gradient scaler, as the
    Trainer does it.
    """
    try:
        return _trained(cell, rules)
    except Exception as error:  # noqa: BLE001 - another trainer's failure must not cost the record
        return {"outcome": "failed", "reason": f"{type(error).__name__}: {str(error)[:300]}"}
    finally:
        forget(rules.device)


def _trained(cell: Cell, rules: Rules) -> dict[str, Any]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    on_cuda = rules.device.type == "cuda"
    forget(rules.device)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(rules.device)
    model = build.add_adapters(
        cells.random_model(cell, rules.compute_dtype, rules.device.type), cell.rank, 2 * cell.rank
    )
    moments: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc,unused-ignore]
        """Notes when each step ended."""

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            """Called by the Trainer."""
            if on_cuda:
                torch.cuda.synchronize(rules.device)
            moments.append(time.perf_counter())

    tokens = torch.zeros(cell.sequence_length, dtype=torch.int64)
    row = {"input_ids": tokens, "labels": tokens}
    num_steps = NUM_WARMUP_STEPS + NUM_TIMED_STEPS + 1
    kernels = sdpa_kernel(cells.T4_KERNELS) if on_cuda else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), kernels:
        warnings.simplefilter("ignore")
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=cell.micro_batch_size,
            max_steps=num_steps,
            fp16=on_cuda,
            use_cpu=not on_cuda,
            gradient_checkpointing=cell.recompute == "all",
            gradient_checkpointing_kwargs={"use_reentrant": False},
            optim="adamw_torch",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        data: Any = [row] * (num_steps * cell.micro_batch_size)
        trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Clock()])
        trainer.train()
    times = [after - before for before, after in itertools.pairwise(moments)][NUM_WARMUP_STEPS:]
    seconds = statistics.median(times)
    found: dict[str, Any] = {
        "outcome": "ran",
        "step_seconds": seconds,
        "tokens_per_second": cell.num_tokens / seconds,
    }
    if on_cuda:
        found["peak_allocated_bytes"] = torch.cuda.max_memory_allocated(rules.device)
        found["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(rules.device)
    return found
