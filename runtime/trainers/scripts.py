"""Python scripts that train with TRL, Unsloth or ``transformers.Trainer``: what they say, read without running them."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping
from typing import Any, TypeGuard

from . import trl
from .settings import (
    WORDS,
    ConfigurationError,
    Entries,
    Loss,
    Precision,
    Quantized,
    Settings,
    Stored,
    Tool,
    dtype_of,
)

_ARGUMENTS = ("SFTConfig", "TrainingArguments", "UnslothTrainingArguments", "Seq2SeqTrainingArguments")
_TRAINERS = ("SFTTrainer", "Trainer", "UnslothTrainer", "Seq2SeqTrainer")
_OTHERS = ("DPOTrainer", "GRPOTrainer", "KTOTrainer", "ORPOTrainer", "PPOTrainer", "RewardTrainer")
_LOADED = ("AutoModelForCausalLM.from_pretrained", "AutoPeftModelForCausalLM.from_pretrained")
_UNSLOTH = ("FastLanguageModel.from_pretrained", "FastModel.from_pretrained")
_UNSLOTH_ADAPTER = ("FastLanguageModel.get_peft_model", "FastModel.get_peft_model")
UNKNOWN = object()
"""What cannot be told without running the script."""


def read(text: str, where: str, *, has_bf16: bool) -> Settings:
    """The settings of a script.

    Names that are assigned a constant are followed, and so are ``is_bfloat16_supported()`` (Unsloth asks for compute
    capability 8, so *has_bf16* decides) and ``torch.cuda.is_bf16_supported()``, which is true wherever it is emulated.

    Raises:
        ConfigurationError: it is no Python, or calls no trainer that is known here.
    """
    calls = _Calls(has_bf16=has_bf16)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that are none
            calls.visit(ast.parse(text))
    except SyntaxError as error:
        raise ConfigurationError(f"{where} is no Python: {error.msg}, in line {error.lineno}") from None
    except ValueError as error:
        raise ConfigurationError(f"{where} is no Python: {' '.join(str(error).split())[:200]}") from None
    except (RecursionError, MemoryError):
        raise ConfigurationError(f"{where} is nested too deeply to be read") from None
    arguments = calls.merged(*_ARGUMENTS)
    trainer = calls.merged(*_TRAINERS)
    _refuse_others(calls, where)
    if not calls.called(*_ARGUMENTS, *_TRAINERS):
        known = ", ".join((*_ARGUMENTS[:2], *_TRAINERS[:2]))
        raise ConfigurationError(f"{where} calls none of {known}; give a script that trains with one of them")
    return _settings(calls, {**trainer, **arguments}, where)


def _refuse_others(calls: _Calls, where: str) -> None:
    for name in _OTHERS:
        if calls.called(name):
            raise ConfigurationError(f"{where} trains with {name}; supervised fine-tuning can be checked")


class _Calls(ast.NodeVisitor):
    """Keyword arguments of every call, by the name that is called, and the constants that names were given."""

    def __init__(self, *, has_bf16: bool) -> None:
        self.has_bf16 = has_bf16
        self._names: dict[str, Any] = {}
        self._found: dict[str, dict[str, Any]] = {}

    def merged(self, *names: str) -> dict[str, Any]:
        """The arguments of all calls of *names*, those of the last one first in question."""
        made: dict[str, Any] = {}
        for name in names:
            made |= self._found.get(name, {})
        return {key: value for key, value in made.items() if value is not UNKNOWN}

    def called(self, *names: str) -> bool:
        """Whether one of *names* is called."""
        return any(name in self._found for name in names)

    def visit_Assign(self, node: ast.Assign) -> None:
        """Remember a constant."""
        self.generic_visit(node)
        for target in node.targets:
            if isinstance(target, ast.Name):
                self._names[target.id] = self._value(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        """Remember what is given by name, and the first thing that is given by position."""
        self.generic_visit(node)
        name = _dotted(node.func)
        given = {word.arg: self._value(word.value) for word in node.keywords if word.arg is not None}
        if node.args:
            given.setdefault("*first", self._value(node.args[0]))
        if node.args and name.endswith("Trainer"):
            given.setdefault("model", given["*first"])
        for known in {name, ".".join(name.split(".")[-2:]), name.rpartition(".")[2]}:
            self._found[known] = {**self._found.get(known, {}), **given}

    def _value(self, node: ast.expr) -> Any:
        found: Any = UNKNOWN
        if isinstance(node, ast.Constant):
            found = node.value
        elif isinstance(node, ast.Name):
            found = self._names.get(node.id, UNKNOWN)
        elif isinstance(node, ast.Attribute):
            found = WORDS.get(node.attr, UNKNOWN)
        elif isinstance(node, ast.List | ast.Tuple):
            values = [self._value(one) for one in node.elts]
            found = UNKNOWN if any(value is UNKNOWN for value in values) else values
        elif isinstance(node, ast.Dict):
            found = {key.value: self._value(v) for key, v in zip(node.keys, node.values, strict=True) if _is_text(key)}
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            value = self._value(node.operand)
            found = UNKNOWN if value is UNKNOWN else not value
        elif isinstance(node, ast.Compare) and len(node.ops) == 1:
            found = self._compared(node.ops[0], self._value(node.left), self._value(node.comparators[0]))
        elif isinstance(node, ast.IfExp):
            condition = self._value(node.test)
            found = UNKNOWN if condition is UNKNOWN else self._value(node.body if condition else node.orelse)
        elif isinstance(node, ast.Call):
            found = self._asked(_dotted(node.func))
        return found

    def _compared(self, how: ast.cmpop, left: Any, right: Any) -> Any:
        if left is UNKNOWN or right is UNKNOWN:
            return UNKNOWN
        if isinstance(how, ast.Eq | ast.Is):
            return left == right
        return left != right if isinstance(how, ast.NotEq | ast.IsNot) else UNKNOWN

    def _asked(self, name: str) -> Any:
        """What functions that ask a GPU for bf16 say."""
        last = name.rpartition(".")[2]
        if last in ("is_bfloat16_supported", "is_bf16_supported_by_capability"):
            return self.has_bf16
        if last in ("is_bf16_supported", "is_torch_bf16_gpu_available"):
            return True
        return UNKNOWN


def _is_text(node: ast.expr | None) -> TypeGuard[ast.Constant]:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}".lstrip(".")
    return node.id if isinstance(node, ast.Name) else ""


def _settings(calls: _Calls, arguments: Mapping[str, Any], where: str) -> Settings:
    is_unsloth = calls.called(*_UNSLOTH)
    tool: Tool = "unsloth" if is_unsloth else "trl" if calls.called("SFTTrainer", "SFTConfig") else "transformers"
    loaded = calls.merged(*(_UNSLOTH if is_unsloth else _LOADED))
    if not is_unsloth and "model_init_kwargs" in arguments and isinstance(arguments["model_init_kwargs"], Mapping):
        loaded |= {key: value for key, value in arguments["model_init_kwargs"].items() if value is not UNKNOWN}
    lora = calls.merged(*_UNSLOTH_ADAPTER) if is_unsloth else calls.merged("LoraConfig")
    has_adapter = calls.called(*_UNSLOTH_ADAPTER) if is_unsloth else calls.called("LoraConfig")
    run, model, bits, adapter = (
        Entries(one, where) for one in (arguments, loaded, calls.merged("BitsAndBytesConfig"), lora)
    )
    quantization = _quantization(model if is_unsloth else bits, is_unsloth=is_unsloth)
    precision = _precision(run, tool, has_bf16=calls.has_bf16)
    dtype = _weights(model, loaded, tool, has_bf16=calls.has_bf16)
    product = dtype if is_unsloth else dtype_of(bits.text("bnb_4bit_compute_dtype", "", "product_dtype"), "float32")
    return Settings(
        tool=tool,
        model=_name(run, model, where),
        sequence_length=_length(run, model, tool),
        micro_batch_size=run.whole("per_device_train_batch_size", 8, "micro_batch_size"),
        gradient_accumulation_steps=run.whole("gradient_accumulation_steps", 1, "gradient_accumulation_steps"),
        quantization=quantization,
        double_quantization=quantization == "nf4" and (is_unsloth or bits.flag("bnb_4bit_use_double_quant")),
        weights_dtype=dtype,
        casts_rest=quantization != "none" and calls.called("prepare_model_for_kbit_training"),
        product_dtype="bfloat16" if product == "auto" else product,
        precision=precision,
        adapter=trl.kind_of(adapter) if has_adapter else "full",
        adapter_dtype=trl.adapter_dtype(quantization) if tool == "trl" and not _casts(calls) else "float32",
        rank=adapter.whole("r", 16 if is_unsloth else 8, "rank") if has_adapter else None,
        alpha=adapter.whole("lora_alpha", 16 if is_unsloth else 8, "alpha") if has_adapter else None,
        dropout=adapter.number("lora_dropout", 0.0, "dropout"),
        target_modules=_targets(adapter, is_unsloth=is_unsloth),
        trained_whole=adapter.names("modules_to_save", "trained_whole"),
        recomputes=_recomputes(run, adapter, lora, tool),
        attention="sdpa" if is_unsloth else model.text("attn_implementation", "sdpa", "attention"),
        loss=_loss(run, tool),
        packing=trl.packing_of(run) if tool != "transformers" else "none",
        shards=run.has("fsdp", "fsdp_config", "deepspeed") or "",
        longest_first=trl.groups(run),
        optimizer=run.text("optim", "adamw_torch_fused", "optimizer"),
        learning_rate=run.number("learning_rate", 5e-5, "learning_rate"),
        initial_scale=_scale(calls),
        resumes_blindly=calls.merged("trainer.train").get("resume_from_checkpoint") is True,
        keys=_keys(adapter, bits, model, run),
        values={**adapter.values, **bits.values, **model.values, **run.values, **_resumed(calls)},
    )


def _keys(*read: Entries) -> dict[str, str]:
    keys = {"resumes_blindly": "resume_from_checkpoint"}
    for entries in read:
        keys |= {name: key for name, key in entries.keys.items() if name not in keys or name in entries.values}
    return keys


def _resumed(calls: _Calls) -> dict[str, str]:
    given = calls.merged("trainer.train").get("resume_from_checkpoint")
    return {} if given is None else {"resumes_blindly": str(given)}


def _casts(calls: _Calls) -> bool:
    """Whether the script makes parameters fp32 itself, with ``.data.float()``."""
    return calls.called("data.float")


def _scale(calls: _Calls) -> float:
    """Where the script's own gradient scaler begins, or PyTorch's."""
    given = calls.merged("GradScaler").get("init_scale")
    return float(given) if isinstance(given, int | float) and not isinstance(given, bool) and given > 0 else 65536.0


def _name(run: Entries, model: Entries, where: str) -> str:
    for own, key in (
        (model, "model_name"),
        (model, "pretrained_model_name_or_path"),
        (model, "*first"),
        (run, "model"),
    ):
        if name := own.text(key):
            return name
    raise ConfigurationError(
        f"{where}: the model's name cannot be told without running it; write it out where the model is loaded"
    )


def _length(run: Entries, model: Entries, tool: Tool) -> int:
    default = model.whole("max_seq_length", 2048 if tool == "unsloth" else 1024)
    return run.whole("max_length", run.whole("max_seq_length", default), "sequence_length")


def _quantization(own: Entries, *, is_unsloth: bool) -> Quantized:
    """Unsloth quantizes to 4 bits where nothing else is said (its ``loader.py``)."""
    in_8, in_16 = own.flag("load_in_8bit"), own.flag("load_in_16bit") or own.flag("full_finetuning")
    in_4 = own.flag("load_in_4bit", default=is_unsloth and not (in_8 or in_16))
    own.name("quantization", "load_in_8bit" if in_8 and not in_4 else "load_in_4bit")
    return "nf4" if in_4 else "int8" if in_8 else "none"


def _precision(run: Entries, tool: Tool, *, has_bf16: bool) -> Precision:
    """Unsloth chooses by itself where neither is wanted, by capability (its ``models/rl.py``)."""
    if tool == "trl":
        return trl.precision_of(run)
    fp16, bf16 = run.flag("fp16"), run.flag("bf16")
    run.name("precision", "fp16" if fp16 and not bf16 else "bf16")
    if tool == "unsloth" and not (fp16 or bf16):
        return "bf16" if has_bf16 else "fp16"
    return "bf16" if bf16 else "fp16" if fp16 else "fp32"


def _weights(model: Entries, loaded: Mapping[str, Any], tool: Tool, *, has_bf16: bool) -> Stored:
    """Unsloth keeps to what the GPU has (its ``loader.py``); transformers 5 loads what the checkpoint has."""
    word = model.text("dtype" if "dtype" in loaded else "torch_dtype", "", "weights_dtype")
    if tool == "unsloth":
        wanted = dtype_of(word, "bfloat16" if has_bf16 else "float16")
        return "float16" if wanted in ("bfloat16", "auto") and not has_bf16 else wanted
    return dtype_of(word, "auto")


def _targets(adapter: Entries, *, is_unsloth: bool) -> tuple[str, ...] | None:
    targets = adapter.names("target_modules", "target_modules")
    if targets == ("all-linear",):
        return ()
    return targets or (() if is_unsloth else None)


def _recomputes(run: Entries, adapter: Entries, lora: Mapping[str, Any], tool: Tool) -> bool:
    if tool == "unsloth":
        adapter.name("recomputes", "use_gradient_checkpointing")
        return lora.get("use_gradient_checkpointing", True) not in (False, None, "False")
    return trl.recomputes(run, default=tool == "trl")


def _loss(run: Entries, tool: Tool) -> Loss:
    if run.flag("use_liger_kernel", "loss") and tool == "transformers":
        return "fused"
    return _LOSSES[tool]


_LOSSES: dict[Tool, Loss] = {"transformers": "whole", "trl": "tiled", "unsloth": "parts"}
