"""What well-known trainers fall into on a T4, and what keeps this one out: a law for each trap, in their order.

Elsewhere are: KV heads expanded (test_attention, test_sdpa), documents apart (test_batches), skipped updates counted
and scales bounded (test_step, test_precision), half-written checkpoints passed over (test_checkpoint).
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import shallowflow
from shallowflow.planner.plan import Plan
from shallowflow.planner.profiler import shapes
from shallowflow.planner.serialize import PlanError, from_json, to_json
from shallowflow.planner.strategies import Strategy, uniform
from shallowflow.profiles import load_gpu
from shallowflow.runtime import checkpoint
from shallowflow.runtime.loss import _Chunked, summed
from shallowflow.runtime.precision import INITIAL_FP16_SCALE, LossScale
from shallowflow.runtime.step import Trainee, make_trainee
from tests.planner import tiny as traced
from tests.planner.kernel_traces import recorded
from tests.runtime import tiny

PACKAGE = Path(shallowflow.__file__).parent
BATCH = tiny.random_batch([16, 9])


def names() -> Iterator[str]:
    """Every name and attribute that the package's code uses."""
    for folder in (PACKAGE, *(PACKAGE / part for part in ("planner", "profiles", "runtime"))):
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute):
                    yield node.attr
                elif isinstance(node, ast.Name):
                    yield node.id
                elif isinstance(node, (ast.Import, ast.ImportFrom)):
                    yield from (part for alias in node.names for part in alias.name.split("."))
                    yield getattr(node, "module", None) or ""


class Watch(TorchDispatchMode):
    """Tells of every operator and of what it made."""

    def __init__(self, tell: Callable[[Any, Any, Any], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tell = tell

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.tell(func, args, out)
        return out


def made_in(trainee: Trainee, *micro_batches: Any) -> list[torch.Tensor]:
    """Every tensor that an operator of one step made."""
    found: list[torch.Tensor] = []

    def tell(_func: Any, _args: Any, out: Any) -> None:
        found.extend(t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor))

    with Watch(tell):
        trainee.step(micro_batches)
    return found


# 1: bf16 that is only emulated


def test_nobody_asks_whether_bf16_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dtype follows from the compute capability, whatever torch says of bf16, which is True on a T4."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)

    assert "is_bf16_supported" not in set(names())
    t4 = load_gpu("t4")
    assert [t4.compute_dtype, load_gpu("l4").compute_dtype] == ["float16", "bfloat16"]
    assert replace(t4, compute_capability=(8, 0)).compute_dtype == "bfloat16"


# 2: a loss scale that skips a short run's updates


def test_the_first_updates_of_fp16_run() -> None:
    """With the initial scale, which is far below PyTorch's 65536, none of the first updates is skipped."""
    trainee = tiny.trainee("fp16", compute_dtype="float16")

    assert trainee.loss_scale.value == INITIAL_FP16_SCALE < 65536
    assert not any(trainee.step([BATCH]).skipped for _ in range(3))


def test_the_scale_survives_a_checkpoint(tmp_path: Path) -> None:
    """Value, skipped and calm updates are those that were saved."""
    trainee, other = (tiny.trainee("fp16", compute_dtype="float16") for _ in range(2))
    trainee.step([BATCH])
    trainee.loss_scale = LossScale(256.0, dynamic=True, num_skipped=2, num_calm=77)
    scale = trainee.loss_scale
    state = checkpoint.State(
        steps=(),
        started="",
        seconds=0.0,
        loss_scale=scale.value,
        num_skipped=scale.num_skipped,
        num_calm=scale.num_calm,
    )

    checkpoint.restore(checkpoint.load(checkpoint.save(tmp_path / "kept", trainee, state)), other)

    assert other.loss_scale == scale


# 3 and 4: adapters in fp32, no bf16 left


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("weight_format", ["fp16", "int8", "nf4"])
def test_a_bf16_checkpoint_leaves_no_bf16(weight_format: Any, double: bool) -> None:
    """Loaded for fp16 and quantized, a step of what was bf16 makes no bf16 tensor; adapters and gradients are fp32."""
    model: Any = tiny.base("bfloat16")
    model.to(torch.float16)  # as weights are loaded: converted to the plan's dtype
    strategy = Strategy(weight_format=weight_format, activations="save", double_quantization=double)
    chosen = replace(tiny.configuration(), layers=uniform(strategy, tiny.NUM_LAYERS))
    trainee = make_trainee(model, chosen, "float16", tiny.CPU)
    dtypes: set[torch.dtype] = set()
    for parameter in trainee.parameters:
        parameter.register_post_accumulate_grad_hook(lambda p: dtypes.add(p.grad.dtype))

    tensors = made_in(trainee, BATCH)

    assert dtypes == {p.dtype for p in trainee.parameters} == {torch.float32}
    assert torch.bfloat16 not in {t.dtype for t in (*tensors, *trainee.resident())}
    linear = [m for m in trainee.model.modules() if type(m).__name__ == "Linear4bit"]
    assert len(linear) == (7 * tiny.NUM_LAYERS if weight_format == "nf4" else 0)
    for module in linear:
        held: Any = module
        assert held.compute_dtype == held.weight.quant_state.dtype == torch.float16


# 5: models that overflow fp16


def test_a_plan_altered_to_overflow_is_refused(plans: dict[str, Plan]) -> None:
    """A fp16 plan whose model becomes one that leaves fp16's range is no plan, with the reason."""
    plan = plans["fp16"]
    strategy = Strategy(weight_format="fp16", activations="save")
    half = replace(
        plan,
        compute_dtype="float16",
        alternatives=(),
        configuration=replace(plan.configuration, layers=uniform(strategy, plan.configuration.num_layers)),
    )
    assert from_json(to_json(half)) == half

    altered = replace(half, model_config={**plan.model_config, "model_type": "gemma3_text"})
    with pytest.raises(PlanError, match="compute_dtype is float16, which gemma3_text overflows"):
        from_json(to_json(altered))


# 6: grouped heads


def test_a_t4_never_meets_the_math_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced for a T4, a model with grouped heads takes the memory-efficient kernel in both passes, never in groups."""
    called: list[str] = []
    kernel = "_scaled_dot_product_efficient_attention"
    plain = shapes.call

    def spy(func: Any, operator: Any, args: Any, kwargs: Any) -> Any:
        called.append(func._overloadpacket.__name__)
        if called[-1] == kernel:
            query, key, value = args[:3]
            assert query.shape == key.shape == value.shape
        return plain(func, operator, args, kwargs)

    monkeypatch.setattr(shapes, "call", spy)
    step = traced.meta_step("llama", "t4", traced.configuration("fp16", "recompute"))
    recorded("t4", step.run)

    num_layers = len(step.layers)
    assert (called.count(kernel), called.count(f"{kernel}_backward")) == (2 * num_layers, num_layers)
    assert "_softmax" not in called


# 8: Triton


def test_no_kernel_multiplies_in_triton() -> None:
    """Products are left to libraries, for Triton would not give them to tensor cores: its kernels have none."""
    used = {part for name in names() for part in name.split(".")}
    written = [
        path for path in (PACKAGE / "runtime").rglob("*.py") if "triton.language" in path.read_text(encoding="utf-8")
    ]

    assert {"torch", "transformers", "tl"} < used
    assert [path.name for path in written] == ["nf4_kernel.py"]
    for path in written:
        text = path.read_text(encoding="utf-8")
        assert "tl.load" in text and "dot" not in text


# 9: gradients that are formed before the loss scale arrives


@pytest.mark.parametrize("scale", [1024.0, 65536.0])
@pytest.mark.parametrize("num_targets", [48, 4096, 32_768, 100_000])
@pytest.mark.parametrize("certainty", [0, 10, 14, 20])
def test_chunks_lose_no_more_than_ordinary_autograd(certainty: int, num_targets: int, scale: float) -> None:
    """In fp16, from unknown tokens to nearly learned ones (0.9998), and for batches of any size.

    Compared with the gradient in double precision of the same fp16 logits. What is left is the rounding of the result,
    and of the rarest tokens' probabilities, 2e-8, of which fp16 holds eight bits and not one as they are.
    """
    torch.manual_seed(0)
    head = torch.nn.Linear(128, 8000, bias=False).requires_grad_(False)
    weight = head.weight.data = (torch.randn(8000, 128) * 0.05).half()
    labels = torch.randint(0, len(weight), (48,))
    towards = weight[labels].float()
    rows = (torch.randn(48, 128) * 0.5 + towards * certainty / towards.square().sum(-1, keepdim=True)).half()
    wrong = torch.nn.functional.linear(rows, weight).double().softmax(-1)
    wrong[torch.arange(len(labels)), labels] -= 1
    exact = wrong @ weight.double() * (scale / num_targets)

    def error(found: torch.Tensor) -> float:
        return float((found.double() - exact).norm() / exact.norm())

    gradients = []
    apply: Callable[..., torch.Tensor] = _Chunked.apply
    for chunk in (True, False):
        leaf = rows.clone().requires_grad_()
        whole = torch.nn.functional.linear(leaf, weight)
        loss = apply(leaf, head, labels, 16, True, 1.0) if chunk else summed(whole, labels)
        (loss / num_targets * scale).backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)

    ours, ordinary = map(error, gradients)
    rounding = error(exact.half())
    assert ours < max(1.1 * ordinary, 2**-10)
    assert ours < 1.5 * rounding + 2**-8


# 10: logits


@pytest.mark.parametrize("loss_chunks", [2, 8])
def test_no_more_logits_than_a_chunks(loss_chunks: int) -> None:
    """No tensor of the step has the vocabulary and more rows than one chunk."""
    chosen = replace(tiny.configuration(), loss_chunks=loss_chunks)
    trainee = make_trainee(tiny.base(), chosen, "float32", tiny.CPU)
    most = BATCH.labels.numel() // loss_chunks

    sizes = [t.shape for t in made_in(trainee, BATCH) if tiny.VOCABULARY in t.shape]

    logits = [size for size in sizes if size[-1] == tiny.VOCABULARY and size[0] != tiny.CONFIG["hidden_size"]]
    assert logits and max(size.numel() for size in logits) == most * tiny.VOCABULARY


# The host's waits


@pytest.mark.parametrize("num_micro_batches", [1, 5])
def test_the_host_waits_once_a_step(num_micro_batches: int) -> None:
    """Losses and norm are read together: no value is asked of the device but in one transfer at the end.

    AdamW's own step counts live on the host.
    """
    trainee = tiny.trainee(activations="recompute")
    trainee.step([BATCH])
    counts = {s["step"].data_ptr() for s in trainee.optimizer.state.values()}
    asked: list[Any] = []
    read: list[int] = []

    def tell(func: Any, args: Any, _out: Any) -> None:
        if func._overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal"):
            asked.extend(a for a in args if isinstance(a, torch.Tensor) and a.data_ptr() not in counts)

    whole = torch.Tensor.tolist

    def reading(tensor: torch.Tensor) -> Any:
        read.append(tensor.numel())
        return whole(tensor)

    with pytest.MonkeyPatch.context() as patch, Watch(tell):
        patch.setattr(torch.Tensor, "tolist", reading)
        trainee.step([BATCH] * num_micro_batches)

    assert not asked
    assert read == [num_micro_batches + 1]
