"""What a trainer's configuration says, in words that all trainers share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Tool = Literal["axolotl", "llamafactory", "trl", "unsloth", "transformers"]
TITLES: dict[Tool, str] = {
    "axolotl": "axolotl",
    "llamafactory": "LLaMA-Factory",
    "trl": "TRL",
    "unsloth": "Unsloth",
    "transformers": "transformers.Trainer",
}
Precision = Literal["fp16", "bf16", "fp32"]
Dtype = Literal["float16", "bfloat16", "float32"]
Stored = Literal["float16", "bfloat16", "float32", "auto"]
Quantized = Literal["none", "int8", "nf4"]
Adapter = Literal["lora", "rslora", "dora", "full"]
Loss = Literal["whole", "tiled", "parts", "fused", "cut"]
Packing = Literal["none", "separate", "leaking"]

DTYPES: dict[Precision, Dtype] = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
WORDS: dict[str, Stored] = {
    "float16": "float16",
    "half": "float16",
    "fp16": "float16",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float32": "float32",
    "float": "float32",
    "fp32": "float32",
    "auto": "auto",
}
"""How files and scripts call dtypes, without ``torch.``."""
NEARLY = 0.9
"""How alike a key must be to one that is read (difflib's ratio): two letters in sixteen may have changed places, and
``per_device_eval_batch_size`` is not ``per_device_train_batch_size``."""
VARLEN = "sdpa_varlen"
"""axolotl's attention over packed rows: PyTorch's ``varlen_attn``, which is FlashAttention."""


_TRUE = ("true", "yes", "on", "auto", "full", "unsloth", "offload", "offload_disk", "legacy", "disk", "hidden_states")
_FALSE = ("false", "no", "off")
"""Words that trainers take for yes and no."""


class ConfigurationError(ValueError):
    """A configuration that cannot be read: one line that says what is wrong, the value, and what would work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One way to train, as a trainer is told it and with what that trainer itself does with it.

    Attributes:
        model: a name on the Hub, or a folder.
        sequence_length: the most tokens of a sequence.
        micro_batch_size, gradient_accumulation_steps: of each GPU.
        quantization, double_quantization: of the frozen base; ``none`` where it is stored as *weights_dtype*.
        weights_dtype: of what is not quantized, as it lies on the GPU; ``auto`` for what the checkpoint has.
        casts_rest: what is not quantized is made fp32 after loading (PEFT's ``prepare_model_for_kbit_training``).
        product_dtype: in which quantized weights are multiplied.
        precision: that autocast multiplies in; fp32 where there is none.
        adapter_dtype: of the adapter's weights.
        rank, alpha: None in full fine-tuning.
        target_modules: names of the modules that have an adapter; empty for all linear ones, None for PEFT's choice.
        trained_whole: names of modules beside the layers that learn whole, such as embeddings.
        recomputes: whether every layer is computed again in its backward pass.
        attention: as transformers calls it.
        loss: the logits whole; tile by tile, computed again in the backward pass (TRL); in parts (Unsloth); in parts
            whose gradients are formed in the forward pass (Liger); or never held, by Triton's products (cut
            cross-entropy).
        packing: several documents to a sequence, kept apart or not.
        shards: the key by which FSDP or DeepSpeed is asked for, or nothing.
        longest_first: whether the longest batch comes in the first step.
        optimizer: as the tool calls it.
        initial_scale: of an fp16 loss.
        kernels: of Triton's, with products, that were asked for by name.
        resumes_blindly: whether the newest checkpoint is taken for whole.
        keys: by a field's name, what the tool calls it, for messages.
        values: by a field's name, what the file says there.
        ignored: keys of the file that decide nothing about memory and time here.
        misspelled: of those, by each that is nearly one that does, the one that it is nearly.
        inert: what the file asks for and the tool itself does not do, in sentences.
    """

    tool: Tool
    model: str
    sequence_length: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    num_gpus: int = 1
    quantization: Quantized = "none"
    double_quantization: bool = False
    weights_dtype: Stored = "float16"
    casts_rest: bool = False
    product_dtype: Dtype = "float16"
    precision: Precision = "fp16"
    adapter: Adapter = "lora"
    adapter_dtype: Dtype = "float32"
    rank: int | None = 16
    alpha: int | None = 32
    dropout: float = 0.0
    target_modules: tuple[str, ...] | None = ()
    trained_whole: tuple[str, ...] = ()
    recomputes: bool = True
    attention: str = "sdpa"
    loss: Loss = "whole"
    packing: Packing = "none"
    shards: str = ""
    longest_first: bool = False
    optimizer: str = "adamw_torch"
    learning_rate: float = 2e-4
    initial_scale: float = 65536.0
    kernels: tuple[str, ...] = ()
    resumes_blindly: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    misspelled: Mapping[str, str] = field(default_factory=dict)
    inert: tuple[str, ...] = ()

    @property
    def in_8_bits(self) -> bool:
        """Whether the optimizer keeps its moments in 8 bits."""
        return "8bit" in self.optimizer

    @property
    def multiplied(self) -> Stored:
        """What weights that are not quantized are multiplied in."""
        return self.weights_dtype if self.precision == "fp32" else DTYPES[self.precision]

    @property
    def is_flattened(self) -> bool:
        """Whether a micro-batch is one row of all its documents, as TRL packs (its ``padding_free``)."""
        return self.tool in ("trl", "unsloth") and self.packing == "separate"

    @property
    def is_masked(self) -> bool:
        """Whether attention is given a mask even where a row is full: the one that keeps documents apart.

        LLaMA-Factory makes one for every batch; transformers makes one where a row has more than one document.
        """
        if self.packing != "separate" or self.tool == "unsloth" or is_any(self.attention, ("flash", "flex", VARLEN)):
            return False
        return self.tool == "llamafactory" or (self.is_flattened and self.micro_batch_size > 1)

    def key(self, name: str) -> str:
        """What the tool calls the field *name*."""
        return self.keys.get(name, name)

    def is_said(self, name: str) -> bool:
        """Whether the file says anything of the field *name*."""
        return name in self.values

    def said(self, name: str) -> str:
        """``key: value`` as it stands in the file, or that it is not there."""
        if name in self.values:
            return f"{self.key(name)}: {self.values[name]}"
        return f"{self.key(name)} (not given)"


class Entries:
    """The entries of a tool's file: each is asked for by name, checked, and remembered as read.

    Raises:
        ConfigurationError: an entry is not of the type that it has to be.
    """

    def __init__(self, entries: Mapping[str, Any], where: str) -> None:
        self._entries = entries
        self._where = where
        self._read: set[str] = set()
        self.values: dict[str, str] = {}
        self.keys: dict[str, str] = {}

    def _named(self, key: str, name: str | None) -> Any:
        self._read.add(key)
        found = self._entries.get(key)
        if name is not None:
            self.keys.setdefault(name, key)
            if key in self._entries:
                self.keys[name] = key
                self.values[name] = _shown(found)
        return found

    def name(self, name: str, key: str) -> None:
        """Say that the entry *key* decides the field *name*."""
        self._read.add(key)
        self.keys[name] = key
        self.values.pop(name, None)
        if key in self._entries:
            self.values[name] = _shown(self._entries[key])

    def whole(self, key: str, default: int | None = None, name: str | None = None, *, least: int = 1) -> int:
        """A whole number of at least *least*; without a *default* it has to be there."""
        found = self._named(key, name)
        if found is None and default is not None:
            return default
        if isinstance(found, str) and found.strip().isdecimal() and len(found) < 20:
            found = int(found)
        if isinstance(found, float) and found.is_integer():
            found = int(found)
        if isinstance(found, bool) or not isinstance(found, int) or not least <= found <= 2**31:
            raise self._wrong(key, found, f"a whole number of at least {least}")
        return found

    def number(self, key: str, default: float, name: str | None = None) -> float:
        """A number of at least 0."""
        found = self._named(key, name)
        if found is None:
            return default
        try:
            value = float(found)
        except (TypeError, ValueError):
            value = -1.0
        if isinstance(found, bool) or not 0 <= value < float("inf"):
            raise self._wrong(key, found, "a number of at least 0, such as 2e-4")
        return value

    def flag(self, key: str, name: str | None = None, *, default: bool = False) -> bool:
        """True or false."""
        found = self._named(key, name)
        if found is None:
            return default
        if isinstance(found, str) and found.lower() in (*_TRUE, *_FALSE):
            return found.lower() in _TRUE
        if not isinstance(found, bool) and not (isinstance(found, int) and found in (0, 1)):
            raise self._wrong(key, found, "true or false")
        return bool(found)

    def text(self, key: str, default: str = "", name: str | None = None) -> str:
        """A word."""
        found = self._named(key, name)
        if found is None:
            return default
        if not isinstance(found, (str, int, float)) or isinstance(found, bool):
            raise self._wrong(key, found, "a word")
        return str(found)

    def model(self, key: str) -> str:
        """A model's name, which a number is not, though YAML may make one of it."""
        found = self.text(key)
        if not isinstance(self._entries.get(key, ""), str):
            raise self._wrong(key, found, "a model's name, such as meta-llama/Llama-3.1-8B")
        return found

    def names(self, key: str, name: str | None = None) -> tuple[str, ...]:
        """Names: a list, or one text with commas between them."""
        found = self._named(key, name)
        if found is None:
            return ()
        listed = [part.strip() for part in found.split(",")] if isinstance(found, str) else found
        if isinstance(found, Mapping):
            listed = list(found)
        if not isinstance(listed, list | tuple) or not all(isinstance(one, str) for one in listed):
            raise self._wrong(key, found, "a list of names")
        return tuple(one for one in listed if one)

    def table(self, key: str) -> Mapping[str, Any]:
        """Entries within an entry."""
        found = self._named(key, None)
        if found is None:
            return {}
        if not isinstance(found, Mapping):
            raise self._wrong(key, found, "entries of its own")
        return found

    def has(self, *keys: str) -> str | None:
        """The first of *keys* that is there and not false."""
        self._read.update(keys)
        return next((key for key in keys if self._entries.get(key)), None)

    def unread(self) -> tuple[str, ...]:
        """Keys that nobody asked for."""
        return tuple(key for key in self._entries if key not in self._read)

    def misspelled(self) -> dict[str, str]:
        """By each key that nobody asked for and is nearly one that was asked for and is not there, that one."""
        missing = sorted(self._read - self._entries.keys())
        near = {key: difflib.get_close_matches(str(key), missing, n=1, cutoff=NEARLY) for key in self.unread()}
        return {key: found[0] for key, found in near.items() if found}

    def _wrong(self, key: str, found: Any, wanted: str) -> ConfigurationError:
        if found is None:
            return ConfigurationError(f"{self._where} has no {key}; give {wanted}")
        return ConfigurationError(f"{self._where}: {key} is {_shown(found)}; give {wanted}")


def _shown(value: Any) -> str:
    """*value* as a file has it, on one line and not for ever."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(str(one) for one in value)}]"[:100]
    return " ".join(str(value).split())[:100]


def is_any(text: str, words: Iterable[str]) -> bool:
    """Whether one of *words* is in *text*."""
    return any(word in text for word in words)


def dtype_of(word: Any, otherwise: Stored) -> Stored:
    """What a file calls a dtype, or *otherwise* where that is nothing known."""
    return WORDS.get(str(word).removeprefix("torch."), otherwise)
