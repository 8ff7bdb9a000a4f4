"""``shallowflow.check`` of trainers that are about to run."""

from __future__ import annotations

from pathlib import Path

import pytest

import shallowflow
from shallowflow.runtime.trainers.settings import ConfigurationError
from tests.trainers import really
from tests.trainers.really import Work


@pytest.mark.parametrize("make", [really.plain, really.sft])
def test_a_trainer_is_checked_and_left_alone(make: really.Make, tmp_path: Path) -> None:
    """It says whether it fits, where its peak is and how long a step takes; the trainer's model stays as it was."""
    trainer = make(Work(recomputes=True, gradient_accumulation_steps=4), str(tmp_path))
    before = {name: (p.dtype, p.device, p.requires_grad) for name, p in trainer.model.named_parameters()}

    verdict = shallowflow.check(trainer, "t4")

    assert verdict.fits and verdict.outcome.peak_phase in ("forward", "backward")
    assert verdict.outcome.step_seconds > 0 and verdict.outcome.tokens_per_second > 0
    assert sum(one.num_bytes for one in verdict.outcome.categories) == verdict.outcome.peak_process_bytes
    assert {name: (p.dtype, p.device, p.requires_grad) for name, p in trainer.model.named_parameters()} == before
    found = {finding.trap for finding in verdict.findings}
    assert found == {"no fp16", "grouped KV heads", "longest batch"}
    assert verdict.corrected is not None and verdict.corrected.precision == "fp16"


def test_a_trainer_says_what_it_was_made_with(tmp_path: Path) -> None:
    """Model, adapter, batch, optimizer and loss are read from it."""
    settings = shallowflow.check(really.sft(Work(micro_batch_size=3), str(tmp_path))).settings

    assert (settings.tool, settings.loss, settings.sequence_length) == ("trl", "tiled", 128)
    assert (settings.micro_batch_size, settings.gradient_accumulation_steps) == (3, 1)
    assert (settings.adapter, settings.rank, settings.alpha, settings.optimizer) == ("lora", 8, 16, "adamw_torch")
    assert settings.target_modules == ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")


def test_the_length_of_sequences_has_to_be_known(tmp_path: Path) -> None:
    """A Trainer of rows that are no tokens is told what to give, and takes it."""
    trainer = really.plain(Work(), str(tmp_path))
    trainer.train_dataset = [{"text": "words"}]

    with pytest.raises(ConfigurationError, match=r"its rows have no input_ids; give sequence_length$"):
        shallowflow.check(trainer)

    assert shallowflow.check(trainer, sequence_length=64).settings.sequence_length == 64
