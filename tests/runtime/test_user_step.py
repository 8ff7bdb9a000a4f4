"""A user's own step: what is simulated is what is measured."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from shallowflow.planner.profiler.allocator import OutOfMemory
from shallowflow.planner.profiler.user_step import simulate
from shallowflow.profiles import load_gpu
from shallowflow.runtime.user_step import StepError, load_step, measure, measured, simulated

MakeStep = Callable[[str], Callable[[], None]]


def plain(optimizer_class: Callable[..., torch.optim.Optimizer]) -> MakeStep:
    """A convolution and a recurrent-free classifier in plain PyTorch."""

    def make_step(device: str) -> Callable[[], None]:
        model = torch.nn.Sequential(
            torch.nn.Conv1d(8, 32, 5, padding=2), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(32 * 64, 100)
        ).to(device)
        optimizer = optimizer_class(model.parameters(), lr=1e-3)
        inputs, labels = torch.randn(16, 8, 64, device=device), torch.randint(0, 100, (16,), device=device)

        def step() -> None:
            torch.nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return make_step


def encoder(device: str) -> Callable[[], None]:
    """A transformer encoder whose attention is called from inside another PyTorch function."""
    layer = torch.nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    model = torch.nn.Sequential(torch.nn.Embedding(500, 64), torch.nn.TransformerEncoder(layer, 2)).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(0, 500, (4, 64), device=device)

    def step() -> None:
        model(tokens).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def hugging_face(config: GPT2Config | LlamaConfig, attention: str) -> MakeStep:
    """Full fine-tuning of a small Hugging Face model."""

    def make_step(device: str) -> Callable[[], None]:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(device)
        optimizer = torch.optim.AdamW(model.parameters())
        tokens = torch.randint(0, 300, (2, 32), device=device)

        def step() -> None:
            optimizer.zero_grad()
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            optimizer.step()

        return step

    return make_step


GPT2 = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=300, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
LLAMA = LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=300,
)  # fmt: skip
STEPS: dict[str, MakeStep] = {
    "convolution, SGD": plain(torch.optim.SGD),
    "convolution, AdamW": plain(torch.optim.AdamW),
    "encoder": encoder,
    "GPT-2, eager": hugging_face(GPT2, "eager"),
    "Llama, SDPA": hugging_face(LLAMA, "sdpa"),
}


@pytest.mark.parametrize("name", STEPS)
def test_simulated_equals_measured_on_a_cpu(name: str) -> None:
    """The simulator gives the CPU allocator's own peak and resident bytes to a thousandth."""
    make_step = STEPS[name]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        predicted, truth = simulate(make_step, load_gpu("cpu")), measure(make_step, "cpu")

    assert predicted.peak_allocated_bytes == pytest.approx(truth.peak_allocated_bytes, rel=1e-3)
    assert predicted.resident_bytes == pytest.approx(truth.resident_bytes, rel=1e-3)
    assert truth.step_seconds is not None
    assert truth.step_seconds > 0


def test_categories_sum_to_the_process() -> None:
    """Every byte of the process at the peak has a category."""
    record = simulate(encoder, load_gpu("t4"))

    assert sum(part.num_bytes for part in record.categories) == record.peak_process_bytes
    assert max(phase.peak_allocated_bytes for phase in record.phases) == record.peak_allocated_bytes
    assert record.resident_bytes < record.peak_allocated_bytes <= record.peak_reserved_bytes


def test_a_step_fits_in_what_it_reserves_and_not_in_what_it_allocates_less_a_byte() -> None:
    """A capacity equal to the reserved peak suffices; one below the allocated peak never does."""
    gpu = load_gpu("t4")
    roomy = simulate(encoder, gpu)

    capped = simulate(encoder, gpu, capacity_bytes=roomy.peak_reserved_bytes)

    assert capped.peak_reserved_bytes <= roomy.peak_reserved_bytes
    with pytest.raises(OutOfMemory):
        simulate(encoder, gpu, capacity_bytes=roomy.peak_allocated_bytes - 1)


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("nothing.py:make_step", "does not exist"),
        ("make_step", "is not FILE.py:FUNCTION"),
        ("{folder}/step.py:other", "has no function 'other'; it has make_step"),
        ("{folder}/broken.py:make_step", "fails when imported: ZeroDivisionError"),
    ],
)
def test_a_reference_that_leads_nowhere_is_one_line(reference: str, said: str, tmp_path: Path) -> None:
    """A file, function or import that fails is named in one line."""
    (tmp_path / "step.py").write_text("def make_step(device):\n    return lambda: None\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")

    with pytest.raises(StepError) as caught:
        load_step(reference.format(folder=tmp_path))

    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_step_that_depends_on_data_names_the_users_line(tmp_path: Path) -> None:
    """What meta tensors cannot follow is reported with the line of the user's own file."""
    path = tmp_path / "depends.py"
    path.write_text(
        "import torch\n\ndef make_step(device):\n    x = torch.ones(3, device=device)\n    return lambda: x.numpy()\n"
    )

    with pytest.raises(StepError, match=r"cannot be simulated \(line 5\)"):
        simulated(f"{path}:make_step", load_gpu("t4"))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('raise RuntimeError("boom\\nsecond")', r"fails on cpu \(line 3\): RuntimeError: boom$"),
        ('raise OSError("cannot find dataset")', "OSError: cannot find dataset$"),
        ('raise SystemExit("bye")', "SystemExit: bye$"),
    ],
)
def test_a_step_that_fails_is_one_line(body: str, said: str, tmp_path: Path) -> None:
    """Whatever a user's step raises while it is measured is told with its line."""
    path = tmp_path / "fails.py"
    path.write_text(f"def make_step(device):\n    def step():\n        {body}\n    return step\n")

    with pytest.raises(StepError, match=said):
        measured(f"{path}:make_step", "cpu")


def test_the_first_simulation_of_a_process_is_like_the_second(tmp_path: Path) -> None:
    """What PyTorch loads while it traces for the first time leaves nothing behind that counts."""
    program = """
import torch
from shallowflow.planner.profiler.user_step import simulate

def make_step(device):
    model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 512)).to(device)
    inputs = torch.zeros(256, 512, device=device)

    def step():
        torch.nn.functional.mse_loss(model(inputs), inputs).backward()
        for parameter in model.parameters():
            parameter.grad = None

    return step

first, second = (simulate(make_step, "cpu") for _ in range(2))
assert (first.resident_bytes, first.peak_allocated_bytes) == (second.resident_bytes, second.peak_allocated_bytes)
"""

    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, cwd=tmp_path)


def test_a_step_that_does_nothing_is_told(tmp_path: Path) -> None:
    """A step without any tensor is no step to simulate."""
    (tmp_path / "step.py").write_text("def make_step(device):\n    return lambda: None\n")

    with pytest.raises(StepError, match="the step allocates nothing; make_step"):
        simulated(f"{tmp_path / 'step.py'}:make_step", load_gpu("t4"))
