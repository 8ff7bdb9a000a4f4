"""Other trainers' own parsers, each in a process of its own, with what ``make test`` installs for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TOOLS = Path(sys.prefix) / "tools"
"""Where ``make test`` puts axolotl and LLaMA-Factory, without what they require."""
MISSING = "other trainers' parsers are installed by `make test`"

AXOLOTL = """
import json, sys, yaml
from axolotl.utils.schemas.config import AxolotlConfigWCapabilities
chip = dict(bf16=False, tf32=False, fp8=False, n_gpu=1, n_node=1, compute_capability="sm_75")
found = []
for path in sys.argv[1:]:
    entries = yaml.safe_load(open(path, encoding="utf-8"))
    read = AxolotlConfigWCapabilities(**entries, capabilities=chip, env_capabilities={"torch_version": "2.13.0"})
    unknown = sorted(set(entries) - set(type(read).model_fields))
    found.append({**json.loads(read.model_dump_json(exclude_none=True, fallback=str)), "unknown": unknown})
print(json.dumps(found))
"""
LLAMAFACTORY = """
import json, sys, yaml
from llamafactory.hparams.parser import _TRAIN_ARGS, _parse_train_args
found = []
for path in sys.argv[1:]:
    entries = yaml.safe_load(open(path, encoding="utf-8"))
    read = _parse_train_args({**entries, "use_cpu": True})
    found.append({key: str(value) for part in read for key, value in vars(part).items()})
print(json.dumps(found))
"""
"""On a CPU, as there is no GPU; without its check of versions, which are those of a place of its own."""
TRL = """
import json, sys
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser
found = []
for path in sys.argv[1:]:
    read = TrlParser((ScriptArguments, SFTConfig, ModelConfig)).parse_args_and_config(["--config", path, "--use_cpu"])
    found.append({key: str(value) for part in read for key, value in vars(part).items()})
print(json.dumps(found))
"""


def read_by(code: str, paths: Sequence[Path]) -> list[dict[str, Any]]:
    """What *code* makes of each of *paths*; it prints JSON on its last line."""
    environment = {**os.environ, "PYTHONPATH": str(TOOLS), "DISABLE_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, paths)],
        cwd=paths[0].parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found
