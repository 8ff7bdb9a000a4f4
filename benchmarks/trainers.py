"""Our step beside transformers.Trainer and TRL's SFTTrainer, both with PEFT: speed and memory on this CPU.

python -m benchmarks.trainers             # what was recorded
python -m benchmarks.trainers --record    # measure again, about a quarter of an hour on two cores that do nothing else
python -m benchmarks.trainers --record-memory    # the bytes alone, which do not mind what else runs

All train one model of the same random weights, on the same tokens, with LoRA on every linear layer, AdamW, fp32 and
threads of one number. Speed is paired: the trainers take turns in one process, and the order turns round each time.
Memory is taken in a process of each trainer's own.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from shallowflow.planner.allowed import ALPHA
from shallowflow.planner.strategies import Activations, Configuration, Strategy, WeightFormat, uniform
from shallowflow.profiles.load import load_model
from shallowflow.runtime import build, others, quantized
from shallowflow.runtime.heap import give_back, keeping_freed_memory
from shallowflow.runtime.meter import allocator_levels
from shallowflow.runtime.step import LEARNING_RATE, MicroBatch, Trainee, make_trainee

RECORD = Path(__file__).parent.parent / "tests" / "measured" / "trainers_cpu_x86_64.json"
MODEL, NUM_LAYERS, RANK = "SmolLM2-135M", 12, 16
NUM_ROUNDS, NUM_WARMUP_STEPS, NUM_TIMED_STEPS = 4, 1, 3
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What all are given; *loss_chunks* is an option of ours alone, as TRL cuts the loss in a way of its own."""

    name: str
    micro_batch_size: int = 1
    sequence_length: int = 256
    gradient_accumulation_steps: int = 1
    weight_format: WeightFormat = "fp32"
    activations: Activations = "save"
    loss_chunks: int = 1

    @property
    def num_sequences(self) -> int:
        """In one step."""
        return self.micro_batch_size * self.gradient_accumulation_steps


_WORKS = (
    Work(name="fp32, 1 x 256"),
    Work(name="fp32, 4 x 128", micro_batch_size=4, sequence_length=128),
    Work(name="fp32, recomputed, 4 x 128", micro_batch_size=4, sequence_length=128, activations="recompute"),
    Work(name="nf4, 1 x 256", weight_format="nf4"),
    Work(name="fp32, 1 x 128, accumulated 4 times", sequence_length=128, gradient_accumulation_steps=4),
)
LOSS_CHUNKS = 4
WORKS = (*_WORKS, *(replace(w, name=f"{w.name}, loss in parts", loss_chunks=LOSS_CHUNKS) for w in _WORKS))
"""Each with the whole loss, which is the quickest here, and with a loss in parts, which is the leanest."""
Train = Callable[[int], list[float]]
"""Takes so many steps, and returns when each ended."""


def _tokens(work: Work, num_steps: int) -> list[list[int]]:
    """Sequences for *num_steps*, the same for every trainer."""
    maker = torch.Generator().manual_seed(0)
    shape = (num_steps * work.num_sequences, work.sequence_length)
    rows: list[list[int]] = torch.randint(0, 49_000, shape, generator=maker).tolist()
    return rows


# The three trainers


def ours(work: Work) -> Train:
    """The trainee that a plan would make."""
    strategy = Strategy(weight_format=work.weight_format, activations=work.activations)
    configuration = Configuration(
        layers=uniform(strategy, NUM_LAYERS),
        rank=RANK,
        alpha=ALPHA["lora"],
        sequence_length=work.sequence_length,
        micro_batch_size=work.micro_batch_size,
        gradient_accumulation_steps=work.gradient_accumulation_steps,
        loss_chunks=work.loss_chunks,
    )
    torch.manual_seed(0)
    model = build.empty_model(_config(), "float32", "cpu")
    trainee = make_trainee(model, configuration, "float32", CPU)
    return lambda num_steps: _steps(trainee, work, num_steps)


def _steps(trainee: Trainee, work: Work, num_steps: int) -> list[float]:
    rows = _tokens(work, num_steps)
    moments: list[float] = []
    with keeping_freed_memory():
        for first in range(0, len(rows), work.num_sequences):
            step = rows[first : first + work.num_sequences]
            cut = [step[i : i + work.micro_batch_size] for i in range(0, len(step), work.micro_batch_size)]
            trainee.step([_micro_batch(part) for part in cut])
            moments.append(time.perf_counter())
    return moments


def _micro_batch(rows: list[list[int]]) -> MicroBatch:
    tokens = torch.tensor(rows)
    labels = torch.cat([tokens[:, 1:], torch.full((len(rows), 1), -100)], dim=1)
    return MicroBatch(tokens, labels, int(tokens[:, 1:].numel()))


def _config() -> Any:
    return build.transformers_config(load_model(MODEL).config, NUM_LAYERS)


def _plain_model(work: Work) -> Any:
    """As their users make one: transformers' own SDPA, PEFT's own LoRA."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = build.empty_model(_config(), "float32", "cpu", "sdpa")
    if work.weight_format == "nf4":
        for layer in build.decoder_layers(model):
            quantized.quantize_linears(layer, "nf4", torch.float32, double_quantization=False)
    return get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=ALPHA["lora"], target_modules=build.adapter_targets(model))
    )


def _theirs(work: Work, make: Callable[[Any, dict[str, Any], list[list[int]]], Any]) -> Train:
    model = _plain_model(work)

    def train(num_steps: int) -> list[float]:
        moments: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            recomputes = work.activations == "recompute"
            shared = {
                **others.plain_arguments(folder, work.micro_batch_size, num_steps, recomputes=recomputes),
                "gradient_accumulation_steps": work.gradient_accumulation_steps,
                "learning_rate": LEARNING_RATE,
                "weight_decay": 0.0,
                "use_cpu": True,
            }
            trainer = make(model, shared, _tokens(work, num_steps))
            others._note_steps(trainer, moments, CPU)
            trainer.train()
        return moments

    return train


def plain_trainer(work: Work) -> Train:
    """transformers.Trainer."""
    from transformers import Trainer, TrainingArguments

    def make(model: Any, shared: dict[str, Any], rows: list[list[int]]) -> Any:
        data: Any = [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in rows]
        return Trainer(model=model, args=TrainingArguments(**shared), train_dataset=data)

    return _theirs(work, make)


def sft_trainer(work: Work) -> Train:
    """TRL's SFTTrainer."""
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from trl import SFTConfig, SFTTrainer

    def make(model: Any, shared: dict[str, Any], rows: list[list[int]]) -> Any:
        arguments = SFTConfig(**shared, max_length=None, packing=False, dataset_kwargs={"skip_prepare_dataset": True})
        table = InMemoryTable.from_pydict({"input_ids": rows, "labels": rows})
        data = Dataset(table, fingerprint="made")
        return SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=others._tokenizer())

    return _theirs(work, make)


TRAINERS: Mapping[str, Callable[[Work], Train]] = {
    "shallowflow": ours,
    "transformers.Trainer": plain_trainer,
    "trl.SFTTrainer": sft_trainer,
}


# Measuring


def timed(work: Work) -> dict[str, list[float]]:
    """For each trainer its median seconds per step, a round each; the order turns round from round to round."""
    made = {name: make(work) for name, make in TRAINERS.items()}
    found: dict[str, list[float]] = {name: [] for name in made}
    for number in range(NUM_ROUNDS):
        for name in list(made)[:: 1 if number % 2 == 0 else -1]:
            moments = made[name](NUM_WARMUP_STEPS + NUM_TIMED_STEPS)
            seconds = [after - before for before, after in itertools.pairwise(moments)]
            found[name].append(round(statistics.median(seconds[NUM_WARMUP_STEPS - 1 :]), 4))
    return found


def memory(name: str, work: Work) -> dict[str, int]:
    """The allocator's highest total in two steps, and by how much the process grew beyond its imports.

    What the heap still holds of the step that does the imports is given back first, or growth into it would not count.
    """
    TRAINERS[name](Work(name="imports", sequence_length=8))(1)
    give_back()
    before = psutil.Process().memory_info().rss
    train: list[Train] = []

    def build_it() -> None:
        train.append(TRAINERS[name](work))

    build_it()
    train.pop()(2)
    resident = _most_resident_bytes() - before
    levels = allocator_levels([build_it, lambda: train.pop()(2)])
    return {"peak_allocated_bytes": max(levels[1]), "peak_resident_bytes": resident}


def _most_resident_bytes() -> int:
    """Of this program so far; ``getrusage`` would count what the one that started it held."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    kib: str = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(kib) * 1024


def _memory_elsewhere(name: str, work: Work) -> dict[str, int]:
    words = [sys.executable, "-m", "benchmarks.trainers", "--memory", name, json.dumps(asdict(work))]
    done = subprocess.run(words, capture_output=True, text=True, check=True)  # noqa: S603
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure() -> None:
    """Write the record, row by row."""
    rows: list[dict[str, Any]] = []
    for work in WORKS:
        seconds = timed(work)
        tokens = work.num_sequences * work.sequence_length
        row: dict[str, Any] = {"work": asdict(work), "tokens_per_step": tokens, "trainers": {}}
        for name in TRAINERS:
            row["trainers"][name] = {"step_seconds": seconds[name], **_memory_elsewhere(name, work)}
        rows.append(row)
        RECORD.write_text(json.dumps({**_head(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


def measure_memory() -> None:
    """Write the bytes of every row anew, and leave the seconds as they were recorded."""
    record = load()
    for row in record["rows"]:
        for name, its in row["trainers"].items():
            its.update(_memory_elsewhere(name, Work(**row["work"])))
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _head() -> dict[str, Any]:
    names = ("torch", "transformers", "peft", "accelerate", "trl", "bitsandbytes")
    return {
        "command": "python -m benchmarks.trainers --record",
        "device": f"{_processor()}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), **{n: importlib.metadata.version(n) for n in names}},
        "model": f"{MODEL}, {NUM_LAYERS} layers, random weights, LoRA of rank {RANK} on every linear layer",
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


# Reading


def load() -> dict[str, Any]:
    """The record, without rows where there is none."""
    found: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {"rows": []}
    return found


def speedups(row: Mapping[str, Any], other: str) -> list[float]:
    """Our tokens per second over *other*'s, round by round."""
    mine, theirs = (row["trainers"][name]["step_seconds"] for name in ("shallowflow", other))
    return [their / my for my, their in zip(mine, theirs, strict=True)]


def memory_ratio(row: Mapping[str, Any], other: str, key: str = "peak_allocated_bytes") -> float:
    """Our peak over *other*'s."""
    return float(row["trainers"]["shallowflow"][key] / row["trainers"][other][key])


def main() -> None:
    """Measure, if asked; print tokens per second, and ours over theirs."""
    warnings.simplefilter("ignore")
    if "--memory" in sys.argv:
        name, work = sys.argv[-2:]
        print(json.dumps(memory(name, Work(**json.loads(work)))))
        return
    if "--record" in sys.argv:
        measure()
    if "--record-memory" in sys.argv:
        measure_memory()
    table = Table(box=None, pad_edge=False)
    titles = ("", "trainer", "tokens/s", "ours over it", "peak MiB", "ours over it", "resident MiB", "ours over it")
    for title in titles:
        table.add_column(title, justify="left" if title in ("", "trainer") else "right")
    for row in load()["rows"]:
        for name, its in row["trainers"].items():
            rate = row["tokens_per_step"] / statistics.median(its["step_seconds"])
            ratios = speedups(row, name)
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            mine = name == "shallowflow"
            table.add_row(
                row["work"]["name"] if mine else "",
                name,
                f"{rate:.0f}",
                "" if mine else spread,
                f"{its['peak_allocated_bytes'] / 2**20:.0f}",
                "" if mine else f"{memory_ratio(row, name):.2f}",
                f"{its['peak_resident_bytes'] / 2**20:.0f}",
                "" if mine else f"{memory_ratio(row, name, 'peak_resident_bytes'):.2f}",
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
