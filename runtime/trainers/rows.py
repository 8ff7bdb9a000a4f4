"""Data of each format, as each trainer is told of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shallowflow.runtime.documents import Format

_FILES = {".csv": "csv", ".parquet": "parquet"}
NAME = "data"
"""What the data is called in LLaMA-Factory's ``dataset_info.json``."""


def loader(data: Path) -> str:
    """The builder of Hugging Face's datasets that reads *data*."""
    return _FILES.get(data.suffix.lower(), "json")


def for_axolotl(data: Path, data_format: Format) -> dict[str, Any]:
    """An entry of its ``datasets``."""
    kinds: dict[Format, dict[str, Any]] = {
        "messages": {"type": "chat_template"},
        "sharegpt": {
            "type": "chat_template",
            "field_messages": "conversations",
            "message_property_mappings": {"role": "from", "content": "value"},
        },
        "alpaca": {"type": "alpaca"},
        "text": {"type": "completion", "field": "text"},
        "prompt-completion": {
            "type": {
                "field_instruction": "prompt",
                "field_output": "completion",
                "format": "{instruction}",
                "no_input_format": "{instruction}",
            }
        },
    }
    return {"path": str(data), "ds_type": loader(data), **kinds[data_format]}


def for_llamafactory(data: Path, data_format: Format) -> dict[str, Any]:
    """An entry of its ``dataset_info.json``."""
    entries: dict[Format, dict[str, Any]] = {
        "messages": {
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": {
                "role_tag": "role",
                "content_tag": "content",
                "user_tag": "user",
                "assistant_tag": "assistant",
                "system_tag": "system",
            },
        },
        "sharegpt": {"formatting": "sharegpt", "columns": {"messages": "conversations"}},
        "alpaca": {"columns": {"prompt": "instruction", "query": "input", "response": "output"}},
        "text": {"columns": {"prompt": "text"}},
        "prompt-completion": {"columns": {"prompt": "prompt", "response": "completion"}},
    }
    return {"file_name": str(data), **entries[data_format]}


def for_trl(data: Path, data_format: Format) -> list[str]:
    """Lines of Python that make *rows*, in a form that TRL knows."""
    load = f'rows = load_dataset("{loader(data)}", data_files={str(data)!r}, split="train")'
    return [load, *_MAPPED.get(data_format, ())]


_MAPPED: dict[Format, tuple[str, ...]] = {
    "alpaca": (
        "rows = rows.map(",
        "    lambda row: {",
        '        "prompt": "\\n\\n".join(filter(None, (row["instruction"], row.get("input")))) + "\\n\\n",',
        '        "completion": row["output"],',
        "    },",
        "    remove_columns=rows.column_names,",
        ")",
    ),
    "sharegpt": (
        'ROLES = {"human": "user", "gpt": "assistant"}',
        "rows = rows.map(",
        "    lambda row: {",
        '        "messages": [',
        '            {"role": ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}',
        '            for turn in row["conversations"]',
        "        ]",
        "    },",
        "    remove_columns=rows.column_names,",
        ")",
    ),
}
