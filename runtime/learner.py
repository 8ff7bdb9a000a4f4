"""A run under one configuration: steps, evaluations at intervals, checkpoints, the best of what is learned."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass
from pathlib import Path

from shallowflow.planner.wall_time import save_interval_seconds

from . import batches, checkpoint, dequantizing, fallback, folder, sample, trainees
from .evaluate import mean_loss, perplexity
from .joining import end_together
from .meter import MeasuredPeak, highest
from .progress import Progress, exhausted, improves
from .promise import Promise
from .ranks import WELL, GivenUp, Lost
from .record import EvaluationRecord, StepRecord
from .request import RunError
from .spot import Wish
from .step import Trainee
from .trackers import Trackers
from .train import train as training_steps
from .watch import Money
from .work import Work


class Diverged(Exception):
    """A loss that is no number, where no loss scale could be to blame."""


@dataclass(slots=True)
class Learner:
    """A model that learns *work* under one configuration.

    Attributes:
        updating: from the begin of an optimizer's update until its step counts: what is learned is then no step's.
        asked_to_save: whether a notice wants a checkpoint of a model that is cut.
    """

    work: Work
    progress: Progress
    promise: Promise
    trainee: Trainee
    trackers: Trackers
    updating: bool = False
    asked_to_save: bool = False

    @classmethod
    def begin(cls, work: Work, progress: Progress, promise: Promise, path: Path | None, trackers: Trackers) -> Learner:
        """Load the base, make it what the configuration says, and put the checkpoint *path* into it.

        Of several processes the first one alone is given the path, and tells the others what it holds.

        Raises:
            RunError: the checkpoint is another model's.
        """
        trainee = trainees.loaded(
            work.plan, work.request, work.source, promise.candidate.configuration, work.device, work.ranks
        )
        progress.dequantizing = dequantizing.choose(trainee.model, work.device)
        made = cls(work, progress, promise, trainee, trackers)
        trainee.optimizer.register_step_pre_hook(lambda *_: made._begin_update())
        work.ranks.vote(WELL)  # or those with memory for the model would wait for what one without it never sends
        kept = work.ranks.led(None if path is None else checkpoint.load(path))
        if kept is not None:
            made._take_over(kept)
        return made

    def _take_over(self, kept: checkpoint.Snapshot) -> None:
        try:
            checkpoint.restore(kept, self.trainee)
        except RunError:
            end_together()  # all were given the same
            raise
        if kept.best is not None:
            self.progress.best = {name: kept.best[name] for name in checkpoint.learned(self.trainee)}
            checkpoint.put_learned(self.trainee, kept.best)
            self._save_best()
            checkpoint.put_learned(self.trainee, kept.learned)

    def _save_best(self) -> None:
        folder.save_best(self.work.request.output, self.work.plan, self.trainee, self.work.tokenizer)

    @property
    def is_cut(self) -> bool:
        """Whether other processes hold the other layers, so that nothing can be saved without them."""
        return self.trainee.pipe is not None

    def is_updating(self) -> bool:
        """Whether an update is being made, or was made and does not count yet."""
        return self.updating

    def _begin_update(self) -> None:
        self.updating = True

    def learn(self) -> None:
        """Answer, evaluate, train, evaluate and answer again; Ctrl-C ends it early, with what was learned saved.

        Raises:
            torch.OutOfMemoryError, BeyondBudget, GivenUp: another configuration is needed.
            Diverged: the loss is no number.
            Lost: another process has ended; what was learned is saved.
        """
        progress = self.progress
        try:
            if not progress.steps and not progress.before:
                progress.before = self._answers("before")
            self._evaluate_when_due()
            if not self._stops():
                self._train()
            self.save_state()
            self._take_best()
            progress.after = self._answers("after")
            if len(progress.steps) < self.work.total:
                progress.outcome = "stopped early"
        except KeyboardInterrupt:
            progress.outcome = self.work.guard.outcome
            if self.updating:  # a second signal, which did not wait
                progress.failure = "interrupted within an update, which is half made and not kept"
            else:
                self.save_state()
        except Lost as lost:
            progress.lost, progress.failure = True, f"{lost} after step {len(progress.steps)}"
            if not self.is_cut:
                self.save_state()
        except (RuntimeError, fallback.BeyondBudget, GivenUp) as error:
            short = not isinstance(error, RuntimeError) or fallback.is_short(error)
            # now: tracing another configuration takes a while, and no signal waits for it; but others hold a cut model
            if short and not (self.updating or self.is_cut):
                self.save_state()
            raise
        finally:
            self.trainee.optimizer.zero_grad(set_to_none=True)

    def _train(self) -> None:
        work, progress = self.work, self.progress
        done, configuration = len(progress.steps), self.promise.candidate.configuration
        work.watcher.stage("training", max(0, work.total - done))
        endless = batches.steps(
            work.windows,
            configuration.micro_batch_size,
            configuration.gradient_accumulation_steps * configuration.num_replicas,
            configuration.sequence_length,
            work.request.seed,
            first_whole=progress.began_at,
        )
        made = training_steps(
            self.trainee,
            itertools.islice(endless, done, max(done, work.total)),
            work.device,
            on_peak=self._keep_peak,
            usd_per_hour=work.request.usd_per_hour,
            seed=work.request.seed,
            first=done,
        )
        work.guard.step_begins = True
        for record in made:
            self._hear(record)
            self._evaluate_when_due()
            self._save_when_due()
            if self._stops():
                break
            if record.memory_measured and progress.peak is not None and len(progress.steps) < work.total:
                fallback.check_budget(work.plan, self.promise.candidate, progress.peak)
            work.guard.step_begins = True

    def _hear(self, record: StepRecord) -> None:
        scale = self.trainee.loss_scale
        helpless = not scale.dynamic or scale.is_helpless
        if helpless and not (math.isfinite(record.loss) and math.isfinite(record.gradient_norm)):
            raise Diverged(
                f"the loss of step {record.index} is {record.loss}, its gradients' norm {record.gradient_norm}, in "
                f"{self.work.plan.compute_dtype}, and no lower loss scale can help; look at the data, or give a lower "
                "--learning-rate in a new --output"
            )
        self.progress.steps.append(record)
        self.updating = False
        self.work.guard.stepped(record.seconds)
        if record.memory_measured:
            self._share_peak()
        guard = self.work.guard
        self.trackers.step(
            record, self.progress.peak, None if guard.spend is None else guard.spend.usd(guard.session_seconds())
        )
        self._tell_money()
        self.work.watcher.step(record, self.progress.peak)

    def _keep_peak(self, peak: MeasuredPeak) -> None:
        self.progress.peaks = [peak]

    def _share_peak(self) -> None:
        """Hear all processes' peaks; only once the step counts, for another may have run out in its update."""
        self.work.ranks.vote(WELL)
        self.progress.peaks = self.work.ranks.gathered(self.progress.peaks[0])
        self.progress.peak = highest(self.progress.peaks)

    def _stops(self) -> bool:
        progress = self.progress
        return exhausted(progress.evaluations, progress.best_step, self.work.request.patience)

    # Evaluations

    def _evaluate_when_due(self) -> None:
        work, progress = self.work, self.progress
        step, every = len(progress.steps), work.request.eval_every
        due = step in (0, work.total) or (every is not None and step % every == 0)
        if not (work.eval_windows and due) or any(record.step == step for record in progress.evaluations):
            return
        size = self.promise.evaluation_micro_batch_size
        when = {0: "before training", work.total: "after training"}.get(step, f"after step {step}")
        work.watcher.stage(f"perplexity {when}", -(-len(work.eval_windows) // (size * self.trainee.ranks.num_replicas)))
        began = time.perf_counter()
        loss = mean_loss(self.trainee, work.eval_windows, size, work.device, self._advance)
        record = EvaluationRecord(
            step=step,
            loss=loss,
            perplexity=perplexity(loss),
            seconds=time.perf_counter() - began,
            tokens=sum(window.num_targets for window in work.eval_windows),
        )
        progress.evaluations.append(record)
        self.trackers.evaluation(record)
        work.watcher.evaluated(record)
        if work.request.patience is not None and improves(progress.evaluations, progress.best_step):
            progress.best_step = step
            progress.best = {n: t.to("cpu", copy=True) for n, t in checkpoint.learned(self.trainee).items()}
            self._save_best()

    def _advance(self) -> None:
        self.trainee.before_micro_batch()
        self.work.watcher.advance()

    def _take_best(self) -> None:
        if self.work.request.patience is not None and self.progress.best is not None:
            checkpoint.put_learned(self.trainee, self.progress.best)

    def _answers(self, when: str) -> list[str]:
        work = self.work
        if not work.prompts:
            return []
        work.watcher.stage(f"samples {when} training", len(work.prompts))
        length = work.plan.configuration.sequence_length
        found = []
        for tokens in work.prompts:
            found.append(sample.answer(self.trainee, work.tokenizer, tokens, length, work.device))
            work.watcher.advance()
        return found

    # Checkpoints

    def _save_when_due(self) -> None:
        progress, every = self.progress, self.work.request.save_every
        if every is not None:
            due = len(progress.steps) % every == 0
        else:
            since = time.perf_counter() - max(progress.clock, progress.saved_at)
            due = since >= save_interval_seconds(progress.saving_seconds)
        due = due or self.asked_to_save
        if self.work.ranks.led(due) if self.is_cut else due:
            self._try_to_save()

    def _try_to_save(self) -> None:
        """Write a checkpoint; one that cannot be written, as on a full disk, ends no run: the next may be."""
        progress = self.progress
        try:
            self.save_state()
        except OSError as error:
            note = f"no checkpoint after step {len(progress.steps)}: {error.strerror or error}"
            progress.notes.append(note)
            progress.saved_at = time.perf_counter()
            self.work.watcher.note(note)

    def save_state(self) -> None:
        """Write a checkpoint, unless the newest holds all there is, or another process writes them.

        Where the model is cut, all processes call this together.
        """
        progress, leads = self.progress, self.work.ranks.leads
        if progress.mark == progress.saved or not (leads or self.is_cut):
            return
        path, began = self.work.request.output / folder.CHECKPOINTS, time.perf_counter()
        learned = checkpoint.gathered(self.trainee, progress.best)
        made = checkpoint.write(path, learned, progress.state(self.trainee)) if leads else None
        progress.saved, progress.saved_at = progress.mark, time.perf_counter()
        progress.saving_seconds = progress.saved_at - began
        if made is not None:
            self.work.guard.saved(made, len(progress.steps), progress.saving_seconds)
        if self.asked_to_save:
            self.work.guard.insist()
            self.asked_to_save = False

    # What may end a run before its time

    def must_stop(self) -> bool:
        """Save where a notice asks for it; returns whether to end, as after Ctrl-C. Asked before every micro-batch."""
        guard = self.work.guard
        wish = guard.wish()
        untold = self.trackers.news()
        self.progress.notes += untold
        for line in (*guard.news(), *untold):
            self.work.watcher.note(line)
        if wish is Wish.SAVE and self.is_cut:
            self.asked_to_save = True  # once the step is over, when all can
        elif wish is Wish.SAVE:
            self.save_state()
            guard.insist()
        return wish is Wish.STOP

    def _tell_money(self) -> None:
        guard, progress = self.work.guard, self.progress
        if guard.spend is None:
            return
        left = max(0, self.work.total - len(progress.steps))
        spent = guard.spend.usd(guard.session_seconds())
        self.work.watcher.money(
            Money(
                usd=spent,
                projected_usd=guard.projected_usd(left),
                budget_usd=guard.spend.budget_usd,
                interruptions=progress.interruptions,
            )
        )
