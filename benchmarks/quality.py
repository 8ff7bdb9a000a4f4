"""What weight formats, ranks and 8-bit AdamW cost in quality: SmolLM2-135M-Instruct, beside what the planner holds.

python -m benchmarks.quality             # what was recorded, against the planner's order
python -m benchmarks.quality --record    # train what is missing from the record, about four minutes a run on two cores

The packaged weights are themselves 4-bit (Q4_1), so what is measured is the harm of a second rounding.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from itertools import combinations, islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from shallowflow.planner import quality
from shallowflow.planner.allowed import ALPHA
from shallowflow.planner.strategies import Configuration, Optimizer, Strategy, StrategyRun, WeightFormat, uniform
from shallowflow.profiles.load import load_model
from shallowflow.runtime import batches, build, quantized
from shallowflow.runtime.documents import Document
from shallowflow.runtime.evaluate import mean_loss
from shallowflow.runtime.heap import keeping_freed_memory
from shallowflow.runtime.step import make_trainee
from shallowflow.runtime.weights import find_weights, load_tokenizer, load_weights

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
RECORD = Path(__file__).parent.parent / "tests" / "measured" / "quality_smollm2_135m.json"
SEEDS = (0, 1, 2)
NUM_STEPS, MICRO_BATCH, LENGTH = 32, 4, 256
HELD_OUT_EVERY = 10
RANK = 16
NUM_LAYERS = 30


def _format(weight_format: WeightFormat) -> Strategy:
    return Strategy(weight_format=weight_format, activations="save")


MIXED = (
    StrategyRun(first=0, last=NUM_LAYERS // 2 - 1, strategy=_format("nf4")),
    StrategyRun(first=NUM_LAYERS // 2, last=NUM_LAYERS - 1, strategy=_format("fp32")),
)
FORMATS = {
    "fp32": uniform(_format("fp32"), NUM_LAYERS),
    "int8": uniform(_format("int8"), NUM_LAYERS),
    "mixed": MIXED,
    "nf4": uniform(_format("nf4"), NUM_LAYERS),
}
WAYS: dict[str, tuple[tuple[StrategyRun, ...], int, Optimizer]] = {
    **{name: (layers, RANK, "adamw") for name, layers in FORMATS.items()},
    **{f"rank {rank}": (FORMATS["fp32"], rank, "adamw") for rank in (4, 64)},
    "8-bit AdamW": (FORMATS["fp32"], RANK, "adamw8bit"),
}
"""Of each way: the layers' strategies, the rank and the optimizer.

``fp32`` is also rank 16 with AdamW, ``mixed`` the first half of it in nf4.
"""


def run(way: str, seed: int) -> dict[str, Any]:
    """Fine-tune one *way*, and the loss per held-out token before and after."""
    layers, rank, optimizer = WAYS[way]
    spec = load_model(MODEL)
    source = find_weights(MODEL)
    tokenizer = load_tokenizer(source)
    names = sorted(topics)
    held = names[::HELD_OUT_EVERY]
    learned = batches.windows([Document(topics[n]) for n in names if n not in held], tokenizer, LENGTH)
    tested = batches.windows([Document(topics[n][:3000]) for n in held], tokenizer, LENGTH)
    model = load_weights(source, spec.config, "float32", build.count_parameters(spec.config))
    configuration = Configuration(
        layers=layers,
        rank=rank,
        alpha=ALPHA["lora"],
        sequence_length=LENGTH,
        micro_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=1,
        optimizer=optimizer,
    )
    torch.manual_seed(seed)
    trainee = make_trainee(model, configuration, "float32", torch.device("cpu"))
    device = torch.device("cpu")
    began = time.perf_counter()
    before = mean_loss(trainee, tested, MICRO_BATCH, device)
    tokens = 0
    for chosen in islice(batches.steps(learned, MICRO_BATCH, 1, LENGTH, seed), NUM_STEPS):
        made = [batches.micro_batch(group.windows, device, group.length) for group in chosen]
        trainee.step(made)
        tokens += sum(b.num_targets for b in made)
    after = mean_loss(trainee, tested, MICRO_BATCH, device)
    return {
        "way": way,
        "seed": seed,
        "rank": rank,
        "learned_tokens": tokens,
        "held_out_tokens": sum(w.num_targets for w in tested),
        "loss_before": round(before, 6),
        "loss_after": round(after, 6),
        "seconds": round(time.perf_counter() - began, 1),
    }


def weight_errors() -> dict[str, float]:
    """Relative error of each format on the real weights: root of all squared errors over all squared weights."""
    spec, source = load_model(MODEL), find_weights(MODEL)
    model = load_weights(source, spec.config, "float32", build.count_parameters(spec.config))
    linears = [m for layer in build.decoder_layers(model) for m in layer.modules() if quantized.is_linear(m)]
    weights = [quantized.weight_of(m, torch.float32).detach() for m in linears]
    bnb = quantized.bitsandbytes()
    found = {}
    for name in ("int8", "nf4"):
        wrong, total = 0.0, 0.0
        for weight in weights:
            if name == "nf4":
                packed, state = bnb.functional.quantize_4bit(weight, blocksize=quantized.NF4_BLOCK, quant_type="nf4")
                again = bnb.functional.dequantize_4bit(packed, state)
            else:
                rows, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
                again = bnb.functional.int8_vectorwise_dequant(rows, scales)
            wrong += float((again - weight).double().square().sum())
            total += float(weight.double().square().sum())
        found[name] = math.sqrt(wrong / total)
    return found


def load() -> dict[str, Any]:
    """The record, empty where there is none."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {"model": MODEL, "runs": []}


def save(record: Mapping[str, Any]) -> None:
    """Write the record, a line a run."""
    head = {key: value for key, value in record.items() if key != "runs"}
    lines = ",\n".join("    " + json.dumps(row) for row in record["runs"])
    RECORD.write_text(json.dumps(head, indent=2)[:-2] + ',\n  "runs": [\n' + lines + "\n  ]\n}\n")


def harm(way: str) -> float:
    """What the planner holds the format of a *way* to cost: the mean squared relative error of its layers."""
    layers, _, _ = WAYS[way]
    strategies = tuple(run.strategy for run in layers for _ in range(run.first, run.last + 1))
    return quality.mean_error(strategies) ** 2


def losses(record: Mapping[str, Any], way: str, key: str = "loss_after") -> dict[int, float]:
    """For each seed, the loss per held-out token of a *way*."""
    return {row["seed"]: row[key] for row in record["runs"] if row["way"] == way}


def excess(record: Mapping[str, Any], way: str, than: str = "fp32") -> tuple[float, float]:
    """By how much a *way*'s loss after training exceeds another's, seed by seed: mean, and its standard error."""
    mine, other = losses(record, way), losses(record, than)
    differences = [mine[seed] - other[seed] for seed in sorted(mine.keys() & other.keys())]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    return statistics.mean(differences), error


def orders(record: Mapping[str, Any], ways: Sequence[str] = tuple(FORMATS)) -> list[tuple[str, str, float, float]]:
    """For each pair, the lesser harm first: by how much the loss differs, and the standard error of that."""
    ranked = sorted(ways, key=harm)
    return [(a, b, *excess(record, b, a)) for a, b in combinations(ranked, 2)]


def main() -> None:
    """Train what is missing, if asked; print losses, differences and orders."""
    warnings.simplefilter("ignore")
    record = load()
    if "--record" in sys.argv:
        record["weight_errors"] = weight_errors()
        record["steps"], record["micro_batch_size"], record["sequence_length"] = NUM_STEPS, MICRO_BATCH, LENGTH
        for seed in SEEDS:
            for way in WAYS:
                if seed not in losses(record, way):
                    with keeping_freed_memory():
                        record["runs"].append(run(way, seed))
                    print(record["runs"][-1], flush=True)
                    save(record)
    table = Table(box=None, pad_edge=False)
    for name in ("", "relative error held", "loss before", "after", "above fp32, rank 16"):
        table.add_column(name, justify="right" if name else "left")
    for way in WAYS:
        before, after = losses(record, way, "loss_before"), losses(record, way)
        mean, error = excess(record, way)
        cells = (
            f"{math.sqrt(harm(way)):.3f}",
            f"{statistics.mean(before.values()):.4f}",
            f"{statistics.mean(after.values()):.4f}",
        )
        table.add_row(way, *cells, f"{mean:+.4f} ± {error:.4f}")
    console = Console(width=110)
    console.print(table)
    for lesser, greater, mean, error in orders(record):
        console.print(f"{greater} above {lesser}: {mean:+.4f} ± {error:.4f}")
    console.print("relative errors on the real weights:", {k: round(v, 4) for k, v in record["weight_errors"].items()})


if __name__ == "__main__":
    main()
