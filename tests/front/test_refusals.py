"""Whatever is wrong with a request for a plan, the answer is exit code 2 and one clear line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shallowflow
from tests.front.shell import SMALL, sfplan


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["Lama-3.1-8B"], ["unknown model 'Lama-3.1-8B'", "'meta-llama/Llama-3.1-8B'"]),
        (["some/model-that-nobody-has"], ["unknown model", "The Hub could not be reached"]),
        (["./nowhere"], ["nowhere", "no such file"]),
        (["SmolLM2-135M", "--gpu", "t5"], ["unknown GPU 't5'", "'t4'"]),
        (["SmolLM2-135M", "--gpu", "quantum"], ["unknown GPU 'quantum'", "known: ", "l4"]),
        (["SmolLM2-135M", "--sequence-length", "8193"], ["8193", "--sequence-length 8192"]),
        (["SmolLM2-135M", "--rank", "577"], ["rank 577", "576"]),
        (["SmolLM2-135M", "--gpus", "3", "--stages", "1"], ["does not divide over 3", "--global-batch-size 18"]),
        (["SmolLM2-135M", "--gpus", "4", "--stages", "3"], ["4 GPUs cannot hold 3 stages", "--stages 2 or --gpus 3"]),
        (["SmolLM2-135M", "--gpus", "32", "--stages", "32"], ["has 30 layers", "--stages 30"]),
        (
            ["SmolLM2-135M", "--gpus", "8", "--stages", "4", "--global-batch-size", "6"],
            ["fewer micro-batches than 4 stages", "--global-batch-size 8"],
        ),
        (["gpt2", "--gpus", "2", "--stages", "2"], ["gpt2", "cannot be cut into stages", "--stages 1"]),
        (
            ["SmolLM2-135M", "--gpus", "2", "--stages", "2", "--adapter", "full"],
            ["--adapter full is not planned for models in stages", "--stages 1"],
        ),
        (
            ["SmolLM2-135M", "--gpus", "2", "--stages", "2", "--sharding", "weights"],
            ["--sharding weights is not planned for models in stages", "--stages 1"],
        ),
        (
            ["SmolLM2-135M", "--target-modules", "q_prj,v_proj"],
            ["'q_prj'", "down_proj, gate_proj, k_proj"],
        ),
        (["SmolLM2-135M", "--target-modules", "q_proj,,v_proj"], ["'' names no module", "such as q_proj,v_proj"]),
        (["SmolLM2-135M", "--target-modules", "q_proj,attention"], ["attention stands alone", "by itself"]),
        (["gemma-3-1b-pt"], ["overflows in fp16", "--gpu l4"]),
        (["SmolLM2-135M", "--region", "atlantis-1"], ["atlantis-1", "us-east-1"]),
        (["SmolLM2-135M", "--rank", "8", "--min-rank", "32"], ["--rank 8 is less than --min-rank 32"]),
        *(
            (["SmolLM2-135M", option, "9" * 23], [f"'{option}'", "not in the range 1<=x<=1024"])
            for option in ("--gpus", "--nodes", "--stages")
        ),
        *(
            (["SmolLM2-135M", option, number], [f"'{option}'", f"{number} is no number"])
            for option in ("--max-process-gib", "--deadline-hours", "--budget-usd")
            for number in ("nan", "inf")
        ),
        (["SmolLM2-135M", "--headroom", "nan"], ["'--headroom'", "nan is no number"]),
        (["SmolLM2-135M", "--max-weight-error", "nan"], ["'--max-weight-error'", "nan is no number"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_a_bad_request_is_told_in_one_line(words: list[str], told: list[str]) -> None:
    """Exit code 2, and one line with what is wrong and what would work."""
    done = sfplan(*words)

    assert done.code == 2
    assert all(part in done.error() for part in told), done.errors


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["SmolLM2-135M", "--bogus"], "No such option"),
        (["train", "--bogus"], "No such option"),
        (["SmolLM2-135M", "Llama-3.1-8B"], "unexpected extra argument"),
        (["SmolLM2-135M", "--quantization", "fp4"], "'fp4' is not one of 'any', 'fp16', 'int8', 'nf4'"),
        (["SmolLM2-135M", "--tokens", "many"], "'many' is not a whole number"),
        (["SmolLM2-135M", "--gpus", "0"], "0 is not in the range"),
        (["SmolLM2-135M", "--sequence-length", "1"], "1 is not in the range"),
        (["trian", "plan.json"], "there is no command 'trian'; did you mean 'train'?"),
        (["train"], "Missing argument"),
        (["train", "plan.json", "--output", "run"], "Missing option '--data'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_a_bad_option_is_told_in_one_line(words: list[str], told: str) -> None:
    """Exit code 2, what is wrong, and where the options stand."""
    done = sfplan(*words)

    assert done.code == 2
    assert told in done.error() and done.error().endswith(" --help")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--quantization", "int8", "--fix", "double_quantization=true"], "try --quantization nf4"),
        (["--gpu", "cpu", "--fix", "activations=offload"], "try --fix activations=recompute"),
        (["--rank", 16, "--fix", "rank=8"], "--fix rank=8 contradicts the option of that name, 16"),
        (["--quantization", "nf4", "--fix", "quantization=int8"], "contradicts the option of that name, nf4"),
        (["--adapter", "full", "--rank", 16], "rank is 16, and adapter is full: every weight learns"),
        (["--adapter", "full", "--min-rank", 32], "min_rank is 32, and adapter is full"),
        (["--adapter", "full", "--target-modules", "attention"], "leave it out, or give --adapter lora"),
        (["--adapter", "full", "--quantization", "nf4"], "quantization is nf4, and adapter is full"),
        (["--adapter", "full", "--fix", "double_quantization=true"], "double_quantization is True, and adapter is"),
    ],
)
def test_contradictions_are_told(words: list[object], told: str, tiny_folder: Path) -> None:
    """What no layer can be given, and what is asked for twice, is bad input."""
    done = sfplan(tiny_folder, *words)

    assert done.code == 2 and told in done.error()


def test_what_headroom_leaves_may_be_too_little(tiny_folder: Path) -> None:
    """The refusal speaks of the share left free, and offers one that fits."""
    done = sfplan(tiny_folder, *SMALL, "--headroom", 0.9999)

    (said, _, remedy, *_) = done.errors.splitlines()
    assert done.code == 1 and "100.0% of it left free" in said
    assert sfplan(tiny_folder, *SMALL, *remedy.split()[:2]).code == 0


def test_work_too_large_to_count_is_refused(tiny_folder: Path) -> None:
    """A global batch beyond any training is answered at once, not searched for ever."""
    done = sfplan(tiny_folder, *SMALL, "--global-batch-size", 10**15)

    assert done.code == 2
    assert "--global-batch-size" in done.errors.splitlines()[-1]


def test_work_is_measured_in_one_way(tiny_folder: Path, data: Path) -> None:
    """Tokens and data together contradict each other."""
    assert "the size is given twice" in sfplan(tiny_folder, "--tokens", 5, "--data", data).error()


@pytest.mark.parametrize("content", [None, "", '{"body": "no text"}'], ids=["missing", "empty", "columns"])
def test_bad_data_stops_a_plan(tiny_folder: Path, tmp_path: Path, content: str | None) -> None:
    """The size of the work cannot come from a file that cannot be learned."""
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")

    done = sfplan(tiny_folder, "--data", path)

    assert done.code == 2
    assert str(path) in done.error()


def test_a_folder_for_the_plan_must_exist(tiny_folder: Path, tmp_path: Path) -> None:
    """Where a plan cannot be written, that is said before it is made."""
    done = sfplan(tiny_folder, "--output", tmp_path / "missing" / "plan.json")

    assert done.code == 2
    assert str(tmp_path / "missing") in done.error()
    assert sfplan(tiny_folder, *SMALL, "--output", tmp_path).code == 2


def test_a_full_disk_is_told_in_one_line(tiny_folder: Path) -> None:
    """A plan that cannot be written ends in one line, not in a traceback."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no device that is always full")

    done = sfplan(tiny_folder, *SMALL, "--output", full)

    assert done.code == 2
    assert str(full) in done.error()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"model_type": "llama"}', "\0", "{" * 10_000])
def test_a_broken_config_is_told(tmp_path: Path, content: str) -> None:
    """A config.json that is none, or lacks its sizes, is refused by its path."""
    path = tmp_path / "config.json"
    path.write_text(content, encoding="utf-8")

    for given in (path, tmp_path):
        done = sfplan(given)
        assert done.code == 2
        assert str(path) in done.error()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "is not a causal language model"),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "is not a causal language model"),
        ({"architectures": None, "model_type": "clip"}, "causal language model"),
        ({"model_type": "made_up"}, "knows no such model_type"),
        ({"num_key_value_heads": 3}, "not divisible"),
        ({"hidden_size": 66, "head_dim": 16}, "66"),
        ({"hidden_size": 10**9}, "beyond any model"),
        ({"num_hidden_layers": 0}, "not a positive whole number"),
        ({"num_hidden_layers": 4, "layer_types": ["full_attention"] * 3}, "layer_types has 3"),
        ({"hidden_act": "made_up"}, "knows no hidden_act 'made_up'"),
        ({"architectures": None, "model_type": "bert"}, '"bert" is an encoder'),
        ({"max_position_embeddings": "many"}, "max_position_embeddings"),
        ({"rope_parameters": {"rope_type": "made_up"}}, "made_up"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_config_that_lies_is_told(folder: Callable[..., Path], changes: dict[str, Any], told: str) -> None:
    """What is no causal language model, or contradicts itself, is refused with the value that is wrong."""
    done = sfplan(folder(**changes), *SMALL)

    assert done.code == 2
    assert told in done.error()


def test_a_device_that_is_not_there_is_not_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, exit code 2, and what would work."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    done = sfplan("calibrate", "--device", "cuda")

    assert done.code == 2
    assert done.error() == "this machine has no CUDA device; try --device cpu"


@pytest.mark.parametrize("option", ["--output", "--report"])
def test_nothing_that_is_read_is_written_over(option: str, folder: Callable[..., Path], tmp_path: Path) -> None:
    """Neither data, nor held-out text, nor the model's own configuration, nor what another option writes."""
    model, data, held = folder(), tmp_path / "data.html", tmp_path / "held.html"
    for file in (data, held):
        file.write_text("the cat sat on the mat", encoding="utf-8")
    other = "--report" if option == "--output" else "--output"
    before = {path: path.read_bytes() for path in (model / "config.json", data, held)}
    page = model.rename(tmp_path / "model.html")  # as a report's name must end so
    before = {page / "config.json" if path.name == "config.json" else path: told for path, told in before.items()}

    for words in (
        [page, *SMALL, "--data", data, option, data],
        [page, *SMALL, "--eval-data", held, option, held],
        [page, *SMALL, option, tmp_path / "one.html", other, tmp_path / "one.html"],
        [page, *SMALL, option, page],
    ):
        done = sfplan(*words)
        assert done.code == 2 and ("another name" in done.error() or "is a directory" in done.error()), done

    assert sfplan(page / "config.json", *SMALL, "--output", page / "config.json").code == 2
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"data": 123}, "data is int; give the path of a file"),
        ({"eval_data": ["held.jsonl"]}, "eval_data is list; give the path of a file"),
        ({"data": "d.jsonl", "data_format": "zzz"}, "data_format is 'zzz'; give one of messages,"),
        ({"data": "d.jsonl", "total_tokens": 5}, "the size is given twice"),
        ({"gpu": None}, "unknown GPU 'None'"),
        ({"num_gpus": 10**24}, "num_gpus"),
    ],
)
def test_a_bad_argument_is_told_in_one_line(given: dict[str, Any], told: str) -> None:
    """In Python too, as one of the exceptions that the function names."""
    with pytest.raises((shallowflow.RequestError, shallowflow.FactsError)) as raised:
        shallowflow.plan(**{"model": "SmolLM2-135M", "gpu": "t4", **given})

    assert told in str(raised.value) and "\n" not in str(raised.value)
