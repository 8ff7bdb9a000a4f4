"""A run's folder beside its store: which run is there, who may write, what is brought here, and what is kept."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from shallowflow.planner.plan import Plan

from . import checkpoint, folder
from .files import write_text
from .guard import Guard
from .request import RunError, RunRequest
from .spend import Ledger, Spend
from .storage import StoreError, Vault, session_name
from .uploads import Uploads, link

SPOOL = ".uploading"
"""The folder inside a run's that holds what is on its way to the store."""
RESULTS = (folder.ADAPTER, folder.MODEL, folder.BEST, "run.json", "plan.json", "report.html")


@contextmanager
def _told(request: RunRequest) -> Iterator[None]:
    """A store that cannot be used is a run that cannot start."""
    try:
        yield
    except StoreError as error:
        raise RunError(f"{_shown(request)}: {error}") from error


def _shown(request: RunRequest) -> str:
    from .aws.s3 import shown

    return f"--store {shown(str(request.store))}"


def look(request: RunRequest) -> Vault | None:
    """The store that *request* names, where it names one, as it is; nothing is written.

    Raises:
        RunError: it cannot be used, or holds a run that is not to be gone on with.
    """
    if request.store is None:
        return None
    with _told(request):
        from .aws.s3 import S3Objects, place

        vault = Vault.look(S3Objects(place(request.store)))
        if vault.latest is not None and not (vault.latest.is_empty or request.resume):
            raise StoreError("it holds a run; go on with it by --resume, or give another prefix")
    return vault


def same(plan: Plan, request: RunRequest, vault: Vault | None) -> bool:
    """Refuse to go on with another run than the folder and the store hold; returns whether it is on with another plan.

    Raises:
        RunError: in what they differ.
    """
    moves = folder.check_same(plan, request)
    if vault is None or vault.latest is None or vault.latest.is_empty:
        return moves
    return folder.check_alike(plan, request, vault.latest.request, _shown(request), "another prefix") or moves


def take_over(plan: Plan, request: RunRequest, vault: Vault, guard: Guard) -> list[str]:
    """Become the one who writes to the store, and bring its newest checkpoint here, where it is newer than any here.

    Returns why newer ones are not believed, and what else is to be noted.

    Raises:
        RunError: the store cannot be used.
    """
    kept = request.output / folder.REQUEST
    mine = folder.fingerprint(plan, request)
    if kept.is_file():
        mine = msgspec.json.decode(kept.read_bytes(), type=dict[str, str])
    with _told(request):
        left = vault.claim(mine)
        assert vault.latest is not None
        if not kept.is_file():
            write_text(kept, msgspec.json.format(msgspec.json.encode(vault.latest.request), indent=2).decode() + "\n")
        place = request.output / folder.CHECKPOINTS
        checkpoint.finish(place)
        newest, _ = checkpoint.latest(place)
        here = 0 if newest is None else len(checkpoint.read(newest).steps)
        doubts = vault.fetch(place, here, checkpoint.doubt) if request.resume else []
    guard.uploads = Uploads(vault, request.output / SPOOL)
    stored = vault.latest.checkpoints
    guard.uploads.num_stored = stored[0].num_steps if stored else None
    if newest is not None and (not stored or here > stored[0].num_steps):
        guard.submit(newest, here)
    return [*([left] if left else []), *doubts]


def open_books(request: RunRequest, vault: Vault | None, guard: Guard) -> None:
    """Count what earlier sessions spent, where there is a price, and begin to write down what this one does.

    Raises:
        RunError: the budget is spent, or the books cannot be read or written.
    """
    if request.usd_per_hour is None:
        return
    objects = None if vault is None else vault.objects
    name = vault.writer if vault is not None else session_name()
    guard.spend = Spend(request.usd_per_hour, request.budget_usd)
    guard.ledger = Ledger(name, request.usd_per_hour, guard.session_seconds, request.output, objects)
    newest, _ = checkpoint.latest(request.output / folder.CHECKPOINTS) if request.resume else (None, [])
    try:
        guard.spend.take_over(guard.ledger.books(), 0.0 if newest is None else checkpoint.read(newest).seconds)
        if guard.spend.forbids(guard.session_seconds(), 0.0):
            raise RunError(
                f"the budget of ${request.budget_usd:.4f} is spent: {guard.spend.usd(guard.session_seconds()):.4f} "
                "dollars so far; give a higher --budget-usd"
            )
        guard.ledger.start()
    except StoreError as error:
        raise RunError(f"what the run has spent so far is not known: {error}") from error
    except RunError:
        guard.ledger = None
        raise


def keep_results(output: Path, num_steps: int, uploads: Uploads) -> str | None:
    """Put what a run has come to into its store; returns why that cannot be."""
    spool = output / SPOOL / "results"
    shutil.rmtree(spool, ignore_errors=True)
    spool.mkdir(parents=True)
    try:
        for name in RESULTS:
            source = output / name
            if source.is_dir():
                link(source, spool / name)
            elif source.is_file():
                shutil.copy2(source, spool / name)
        uploads.vault.keep_results(spool, num_steps)
    except StoreError as error:
        return str(error)
    finally:
        shutil.rmtree(output / SPOOL, ignore_errors=True)
    return None
