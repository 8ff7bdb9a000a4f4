"""Learn under a plan's configuration and, where memory runs out, under one of its alternatives after the other."""

from __future__ import annotations

import contextlib
import datetime
import signal
from dataclasses import replace
from pathlib import Path

from shallowflow.planner.plan import Plan

from . import checkpoint, dequantizing, fallback, folder, interrupts, promise, quantized
from .joining import together
from .learner import Diverged, Learner
from .progress import Progress
from .promise import Promise
from .ranks import SHORT, WELL, GivenUp, Lost, Ranks
from .record import FallbackRecord
from .request import RunError, RunFailed, RunRequest
from .trackers import Trackers
from .watch import Watcher
from .work import Work


def learned(work: Work, progress: Progress, path: Path | None) -> tuple[Learner | None, Promise]:
    """Go on from the checkpoint *path* until the work is done, interrupted, or cannot go on, which *progress* tells.

    Returns the last learner, with what was promised for it; None instead of a learner that holds nothing to keep.

    Raises:
        RunError: the step is not the planned one.
        RunFailed: memory ran out in a pass that is shared, and the others had enough.
        Lost: another process ended before it began to learn.
    """
    kept = together(work.ranks, lambda: promised(work.plan, progress.alternative, work.watcher, work.ranks.rank))
    trackers = Trackers(
        work.request.track if work.ranks.leads else (), work.request.output, folder.settings(work.plan, work.request)
    )
    try:
        while True:
            kept = _alike(work.ranks, kept)
            progress.notes += [note for note in kept.notes if note not in progress.notes]
            learner, trouble = _attempt(work, progress, kept, path, trackers)
            following = _following(work, progress, kept) if trouble else None
            if trouble is None or following is None:
                return _ended(work, progress, learner, kept, trouble), kept
            savable = _is_whole(work, learner, kept)
            alternative, kept = following
            path = _fall_back(work, progress, learner if savable else None, alternative, trouble)
            del learner
            fallback.free_memory()
    finally:
        dequantizing.restore()
        trackers.finish()
        progress.notes += trackers.news()


def _following(work: Work, progress: Progress, failed: Promise) -> tuple[int, Promise] | None:
    """The next alternative with what tracing says of it; one that a process finds to be another is passed over."""
    passed_over: set[int] = set()
    while True:
        alternative = fallback.following(work.plan, failed.candidate, passed_over)
        if alternative is None:
            return None
        doubt = kept = None
        try:
            kept = promised(work.plan, alternative, work.watcher, work.ranks.rank)
        except RunError as error:
            doubt = str(error)
        doubt = _trouble(work.ranks, doubt)
        if kept is not None and doubt is None:
            return alternative, kept
        passed_over.add(alternative)
        progress.notes.append(f"alternative {alternative + 1} is passed over: {doubt}")


def _alike(ranks: Ranks, kept: Promise) -> Promise:
    """*kept* with the evaluations that every stage has memory for, and what is to be noted of each."""
    if kept.candidate.configuration.num_stages == 1:
        return kept
    told = ranks.gathered((kept.evaluation_micro_batch_size, kept.evaluation_peak_bytes, kept.notes))
    sizes, peaks, notes = zip(*told, strict=True)
    return replace(
        kept,
        evaluation_micro_batch_size=min(sizes),
        evaluation_peak_bytes=max(peaks),
        notes=tuple(dict.fromkeys(note for each in notes for note in each)),
    )


def promised(plan: Plan, alternative: int | None, watcher: Watcher, rank: int = 0) -> Promise:
    """What tracing says of the step of the plan itself or of an alternative, as the process *rank* has it.

    Raises:
        RunError: it is not what was predicted.
    """
    with contextlib.suppress(ImportError):
        quantized.bitsandbytes()  # before tracing, which would import it without its compiled kernels
    watcher.stage("tracing the step")
    return promise.kept(plan, fallback.candidate(plan, alternative), rank)


def _attempt(
    work: Work, progress: Progress, kept: Promise, path: Path | None, trackers: Trackers
) -> tuple[Learner | None, str | None]:
    """Learn under one configuration; returns the learner, if one could be made, and why another is needed.

    Each process ends it with one vote: the one in which it hears that another has given up, or one at the end. Then all
    tell each other why, and whether they were asked to stop meanwhile.
    """
    learner: Learner | None = None
    trouble: str | None = None
    asked: list[int] = []
    try:
        work.watcher.stage("loading weights")
        learner = Learner.begin(work, progress, kept, path, trackers)
        if work.ranks.leads:
            folder.note_request(work.plan, work.request)
        with interrupts.deferred(
            work.ranks, asked, learner.must_stop, learner.is_updating, lambda number: _tell_heard(work, number)
        ) as check:
            learner.trainee.before_micro_batch = check
            learner.learn()
    except (RuntimeError, fallback.BeyondBudget) as error:
        if isinstance(error, RuntimeError) and not fallback.is_short(error):
            raise
        trouble = str(error).strip().split("\n")[0]
    except Diverged as error:
        progress.failure = str(error)
    except GivenUp:
        return learner, _unless_asked(work.ranks, progress, learner, asked, _trouble(work.ranks, None))
    if progress.lost:
        return learner, None
    with contextlib.suppress(GivenUp):
        if trouble is not None and kept.candidate.configuration.sharding == "weights":
            _tell_short(work, trouble)
        else:
            work.ranks.vote(WELL if trouble is None else SHORT)
    return learner, _unless_asked(work.ranks, progress, learner, asked, _trouble(work.ranks, trouble))


def _tell_heard(work: Work, number: int) -> None:
    """Say that a signal came, which may be obeyed seconds later; a launcher that ends all for a lost one says so."""
    if work.ranks.talks and number != signal.SIGINT:
        return
    where = "step" if work.ranks.num_stages > 1 else "micro-batch"
    again = "" if work.ranks.talks else "; Ctrl-C again ends at once"
    with contextlib.suppress(RuntimeError, OSError):  # it may have come in the midst of other words, or nobody listens
        work.watcher.note(f"stopping before the next {where}, and saving{again}")


def _tell_short(work: Work, trouble: str) -> None:
    """Vote for falling back, which the others hear unless they wait for this process's part of a matrix.

    Raises:
        GivenUp: another is short of memory as well.
        RunFailed: they do not hear; the end of this process ends their waiting.
    """
    try:
        work.ranks.vote(SHORT, patience=SHORT_PATIENCE)
    except Lost as lost:
        raise RunFailed(
            f"out of memory ({trouble}) in a pass that other processes had enough for; the newest checkpoint is kept; "
            "plan again with more --headroom"
        ) from lost


SHORT_PATIENCE = datetime.timedelta(seconds=60)
"""For processes that make the same pass and are as short of memory, where they are."""


def _unless_asked(
    ranks: Ranks, progress: Progress, learner: Learner | None, asked: list[int], trouble: str | None
) -> str | None:
    """The *trouble*; None where a process was *asked* to stop as well, which ends the run with what is saved."""
    if trouble is None or not any(ranks.gathered(bool(asked))):
        return trouble
    progress.outcome = "interrupted"
    if ranks.led(learner is not None and learner.updating):
        progress.failure = "interrupted within an update, which is half made and not kept"
    return None


def _trouble(ranks: Ranks, mine: str | None) -> str | None:
    """Why another configuration is needed: the first reason that any process has."""
    for rank, told in enumerate(ranks.gathered(mine)):
        if told is not None:
            return told if ranks.size == 1 else f"rank {rank}: {told}"
    return None


def _is_whole(work: Work, learner: Learner | None, kept: Promise) -> bool:
    """Whether *learner* holds whole updates; where the model is cut, whether all processes' do, which all ask."""
    mine = learner is not None and not learner.updating
    is_cut = kept.candidate.configuration.num_stages > 1
    return all(work.ranks.gathered(mine)) if is_cut else mine


def _ended(
    work: Work, progress: Progress, learner: Learner | None, kept: Promise, trouble: str | None
) -> Learner | None:
    """Save what there is, also of a run that failed; a half-made update is not worth keeping."""
    if trouble is not None:
        progress.failure = (
            f"out of memory after step {len(progress.steps)} ({trouble}), and the plan has no alternative left that "
            "needs less"
        )
    if progress.failure is None:
        return learner
    progress.outcome = "failed"
    if progress.lost:
        return None if learner is None or learner.updating else learner
    whole = _is_whole(work, learner, kept)
    if learner is None or not whole:
        return None
    learner.save_state()
    return learner


def _fall_back(work: Work, progress: Progress, learner: Learner | None, alternative: int, trouble: str) -> Path | None:
    """Choose *alternative* and return the checkpoint to go on from.

    It is of the last finished step, unless memory ran out in the middle of an update: then the updates since the last
    checkpoint are made again.
    """
    chosen = work.plan.alternatives[alternative]
    progress.alternative, progress.peak, progress.peaks = alternative, None, []
    progress.fallbacks.append(
        FallbackRecord(
            step=len(progress.steps),
            went_on_at=len(progress.steps),
            reason=trouble,
            alternative=alternative,
            configuration=chosen.configuration,
            peak_reserved_bytes=chosen.prediction.peak_reserved_bytes,
        )
    )
    work.watcher.note(fallback.told(progress.fallbacks[-1]))
    if learner is not None:
        learner.save_state()
    path, state = found(work.request, progress, work.ranks)
    if state is None:
        progress.start_again()
    else:
        progress.go_back_to(state)
    progress.fallbacks[-1] = replace(progress.fallbacks[-1], went_on_at=len(progress.steps))
    return path


def found(request: RunRequest, progress: Progress, ranks: Ranks) -> tuple[Path | None, checkpoint.State | None]:
    """The newest good checkpoint, where this process reads them, and what the run had come to in it, which all hear.

    Why newer ones are not believed goes into the notes.
    """
    path: Path | None = None
    if ranks.leads:
        checkpoint.finish(request.output / folder.CHECKPOINTS)
        path, doubts = checkpoint.latest(request.output / folder.CHECKPOINTS)
        progress.notes += doubts
    return path, ranks.led(None if path is None else checkpoint.read(path))
