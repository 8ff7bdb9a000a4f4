"""Files that are read, and files that are refused with one clear line."""

from __future__ import annotations

import contextlib
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from shallowflow.runtime.trainers import axolotl, files, llamafactory, names
from shallowflow.runtime.trainers.settings import ConfigurationError, Settings
from tests.trainers.test_traps import CLEAN

PUBLIC = sorted(path for path in (Path(__file__).parent / "public").iterdir() if path.suffix != ".md")
NUM_FUZZED = 300
BOTH = "load_in_4bit: true\nload_in_8bit: true"


def read(path: Path) -> Settings:
    """As for a T4."""
    return files.read(path, None, has_bf16=False)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "has no entries; give a trainer's configuration, such as axolotl's"),
        ("- 1", "has no entries; give a trainer's configuration, such as axolotl's"),
        ("a: [", "is no YAML: "),
        ("a: 1", "has no key of axolotl, LLaMA-Factory, TRL; name its tool by --tool"),
        ("sequence_len: 512", "names no model; give base_model"),
        ("base_model: 5\nsequence_len: 512", ": base_model is 5; give a model's name, such as meta-llama/Llama-3.1-8B"),
        ("base_model: x\nsequence_len: many", ": sequence_len is many; give a whole number of at least 1"),
        ("base_model: x\nmicro_batch_size: 0", ": micro_batch_size is 0; give a whole number of at least 1"),
        ("base_model: x\nadapter: lora\nlora_r: [1]", ": lora_r is [1]; give a whole number of at least 1"),
        ("base_model: x\nlearning_rate: -1", ": learning_rate is -1; give a number of at least 0, such as 2e-4"),
        ("base_model: x\nsample_packing: perhaps", ": sample_packing is perhaps; give true or false"),
        ("base_model: x\nadapter: ia3", ": adapter is ia3; lora, qlora and none can be checked"),
        ("base_model: x\nload_in_4bit: true", ": axolotl refuses load_in_4bit without an adapter; give adapter: qlora"),
        ("base_model: x\nadapter: qlora\nload_in_8bit: true", ": axolotl refuses adapter: qlora with load_in_8bit"),
        (
            "base_model: x\nadapter: qlora\nload_in_4bit: 1\nload_in_8bit: 1",
            ": axolotl refuses adapter: qlora with load_in",
        ),
        ("base_model: x\nadapter: qlora", ": axolotl refuses adapter: qlora with no load_in_4bit; give load_in_4bit"),
        ("base_model: x\nrl: dpo", ": rl is dpo; supervised fine-tuning can be checked"),
        ("model_name_or_path: x\nstage: dpo", ": stage is dpo; sft and pt can be checked"),
        ("model_name_or_path: x\nstage: sft\nquantization_bit: 3", ": quantization_bit is 3; 4 and 8 can be checked"),
        ("model_name_or_path: x\nstage: sft\nflash_attn: fast", ": flash_attn is fast; LLaMA-Factory has auto"),
    ],
)
def test_a_broken_file_is_told_in_one_line(text: str, told: str, tmp_path: Path) -> None:
    """What is wrong, the value, and what would do."""
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")

    with pytest.raises(ConfigurationError) as raised:
        read(path)

    assert told in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "quantized", "told"),
    [
        ("adapter: qlora\nload_in_4bit: true", "nf4", ""),
        ("adapter: lora\nload_in_8bit: true", "int8", ""),
        ("adapter: lora\nload_in_4bit: true", "none", "axolotl ignores load_in_4bit with adapter: lora: weights stay"),
        (
            "adapter: lora\nload_in_4bit: true\nload_in_8bit: true",
            "int8",
            "axolotl ignores load_in_4bit with adapter: ",
        ),
    ],
)
def test_what_axolotl_ignores_is_told(text: str, quantized: str, told: str, tmp_path: Path) -> None:
    """It quantizes to 4 bits for one kind of adapter alone, and says nothing where another is asked for."""
    path = tmp_path / "config.yaml"
    path.write_text(f"base_model: x\nsequence_len: 512\n{text}", encoding="utf-8")

    settings = read(path)

    assert settings.quantization == quantized
    assert len(settings.inert) == bool(told) and all(one.startswith(told) for one in settings.inert)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = (", "is no Python: "),
        ("print('hello')", "calls none of SFTConfig, TrainingArguments, SFTTrainer, Trainer; give a script"),
        ("SFTTrainer(model=found)", "the model's name cannot be told without running it"),
        ("DPOTrainer()\nTrainingArguments()", "trains with DPOTrainer; supervised fine-tuning can be checked"),
        ("(" * 300 + ")" * 300, "is "),
    ],
)
def test_a_script_that_says_too_little_is_told_in_one_line(text: str, told: str, tmp_path: Path) -> None:
    """It is never run."""
    path = tmp_path / "train.py"
    path.write_text(text, encoding="utf-8")

    with pytest.raises(ConfigurationError) as raised:
        read(path)

    assert told in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_that_cannot_be_read_is_told_of(tmp_path: Path) -> None:
    """Missing, a folder, no text, or far too long."""
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "long.yaml").write_text("a" * (files.MOST_BYTES + 1), encoding="utf-8")

    for name, told in (
        ("missing.yaml", "cannot read"),
        ("", "cannot read"),
        ("binary.yaml", "is not text"),
        ("long.yaml", "bytes"),
    ):
        with pytest.raises(ConfigurationError, match=told):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NousResearch/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B"),
        ("unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit", "meta-llama/Llama-3.2-1B-Instruct"),
        ("unsloth/llama-3-8b-bnb-4bit", "meta-llama/Meta-Llama-3-8B"),
        ("unsloth/no-such-model", "unsloth/no-such-model"),
        ("someone/Llama-3.2-1B", "someone/Llama-3.2-1B"),
    ],
)
def test_copies_of_models_are_known(name: str, known: str) -> None:
    """Those of owners who repeat others' models, and no one else's."""
    assert names.original(name) == known


@pytest.mark.parametrize("write", [axolotl.write, llamafactory.write])
@pytest.mark.parametrize("public", PUBLIC, ids=lambda path: path.name)
def test_what_is_written_is_read_as_it_was(
    public: Path, write: Callable[[Settings], dict[str, Any]], tmp_path: Path
) -> None:
    """Settings of any origin, in a tool's own YAML: all that decides memory and time comes back, but its own limits."""
    path = tmp_path / "config.yaml"
    before = read(public)
    path.write_text(yaml.safe_dump(write(before)), encoding="utf-8")

    after = files.read(path, "axolotl" if write is axolotl.write else "llamafactory", has_bf16=False)

    for name in ("sequence_length", "micro_batch_size", "gradient_accumulation_steps", "rank", "alpha", "precision"):
        assert getattr(after, name) == getattr(before, name), name
    for name in ("quantization", "adapter", "recomputes", "longest_first", "optimizer", "learning_rate", "dropout"):
        assert getattr(after, name) == getattr(before, name), name


def test_fuzzed_files_never_raise_anything_else(tmp_path: Path) -> None:
    """YAML of every key with every kind of value, and public files with letters changed: read, or refused in a line."""
    chance = random.Random(0)
    keys = sorted({key for entries in CLEAN.values() for key in entries} | {*_keys_of_public()})
    values: tuple[Any, ...] = (
        None,
        True,
        False,
        0,
        -1,
        3,
        1e99,
        float("nan"),
        "",
        "auto",
        "true",
        "x" * 50,
        [],
        ["q_proj"],
        [1],
        {},
        {"a": 1},
    )
    outcomes = set()
    for number in range(NUM_FUZZED):
        source = chance.choice(PUBLIC)
        if number % 2:
            path = tmp_path / "config.yaml"
            chosen = {key: chance.choice(values) for key in chance.sample(keys, 12)}
            path.write_text(yaml.safe_dump({"base_model": "x", "model_name_or_path": "x", **chosen}), encoding="utf-8")
        else:
            path = tmp_path / f"fuzzed{source.suffix}"
            path.write_text(_changed(source.read_text(encoding="utf-8"), chance), encoding="utf-8")
        with contextlib.suppress(ConfigurationError):
            read(path)
            outcomes.add("read")
            continue
        outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def _keys_of_public() -> set[str]:
    return {key for path in PUBLIC if path.suffix != ".py" for key in yaml.safe_load(path.read_text(encoding="utf-8"))}


def _changed(text: str, chance: random.Random) -> str:
    letters = list(text)
    for _ in range(chance.randint(1, 8)):
        letters[chance.randrange(len(letters))] = chance.choice(string.printable)
    return "".join(letters)
