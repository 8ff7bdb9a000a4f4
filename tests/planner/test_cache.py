"""What was traced is found again by what it depends on, and a cache that fails is done without."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallowflow.planner.costs import StepProfile
from shallowflow.planner.memory_record import TracedPeak
from shallowflow.planner.plan import MemoryPart
from shallowflow.planner.profiler import cache
from shallowflow.planner.strategies import Strategy
from tests.planner import tiny
from tests.strategies import json_values

PEAK = TracedPeak(1, 2, 3, (MemoryPart(category="context", num_bytes=4),), "SDPA")
NESTED = [b"[" * 100_000, b'{"a":' * 100_000]
DAMAGES = pytest.mark.parametrize("damage", [*NESTED, b"", b"{}", b"PK\x03\x04", b"[1, 2", b"\x93NUMPY", b"\xff" * 100])


@pytest.fixture(name="folder", autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHALLOWFLOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def profile() -> StepProfile:
    """Some profile."""
    return tiny.profiled("gpt2", "t4", Strategy(weight_format="fp16", activations="save"))


def test_what_is_written_is_read() -> None:
    """Profiles, peaks and numbers come back as they were, and under no other name."""
    cache.write_profile("a", profile())
    cache.write_peak("b", PEAK)
    cache.write_numbers("c", (12, 3))

    read = cache.read_profile("a")

    assert read is not None
    assert {n: v.tolist() for n, v in read.to_arrays().items()} == {
        n: v.tolist() for n, v in profile().to_arrays().items()
    }
    assert (cache.read_peak("b"), cache.read_numbers("c")) == (PEAK, (12, 3))
    assert (cache.read_profile("b"), cache.read_peak("a"), cache.read_numbers("a")) == (None, None, None)


@DAMAGES
def test_a_damaged_entry_counts_as_none(damage: bytes, folder: Path) -> None:
    """Whatever a file holds, reading it gives the entry or None, and writing it again mends it."""
    folder.mkdir()
    for name in ("a.npz", "b.json"):
        (folder / name).write_bytes(damage)

    found = (cache.read_profile("a"), cache.read_peak("b"), cache.read_numbers("b"))

    assert found == (None, None, None)
    cache.write_profile("a", profile())
    assert cache.read_profile("a") is not None


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.99])
def test_half_a_profile_counts_as_none(kept: float, folder: Path) -> None:
    """An entry cut off at any point is not believed."""
    cache.write_profile("a", profile())
    content = (folder / "a.npz").read_bytes()
    (folder / "a.npz").write_bytes(content[: int(kept * len(content))])

    assert cache.read_profile("a") is None


def test_a_flipped_byte_counts_as_none_or_changes_nothing(folder: Path) -> None:
    """A damaged array is noticed by its checksum, a damaged header by what reads it; nothing is raised."""
    cache.write_profile("a", profile())
    whole = (folder / "a.npz").read_bytes()
    for position in range(0, len(whole), 7):
        content = bytearray(whole)
        content[position] ^= 0xFF
        (folder / "a.npz").write_bytes(content)

        found = cache.read_profile("a")

        assert found is None or found.to_arrays().keys() == profile().to_arrays().keys()


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is a file makes nothing fail."""
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SHALLOWFLOW_CACHE", str(tmp_path / "file"))

    cache.write_numbers("a", (1,))
    cache.write_profile("a", profile())

    assert (cache.read_numbers("a"), cache.read_profile("a")) == (None, None)


def test_nothing_half_written_is_left(folder: Path) -> None:
    """Entries appear whole: no temporary file stays beside them."""
    cache.write_numbers("a", (1,))
    cache.write_numbers("a", (2,))
    cache.write_peak("b", PEAK)

    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "b.json"]


@given(st.dictionaries(st.text(max_size=3), json_values, max_size=3), st.text(max_size=3), json_values)
def test_a_key_follows_from_every_fact(facts: dict[str, object], name: str, value: object) -> None:
    """The same facts in any order have one key; a fact that differs, or another kind of entry, has another."""
    turned = dict(reversed(facts.items()))

    key = cache.key("profile", facts)

    assert cache.key("profile", turned) == key
    assert cache.key("peak", facts) != key
    if name not in facts:
        assert cache.key("profile", {**facts, name: value}) != key
