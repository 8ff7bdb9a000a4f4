"""Python scripts that train with TRL, Unsloth or ``transformers.Trainer``: what they say, read without running them."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from .settings import (
    Adapter,
    ConfigurationError,
    Dtype,
    Entries,
    Loss,
    Packing,
    Precision,
    Quantized,
    Settings,
    Tool,
    is_any,
)

_ARGUMENTS = ("SFTConfig", "TrainingArguments", "UnslothTrainingArguments", "Seq2SeqTrainingArguments")
_TRAINERS = ("SFTTrainer", "Trainer", "UnslothTrainer", "Seq2SeqTrainer")
_DTYPES: dict[str, Dtype] = {"float16": "float16", "half": "float16", "bfloat16": "bfloat16", "float32": "float32"}
UNKNOWN = object()
"""What cannot be told without running the script."""


def read(text: str, where: str, *, has_bf16: bool) -> Settings:
    """The settings of a script.

    Names that are assigned a constant are followed, and so are ``is_bfloat16_supported()`` (Unsloth asks for compute
    capability 8, so *has_bf16* decides) and ``torch.cuda.is_bf16_supported()``, which is true wherever it is emulated.

    Raises:
        ConfigurationError: it is no Python, or calls no trainer that is known here.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise ConfigurationError(f"{where} is no Python: {' '.join(str(error).split())}") from None
    calls = _Calls(has_bf16=has_bf16)
    calls.visit(tree)
    arguments = calls.merged(*_ARGUMENTS)
    trainer = calls.merged(*_TRAINERS)
    if not arguments and not trainer:
        known = ", ".join((*_ARGUMENTS[:2], *_TRAINERS[:2]))
        raise ConfigurationError(f"{where} calls none of {known}; give a script that trains with one of them")
    unsloth = calls.merged("FastLanguageModel.from_pretrained", "FastModel.from_pretrained")
    return _settings(calls, {**trainer, **arguments}, unsloth, where)


class _Calls(ast.NodeVisitor):
    """Keyword arguments of every call, by the name that is called, and the constants that names were given."""

    def __init__(self, *, has_bf16: bool) -> None:
        self._has_bf16 = has_bf16
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
        for known in {name, ".".join(name.split(".")[-2:]), name.rpartition(".")[2]}:
            self._found[known] = {**self._found.get(known, {}), **given}

    def _value(self, node: ast.expr) -> Any:
        found: Any = UNKNOWN
        if isinstance(node, ast.Constant):
            found = node.value
        elif isinstance(node, ast.Name):
            found = self._names.get(node.id, UNKNOWN)
        elif isinstance(node, ast.Attribute):
            found = _DTYPES.get(node.attr, UNKNOWN)
        elif isinstance(node, ast.List | ast.Tuple):
            values = [self._value(one) for one in node.elts]
            found = UNKNOWN if any(value is UNKNOWN for value in values) else values
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            value = self._value(node.operand)
            found = UNKNOWN if value is UNKNOWN else not value
        elif isinstance(node, ast.Call):
            found = self._asked(_dotted(node.func))
        return found

    def _asked(self, name: str) -> Any:
        """What functions that ask a GPU for bf16 say."""
        last = name.rpartition(".")[2]
        if last in ("is_bfloat16_supported", "is_bf16_supported_by_capability"):
            return self._has_bf16
        if last in ("is_bf16_supported", "is_torch_bf16_gpu_available"):
            return True
        return UNKNOWN


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}".lstrip(".")
    return node.id if isinstance(node, ast.Name) else ""


def _settings(calls: _Calls, arguments: Mapping[str, Any], unsloth: Mapping[str, Any], where: str) -> Settings:
    is_unsloth = bool(unsloth)
    loaded = dict(unsloth) if is_unsloth else calls.merged("AutoModelForCausalLM.from_pretrained")
    bits = {} if is_unsloth else calls.merged("BitsAndBytesConfig")
    lora = (
        calls.merged("FastLanguageModel.get_peft_model", "FastModel.get_peft_model")
        if is_unsloth
        else calls.merged("LoraConfig")
    )
    uses_trl = calls.called("SFTTrainer", "SFTConfig")
    tool: Tool = "unsloth" if is_unsloth else "trl" if uses_trl else "transformers"
    run, model, quantized, adapter = (Entries(one, where) for one in (arguments, loaded, bits, lora))
    quantization = _quantization(model, quantized, loaded if is_unsloth else bits, is_unsloth=is_unsloth)
    precision = _precision(run, arguments, tool)
    dtype = _weights(model, loaded, tool, precision)
    has_adapter = bool(lora)
    attention = model.text("attn_implementation", "sdpa", "attention")
    return Settings(
        tool=tool,
        model=_name(model, loaded, where),
        sequence_length=_length(run, model, tool),
        micro_batch_size=run.whole("per_device_train_batch_size", 8, "micro_batch_size"),
        gradient_accumulation_steps=run.whole("gradient_accumulation_steps", 1, "gradient_accumulation_steps"),
        quantization=quantization,
        double_quantization=quantization == "nf4" and (is_unsloth or quantized.flag("bnb_4bit_use_double_quant")),
        weights_dtype=dtype,
        casts_rest=quantization != "none" and calls.called("prepare_model_for_kbit_training"),
        product_dtype=dtype if is_unsloth else _product(quantized, bits),
        precision=precision,
        adapter=_kind(adapter) if has_adapter else "full",
        adapter_dtype="bfloat16" if tool == "trl" and quantization != "none" and not _casts(calls) else "float32",
        rank=adapter.whole("r", 16 if is_unsloth else 8, "rank") if has_adapter else None,
        alpha=adapter.whole("lora_alpha", 16 if is_unsloth else 8, "alpha") if has_adapter else None,
        dropout=adapter.number("lora_dropout", 0.0, "dropout"),
        target_modules=_targets(adapter, is_unsloth=is_unsloth),
        trained_whole=adapter.names("modules_to_save", "trained_whole"),
        recomputes=_recomputes(run, adapter, lora, tool),
        attention=attention,
        loss=_loss(run, tool),
        packing=_packing(run, attention, tool),
        longest_first=run.flag("group_by_length", "longest_first")
        or run.text("train_sampling_strategy") == "group_by_length",
        optimizer=run.text("optim", "adamw_torch_fused", "optimizer"),
        learning_rate=run.number("learning_rate", 5e-5, "learning_rate"),
        resumes_blindly=calls.merged("trainer.train").get("resume_from_checkpoint") not in (None, False),
        keys={
            "resumes_blindly": "resume_from_checkpoint",
            **adapter.keys,
            **quantized.keys,
            **model.keys,
            **run.keys,
        },
        values={**adapter.values, **quantized.values, **model.values, **run.values},
    )


def _casts(calls: _Calls) -> bool:
    """Whether the script makes parameters fp32 itself."""
    return calls.called("data.float", "param.data.float", "p.data.float", "parameter.data.float")


def _name(model: Entries, loaded: Mapping[str, Any], where: str) -> str:
    name = model.text("model_name") or model.text("pretrained_model_name_or_path") or model.text("*first")
    if not name:
        raise ConfigurationError(
            f"{where}: the model's name cannot be told without running it; give from_pretrained a text"
        )
    del loaded
    return name


def _length(run: Entries, model: Entries, tool: Tool) -> int:
    default = model.whole("max_seq_length", 2048 if tool == "unsloth" else 1024)
    return run.whole("max_length", run.whole("max_seq_length", default), "sequence_length")


def _quantization(model: Entries, quantized: Entries, given: Mapping[str, Any], *, is_unsloth: bool) -> Quantized:
    own = model if is_unsloth else quantized
    in_8 = own.flag("load_in_8bit")
    in_4 = own.flag("load_in_4bit", "quantization", default=is_unsloth and not in_8)
    del given
    return "nf4" if in_4 else "int8" if in_8 else "none"


def _precision(run: Entries, arguments: Mapping[str, Any], tool: Tool) -> Precision:
    fp16 = run.flag("fp16")
    bf16 = run.flag("bf16", "precision", default=tool == "trl" and not fp16)
    if fp16 and "bf16" not in arguments:
        run.keys["precision"], run.values["precision"] = "fp16", "true"
    return "fp16" if fp16 else "bf16" if bf16 else "fp32"


def _weights(model: Entries, loaded: Mapping[str, Any], tool: Tool, precision: Precision) -> Dtype:
    key = "dtype" if "dtype" in loaded else "torch_dtype"
    word = model.text(key, "", "weights_dtype")
    if tool == "unsloth":
        return _DTYPES.get(word, "bfloat16" if precision == "bf16" else "float16")
    return _DTYPES.get(word, "bfloat16")  # transformers 5 loads what the checkpoint has, for most models bf16


def _product(quantized: Entries, bits: Mapping[str, Any]) -> Dtype:
    """``BitsAndBytesConfig`` multiplies in fp32 unless it is told."""
    word = quantized.text("bnb_4bit_compute_dtype", "float32", "product_dtype")
    del bits
    return _DTYPES.get(word.removeprefix("torch."), "float32")


def _kind(adapter: Entries) -> Adapter:
    return "dora" if adapter.flag("use_dora") else "rslora" if adapter.flag("use_rslora") else "lora"


def _targets(adapter: Entries, *, is_unsloth: bool) -> tuple[str, ...]:
    targets = adapter.names("target_modules", "target_modules")
    if targets == ("all-linear",):
        return ()
    return targets or (() if is_unsloth else ("q_proj", "v_proj"))


def _recomputes(run: Entries, adapter: Entries, lora: Mapping[str, Any], tool: Tool) -> bool:
    if tool == "unsloth":
        word = lora.get("use_gradient_checkpointing", True)
        del adapter
        return word not in (False, None, "False")
    return run.flag("gradient_checkpointing", "recomputes", default=tool == "trl")


def _loss(run: Entries, tool: Tool) -> Loss:
    if run.flag("use_liger_kernel", "loss") and tool == "transformers":
        return "fused"
    return {"transformers": "whole", "trl": "tiled"}.get(tool, "parts")  # type: ignore[return-value]


def _packing(run: Entries, attention: str, tool: Tool) -> Packing:
    if not run.flag("packing", "packing"):
        return "none"
    return "separate" if tool == "unsloth" or is_any(attention, ("flash", "flex")) else "leaking"
