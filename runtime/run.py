"""Execute a plan: check that it is what it says, learn, save, report."""

from __future__ import annotations

import contextlib
import datetime
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from shallowflow.planner import words
from shallowflow.planner.plan import Plan
from shallowflow.planner.profiler import cache

from . import batches, checkpoint, folder, joining, keeping, sample, summary
from .attempts import found, learned
from .documents import read_documents
from .folder import CHECKPOINTS
from .guard import Guard, guarding
from .heap import keeping_freed_memory
from .progress import Progress
from .ranks import ALONE, Lost, Ranks
from .record import RunRecord
from .request import RunError, RunFailed, RunLost, RunRequest, check_processes, check_request, device_of
from .storage import Vault
from .watch import Silent, Watcher
from .weights import find_weights, load_tokenizer
from .work import Work

__all__ = ["CHECKPOINTS", "RunError", "RunFailed", "RunRequest", "Silent", "Watcher", "prepared", "train"]


def train(plan: Plan, request: RunRequest, watcher: Watcher | None = None) -> RunRecord:
    """Fine-tune as *plan* says; write what was learned, ``run.json``, ``plan.json`` and ``report.html`` to a folder.

    The step is traced first and must be the planned one. Checkpoints are written as it goes. Ctrl-C, or SIGTERM, ends
    training before the next micro-batch; what was learned is saved and recorded as interrupted, without the step it cut
    short, and a request to resume goes on from there. Where memory runs out, the plan's alternatives are gone through.

    A plan for several GPUs is run by as many processes that call this alike, as torchrun starts them. They share each
    step; the first alone writes and is watched.

    Raises:
        RunError: the step is not the planned one, the plan is for a GPU and this machine has none, or for another
            number of them than there are processes, the output folder cannot be had, or what is to be resumed is
            another run.
        RunFailed: memory ran out with no alternative left, or the loss is no number; what was learned is saved.
        RunLost: another process has ended; what was learned is saved.
        DataError, WeightsError: see there.
    """
    ranks = joining.join()
    told = watcher if watcher is not None and ranks.leads else Silent()
    try:
        with guarding(ranks) as guard:
            work = joining.together(ranks, lambda: _begun(plan, request, told, ranks, guard))
            ranks.connect(work.device)
            record = _trained(work)
    except Lost as lost:
        raise RunLost(f"{lost}; {_saved(plan, request, 0, has_results=False)}") from lost
    return record


def _begun(plan: Plan, request: RunRequest, watcher: Watcher, ranks: Ranks, guard: Guard) -> Work:
    check_processes(plan, ranks.size)
    work = prepared(plan, request, watcher, device_of(plan, ranks.local_rank), ranks)
    return replace(work, guard=guard)


def _trained(work: Work) -> RunRecord:
    plan, request, ranks = work.plan, work.request, work.ranks
    progress = Progress(
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        plan=folder.plan_digest(plan),
        clock=work.guard.began,
        total=work.total,
    )
    _check_alike(work)
    with contextlib.ExitStack() as held:
        moves = False
        if ranks.leads:
            held.enter_context(folder.claimed(request.output))
            moves = keeping.same(plan, request, work.vault)
            progress.notes += _held_store(work)
        if work.device.type == "cpu":
            held.enter_context(keeping_freed_memory())
        path = _go_on(work, progress, moves=ranks.led(moves)) if request.resume else None
        for note in progress.notes:
            work.watcher.note(note)
        learner, kept = learned(work, progress, path)
        _settle(work, progress)
        record = summary.record_of(work, progress, kept)
        if learner is not None and not progress.lost:
            work.watcher.stage("saving")
            folder.save_learned(request.output, plan, learner.trainee, work.tokenizer)
            if ranks.leads:
                folder.save_record(plan, request.output, record)
                _keep_results(work, progress)
    if progress.lost:
        raise RunLost(f"{progress.failure}; {_saved(plan, request, len(progress.steps), has_results=False)}")
    joining.end_together()
    if progress.failure is not None:
        saved = _saved(plan, request, len(progress.steps), has_results=learner is not None)
        raise RunFailed(f"{progress.failure}; {saved}")
    return record


def _held_store(work: Work) -> list[str]:
    """Take the store over, where there is one, and open the books, where there is a price; returns what to note."""
    notes: list[str] = []
    if work.vault is not None:
        work.watcher.stage("looking into the store")
        notes = keeping.take_over(work.plan, work.request, work.vault, work.guard)
    keeping.open_books(work.request, work.vault, work.guard)
    return notes


def _settle(work: Work, progress: Progress) -> None:
    """Wait for the last checkpoint to be stored, and take over what the guard has to say of the run."""
    guard = work.guard
    if guard.uploads is not None:
        work.watcher.stage("storing")
    guard.settle(len(progress.steps))
    progress.notes += guard.notes
    if guard.uploads is not None and guard.uploads.superseded is not None:
        progress.outcome, progress.failure = "failed", guard.uploads.superseded


def _keep_results(work: Work, progress: Progress) -> None:
    """Store the results as well, unless the machine is about to be taken: the next one goes on."""
    uploads = work.guard.uploads
    if uploads is None or uploads.superseded is not None or work.guard.inbox.interruption is not None:
        return
    trouble = keeping.keep_results(work.request.output, len(progress.steps), uploads)
    if trouble is not None and progress.failure is None:
        progress.failure = f"the results are not in the store: {trouble}"


def prepared(plan: Plan, request: RunRequest, watcher: Watcher, device: torch.device, ranks: Ranks = ALONE) -> Work:
    """Everything that *plan* and *request* ask for, checked and read, but for the weights.

    Raises:
        RunError, DataError, WeightsError: what is missing or wrong.
    """
    check_request(request)
    vault: Vault | None = None
    if ranks.leads:
        folder.check_output(request.output, request.resume)
        folder.check_writable(request.output)
        vault = keeping.look(request)
    documents = read_documents(request.data, request.data_format)
    held_out = read_documents(request.eval_data, request.data_format) if request.eval_data else []
    watcher.stage("reading data and tokenizer")
    source = find_weights(plan.model_name, request.weights)
    tokenizer = load_tokenizer(source)
    length = plan.configuration.sequence_length
    windows = _windows(batches.windows(documents, tokenizer, length), request.data)
    if plan.configuration.packing:
        windows = batches.packed(windows, length)
    eval_windows = _windows(batches.windows(held_out, tokenizer, length), request.eval_data) if held_out else []
    return Work(
        plan=plan,
        request=request,
        watcher=watcher,
        device=device,
        source=source,
        tokenizer=tokenizer,
        windows=windows,
        eval_windows=eval_windows,
        prompts=[sample.prompt_tokens(tokenizer, prompt, length) for prompt in request.samples],
        total=request.num_steps or -(-len(windows) // plan.configuration.global_batch_size),
        ranks=ranks,
        vault=vault,
    )


def _windows(found: list[batches.Window], path: Path | None) -> list[batches.Window]:
    if not found:
        raise RunError(f"{path} holds no token to learn: its documents are shorter than two tokens")
    return found


def _check_alike(work: Work) -> None:
    """Refuse what would let a process learn anything else than the first does, or talk to it more or less often.

    Where the weights lie is each one's own affair.

    Raises:
        RunError: which process differs, and in what.
    """
    if not work.ranks.talks:
        return
    request = work.request
    mine: dict[str, Any] = {**folder.fingerprint(work.plan, request), "weights": ""}
    mine |= {f"version of {package}": number for package, number in cache.versions().items()}
    mine |= {"--steps": request.num_steps, "--eval-every": request.eval_every, "--patience": request.patience}
    mine |= {"--sample": request.samples, "--resume": request.resume}
    first, *others = work.ranks.gathered(mine)
    for rank, other in enumerate(others, start=1):
        differing = [name for name in first if first[name] != other[name]]
        if differing:
            joining.end_together()
            raise RunError(f"rank {rank} was given another {differing[0]} than rank 0; give all the same")


def _go_on(work: Work, progress: Progress, *, moves: bool) -> Path | None:
    """Put the newest good checkpoint, if there is one, into *progress*; a run that *moves* began with another plan."""
    path, state = found(work.request, progress, work.ranks)
    if state is not None:
        progress.go_back_to(state)
        progress.started, progress.earlier_seconds = state.started, state.seconds
        work.guard.remember([step.seconds for step in state.steps])
        progress.interruptions = state.interruptions + (len(state.steps) < state.total)
        if moves:
            progress.notes.append(f"on with {words.counted(work.plan.configuration.num_gpus, 'GPU')}, not as it began")
        if state.plan == progress.plan or not (state.plan or moves):  # without its digest, it is the one it began with
            progress.alternative, progress.moved_at = state.alternative, state.moved_at
        else:
            progress.moved_at = len(state.steps)
        progress.notes.append(f"resumed after step {len(state.steps)}")
    elif progress.notes:
        progress.notes.append("no checkpoint is left to go on from: the run starts again from step 0")
    return path


def _saved(plan: Plan, request: RunRequest, num_steps: int, *, has_results: bool) -> str:
    if has_results:
        return f"{words.counted(num_steps, 'step')} and the {folder.results(plan)} are saved in {request.output}"
    path, _ = checkpoint.latest(request.output / CHECKPOINTS)
    return "nothing was saved" if path is None else f"what was learned is saved in {path}"
