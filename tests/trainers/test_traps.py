"""Each trap of a T4, planted in a configuration that has none, is found; and is gone from the corrected one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from shallowflow.profiles import GpuSpec, ModelSpec, load_gpu, load_model
from shallowflow.runtime.trainers import check, files, traps
from shallowflow.runtime.trainers.check import Outcome
from shallowflow.runtime.trainers.findings import Finding
from shallowflow.runtime.trainers.settings import Settings, Tool
from tests.planner.tiny import LLAMA

T4 = load_gpu("t4")
NO_GROUPS = {**LLAMA, "num_key_value_heads": LLAMA["num_attention_heads"]}
"""A model whose heads are as many, which no trap says anything of."""
CAPPED = {**NO_GROUPS, "model_type": "gemma2", "attn_logit_softcapping": 50.0, "head_dim": 16}
SHARED = {"gradient_accumulation_steps": 4, "learning_rate": 2e-4}
CLEAN: dict[Tool, dict[str, Any]] = {
    "axolotl": {
        "base_model": "mine",
        "adapter": "lora",
        "micro_batch_size": 1,
        "sequence_len": 512,
        "bf16": False,
        "fp16": True,
        "attn_implementation": "sdpa",
        "group_by_length": True,
        **SHARED,
    },
    "llamafactory": {
        "model_name_or_path": "mine",
        "finetuning_type": "lora",
        "per_device_train_batch_size": 1,
        "cutoff_len": 512,
        "fp16": True,
        "train_sampling_strategy": "group_by_length",
        "overwrite_output_dir": True,
        **SHARED,
    },
    "trl": {
        "model_name_or_path": "mine",
        "use_peft": True,
        "dtype": "float16",
        "per_device_train_batch_size": 1,
        "max_length": 512,
        "fp16": True,
        "train_sampling_strategy": "group_by_length",
        **SHARED,
    },
}
ALWAYS: dict[Tool, set[str]] = {
    "axolotl": {"loss scale"},
    "llamafactory": {"loss scale", "bf16 left over"},
    "trl": {"loss scale"},
}
"""What these tools' files cannot say otherwise: PyTorch's own loss scale, and weights as the checkpoint has them."""


@dataclass(frozen=True, slots=True)
class Planted:
    """A trap: the changes that walk into it; *stays* where the tool's file cannot correct it."""

    trap: str
    tool: Tool
    changes: dict[str, Any]
    stays: bool = False
    config: Any = None

    def __str__(self) -> str:
        return f"{self.trap}, {self.tool}"


GROUPED = LLAMA
LARGE = {**NO_GROUPS, "vocab_size": 256_000}
PLANTED = (
    Planted("emulated bf16", "axolotl", {"bf16": True, "fp16": False}),
    Planted("emulated bf16", "axolotl", {"bf16": "auto", "fp16": None}),
    Planted("emulated bf16", "llamafactory", {"bf16": True, "fp16": False}),
    Planted("emulated bf16", "llamafactory", {"fp16": None}),  # what the GPU claims: the checkpoint's bf16
    Planted("emulated bf16", "llamafactory", {"pure_bf16": True, "fp16": False}),
    Planted("emulated bf16", "trl", {"fp16": False}),  # its default
    Planted("no fp16", "axolotl", {"fp16": False}),
    Planted("no fp16", "trl", {"fp16": False, "bf16": False, "dtype": "float32"}),
    Planted("quantized products", "trl", {"load_in_4bit": True, "dtype": "float32"}),
    Planted(
        "quantized products",
        "axolotl",
        {"adapter": "qlora", "load_in_4bit": True, "bnb_config_kwargs": {"bnb_4bit_compute_dtype": "bfloat16"}},
    ),
    Planted("bf16 left over", "trl", {"dtype": "bfloat16"}),
    Planted("bf16 left over", "llamafactory", {}, stays=True),
    Planted("loss scale", "axolotl", {}, stays=True),
    Planted("16-bit gradients", "trl", {"load_in_4bit": True}),
    Planted("16-bit gradients", "axolotl", {"adapter": None}),
    Planted("16-bit gradients", "axolotl", {"peft_autocast_adapter_dtype": False}),
    Planted("fp16 overflow", "axolotl", {}, config={**NO_GROUPS, "model_type": "gemma3_text", "head_dim": 16}),
    Planted("attention", "axolotl", {"attn_implementation": "flash_attention_2"}),
    Planted("attention", "axolotl", {"attn_implementation": None, "flash_attention": True}),
    Planted("attention", "axolotl", {"sample_packing": True}),  # which goes through FlashAttention unasked
    Planted("attention", "llamafactory", {"flash_attn": "fa2"}),
    Planted("attention", "trl", {"attn_implementation": "kernels-community/flash-attn2"}),
    Planted("capped scores", "trl", {"attn_implementation": "sdpa"}, config=CAPPED),
    Planted("grouped KV heads", "axolotl", {}, stays=True, config=GROUPED),
    Planted("grouped KV heads", "llamafactory", {}, config=GROUPED),
    Planted("packing", "axolotl", {"attn_implementation": None, "sample_packing": True}),
    Planted("packing", "llamafactory", {"packing": True}),
    Planted("packing", "trl", {"packing": True, "packing_strategy": "wrapped"}),
    Planted("Triton's products", "axolotl", {"cut_cross_entropy": True}),
    Planted(
        "fused loss",
        "axolotl",
        {"liger_fused_linear_cross_entropy": True, "plugins": ["axolotl.integrations.liger.LigerPlugin"]},
    ),
    Planted("fused loss", "llamafactory", {"enable_liger_kernel": True}),
    Planted("whole logits", "axolotl", {}, stays=True, config=LARGE),
    Planted("longest batch", "axolotl", {"group_by_length": False}),
    Planted("longest batch", "llamafactory", {"train_sampling_strategy": None}),
    Planted("longest batch", "trl", {"train_sampling_strategy": None}),
    Planted("resume", "axolotl", {"auto_resume_from_checkpoints": True}),
    Planted("resume", "llamafactory", {"overwrite_output_dir": None}),  # its default
    Planted("resume", "trl", {"resume_from_checkpoint": "true"}),
)


def read(tool: Tool, changes: dict[str, Any], folder: Path) -> Settings:
    """The clean configuration with *changes*, as it is read from a file."""
    path = folder / "config.yaml"
    entries = {key: value for key, value in {**CLEAN[tool], **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(entries), encoding="utf-8")
    return files.read(path, tool, has_bf16=False)


def always_fits(_settings: Settings, _config: Any, _gpu: GpuSpec) -> Outcome:
    """A prediction, where only the traps are asked about."""
    return Outcome(
        peak_process_bytes=1,
        peak_phase="backward",
        peak_module="",
        step_seconds=1.0,
        tokens_per_second=1.0,
        categories=(),
    )


def names(found: tuple[Finding, ...]) -> set[str]:
    """Of traps."""
    return {finding.trap for finding in found}


@pytest.mark.parametrize("tool", list(CLEAN))
def test_a_clean_configuration_has_none(tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what its tool cannot say."""
    monkeypatch.setattr(check, "predict", always_fits)

    verdict = check.check(read(tool, {}, tmp_path), ModelSpec(name="mine", config=NO_GROUPS), T4)

    assert names(verdict.findings) == ALWAYS[tool]


@pytest.mark.parametrize("planted", PLANTED, ids=str)
def test_a_planted_trap_is_found_and_mended(planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told of with its line of the file; corrected settings, and a file written from them, have it no more."""
    monkeypatch.setattr(check, "predict", always_fits)
    model = ModelSpec(name="mine", config=planted.config or NO_GROUPS)
    if planted.trap == "whole logits":
        planted = replace(planted, changes={**planted.changes, "sequence_len": 8192})

    verdict = check.check(read(planted.tool, planted.changes, tmp_path), model, T4)

    (finding,) = [finding for finding in verdict.findings if finding.trap == planted.trap]
    assert finding.where and finding.what and finding.instead
    if planted.stays:
        return
    assert verdict.corrected is not None and planted.trap not in names(verdict.remaining)
    if planted.tool in files.WRITTEN:
        text = files.corrected(tmp_path / "config.yaml", verdict.settings, verdict.corrected)
        (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
        again = check.check(files.read(tmp_path / "config.yaml", planted.tool, has_bf16=False), model, T4)
        assert planted.trap not in names(again.findings)
        assert again.corrected is None, "a corrected configuration needs no correction"


def test_a_gpu_with_bf16_has_no_trap_of_a_t4(tmp_path: Path) -> None:
    """The same configurations of an A10G: neither precision, attention nor kernels are told of."""
    a10g = load_gpu("a10g")
    old = {"emulated bf16", "no fp16", "quantized products", "bf16 left over", "attention", "grouped KV heads"}
    for planted in PLANTED:
        path = tmp_path / "config.yaml"
        settings = read(planted.tool, planted.changes, tmp_path)
        assert path.exists()
        assert not names(traps.found(settings, GROUPED, a10g)) & {*old, "Triton's products"}


def test_needless_quantization_is_found() -> None:
    """A model of a billion parameters in 4 bits takes longer than in fp16, which fits: told of, and undone."""
    model = load_model("SmolLM2-135M")
    settings = Settings(
        tool="trl",
        model=model.name,
        sequence_length=256,
        micro_batch_size=1,
        gradient_accumulation_steps=1,
        quantization="nf4",
        longest_first=True,
    )

    verdict = check.check(settings, replace(model, config={**model.config, "num_hidden_layers": 2}), T4)

    assert "needless quantization" in names(verdict.findings)
    assert verdict.corrected is not None and verdict.corrected.quantization == "none"
