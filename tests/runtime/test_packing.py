"""Packed documents are computed as if each were alone, and a packed run takes the memory that was planned for it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import shallowflow
from shallowflow.profiles import model_facts
from shallowflow.runtime import attention, batches, build
from shallowflow.runtime.run import RunRequest, train
from shallowflow.runtime.step import MicroBatch, Trainee, make_trainee
from tests.runtime import tiny

LENGTHS = (530, 60, 34)
"""Of three documents: the first is longer than what a CPU's kernel takes at once."""
TOTAL = 640
OPT: dict[str, Any] = {"ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0}
FAMILIES: dict[str, dict[str, Any]] = {
    **{kind: {} for kind in sorted(model_facts._PACKABLE)},
    "mistral": {"sliding_window": TOTAL},
    "starcoder2": {"sliding_window": TOTAL, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    "gemma3_text": {"sliding_window": TOTAL, "head_dim": 16},
    "opt": OPT,
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": TOTAL, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
    | {"resid_pdrop": 0.0},
}


@cache
def packed_trainee(kind: str, loss_chunks: int = 1) -> Trainee:
    """A two-layer model of this kind with random weights, ready to learn packed documents."""
    sizes = {**tiny.CONFIG, "num_hidden_layers": 2, "max_position_embeddings": TOTAL, "pad_token_id": 0}
    config = {**sizes, **FAMILIES[kind], "model_type": kind}
    assert model_facts.why_not_packed(config, TOTAL) is None
    model = build.empty_model(build.transformers_config(config), "float32", "cpu")
    maker = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2, generator=maker)
    chosen = replace(
        tiny.configuration(num_layers=2),
        sequence_length=TOTAL,
        micro_batch_size=1,
        packing=True,
        loss_chunks=loss_chunks,
    )
    trainee = make_trainee(model, chosen, "float32", tiny.CPU)
    for parameter in trainee.parameters:
        torch.nn.init.normal_(parameter, std=0.05, generator=maker)
    return trainee


def document(length: int, seed: int) -> batches.Window:
    """Random tokens, of which each but the last is followed by its label."""
    tokens = torch.randint(3, tiny.VOCABULARY, (length + 1,), generator=torch.Generator().manual_seed(seed)).tolist()
    return batches.Window(tuple(tokens[:-1]), tuple(tokens[1:]), length)


def together(first_seed: int = 0, learned: int | None = None) -> MicroBatch:
    """The three documents in one sequence; only number *learned* is learned, if one is given."""
    documents = [document(length, seed) for length, seed in zip(LENGTHS, (first_seed, 1, 2), strict=True)]
    if learned is not None:
        ignored = [replace(d, labels=(-100,) * len(d.labels), num_targets=0) for d in documents]
        documents = [d if number == learned else ignored[number] for number, d in enumerate(documents)]
    (sequence,) = batches.packed(documents, TOTAL)
    assert sequence.packed == LENGTHS
    return batches.micro_batch([sequence], tiny.CPU, TOTAL)


def logits(trainee: Trainee, batch: MicroBatch) -> torch.Tensor:
    """What the model says of one packed sequence."""
    with torch.no_grad():
        found: torch.Tensor = trainee.model(input_ids=batch.input_ids, position_ids=batch.position_ids).logits[0]
    return found


def gradients(trainee: Trainee, batch: MicroBatch) -> list[torch.Tensor]:
    """Of the adapter, by the loss of *batch*."""
    return list(torch.autograd.grad(trainee.loss(batch), trainee.parameters))


@pytest.mark.parametrize("kind", FAMILIES)
def test_no_document_sees_another(kind: str) -> None:
    """Another first document changes no logit of those behind it, nor a gradient of their loss, by a single bit."""
    trainee = packed_trainee(kind)

    one, other = (logits(trainee, together(seed)) for seed in (0, 7))

    assert not torch.equal(one[: LENGTHS[0]], other[: LENGTHS[0]])
    assert torch.equal(one[LENGTHS[0] :], other[LENGTHS[0] :])
    before, after = (gradients(trainee, together(seed, learned=1)) for seed in (0, 7))
    assert all(map(torch.equal, before, after)) and any(bool(g.any()) for g in before)


@pytest.mark.parametrize(("kind", "loss_chunks"), [*((kind, 1) for kind in FAMILIES), ("llama", 4), ("gpt2", 4)])
def test_a_packed_document_learns_as_if_alone(kind: str, loss_chunks: int) -> None:
    """Each document's loss, and the gradient of all, are those of the documents in sequences of their own."""
    trainee = packed_trainee(kind, loss_chunks)
    alone = [batches.micro_batch([document(n, seed)], tiny.CPU) for seed, n in enumerate(LENGTHS)]

    for number, batch in enumerate(alone):
        torch.testing.assert_close(trainee.loss(together(learned=number)), trainee.loss(batch), rtol=1e-4, atol=1e-3)
    apart = [sum(parts) for parts in zip(*(gradients(trainee, batch) for batch in alone), strict=True)]
    largest = max(float(torch.as_tensor(g).abs().max()) for g in apart)
    torch.testing.assert_close(gradients(trainee, together()), apart, rtol=1e-3, atol=1e-5 * largest)


def test_every_kind_that_is_packed_is_tested() -> None:
    """What the planner packs is what the tests above have shown to keep documents apart."""
    assert set(FAMILIES) == model_facts._PACKABLE


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "falcon"}, "model_type falcon was never shown to keep packed documents apart"),
        ({"model_type": "mamba"}, "model_type mamba was never shown"),
        ({"sliding_window": 63}, "sliding window of 63 tokens is shorter than a sequence of 64"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "depend on the longest document"),
        ({"rope_scaling": {"type": "longrope"}}, "depend on the longest document"),
    ],
)
def test_what_would_leak_is_not_packed(changes: dict[str, Any], reason: str) -> None:
    """Attention that nobody looked at, windows inside a sequence and frequencies that a neighbour sets are refused."""
    assert reason in str(model_facts.why_not_packed({**tiny.CONFIG, **changes}, 64))
    assert model_facts.why_not_packed({**tiny.CONFIG, "sliding_window": 8, "use_sliding_window": False}, 64) is None


def test_attention_of_its_own_is_not_packed() -> None:
    """A model that does not take our attention is refused before a step."""
    model = build.load_model(tiny.CONFIG, compute_dtype="float32", device="cpu", attn_implementation="eager")

    with pytest.raises(ValueError, match="cannot be packed: its attention is its own"):
        attention.pack(model, torch.float32)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("head_size", [8, 6])
def test_every_way_to_compute_packed_attention_is_the_same(dropout: float, head_size: int) -> None:
    """Where kernels refuse to skip what is hidden as well, the mask alone hides it."""
    maker = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 16, head_size, generator=maker) for heads in (4, 2, 2))
    positions = torch.tensor([[*range(10), *range(6)], [*range(3), *range(13)]])
    mask = attention.document_mask(positions, torch.float32)

    torch.manual_seed(0)
    found, _ = attention.packed_attention(torch.nn.Identity(), q, k, v, mask, dropout)
    torch.manual_seed(0)
    plain, _ = attention.expanded_attention(torch.nn.Identity(), q, k, v, mask, dropout)

    torch.testing.assert_close(found, plain)


def test_a_mask_shows_a_token_its_own_document_so_far() -> None:
    """Nothing is added to the scores of what precedes a token in its document, and all else is out of reach."""
    mask = attention.document_mask(torch.tensor([[0, 1, 0, 1, 2]]), torch.float16)

    seen = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert mask.dtype == torch.float16
    assert mask.tolist() == [[[[0.0 if cell else -math.inf for cell in row] for row in seen]]]


@pytest.mark.parametrize("activations", ["save", "recompute"])
@pytest.mark.parametrize("packing", [True, False])
def test_the_measured_peak_is_the_planned_one(
    packing: bool, activations: str, tiny_folder: Path, request_for: Callable[..., RunRequest], tmp_path: Path
) -> None:
    """Packed or not, the step that is measured allocates to the byte what was planned, but for its labels.

    They are an int64 for each position, which the trace does not see before the loss.
    """
    lines = [{"text": "ab" * (1 + number % 19)} for number in range(60)]
    data = tmp_path / "short.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    sizes: dict[str, Any] = {"sequence_length": 128, "global_batch_size": 4, "micro_batch_size": 2, "rank": 8}
    plan = shallowflow.plan(
        str(tiny_folder), "cpu", **sizes, packing=packing, activations=activations, quantization="fp16"
    )

    record = train(plan, request_for(data=data, num_steps=4))

    assert plan.configuration.packing == packing
    predicted, measured = next((c.predicted, c.measured) for c in record.comparisons if c.quantity == "peak allocated")
    assert measured - predicted == 4 * 128 * 8
    assert record.padding_share < 0.2 or not packing


def test_a_packed_run_learns_every_document(
    tiny_folder: Path, request_for: Callable[..., RunRequest], held_out: Path
) -> None:
    """In one pass over the data a packed run learns as many tokens as one that is not, in fewer steps."""
    sizes: dict[str, Any] = {"sequence_length": 128, "global_batch_size": 2, "rank": 8, "quantization": "fp16"}
    records = []
    for packing in (False, True):
        plan = shallowflow.plan(str(tiny_folder), "cpu", packing=packing, **sizes)
        output = request_for().output.with_name(f"packed {packing}")
        records.append(train(plan, request_for(num_steps=None, output=output, eval_data=held_out)))

    tokens = [sum(step.num_target_tokens for step in record.steps) for record in records]
    assert len(records[1].steps) <= len(records[0].steps)
    assert tokens[1] >= tokens[0] > 0
