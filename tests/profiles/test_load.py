"""The shipped facts load whole, names are forgiven, and what is broken is told in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallowflow.profiles.load import (
    BYTE_COUNTS,
    RATES,
    BadFacts,
    FactsError,
    UnknownName,
    gpu_names,
    instance_names,
    load_gpu,
    load_instance,
    load_instances,
    load_model,
    load_storage,
    model_names,
)
from shallowflow.profiles.specs import Trust
from tests.profiles.configs import LLAMA, one_line

MIB = 2**20


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as a user keeps a model in."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    return tmp_path / "mine"


@pytest.mark.parametrize("name", gpu_names())
def test_every_number_of_a_gpu_has_a_source(name: str) -> None:
    """Nothing is stated without saying where it comes from and how far to trust it."""
    gpu = load_gpu(name)

    assert gpu.name == name
    assert set(gpu.sources) == {*BYTE_COUNTS, *RATES}
    assert all(len(source.text) > 10 and source.trust in get_args(Trust) for source in gpu.sources.values())


@pytest.mark.parametrize("name", gpu_names())
def test_the_numbers_of_a_gpu_are_plausible(name: str) -> None:
    """A slipped exponent would show: rates are positive, the context is small, matrix products outrun memory."""
    gpu = load_gpu(name)

    assert 0 <= gpu.context_bytes + 2 * gpu.cublas_workspace_bytes < gpu.memory_bytes / 10
    assert all(getattr(gpu, key) > 0 for key in RATES if key.endswith("_per_second"))
    assert min(gpu.kernel_launch_seconds, gpu.quantized_launch_seconds) >= 0
    assert gpu.fp32_flops_per_second > gpu.dram_bytes_per_second >= gpu.pcie_bytes_per_second
    assert 1e-7 < gpu.kernel_gap_seconds + gpu.kernel_launch_seconds < 1e-4
    assert 0 < gpu.step_error < 2
    assert (gpu.device_type == "cpu") == (gpu.compute_capability is None)


def test_the_t4_is_as_measured() -> None:
    """14912 MiB in all, 140.875 MiB of it for the context, and two workspaces of 8.125 MiB."""
    t4 = load_gpu("t4")

    assert t4.memory_bytes == 14912 * MIB
    assert t4.context_bytes == 140.875 * MIB
    assert t4.cublas_workspace_bytes == 8.125 * MIB
    assert t4.compute_capability == (7, 5)
    assert t4.compute_dtype == "float16"
    assert t4.bf16_flops_per_second < t4.fp32_flops_per_second < t4.fp16_flops_per_second


@pytest.mark.parametrize("name", [name for name in gpu_names() if name != "cpu"])
def test_the_workspace_follows_the_generation(name: str) -> None:
    """PyTorch gives 32 MiB to Hopper and 8.125 MiB to what came before."""
    gpu = load_gpu(name)

    assert gpu.compute_capability is not None
    assert gpu.cublas_workspace_bytes == (32 if gpu.compute_capability >= (9, 0) else 8.125) * MIB


def test_the_cpu_has_the_memory_of_its_host() -> None:
    """The file holds no memory size, because every host has another."""
    psutil = pytest.importorskip("psutil")

    assert load_gpu("cpu").memory_bytes == pytest.approx(psutil.virtual_memory().total, rel=0.01)
    assert load_gpu("cpu").compute_dtype == "float32"


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("T4", "t4"),
        ("Tesla T4", "t4"),
        ("a100", "a100-40gb"),
        ("A100_80GB", "a100-80gb"),
        ("rtx-3090", "rtx3090"),
        ("3090", "rtx3090"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("Tesla V100-SXM2-16GB", "v100"),
    ],
)
def test_gpu_names_are_forgiven(typed: str, name: str) -> None:
    """Case, punctuation, makers' names and what torch calls the card all lead to it."""
    assert load_gpu(typed).name == name


def test_no_two_gpus_answer_to_one_name() -> None:
    """Every alias leads to its own card."""
    gpus = [load_gpu(name) for name in gpu_names()]

    assert all(load_gpu(alias).name == gpu.name for gpu in gpus for alias in (gpu.name, *gpu.aliases))
    assert all(alias == alias.lower() for gpu in gpus for alias in gpu.aliases)


def test_a_mistyped_gpu_is_guessed() -> None:
    """A near name is offered, and all names where none is near."""
    with pytest.raises(UnknownName, match="unknown GPU 'tt4'; did you mean 't4'"):
        load_gpu("tt4")
    with pytest.raises(UnknownName) as caught:
        load_gpu("???")
    assert all(name in one_line(caught.value) for name in gpu_names())


def test_every_instance_is_complete() -> None:
    """Each holds a GPU we know, and every price says when and where it was seen."""
    assert len(load_instances()) == len(set(instance_names())) > 10
    for instance in load_instances():
        assert load_gpu(instance.gpu).name == instance.gpu
        assert min(instance.num_gpus, instance.num_vcpus, instance.ram_bytes, instance.disk_bytes_per_second) > 0
        assert instance.prices and len({price.region for price in instance.prices}) == len(instance.prices)
        for price in instance.prices:
            assert price.date and price.source
            assert (price.spot_usd_per_hour or 0) < price.on_demand_usd_per_hour
            assert price.interruption_bucket in {None, "<5%", "5-10%", "10-15%", "15-20%", ">20%"}


def test_g4dn_xlarge_is_as_aws_states_it() -> None:
    """The small T4 machine: 4 vCPUs, 16 GiB, 125 GB of NVMe, a sustained 118.75 MB/s from disk."""
    instance = load_instance("G4dn.xlarge")
    prices = {price.region: price for price in instance.prices}

    assert (instance.gpu, instance.num_gpus, instance.num_vcpus) == ("t4", 1, 4)
    assert (instance.ram_bytes, instance.nvme_bytes) == (16 * 2**30, 125 * 10**9)
    assert (instance.network_bits_per_second, instance.disk_bytes_per_second) == (5e9, 118.75e6)
    assert prices["us-east-1"].on_demand_usd_per_hour == 0.526
    assert prices["us-east-1"].spot_usd_per_hour == 0.202


def test_storage_has_its_prices_dates_and_sources() -> None:
    """A bucket's price in every region with instances; a disk's where one could be sourced; all of them plausible."""
    storage = load_storage()
    regions = {price.region for instance in load_instances() for price in instance.prices}

    assert set(storage.bucket.usd_per_gb_month) == regions
    assert {"us-east-1", "us-west-2", "eu-west-1"} <= set(storage.volume.usd_per_gb_month) <= regions
    for kind, least, most in ((storage.bucket, 0.02, 0.05), (storage.volume, 0.07, 0.15)):
        assert kind.date and kind.source
        assert all(least < price < most for price in kind.usd_per_gb_month.values())


def test_broken_storage_prices_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One line with the file, for a price that is none, and for a provider without a file."""
    (tmp_path / "storage").mkdir()
    rows = 'name = "disk"\ndate = "today"\nsource = "a list"\nprices = [{ region = "here", usd_per_gb_month = -1 }]\n'
    (tmp_path / "storage" / "mine.toml").write_text(
        f'cloud = "mine"\n[volume]\n{rows}[bucket]\n{rows}', encoding="utf-8"
    )
    monkeypatch.setattr("shallowflow.profiles.load.FACTS", tmp_path)

    for cloud in ("mine", "nobody"):
        with pytest.raises(BadFacts, match=f"{cloud}.toml") as caught:
            load_storage(cloud)
        assert one_line(caught.value)


def test_instances_are_found_by_gpu() -> None:
    """Asking for a card by any of its names gives its machines and no others."""
    assert {instance.gpu for instance in load_instances("Tesla T4")} == {"t4"}
    assert load_instances("rtx3090") == ()
    with pytest.raises(UnknownName, match=r"did you mean 'g4dn\.xlarge'"):
        load_instance("g4dn.xlarg")
    with pytest.raises(UnknownName):
        load_instances("tt4")


@pytest.mark.parametrize("name", model_names())
def test_every_shipped_model_loads(name: str) -> None:
    """Its configuration is sound, and its count of parameters says where it was published."""
    model = load_model(name)

    assert model.name == name
    assert model.num_parameters is None or (model.num_parameters > 0 and model.num_parameters_source)


@pytest.mark.parametrize(
    "typed", ["llama-3.1-8b", "Llama-3.1-8B", "meta-llama/Llama-3.1-8B", "META-LLAMA/llama_3.1 8b"]
)
def test_model_names_are_forgiven(typed: str) -> None:
    """Case may differ and the organisation may be missing."""
    assert load_model(typed).name == "meta-llama/Llama-3.1-8B"


def test_another_organisation_is_another_model() -> None:
    """A copy under another name may differ, so it is offered and never silently taken."""
    with pytest.raises(UnknownName, match=r"did you mean 'meta-llama/Llama-3\.1-8B'"):
        load_model("unsloth/Llama-3.1-8B")


def test_an_ambiguous_model_is_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare name that two organisations use names both, in the same order every time."""
    monkeypatch.setattr("shallowflow.profiles.load.model_names", lambda: ["a/tiny", "b/Tiny"])

    with pytest.raises(UnknownName, match=r"'tiny' names several models: 'a/tiny', 'b/Tiny'; name one"):
        load_model("tiny")


def test_a_model_of_ones_own_is_read_from_its_folder(folder: Path) -> None:
    """The folder, its config.json, and a differently named file all work, and give no count of parameters."""
    (folder / "other.json").write_text(json.dumps(LLAMA), encoding="utf-8-sig")

    assert load_model(str(folder)).name == load_model(str(folder / "config.json")).name == "mine"
    assert load_model(str(folder / "other.json")) == replace(load_model(str(folder)), name="other")
    assert load_model(str(folder)).num_parameters is None


def test_a_relative_folder_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the working directory counts, with and without ./ before it."""
    monkeypatch.chdir(folder.parent)

    assert load_model("mine").name == load_model("./mine").name == "mine"
    monkeypatch.chdir(folder)
    assert load_model(".").name == "mine"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"model_type": "llama",\n  "hidden_size": }', "not JSON: Expecting value at line 2, column 18"),
        (b"", "not JSON: Expecting value at line 1, column 1"),
        (b'{"model_type": "\xff"}', "not UTF-8 text (byte 16)"),
        (b"[" * 200_000, "nested too deeply"),
        (b"1" * 5_000, "a number in it is too long"),
        (b" " * 10_000_001, "10,000,001 bytes is too large"),
        (b'["llama"]', 'a configuration is a JSON object ({...}), not ["llama"]'),
    ],
    ids=["broken", "empty", "latin", "deep", "long-number", "large", "list"],
)
def test_a_broken_file_is_told_in_one_line(folder: Path, content: bytes, told: str) -> None:
    """The message names the file, the place and what is wrong there."""
    (folder / "config.json").write_bytes(content)

    with pytest.raises(BadFacts) as caught:
        load_model(str(folder))
    assert one_line(caught.value).startswith(f"{folder / 'config.json'}: ")
    assert told in str(caught.value)


def test_a_missing_file_is_told_in_one_line(folder: Path) -> None:
    """A path that leads nowhere, and a folder without a configuration."""
    (folder / "empty").mkdir()

    with pytest.raises(BadFacts, match=r"nowhere\.json: no such file"):
        load_model(str(folder / "nowhere.json"))
    with pytest.raises(BadFacts, match=r"empty: this folder holds no config\.json"):
        load_model(str(folder / "empty"))


@given(NAMES)
def test_any_name_is_answered(name: str) -> None:
    """Whatever is typed, the answer is facts or one line."""
    for load in (load_gpu, load_instance, load_model):
        try:
            load(name)
        except FactsError as error:
            one_line(error)


def test_reading_facts_needs_no_heavy_library() -> None:
    """A plan starts at once, because the facts import neither torch nor numpy nor transformers."""
    code = (
        "import sys, shallowflow.profiles as p; p.load_gpu('t4'); p.load_instances(); p.model_names(); "
        "print(*sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.split() == []
