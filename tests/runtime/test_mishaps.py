"""What may go wrong beside a run, or at an awkward moment of it, costs no more than it must."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import tracking

from shallowflow.planner.plan import Plan
from shallowflow.runtime import files, folder, meter, sample
from shallowflow.runtime.answers import DAY, stop_the_clock
from shallowflow.runtime.record import RunRecord
from shallowflow.runtime.request import RunError
from shallowflow.runtime.run import RunRequest, train
from shallowflow.runtime.step import MicroBatch, Trainee
from shallowflow.runtime.watch import Silent

RequestFor = Callable[..., RunRequest]


def losses(record: RunRecord) -> list[float]:
    """Of every step."""
    return [step.loss for step in record.steps]


def test_two_signals_between_an_update_and_its_record(
    plans: dict[str, Plan], request_for: RequestFor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update counts, or it is not kept: a resumed run makes none twice."""
    whole = train(plans["fp16"], request_for(num_steps=6, output=tmp_path / "whole"))
    seconds, calls = meter.Stopwatch.seconds, 0

    def interrupted(self: meter.Stopwatch) -> float:
        nonlocal calls
        calls += 1
        if calls == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return seconds(self)

    with monkeypatch.context() as patch:
        patch.setattr(meter.Stopwatch, "seconds", interrupted)
        cut = train(plans["fp16"], request_for(num_steps=6))
    resumed = train(plans["fp16"], request_for(num_steps=6, resume=True))

    assert calls >= 4 and len(cut.steps) < 6
    assert losses(resumed) == losses(whole)


SHORT = {
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "driver": RuntimeError("CUDA error: out of memory"),
    "cpu": None,
}


@pytest.mark.parametrize("kind", SHORT)
def test_memory_that_runs_out_under_another_name(
    kind: str, plans: dict[str, Plan], request_for: RequestFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library's, the driver's and a CPU's own words for it make the run fall back like the allocator's."""
    loss, calls = Trainee.loss, 0

    def short(self: Trainee, batch: MicroBatch) -> torch.Tensor:
        nonlocal calls
        if torch.is_grad_enabled() and not batch.input_ids.is_meta:
            calls += 1
            if calls == 3:
                error = SHORT[kind]
                if error is None:
                    torch.empty(2**46, dtype=torch.uint8)
                else:
                    raise error
        return loss(self, batch)

    monkeypatch.setattr(Trainee, "loss", short)
    record = train(plans["fp16"], request_for(num_steps=4))

    assert record.outcome == "completed" and len(record.steps) == 4 and len(record.fallbacks) == 1


def test_other_errors_are_not_taken_for_it(
    plans: dict[str, Plan], request_for: RequestFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong shape ends the run as what it is."""
    loss = Trainee.loss

    def wrong(self: Trainee, batch: MicroBatch) -> torch.Tensor:
        if batch.input_ids.is_meta:
            return loss(self, batch)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Trainee, "loss", wrong)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train(plans["fp16"], request_for())


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Let files of this process have at most so many bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_for_a_while(
    plans: dict[str, Plan], request_for: RequestFor, small_files: Callable[[int], None]
) -> None:
    """A checkpoint that cannot be written is told of, leaves nothing, and the next one is written."""

    class Filling(Silent):
        def step(self, record: Any, peak: Any) -> None:
            del peak
            if record.index == 1:
                small_files(4096)
            if record.index == 3:
                small_files(resource.RLIM_INFINITY)

    request = request_for(num_steps=6, save_every=2)
    record = train(plans["fp16"], request, Filling())
    kept = {path.name for path in (request.output / folder.CHECKPOINTS).iterdir()}

    assert record.outcome == "completed" and len(record.steps) == 6
    assert len([note for note in record.notes if note.startswith("no checkpoint after step 2: ")]) == 1
    assert "step-00000004" in kept and not any(name.endswith(".partial") for name in kept)


class Failing:
    """A tracker of which one call fails."""

    name = "tensorboard"
    fails = "start"

    def __init__(self, *_args: object, **_places: object) -> None: ...

    def _call(self, name: str) -> None:
        if name == self.fails:
            raise OSError(28, "No space left on device")

    def start(self) -> None:
        """Begin."""
        self._call("start")

    def log(self, _values: dict[str, float], step: int) -> None:
        """Hear of a step."""
        del step
        self._call("log")

    def finish(self) -> None:
        """End."""
        self._call("finish")


@pytest.mark.parametrize("fails", ["start", "log", "finish"])
def test_a_tracker_that_fails_ends_no_run(
    fails: str, plans: dict[str, Plan], request_for: RequestFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was learned is there, and why nothing was told is in the record."""
    monkeypatch.setattr(Failing, "fails", fails)
    monkeypatch.setattr(tracking, "TensorBoardTracker", Failing)
    request = request_for(track=("tensorboard",))
    record = train(plans["fp16"], request)

    assert record.outcome == "completed" and len(record.steps) == 3
    assert (request.output / "adapter" / "adapter_model.safetensors").is_file()
    assert any("No space left" in note for note in record.notes)


def test_a_folder_that_cannot_be_renamed_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between the renames, or killed there, what was there is there again."""
    path, rename = tmp_path / "best", Path.rename
    path.mkdir()
    (path / "weights").write_text("the best so far", encoding="utf-8")

    def stopped(self: Path, target: Path) -> Path:
        if self.name == ".best.partial":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stopped)
        with pytest.raises(KeyboardInterrupt), files.new_folder(path) as partial:
            partial.mkdir()
    assert [file.name for file in tmp_path.iterdir()] == ["best"]

    path.rename(tmp_path / ".best.old")  # as a process leaves it that is killed there
    with pytest.raises(ZeroDivisionError), files.new_folder(path):
        _ = 1 / 0
    assert (path / "weights").read_text(encoding="utf-8") == "the best so far"


def test_a_lock_without_a_name_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who opened the file just before its holder took it away holds nothing."""
    opened = Path.open

    def taken_away(self: Path, *args: Any, **kwargs: Any) -> Any:
        made = opened(self, *args, **kwargs)
        self.unlink()
        return made

    monkeypatch.setattr(Path, "open", taken_away)
    with pytest.raises(RunError, match="try again"), folder.claimed(tmp_path / "run"):
        pass


def test_templates_know_one_day(tiny_folder: Path) -> None:
    """What a template writes of today's date is the same tomorrow."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}: {{ messages[0]['content'] }}"
    stop_the_clock(tokenizer)

    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "26 Jul 2024: x"
    assert f"{DAY:%d %b %Y}" == "26 Jul 2024"


@pytest.mark.parametrize(
    ("template", "prompt", "said"),
    [("{{ raise_exception('no such role') }}", "hello", "no such role"), (None, "\ud800", "no text in UTF-8")],
)
def test_prompts_that_cannot_be_sampled(template: str | None, prompt: str, said: str, tiny_folder: Path) -> None:
    """They are refused in one line."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = template
    with pytest.raises(RunError, match=said):
        sample.prompt_tokens(tokenizer, prompt, 32)


def test_columns_of_no_text(tmp_path: Path) -> None:
    """A column whose name is no text is named in JSON all the same."""
    from tests.front.shell import sfplan

    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "hello there", "\\ud800": 1}\n', encoding="utf-8")
    done = sfplan("data", data, "--json")

    assert done.code == 0 and json.loads(done.output)["ignored_columns"] == ["\\ud800"]
