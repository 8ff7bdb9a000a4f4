"""The same training step through other trainers, in the same run, for comparison.

As a program it trains with Unsloth what it reads from its standard input: Unsloth changes transformers for a whole
process, and has to be imported before it.
"""

from __future__ import annotations

if __name__ == "__main__":
    import unsloth  # noqa: F401

import contextlib
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch.nn.attention import sdpa_kernel

from . import build, cells
from .cells import Cell
from .meter import allocator_levels
from .trial import NUM_TIMED_STEPS, NUM_WARMUP_STEPS, Rules, failed, forget, rules_for

COMPARED = (
    Cell(model="SmolLM2-135M", micro_batch_size=4),
    Cell(model="Llama-3.2-1B", recompute="all", micro_batch_size=2),
    Cell(model="Llama-3.2-1B", weight_format="nf4", recompute="all", micro_batch_size=2),
)
COMPARED_SMALL = (Cell(model="SmolLM2-135M", weight_format="fp32", num_layers=2, sequence_length=64),)

NUM_STEPS = NUM_WARMUP_STEPS + NUM_TIMED_STEPS + 1
LEAST_SECONDS, MOST_SECONDS = 60, 180
"""For a trainer in a process of its own: what it is given where time is short, and what is enough."""

NOT_INSTALLED = {"outcome": "not installed"}
MakeTrainer = Callable[[Any, Cell, dict[str, Any]], Any]
"""A trainer of a model with adapters, from the cell and the arguments that all trainers share."""


def with_trainer(cell: Cell, rules: Rules) -> dict[str, Any]:
    """*cell* through ``transformers.Trainer`` and PEFT."""
    return _guarded(lambda: _compared(cell, rules, _adapted_model, _plain_trainer), rules)


def with_trl(cell: Cell, rules: Rules) -> dict[str, Any]:
    """*cell* through TRL's ``SFTTrainer`` and PEFT; it computes the loss in chunks of its own."""
    if importlib.util.find_spec("trl") is None:
        return dict(NOT_INSTALLED)
    return _guarded(lambda: _compared(cell, rules, _adapted_model, _sft_trainer), rules)


def with_unsloth(cell: Cell, rules: Rules) -> dict[str, Any]:
    """*cell* through Unsloth and TRL in a process of its own, which loads random weights from a folder."""
    if importlib.util.find_spec("unsloth") is None:
        return dict(NOT_INSTALLED)
    return _guarded(lambda: _in_a_process(cell, rules), rules)


TRAINERS: dict[str, Callable[[Cell, Rules], dict[str, Any]]] = {
    "transformers.Trainer": with_trainer,
    "trl.SFTTrainer": with_trl,
    "unsloth": with_unsloth,
}


def _guarded(run: Callable[[], dict[str, Any]], rules: Rules) -> dict[str, Any]:
    try:
        return run()
    except Exception as error:  # noqa: BLE001 - another trainer's failure must not cost the record
        return failed(error)
    finally:
        forget(rules.device)


# One comparison


def _compared(cell: Cell, rules: Rules, make_model: Callable[[Cell, Rules], Any], make: MakeTrainer) -> dict[str, Any]:
    """Median seconds per step, tokens per second, peak bytes; on a CPU the peak is found in a second run."""
    forget(rules.device)
    moments: list[float] = []
    with _surroundings(rules) as folder:
        shared = _arguments(cell, rules, folder)

        def made() -> Any:
            trainer = make(make_model(cell, rules), cell, shared)
            _note_steps(trainer, moments, rules.device)
            return trainer

        made().train()
        times = [after - before for before, after in itertools.pairwise(moments)][NUM_WARMUP_STEPS:]
        seconds = statistics.median(times)
        found: dict[str, Any] = {
            "outcome": "ran",
            "step_seconds": seconds,
            "tokens_per_second": cell.num_tokens / seconds,
        }
        if rules.device.type == "cuda":
            found["peak_allocated_bytes"] = torch.cuda.max_memory_allocated(rules.device)
            found["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(rules.device)
            return found
        again: list[Any] = []
        levels = allocator_levels([lambda: again.append(made()), lambda: again.pop().train()])
        found["peak_allocated_bytes"] = max(levels[1])
    return found


@contextlib.contextmanager
def _surroundings(rules: Rules) -> Iterator[str]:
    """A folder to write to, no warnings, and the attention of a T4."""
    kernels = sdpa_kernel(cells.T4_KERNELS) if rules.device.type == "cuda" else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), kernels:
        warnings.simplefilter("ignore")
        yield folder


def _arguments(cell: Cell, rules: Rules, folder: str) -> dict[str, Any]:
    """What every trainer is told; fp16 is autocast with a gradient scaler, as the Trainer does it."""
    on_cuda = rules.device.type == "cuda"
    told = plain_arguments(folder, cell.micro_batch_size, NUM_STEPS, recomputes=cell.recompute == "all")
    return {**told, "fp16": on_cuda, "use_cpu": not on_cuda}


def plain_arguments(folder: str, micro_batch_size: int, num_steps: int, *, recomputes: bool) -> dict[str, Any]:
    """Of transformers' ``TrainingArguments``: so many steps of AdamW, and nothing logged, saved or shown."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": micro_batch_size,
        "max_steps": num_steps,
        "bf16": False,
        "gradient_checkpointing": recomputes,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "optim": "adamw_torch",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def _adapted_model(cell: Cell, rules: Rules) -> Any:
    base = cells.random_model(cell, rules.compute_dtype, rules.device.type)
    return build.add_adapters(base, cell.rank, 2 * cell.rank)


def _rows(cell: Cell) -> dict[str, list[list[int]]]:
    """Enough tokens, and labels, for every step."""
    rows = [[0] * cell.sequence_length for _ in range(NUM_STEPS * cell.micro_batch_size)]
    return {"input_ids": rows, "labels": rows}


def _plain_trainer(model: Any, cell: Cell, shared: dict[str, Any]) -> Any:
    from transformers import Trainer, TrainingArguments

    rows = _rows(cell)
    data: Any = [{name: torch.tensor(listed[i]) for name, listed in rows.items()} for i in range(len(rows["labels"]))]
    return Trainer(model=model, args=TrainingArguments(**shared), train_dataset=data)


def _sft_trainer(model: Any, cell: Cell, shared: dict[str, Any]) -> Any:
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(**shared, max_length=None, packing=False, dataset_kwargs={"skip_prepare_dataset": True})
    data = Dataset(InMemoryTable.from_pydict(_rows(cell)), fingerprint="zeros")  # made by itself it pickles PyArrow
    return SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=_tokenizer())


def _tokenizer() -> Any:
    """Of two words, because TRL and Unsloth want one; the data are numbers already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))  # noqa: S106
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def _note_steps(trainer: Any, moments: list[float], device: torch.device) -> None:
    """Let *trainer* note in *moments* when each step ended; peaks are those of the steps that are timed."""
    from transformers import PrinterCallback, TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc,unused-ignore]
        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            """Called by the Trainer."""
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                if len(moments) == NUM_WARMUP_STEPS:
                    torch.cuda.reset_peak_memory_stats(device)
            moments.append(time.perf_counter())

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Clock())


# Unsloth, in a process of its own


def _in_a_process(cell: Cell, rules: Rules) -> dict[str, Any]:
    limit = min(MOST_SECONDS, max(LEAST_SECONDS, rules.deadline - time.perf_counter()))
    with tempfile.TemporaryDirectory() as folder:
        _save_unquantized(cell, rules, folder)
        forget(rules.device)
        asked = {"cell": asdict(cell), "folder": folder, "device": str(rules.device)}
        try:
            done = subprocess.run(  # noqa: S603
                [sys.executable, "-m", __name__],
                input=json.dumps(asked),
                capture_output=True,
                text=True,
                check=False,
                timeout=limit,
                cwd=folder,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        except subprocess.TimeoutExpired:
            return {"outcome": "failed", "reason": f"not done after {limit:.0f} seconds"}
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        return {"outcome": "failed", "reason": said[-1][:300]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _save_unquantized(cell: Cell, rules: Rules, folder: str) -> None:
    plain = asdict(cell) | ({} if cell.weight_format == "fp32" else {"weight_format": "fp16"})
    model = cells.random_model(Cell(**plain), rules.compute_dtype, rules.device.type)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def _unsloth_model(folder: str, cell: Cell, rules: Rules) -> Any:
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        model_name=folder,
        max_seq_length=cell.sequence_length,
        dtype=build.DTYPES[rules.compute_dtype],
        load_in_4bit=cell.weight_format == "nf4",
        load_in_8bit=cell.weight_format == "int8",
        use_gradient_checkpointing=cell.recompute == "all",
    )
    return FastLanguageModel.get_peft_model(
        model,
        r=cell.rank,
        lora_alpha=2 * cell.rank,
        lora_dropout=0.0,
        target_modules=build.adapter_targets(model),
        use_gradient_checkpointing=cell.recompute == "all",
    )


def main() -> None:
    """Train with Unsloth what standard input says; the last line of standard output is what was found."""
    asked = json.load(sys.stdin)
    cell, folder = Cell(**asked["cell"]), asked["folder"]
    with contextlib.redirect_stdout(sys.stderr):
        rules = rules_for(torch.device(asked["device"]), 60)
        found = _compared(cell, rules, lambda *_: _unsloth_model(folder, cell, rules), _sft_trainer)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
