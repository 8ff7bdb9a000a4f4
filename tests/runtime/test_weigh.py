"""What formats do to a model's own weights: by the code that trains with them, a matrix at a time, kept by content."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from shallowflow.planner.weighed import LayerErrors
from shallowflow.profiles import ModelSpec, load_model
from shallowflow.runtime import build, quantized, stored, weigh
from shallowflow.runtime.sources import WeightsError, weights_at_hand
from shallowflow.runtime.weighed import recorded
from shallowflow.runtime.weights import load_weights
from tests.planner.tiny import GPT2
from tests.runtime import tiny


@pytest.fixture(autouse=True)
def _no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was weighed before."""
    monkeypatch.setenv("SHALLOWFLOW_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tiny model, with weights that may be changed."""
    return tiny.save(tmp_path / "tiny")


def errors_as_trained(model: Any, layer: int) -> LayerErrors:
    """By the modules that a run would train with: their weights beside those they were made from."""
    plain = [m for m in build.decoder_layers(model)[layer].modules() if quantized.is_linear(m)]
    weights = [quantized.weight_of(m, torch.float32).clone() for m in plain]
    found = []
    for name, twice in (("int8", False), ("nf4", False), ("nf4", True)):
        made = [quantized._quantize(m, name, torch.float32, twice) for m in plain]  # type: ignore[arg-type]
        for module in made:
            if name == "int8":
                module.init_8bit_state()  # type: ignore[operator]
        again = [quantized.weight_of(m, torch.float32) for m in made]
        lost = sum(float((a - w).double().square().sum()) for a, w in zip(again, weights, strict=True))
        found.append((lost / sum(float(w.double().square().sum()) for w in weights)) ** 0.5)
    return LayerErrors(int8=found[0], nf4=found[1], double_quantized=found[2])


@pytest.mark.parametrize("config", [tiny.CONFIG, GPT2], ids=["llama", "gpt2"])
def test_the_errors_are_those_of_the_modules_that_train(config: dict[str, Any], tmp_path: Path) -> None:
    """Layer by layer what quantizing the loaded model changes, transposed matrices and a missing prefix included."""
    folder = tiny.save(tmp_path / "model", config)
    if config is GPT2:  # as it is published: the decoder's names alone
        tensors = load_file(folder / "model.safetensors")
        bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        save_file(bare, folder / "model.safetensors", {"format": "pt"})
    model = load_model(str(folder))

    found = weigh.weigh(model)

    loaded = load_weights(weights_at_hand(model), model.config, "float32", build.count_parameters(model.config))
    assert len(found.layers) == len(build.decoder_layers(loaded))
    for number, layer in enumerate(found.layers):
        trained = errors_as_trained(loaded, number)
        for name in ("int8", "nf4", "double_quantized"):
            assert getattr(layer, name) == pytest.approx(getattr(trained, name), rel=1e-6)
        assert 0 < layer.int8 < layer.nf4 <= layer.double_quantized * 1.01


def test_one_matrix_is_held_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a tensor is read, the one read before it is gone."""
    reading = stored.reading
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def watched(*arguments: Any) -> Callable[[str], torch.Tensor]:
        read = reading(*arguments)

        def counted(name: str) -> torch.Tensor:
            nonlocal most
            most = max(most, sum(there() is not None for there in alive))
            tensor = read(name)
            alive.append(weakref.ref(tensor))
            return tensor

        return counted

    monkeypatch.setattr(weigh, "reading", watched)

    weigh.weigh(load_model(str(folder)))

    assert len(alive) >= 7 * tiny.NUM_LAYERS
    assert most <= 1


def test_what_was_interrupted_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that were done are not stored again, and the errors are those of a call in one go."""
    model, measured = load_model(str(folder)), []
    errors = weigh._errors

    def counting(*arguments: Any) -> LayerErrors:
        measured.append(arguments)
        return errors(*arguments)

    def interrupt(done: int, _all: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(weigh, "_errors", counting)
    with pytest.raises(KeyboardInterrupt):
        weigh.weigh(model, progress=interrupt)
    assert len(measured) == 2 and recorded(model) is None

    found = weigh.weigh(model)

    assert len(measured) == tiny.NUM_LAYERS
    assert recorded(model) == found
    shutil.rmtree(Path(folder).parent / "cache")
    assert weigh.weigh(model) == found


def test_the_same_weights_elsewhere_are_known(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the folder is weighed by its content alone; of changed weights, the changed layer is measured."""
    found = weigh.weigh(load_model(str(folder)))
    copy = shutil.copytree(folder, folder.parent / "copy")
    measured, errors = [], weigh._errors

    def counting(*arguments: Any) -> LayerErrors:
        measured.append(arguments)
        return errors(*arguments)

    monkeypatch.setattr(weigh, "_errors", counting)

    assert weigh.weigh(load_model(str(copy))) == found
    assert measured == []

    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1.0
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    assert recorded(load_model(str(copy))) is None
    changed = weigh.weigh(load_model(str(copy)))

    assert len(measured) == 1
    assert [a == b for a, b in zip(changed.layers, found.layers, strict=True)] == [True, False, True]
    assert changed.digest != found.digest
    assert recorded(load_model(str(copy))) == changed
    assert recorded(load_model(str(folder))) == found


def test_weights_that_are_gone_are_not_spoken_of(folder: Path) -> None:
    """What was measured holds for as long as its files are what they were."""
    model = load_model(str(folder))
    weigh.weigh(model)

    (folder / "model.safetensors").rename(folder / "other.safetensors")

    assert recorded(model) is None


def test_weights_may_be_given(folder: Path) -> None:
    """Errors of weights that lie elsewhere are kept for the model that they were given for."""
    model = ModelSpec(name="someone/tiny", config=tiny.CONFIG)

    found = weigh.weigh(model, folder)

    assert recorded(model) == found
    assert recorded(ModelSpec(name="someone/other", config=tiny.CONFIG)) is None


@pytest.mark.parametrize("change", ["missing", "broken", "another size", "not there", "no numbers"])
def test_weights_that_cannot_be_weighed_are_told(folder: Path, change: str) -> None:
    """One line that names the weights and what would work."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    config = dict(tiny.CONFIG)
    said = {
        "missing": "lack model.layers.2.mlp.down_proj.weight",
        "broken": "cannot read",
        "another size": "have hidden_size 64, the plan's model 128",
        "not there": "are not on this machine",
        "no numbers": "holds what is no number",
    }
    if change == "missing":
        del tensors["model.layers.2.mlp.down_proj.weight"]
    if change == "no numbers":
        tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    if change == "broken":
        path.write_bytes(b"no weights")
    if change == "another size":
        config["hidden_size"] = 128
    given = None if change == "not there" else folder

    with pytest.raises(WeightsError) as caught:
        weigh.weigh(ModelSpec(name="someone/tiny", config=config), given)

    (line,) = str(caught.value).splitlines()
    assert said[change] in line
    assert "--weights" in line


def test_gguf_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    """Tensor by tensor what loading the whole file gives, with the rows of queries and keys put back in order."""
    model = tiny.base()
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model)
    spec = ModelSpec(name="someone/tiny", config=tiny.CONFIG)
    source = weights_at_hand(spec, path)

    loaded = load_weights(source, tiny.CONFIG, "float32", build.count_parameters(tiny.CONFIG))
    read = stored.reading(source, build.empty_model(build.transformers_config(tiny.CONFIG), "float32", "meta"))

    for name, tensor in loaded.state_dict().items():
        if ".layers." in name:
            assert torch.equal(read(name), tensor), name
    assert not torch.equal(
        read("model.layers.0.self_attn.q_proj.weight"), model.state_dict()["model.layers.0.self_attn.q_proj.weight"]
    )
    assert len(weigh.weigh(spec, path).layers) == tiny.NUM_LAYERS


def write_gguf(path: Path, model: Any) -> None:
    """The tiny model as llama.cpp would name its tensors, its queries and keys in the model's own order."""
    writer = gguf.GGUFWriter(str(path), "llama")
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        known = names.get_name(name, try_suffixes=(".weight",))
        if known is not None and name != "lm_head.weight":
            writer.add_tensor(known, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
