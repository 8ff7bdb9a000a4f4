"""Attention with expanded heads is plain attention."""

from __future__ import annotations

import math
from typing import Literal, get_args

import pytest
import torch

from shallowflow.planner.profiler.user_step import simulate
from shallowflow.profiles import load_gpu, load_model
from shallowflow.runtime import attention, build, cells
from shallowflow.runtime.cells import Attention, Cell, Recompute
from shallowflow.runtime.simulated import register_quantization
from tests.planner.kernel_traces import empty, recorded
from tests.runtime import tiny

TOKENS, HEADS, SIZE = 7, 4, 8


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float) -> torch.Tensor:
    """Softmax attention in double precision, head by head; *seen* says which key each query may look at."""
    out = torch.empty_like(q, dtype=torch.float64)
    groups = q.shape[1] // k.shape[1]
    for batch in range(q.shape[0]):
        for head in range(q.shape[1]):
            key, value = k[batch, head // groups].double(), v[batch, head // groups].double()
            scores = q[batch, head].double() @ key.T * scale
            out[batch, head] = scores.masked_fill(~seen[batch], -math.inf).softmax(-1) @ value
    return out.transpose(1, 2).to(q.dtype)


def causal(num_queries: int) -> torch.Tensor:
    """Each of the last *num_queries* tokens sees itself and what came before, in both rows of the batch."""
    return torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()[-num_queries:].expand(2, -1, -1)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1], ids=["all heads", "grouped", "one head"])
@pytest.mark.parametrize("mask", ["none", "boolean", "additive"])
@pytest.mark.parametrize("scale", [None, 0.25])
def test_expanded_attention_is_attention(
    device: str,
    num_kv_heads: int,
    mask: Literal["none", "boolean", "additive"],
    scale: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As either device computes it, with any KV heads, causal by itself or by a mask, the result is the formula's."""
    monkeypatch.setattr(attention, "device_type", lambda _tensor: device)
    maker = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, TOKENS, SIZE, generator=maker) for heads in (HEADS, num_kv_heads, num_kv_heads))
    seen = causal(TOKENS).clone()
    if mask != "none":
        seen[1, 3:, 0] = False  # one token hidden from some, which causality alone would not do
    given = {"none": None, "boolean": seen[:, None], "additive": torch.zeros(seen.shape)[:, None]}[mask]
    if mask == "additive" and given is not None:
        given.masked_fill_(~seen[:, None], torch.finfo(torch.float32).min)

    found, weights = attention.expanded_attention(torch.nn.Identity(), q, k, v, given, scaling=scale)

    torch.testing.assert_close(found, by_hand(q, k, v, seen, scale or SIZE**-0.5))
    assert weights is None
    assert found.is_contiguous()


@pytest.mark.parametrize(("gpu", "num_more"), [("cpu", -4), ("t4", 4)])
def test_a_cpu_saves_no_expanded_heads(gpu: str, num_more: int) -> None:
    """With half as many keys and values, a CPU holds that much less until the backward pass, a T4 that much more."""

    def held_bytes(num_kv_heads: int) -> int:
        def attend() -> object:
            q, k, v = (empty(2, heads, 512, SIZE) for heads in (HEADS, num_kv_heads, num_kv_heads))
            return attention.expanded_attention(torch.nn.Identity(), q, k, v, None)

        trace = recorded(gpu, attend)
        end = next(position for position, label in trace.marks if label == "end")
        return sum(trace.sizes[e - 1] if e > 0 else -trace.sizes[-e - 1] for e in trace.events[:end])

    assert held_bytes(2) - held_bytes(4) == num_more * 2 * 512 * SIZE * 2


def test_one_query_sees_every_key() -> None:
    """A single new token looks at all that came before it, although it is the first of its queries."""
    maker = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, num, SIZE, generator=maker) for heads, num in ((HEADS, 1), (2, TOKENS), (2, TOKENS))
    )

    found, _ = attention.expanded_attention(torch.nn.Identity(), q, k, v, None)

    torch.testing.assert_close(found, by_hand(q, k, v, causal(1), SIZE**-0.5))


def test_attention_that_is_not_causal_sees_the_future() -> None:
    """Where the caller says so, every token sees every other."""
    maker = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, HEADS, TOKENS, SIZE, generator=maker) for _ in range(3))

    found, _ = attention.expanded_attention(torch.nn.Identity(), q, k, v, None, is_causal=False)

    torch.testing.assert_close(found, by_hand(q, k, v, torch.ones_like(causal(TOKENS)), SIZE**-0.5))


def test_a_model_computes_the_same_as_with_eager_attention() -> None:
    """Our attention and eager attention give a model with grouped KV heads the same logits."""
    tokens = tiny.random_batch([16, 16]).input_ids
    ours = tiny.base()
    eager = build.load_model(tiny.CONFIG, compute_dtype="float32", device="cpu", attn_implementation="eager")
    eager.load_state_dict(ours.state_dict())

    logits = [model(input_ids=tokens).logits for model in (ours, eager)]

    assert ours.config._attn_implementation == attention.NAME
    assert eager.config._attn_implementation == "eager"
    torch.testing.assert_close(logits[0], logits[1])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("meta-llama/Llama-3.1-8B", attention.NAME),
        ("Qwen/Qwen2.5-0.5B", attention.NAME),
        ("google/gemma-2-2b", "eager"),
        ("tiiuae/falcon-7b", "sdpa"),
    ],
)
def test_each_model_gets_the_leanest_attention_it_can_take(name: str, expected: str) -> None:
    """Ours where the model's code takes any, SDPA where it has its own, eager where it needs the scores themselves."""
    config = build.transformers_config(load_model(name).config)

    assert attention.best_for(config) == expected


def test_only_a_causal_language_model_has_a_best_attention() -> None:
    """Another kind of model is refused by its name."""
    config = build.transformers_config({"model_type": "t5"})

    with pytest.raises(ValueError, match="t5 is not a causal language model"):
        attention.best_for(config)


def test_people_read_sdpa() -> None:
    """Both SDPA implementations are shown under one name, any other under its own."""
    assert [attention.shown(name) for name in (attention.NAME, "sdpa", "eager")] == ["SDPA", "SDPA", "eager"]


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("length", [64, 512, 2048])
def test_eager_attention_is_never_better(length: int, recompute: Recompute) -> None:
    """On a T4 it takes more memory and more time than SDPA at any length, so that attention is no decision."""
    register_quantization()
    sdpa, eager = (
        simulate(
            cells.step_of(
                Cell(
                    model="SmolLM2-135M",
                    attention=kind,
                    num_layers=2,
                    sequence_length=length,
                    micro_batch_size=2,
                    recompute=recompute,
                ),
                "float16",
            ),
            load_gpu("t4"),
        )
        for kind in get_args(Attention)
    )

    assert sdpa.peak_allocated_bytes <= eager.peak_allocated_bytes
    assert sdpa.step_seconds is not None
    assert eager.step_seconds is not None
    assert sdpa.step_seconds < eager.step_seconds
