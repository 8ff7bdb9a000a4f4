"""The same step through other trainers."""

from __future__ import annotations

from pathlib import Path

import pytest

from shallowflow.runtime import others
from tests.runtime.cpu_rules import rules, small_cell


def test_trl_takes_the_same_step() -> None:
    """Where TRL is installed: tokens per second and a peak, with the model, the adapters and the batch of ours."""
    pytest.importorskip("trl")

    found = others.with_trl(small_cell(), rules())

    assert found["outcome"] == "ran", found
    assert found["tokens_per_second"] > 0 and found["peak_allocated_bytes"] > 0


UNSLOTH = """
import peft, transformers
class FastLanguageModel:
    def from_pretrained(model_name, max_seq_length, dtype, load_in_4bit, load_in_8bit, use_gradient_checkpointing):
        return transformers.AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype), None
    def get_peft_model(model, r, lora_alpha, lora_dropout, target_modules, use_gradient_checkpointing):
        return peft.get_peft_model(model, peft.LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=target_modules))
"""


def pretend_unsloth(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of that name, of *code*."""
    (folder / "unsloth").mkdir()
    (folder / "unsloth" / "__init__.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)


def test_unsloth_gets_the_model_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The saved weights load, train through TRL, and what was found comes back; the package itself is pretended."""
    pytest.importorskip("trl")
    pretend_unsloth(tmp_path, "print('hello')" + UNSLOTH, monkeypatch)

    found = others.with_unsloth(small_cell(), rules())

    assert found["outcome"] == "ran", found
    assert found["tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise NotImplementedError('Unsloth needs a GPU')", "NotImplementedError: Unsloth needs a GPU"),
        ("import os; os._exit(9)", "exit code 9"),
        ("import time; time.sleep(60)", "not done after 1 seconds"),
    ],
)
def test_unsloth_that_fails_is_recorded(
    code: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its reason, be it an exception, a crash or too long a time."""
    pretend_unsloth(tmp_path, code, monkeypatch)
    if "sleep" in code:
        monkeypatch.setattr(others, "MOST_SECONDS", 1)

    assert others.with_unsloth(small_cell(), rules()) == {"outcome": "failed", "reason": reason}
