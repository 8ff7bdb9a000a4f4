"""Public configurations of other trainers on a T4: their verdicts and traps, verified by hand against the sources."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from shallowflow.profiles import load_gpu, load_model
from shallowflow.runtime.trainers import check, files, names

PUBLIC = Path(__file__).parent / "public"
T4 = load_gpu("t4")
GIB = 2**30
TOLERANCE = 0.005
"""Of the peak, which is told to hundredths of a GiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What is said of a configuration; *model* is told where the name in it is none that is known."""

    traps: frozenset[str]
    peak_gib: float
    fits: bool
    model: str | None = None


def traps(*found: str) -> frozenset[str]:
    """Of a configuration."""
    return frozenset(found)


EXPECTED = {
    "axolotl_llama3_qlora.yml": Expected(
        traps=traps("attention", "emulated bf16", "whole logits"), peak_gib=25.84, fits=False
    ),
    "axolotl_tinyllama_lora.yml": Expected(
        traps=traps("attention", "emulated bf16", "whole logits"),
        peak_gib=11.01,
        fits=True,
        model="TinyLlama-1.1B-Chat-v1.0",
    ),
    "axolotl_gemma2_qlora.yml": Expected(
        traps=traps("attention", "emulated bf16", "whole logits"), peak_gib=16.82, fits=False
    ),
    "axolotl_llama32_lora.yml": Expected(
        traps=traps("attention", "emulated bf16", "whole logits"), peak_gib=10.25, fits=True
    ),
    "axolotl_gemma3_qlora.yml": Expected(
        traps=traps("attention", "emulated bf16", "whole logits"), peak_gib=8.64, fits=True
    ),
    "llamafactory_llama3_lora.yaml": Expected(
        traps=traps("emulated bf16", "grouped KV heads", "longest batch", "whole logits"), peak_gib=20.29, fits=False
    ),
    "llamafactory_llama3_qlora.yaml": Expected(
        traps=traps("emulated bf16", "grouped KV heads", "longest batch", "whole logits"), peak_gib=10.52, fits=True
    ),
    "trl_zephyr_qlora.yaml": Expected(
        traps=traps("attention", "emulated bf16", "longest batch"), peak_gib=9.71, fits=True
    ),
    "trl_smollm2_full.yaml": Expected(
        traps=traps("attention", "emulated bf16", "longest batch"), peak_gib=7.56, fits=True
    ),
    "trl_llama2_qlora.py": Expected(traps=traps("emulated bf16", "longest batch"), peak_gib=8.90, fits=True),
    "unsloth_llama32_qlora.py": Expected(traps=traps("bf16 refused", "longest batch"), peak_gib=9.78, fits=True),
}


@pytest.mark.parametrize("name", sorted(path.name for path in PUBLIC.iterdir() if path.suffix != ".md"))
def test_a_public_configuration_is_judged(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it fits, its peak, and exactly the traps that it walks into; all but one fail or crawl on a T4."""
    monkeypatch.setattr(check, "_corrected", lambda *_: (None, None))
    settings = files.read(PUBLIC / name, None, has_bf16=False)
    expected = EXPECTED[name]

    verdict = check.check(settings, load_model(expected.model or names.original(settings.model)), T4)

    assert {finding.trap for finding in verdict.findings} == expected.traps
    assert verdict.fits == expected.fits
    assert verdict.outcome.peak_process_bytes / GIB == pytest.approx(expected.peak_gib, rel=TOLERANCE)


def test_each_has_its_source() -> None:
    """Repository, path, commit and licence."""
    told = (PUBLIC / "SOURCES.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in told for name in EXPECTED)
    assert len(EXPECTED) >= 10
