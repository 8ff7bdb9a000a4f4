"""A run on its way to a machine: what stands against it, what is put into the store, and the start."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from shallowflow.launching import Launch
from shallowflow.planner import outlook, words
from shallowflow.session import RequestError

if TYPE_CHECKING:
    from shallowflow.runtime.aws.clients import Aws, Rehearsal
    from shallowflow.runtime.storage import Objects

ENDED = ("completed", "stopped early")
"""Outcomes of runs that need no machine any more."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Why no machine is started: the run has one, or is over."""

    why: str
    instance_id: str | None = None


def standing(aws: Aws, launch: Launch) -> Standing | None:
    """Why the run needs no machine; None where it does.

    Raises:
        RequestError: it has a machine, or the store holds a run, and nobody said that it may go on.
        AwsError, StoreError: AWS does not say.
    """
    from shallowflow.runtime.aws.instances import alive

    for instance_id, state in alive(aws, launch.run):
        if not launch.resume:
            raise RequestError(
                f"run {launch.run} has an instance already, {instance_id}, which is {state}; stop it first"
            )
        return Standing(f"run {launch.run} has an instance already, {instance_id}, which is {state}", instance_id)
    return None


def stored(objects: Objects, launch: Launch) -> Standing | None:
    """Why the store needs no machine; None where it does.

    Raises:
        RequestError: it holds a run, and nobody said that it may go on.
        StoreError: it cannot be read.
    """
    from shallowflow.runtime.storage import Vault

    latest = Vault.look(objects).latest
    if latest is None or latest.is_empty:
        return None
    if not launch.resume:
        raise RequestError("the store holds a run; go on with it by --resume, or give another prefix with --store")
    if latest.results is not None:
        outcome = outcome_of(objects, latest.results.prefix)
        if outcome in ENDED:
            return Standing(
                f"run {launch.run} is over: {outcome} after {words.counted(latest.results.num_steps, 'step')}"
            )
    return None


def outcome_of(objects: Objects, prefix: str) -> str | None:
    """How the run ended whose results are stored below *prefix*; None where they do not say."""
    found = objects.read(f"{prefix}run.json")
    try:
        return None if found is None else str(msgspec.json.decode(found[0], type=dict[str, Any]).get("outcome"))
    except msgspec.DecodeError:
        return None


def upload(objects: Objects, launch: Launch) -> None:
    """Put plan, data and package into the store; what is there already stays.

    Raises:
        StoreError: they cannot be written.
    """
    prefix = folder(launch)
    for name, path in launch.files.items():
        objects.upload(f"{prefix}{name}", path)


def rehearse_store(rehearsal: Rehearsal, launch: Launch) -> None:
    """Note what ``stored`` and ``upload`` would ask."""
    from shallowflow.runtime.aws.s3 import PART_BYTES
    from shallowflow.runtime.storage import LATEST

    bucket, base = launch.place.bucket, launch.place.prefix
    rehearsal.ask("s3", "get_object", "see what the store holds", Bucket=bucket, Key=f"{base}{LATEST}")
    for name, path in launch.files.items():
        size = path.stat().st_size
        asked = {"Bucket": bucket, "Key": f"{base}{folder(launch)}{name}"}
        if size > PART_BYTES:
            parts = words.counted(-(-size // PART_BYTES), "part")
            rehearsal.ask("s3", "create_multipart_upload", f"store {name}", **asked)
            rehearsal.ask("s3", "upload_part", f"store {name}, {parts}", **asked)
            rehearsal.ask("s3", "complete_multipart_upload", f"store {name}", **asked)
        else:
            rehearsal.ask("s3", "put_object", f"store {name}", **asked, Body=f"<{size:,} bytes>")
        rehearsal.ask("s3", "head_object", f"see that {name} is there", **asked)


def start(aws: Aws, launch: Launch) -> str:
    """Start the machine; returns the instance's id.

    Raises:
        AwsError, ScriptError: it cannot be started.
    """
    from shallowflow.runtime.aws import instances

    return instances.start(
        aws,
        instances.Machine(
            run=launch.run,
            store=launch.store,
            instance=launch.instance.name,
            market=launch.market,
            profile=launch.profile,
            disk_gb=outlook.disk_gb(launch.plan),
            script=script(launch),
            image=launch.image,
            subnet=launch.subnet,
        ),
    )


def script(launch: Launch) -> str:
    """What the machine runs.

    Raises:
        ScriptError: it is too long.
    """
    from shallowflow.runtime import machine

    prefix = folder(launch)
    return machine.script(
        machine.Errand(
            region=launch.price.region,
            bucket=launch.place.bucket,
            prefix=launch.place.prefix,
            files={name: (f"{prefix}{name}", _sha256(path)) for name, path in launch.files.items()},
            package=launch.package,
            train=launch.train,
            max_hours=launch.max_hours,
            idle_minutes=launch.idle_minutes,
            token_parameter=launch.token_parameter,
        )
    )


def folder(launch: Launch) -> str:
    """Where below the store's prefix the files go: the same files, the same place."""
    digest = hashlib.sha256()
    for name, path in sorted(launch.files.items()):
        digest.update(f"{name} {_sha256(path)}\n".encode())
    return f"launch/{digest.hexdigest()[:16]}/"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
