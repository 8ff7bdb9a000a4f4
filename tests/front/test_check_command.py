"""``sfplan check``: what it says, writes and ends with."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.front.shell import sfplan

ENTRIES: dict[str, Any] = {
    "adapter": "lora",
    "sequence_len": 64,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 2e-4,
    "lora_r": 4,
    "bf16": "auto",
    "flash_attention": True,
    "gradient_checkpointing": True,
}
SCRIPT = """
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer
model = AutoModelForCausalLM.from_pretrained("someone/something", dtype="float16")
SFTTrainer(model, SFTConfig(fp16=True, max_length=64, per_device_train_batch_size=1))
"""


@pytest.fixture
def axolotl(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a configuration for the tiny model, changed or not, in the folder that commands then run in."""
    monkeypatch.chdir(tmp_path)

    def write(**changes: Any) -> Path:
        entries = {"base_model": str(tiny_folder), **ENTRIES, **changes}
        Path("axolotl.yaml").write_text(yaml.safe_dump(entries), encoding="utf-8")
        return Path("axolotl.yaml")

    return write


def test_modules_that_the_model_has_not_are_bad_input(axolotl: Callable[..., Path]) -> None:
    """They are named in one line with those that it has."""
    done = sfplan("check", axolotl(lora_target_modules=["nope"]), "--gpu", "t4")

    assert done.code == 2
    assert done.error().startswith("lora_target_modules names nope, and the model has no such module; its linear ones")
    assert "q_proj" in done.errors


def test_a_length_beyond_the_models_is_told(axolotl: Callable[..., Path]) -> None:
    """The tiny model was built for 128 tokens."""
    done = sfplan("check", axolotl(sequence_len=256), "--gpu", "t4")

    assert "Sequences of 256 tokens are more than the 128 that the model was built for." in done.output


def test_a_key_that_is_misspelled_is_told(axolotl: Callable[..., Path]) -> None:
    """With the one that it is nearly, which counts as not given; keys of other matters are passed over."""
    file = axolotl()
    entries = yaml.safe_load(file.read_text(encoding="utf-8"))
    entries["micro_batch_siez"] = entries.pop("micro_batch_size")
    entries |= {"num_epochs": 1, "eval_sample_packing": False, "dataloader_num_workers": 2}
    file.write_text(yaml.safe_dump(entries), encoding="utf-8")

    done = sfplan("check", file, "--gpu", "t4")

    told = " ".join(done.output.split())
    assert "micro_batch_siez is nothing that axolotl is known to read; if micro_batch_size is meant" in told
    assert told.count("is nothing that axolotl is known to read") == 1


def test_what_a_correction_brings_is_told_apart(axolotl: Callable[..., Path]) -> None:
    """A trap that was none before the correction does not stay: it comes, with what to do."""
    lines = sfplan("check", axolotl(), "--gpu", "t4").output.splitlines()

    assert not any(line.startswith("what stays:") and "loss scale" in line for line in lines)
    assert any(line.startswith("what comes with it: loss scale; instead: more steps") for line in lines)


def test_a_run_that_would_fail_ends_with_1(axolotl: Callable[..., Path]) -> None:
    """The answer comes first, then traps with their lines of the file, then the corrected configuration."""
    done = sfplan("check", axolotl(), "--gpu", "t4")

    assert (done.code, done.errors) == (1, "")
    lines = done.output.splitlines()
    assert lines[0].endswith("with axolotl on an NVIDIA T4")
    assert re.match(r"^fits: \d+\.\d\d GiB of 14\.56 GiB, but fails: attention$", lines[1])
    assert any(line.startswith("fails  attention  flash_attention: true") for line in lines)
    assert any(line.startswith("slow   emulated bf16  bf16: auto") for line in lines)
    assert any(line.startswith("corrected: ") for line in lines)


def test_a_corrected_file_would_run(axolotl: Callable[..., Path]) -> None:
    """What ``--output`` writes is checked with 0, and keeps what decides nothing here."""
    first = sfplan("check", axolotl(datasets=[{"path": "mine"}], wandb_project="mine"), "--output", "corrected.yaml")
    again = sfplan("check", "corrected.yaml")

    assert (first.code, again.code) == (1, 0)
    written = yaml.safe_load(Path("corrected.yaml").read_text(encoding="utf-8"))
    assert (written["fp16"], written["bf16"], written["attn_implementation"]) == (True, False, "sdpa")
    assert "flash_attention" not in written
    assert (written["datasets"], written["wandb_project"]) == ([{"path": "mine"}], "mine")


def test_a_verdict_in_json(axolotl: Callable[..., Path]) -> None:
    """Peak, categories that sum to it, traps with their severity, and the corrected settings."""
    done = sfplan("check", axolotl(), "--json")

    verdict = json.loads(done.output)
    assert (done.code, verdict["fits"], verdict["will_run"], verdict["format_version"]) == (1, True, False, 1)
    assert (
        sum(part["num_bytes"] for part in verdict["outcome"]["categories"]) == verdict["outcome"]["peak_process_bytes"]
    )
    assert verdict["findings"][0]["severity"] == "fails"
    assert verdict["corrected"]["precision"] == "fp16"


def test_every_command_of_the_help_runs(axolotl: Callable[..., Path]) -> None:
    """As it stands: on a YAML, on a script whose model's name is none that is known, and with an output."""
    axolotl()
    Path("train.py").write_text(SCRIPT, encoding="utf-8")
    shown = re.findall(r"^ +sfplan (check .*)$", sfplan("check", "--help").output, re.MULTILINE)
    assert len(shown) == 3

    codes = [sfplan(*shlex.split(words)).code for words in shown]

    assert codes[0] == codes[2] == 1 and codes[1] in (0, 1)
    assert Path("corrected.yaml").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("missing.yaml",), "cannot read missing.yaml: No such file or directory"),
        (("axolotl.yaml", "--gpu", "t5"), "t5"),
        (("axolotl.yaml", "--output", "missing/x.yaml"), "folder missing for --output does not exist"),
        (("axolotl.yaml", "--model", "no-such-model"), "no-such-model"),
        (
            ("train.py", "--model", "SmolLM2-135M", "--output", "x.yaml"),
            "--output writes for axolotl and LLaMA-Factory",
        ),
        (("train.py",), "something"),
    ],
)
def test_bad_input_is_one_line(axolotl: Callable[..., Path], words: tuple[str, ...], told: str) -> None:
    """And ends with 2."""
    axolotl()
    Path("train.py").write_text(SCRIPT, encoding="utf-8")

    done = sfplan("check", *words)

    assert done.code == 2 and told in done.error()


def test_nothing_is_corrected_that_needs_it_not(axolotl: Callable[..., Path]) -> None:
    """``--output`` says so, and writes nothing."""
    clean = {"bf16": False, "fp16": True, "flash_attention": False, "group_by_length": True}

    done = sfplan("check", axolotl(**clean), "--output", "corrected.yaml")

    assert done.code == 2 and done.error() == "axolotl.yaml needs no correction"
    assert not Path("corrected.yaml").exists()


def test_a_file_that_is_refused_loads_no_torch(tmp_path: Path) -> None:
    """Only a simulation does."""
    (tmp_path / "config.yaml").write_text("base_model: x\nsequence_len: many\n", encoding="utf-8")
    code = (
        "import sys\nfrom shallowflow.cli import main\n"
        f"try:\n    main(['check', {str(tmp_path / 'config.yaml')!r}])\n"
        "except SystemExit as ended:\n    print(ended.code, sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "2 []\n"
