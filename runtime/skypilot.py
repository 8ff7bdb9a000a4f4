"""A plan as a SkyPilot task: a managed job on spot instances that resumes from a bucket, mounted or as a store."""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shallowflow.planner import outlook, words
from shallowflow.planner.plan import Plan
from shallowflow.profiles.specs import GpuSpec, InstanceSpec

FILES, RESULTS = "~/shallowflow", "/shallowflow"
"""On the machine: the folder of the uploaded files, and where a bucket is mounted."""

ACCELERATORS = {
    "a100-40gb": "A100",
    "a100-80gb": "A100-80GB",
    "a10g": "A10G",
    "h100": "H100",
    "l4": "L4",
    "t4": "T4",
}
"""SkyPilot's names of the GPUs in shipped instances (its catalog's AcceleratorName)."""

MOST_RESTARTS = 2
"""After an error that is no interruption."""
BUCKET = re.compile(r"(?!\d+\.\d+\.\d+\.\d+$)(?!.*\.\.)[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
"""What S3 takes as a name: no address of four numbers, no two dots in a row."""
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class ExportError(ValueError):
    """A plan, or what it shall run on, that a task file cannot express: one line that says what would work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a task needs to know beside the plan.

    Attributes:
        plan_path, data_path, eval_data_path: files here, which are uploaded.
        bucket: of S3, mounted for checkpoints and results; made if there is none of that name.
        store: in the place of a bucket, where the run itself puts them, such as ``s3://bucket/prefix``: what is named
            there is whole, and is stored before a machine that is told so is taken.
        package: what pip installs.
        wheel: the file that it is, if it is one, which is uploaded, too.
        spot: on spot instances, or on demand.
        data_format: of rows of data; None is told from their columns.
    """

    plan_path: Path
    data_path: Path
    package: str
    wheel: Path | None = None
    bucket: str | None = None
    store: str | None = None
    eval_data_path: Path | None = None
    spot: bool = True
    data_format: str | None = None

    def files(self) -> dict[str, Path]:
        """What is uploaded, by the name that it gets."""
        found = {"plan.json": self.plan_path, f"train{self.data_path.suffix}": self.data_path}
        if self.eval_data_path is not None:
            found[f"heldout{self.eval_data_path.suffix}"] = self.eval_data_path
        return found


def task(plan: Plan, job: Job, gpu: GpuSpec, instances: tuple[InstanceSpec, ...]) -> str:
    """The task file, as YAML: ``sky jobs launch FILE`` runs it.

    Raises:
        ExportError: no machine has the plan's GPUs, the model is on this machine alone, a file is missing, or the
            bucket's name is none.
    """
    num_gpus = _check(plan, job, gpu, instances)
    remarks = [
        f"{plan.model_name} on {words.counted(plan.configuration.num_gpus, gpu.title)}, as planned:",
        f"{words.gib(plan.prediction.peak_process_bytes)} per GPU, {plan.prediction.step_seconds:.1f} s a step, "
        f"{words.duration(plan.wall.total_seconds)} without interruptions.",
        f"Layers: {words.summary(plan.configuration)}.",
        "Start it with: sky jobs launch FILE; a gated model takes: --secret HF_TOKEN",
    ]
    head = "".join(f"# {' '.join(line.split())}\n" for line in remarks)  # a plan is data: no line of its own
    body: str = yaml.safe_dump(_fields(plan, job, num_gpus), sort_keys=False, allow_unicode=True, width=math.inf)
    return head + body


def _check(plan: Plan, job: Job, gpu: GpuSpec, instances: tuple[InstanceSpec, ...]) -> int:
    """How many GPUs the machine has: SkyPilot looks for one with exactly so many, of which the run takes its own."""
    if gpu.name not in ACCELERATORS or not instances:
        raise ExportError(f"the plan is for {gpu.title}, which no shipped instance has; plan for one, such as t4")
    wanted = plan.workload.gpus_per_machine
    enough = [instance.num_gpus for instance in instances if instance.num_gpus >= wanted]
    if not enough:
        most = max(instance.num_gpus for instance in instances)
        raise ExportError(
            f"the plan is for {wanted} x {gpu.title} in a machine, and none has more than {most}; plan with "
            f"--gpus {most}"
        )
    if not HUB_NAME.fullmatch(plan.model_name):
        raise ExportError(
            f"the plan is of {plan.model_name!r}, whose weights another machine would not find; plan a model by its "
            "name on the Hub, such as meta-llama/Llama-3.1-8B"
        )
    for path in job.files().values():
        if not path.is_file():
            raise ExportError(f"file {path} does not exist; a task uploads files, so give one that is here")
    if (job.bucket is None) == (job.store is None):
        raise ExportError("checkpoints go to one place; give either --bucket or --store")
    if job.bucket is not None and not BUCKET.fullmatch(job.bucket):
        raise ExportError(
            f"{job.bucket!r} is no name of a bucket; give 3 to 63 small letters, digits, hyphens and single dots, "
            "and no IP address"
        )
    return min(enough)


def _fields(plan: Plan, job: Job, num_gpus: int) -> dict[str, Any]:
    resources: dict[str, Any] = {
        "infra": "aws",
        "accelerators": {ACCELERATORS[plan.gpu]: num_gpus},
        "disk_size": outlook.disk_gb(plan),
        "use_spot": job.spot,
        "job_recovery": {"max_restarts_on_errors": MOST_RESTARTS},
    }
    uploaded = job.files() | ({} if job.wheel is None else {job.wheel.name: job.wheel})
    several = {} if plan.workload.num_machines == 1 else {"num_nodes": plan.workload.num_machines}
    return {
        "name": "shallowflow-" + re.sub(r"[^a-z0-9]+", "-", plan.model_name.rpartition("/")[2].lower()).strip("-"),
        **several,
        "resources": resources,
        "file_mounts": {**{f"{FILES}/{name}": str(path) for name, path in uploaded.items()}, **_mounted(job)},
        "setup": f"cd {FILES} && pip install {shlex.quote(job.package)}",
        "run": f"cd {FILES} && {_command(plan, job)}",
    }


def _mounted(job: Job) -> dict[str, Any]:
    return {} if job.bucket is None else {RESULTS: {"name": job.bucket, "store": "s3", "mode": "MOUNT_CACHED"}}


_TOGETHER = (
    "torchrun --nnodes $SKYPILOT_NUM_NODES --nproc-per-node {} --node-rank $SKYPILOT_NODE_RANK "
    '--master-addr "$(echo "$SKYPILOT_NODE_IPS" | head -n 1)" --master-port 29500 -m shallowflow'
)
"""What runs on each of several machines, which SkyPilot tells who they are (its "Distributed Jobs on Many Nodes")."""


def _command(plan: Plan, job: Job) -> str:
    """What runs on each machine, the first time and after every interruption."""
    data, *held = list(job.files())[1:]
    output = ["run", "--store", job.store] if job.store is not None else [f"{RESULTS}/run"]
    words = ["train", "plan.json", "--data", data, "--output", *output, "--resume"]
    for name in held:
        words += ["--eval-data", name]
    if job.data_format is not None:
        words += ["--data-format", job.data_format]
    work = plan.workload
    program = "sfplan" if work.num_machines == 1 else _TOGETHER.format(work.gpus_per_machine)
    return f"{program} {shlex.join(words)}"
