"""The training loop, readable top to bottom: set up, fit, evaluate, leave.

    deepspeed launch/train.py --config configs/base.json --run-dir runs/base

One step trains on one window: N contiguous segments of every lane. What a step needs is a pure function of the position
(tick, tokens) and the configuration; the only things carried from step to step are weights, Adam's moments, the lanes'
states and the curriculum's, and these are what a checkpoint holds. So the same command starts a run, resumes it, or
finds it finished.
"""

import json
import logging
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from memformer_dist import agreement, checkpoint, evaluate, metrics, saving, start
from memformer_dist.checkpoint import Contents, ReadoutGroup, build_cell
from memformer_dist.config import RunConfig
from memformer_dist.curriculum import Curriculum
from memformer_dist.data.dataset import TokenDataset
from memformer_dist.data.labels import expect_labels_ahead
from memformer_dist.data.open_data import training_reader
from memformer_dist.data.windows import Counts, WindowReader
from memformer_dist.errors import CorpusError, UserError
from memformer_dist.files import read_json, write_text
from memformer_dist.initial import find_initial, starting_cell
from memformer_dist.logs import EVERY_S, ProgressReport, tracked
from memformer_dist.metrics import LOGGED_AGES, LossByAge, Losses, count_right
from memformer_dist.monitor import Monitor
from memformer_dist.mrbp.drift import drift_problem, exceeds
from memformer_dist.mrbp.readout_size import choose_readout_group
from memformer_dist.optimizer import adamw, decay_begins, learning_rate
from memformer_dist.progress import Evaluation, HeldOut, Interval, Position
from memformer_dist.runtime import StopRequest, lock_run_dir
from memformer_dist.segment import Segment, Tensors
from memformer_dist.token_texts import token_texts
from memformer_dist.world import World
from memformer_dist.zero.engine import Engine, StepResult

log = logging.getLogger(__name__)


def train(config: RunConfig, run_dir: Path, corpora: tuple[TokenDataset, TokenDataset], world: World) -> dict | None:
    """Start, resume or finish the run in `run_dir`. Returns its summary, or None if it was stopped before the end.

    Args:
        corpora: the training and the validation split.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with lock_run_dir(run_dir, world):
        agreement.require_run(world, config, corpora, run_dir)
        trainer = Trainer(config, run_dir, corpora, world)
        try:
            reason = trainer.fit()
            summary = None if reason else trainer.finish()
            if summary is None:
                reason = reason or trainer.stop.agreed()
                log.info("stopped by %s at step %d; the same command resumes", reason, trainer.position.step)
            trainer.stop.clear()  # also where it came too late: it was meant for this run, not for the next
            return summary
        finally:
            trainer.close()


WITHOUT_LABELS = StepResult(0.0, applied=False)  # of a window in which no lane of any rank has a label


class Trained(NamedTuple):
    """What a step leaves for the log and the curriculum."""

    result: StepResult
    nll: float  # over all ranks; 0, as are labels and right, if nothing was applied
    labels: float
    right: float
    state_gradient_squares: Tensor  # [N], of this rank's lanes and of the loss that the engine scales


class Trainer:
    """A run on one rank. Collective throughout: every rank makes the same calls in the same order."""

    def __init__(self, config: RunConfig, run_dir: Path, corpora: tuple[TokenDataset, TokenDataset], world: World):
        began = time.perf_counter()
        self.config, self.run_dir, self.world = config, run_dir, world
        self.train_corpus, self.valid_corpus = corpora
        self.stop = StopRequest(run_dir, world, config.checkpoint.before_job_ends_s)
        lanes, share = world.lanes_of_rank(config.data.lanes), config.lanes_per_group(world.size)
        self.reader = training_reader(config.data, self.train_corpus, lanes=lanes, device=world.device)
        self.groups = [range(first, first + share) for first in range(lanes.start, lanes.stop, share)]

        looks = world.is_main and not config.data.task
        labels = world.on_all_or_raise(lambda: start.find_labels(config, corpora) if looks else None)
        resumed = checkpoint.newest(run_dir, world)
        changes = resumed.changes(config, self.train_corpus) if resumed else {}
        self.position = resumed.contents.position if resumed else Position()
        self.interval = resumed.contents.interval if resumed else Interval()
        self.held_out = resumed.contents.held_out if resumed else HeldOut()
        self.curriculum = Curriculum(
            config.mrbp.window,
            self.position.step,
            resumed.contents.curriculum if resumed else None,
            changed="mrbp.window" in changes,
        )
        auto = config.mrbp.readout_group == "auto"
        self.chosen_group = resumed.contents.readout_group if resumed and auto else None
        self.labels_at = self.position.tick  # where a window with labels was seen last, in this part of the run
        self.saved, self.is_anchor = self.position.model_copy(), resumed is not None and resumed.contents.anchor
        self.saved_best = self.held_out.best
        self.evaluated: tuple[tuple[int, int | None], dict[str, Losses]] | None = None  # the latest: step, segments
        self.began = began - self.position.wall_s  # as if the run had never been interrupted

        world.on_all_or_raise(lambda: start.expect_trainable(config, self.train_corpus.vocabulary))
        initial = None if resumed else find_initial(config, run_dir, self.train_corpus.vocabulary, world)
        cell = starting_cell(config, self.train_corpus.vocabulary, resumed=resumed, initial=initial)
        self.parameters = sum(parameter.numel() for parameter in cell.parameters())
        self.engine = Engine(
            cell,
            adamw(cell, config.optimizer),
            world,
            config.mrbp,
            settings=config.deepspeed,
            precision=config.training.precision,
            gradient_clipping=config.optimizer.gradient_clipping,
            seed=config.training.seed,
        )
        self.states = [self.engine.module.empty_state(len(group), device=world.device) for group in self.groups]
        if resumed:
            self.engine.load_moments(self.position.updates, resumed.moment)
            self.states = [
                resumed.load_lanes(group, empty) for group, empty in zip(self.groups, self.states, strict=True)
            ]

        self.constants = metrics.constants_of(
            config, world, self.states[0], partial(build_cell, config, self.train_corpus.vocabulary)
        )
        tokenizer = None if config.data.task else self.valid_corpus.tokenizer()
        self.texts = None if tokenizer is None else token_texts(tokenizer)
        self.evaluation_plan = evaluate.plan(
            self.valid_corpus,
            world.size,
            lanes=config.data.lanes,
            segment_length=config.data.segment_length,
            warmup_segments=config.training.evaluate_warmup_segments,
        )
        self.monitor = Monitor(run_dir, self.position, configuration=config.to_json(), is_main=world.is_main)
        if world.is_main:
            if resumed is None:
                start.introduce_fresh(run_dir, initial)
            start.record(run_dir, config, tokenizer, world, self.position.step, initial)
            start.introduce(config, world, self.reader, self.curriculum.window, self.parameters)
            start.introduce_evaluations(config, self.evaluation_plan)
            if labels is not None:
                assert isinstance(self.reader, WindowReader)
                plan, replays = self.evaluation_plan, self.engine.module.carries_gradient
                start.advise(config, self.train_corpus, self.reader.schedule, labels, plan, replays=replays)
            start.introduce_resumed(resumed, config, changes, self.curriculum.window, self.engine.module)
        done, total = self.position.tokens, config.training.tokens
        self.progress = ProgressReport("train", total=total, unit="tokens", done=done, enabled=world.is_main)

    # ---- fit ---------------------------------------------------------------------------------------------------------

    def fit(self) -> str | None:
        """Train to the end of the token budget, until no evaluation improves, or until asked to stop; returns who asked."""
        config, position = self.config, self.position
        self.engine.module.train()
        if self.world.is_main and not self._done():
            (self.run_dir / "summary.json").unlink(missing_ok=True)  # of a shorter run, which this one continues
        # A request may have come while the run was set up; an evaluation is due if the run was stopped just before it.
        reason = None if self._done() else self.stop.agreed() or self._evaluate_if_due()
        readout_group = None if reason or self._done() else self._readout_group()
        skipped_in_a_row = 0
        while readout_group is not None and not (reason or self._done()):
            self._check_next_window()
            tokens_before = position.tokens
            trained = self._step(readout_group)
            reason = self.stop.agreed()
            if trained.result is not WITHOUT_LABELS:
                skipped_in_a_row = 0 if trained.result.applied else skipped_in_a_row + 1
            if position.step % config.monitor.log_every_steps == 0 or self._done():
                self._log(trained)
            if skipped_in_a_row == config.training.skipped_steps_limit:
                raise UserError(
                    f"training.skipped_steps_limit: the gradients of {skipped_in_a_row} steps in a row, up to step"
                    f" {position.step}, were not finite; the last checkpoint is of step {self.saved.step}. A lower"
                    " optimizer.learning_rate usually helps"
                )
            self._log_change(self.curriculum.after_step(position.step, *trained[1:4]))
            if not reason:
                reason = self._evaluate_if_due()
            is_due = crosses(tokens_before, position.tokens, config.checkpoint.every_tokens)
            if reason or self._done() or is_due or self._is_best_unsaved():
                self._save()
        self.progress.close()
        return reason

    def _done(self) -> bool:
        return self._ended_by() is not None

    def _ended_by(self) -> str | None:
        """The field that ends the run here; None if it goes on."""
        training = self.config.training
        if self.position.tokens >= training.tokens:
            return "training.tokens"
        is_exhausted = self.held_out.is_exhausted(training.early_stopping_patience)
        return "training.early_stopping_patience" if is_exhausted else None

    def _check_next_window(self) -> None:
        """Raise CorpusError on all ranks if one would meet a damaged document; what was trained is saved first."""
        problem = self.world.first_problem(self.reader.prepare(self.position.tick, self.curriculum.window))
        if problem is not None:
            self._save()
            raise CorpusError(problem)

    def _readout_group(self) -> int:
        """mrbp.readout_group. "auto" is chosen once, by measuring a segment, and kept in the checkpoint.

        The choice leaves room for the longest window to come. It is made again if lane groups have another size.
        """
        configured, lanes, chosen = self.config.mrbp.readout_group, self.groups[0], self.chosen_group
        if configured != "auto":
            return configured
        if chosen is None or chosen.lanes != len(lanes):
            self._check_next_window()
            segment, window = self.reader.segment(self.position.tick, lanes), self.curriculum.largest
            choice = choose_readout_group(
                self.engine,
                self.engine.module,
                segment.to(self.world.device),
                self.states[0],
                self.world,
                window=window,
                reserved=self.engine.first_step_bytes(self.states[0], window),
            )
            self.chosen_group = chosen = ReadoutGroup(segments=choice.readout_group, lanes=len(lanes))
            log.info(
                f"mrbp.readout_group: {choice.readout_group} segments, because a segment of {len(lanes)} lanes takes"
                f" {choice.segment_bytes / 2**20:,.1f} MiB, {choice.free_bytes / 2**20:,.0f} MiB are free, and"
                f" a window has {window} segments at most; kept for the rest of the run"
            )
        return chosen.segments

    def _labels(self, counts: Counts) -> int:
        """Labels of the next window over the lanes of all ranks; loss masks are read by the rank that has the lane."""
        if counts.labels is not None:
            return counts.labels
        tick, window = self.position.tick, self.curriculum.window
        return int(self.world.all_reduce_sum([self.reader.labels(tick, tick + window, self.reader.lanes)])[0])

    def _step(self, readout_group: int) -> Trained:
        """One window of every lane: its gradient, one reduction, one update."""
        began, processor_began, waited = time.perf_counter(), time.process_time(), self.reader.wait_s
        config, position, segments = self.config, self.position, self.curriculum.window
        counts = self.reader.counts(position.tick, position.tick + segments)
        valid_tokens = self._labels(counts)
        if decay_begins(config.optimizer, position.tokens, position.tokens + valid_tokens, config.training.tokens):
            self._save(anchor=True)  # resumed from here, a longer run is one that was as long from the start
            began, processor_began = time.perf_counter(), time.process_time()
        losses = LossByAge(self.world.device, LOGGED_AGES)
        right = torch.zeros((), dtype=torch.float64, device=self.world.device)

        def observe(t: int, segment: Segment, nll: Tensor) -> None:
            losses.add(segment, nll)
            right.add_(count_right(segment, nll))

        windows = [self.reader.window(position.tick, segments, group) for group in self.groups]
        if valid_tokens > 0:
            window = self.engine.accumulate(
                windows,
                self.states,
                valid_tokens=valid_tokens,
                readout_group=readout_group,
                observe=observe,
            )
            rate = learning_rate(config.optimizer, position.tokens + valid_tokens, config.training.tokens)
            result = self.engine.step(rate)
            self.labels_at = position.tick
        else:  # an update without a gradient would still move the weights, by Adam's moments and by their decay
            if isinstance(self.reader, WindowReader):  # every document of a task has labels
                sources = self.train_corpus.sources(config.data.min_tokens)
                expect_labels_ahead(self.reader.schedule, sources, since=self.labels_at, tick=position.tick)
            window, result = self.engine.advance(windows, self.states), WITHOUT_LABELS
        self.states = window.states if result.applied else [self._finite_lanes(state) for state in window.states]
        drift, relative = torch.stack([window.drift, window.relative_drift.max()]).tolist()  # waits for the device
        is_beyond = exceeds(relative, config.drift_limit)
        measured = [drift, is_beyond, float(right), *losses.sums.flatten().tolist()]
        drift, ranks_beyond, were_right, *sums = self.world.all_reduce_sum(measured)
        if ranks_beyond:  # nothing of this step is saved
            problem = drift_problem(window.relative_drift, self.states[0]._fields, config.drift_limit)
            raise UserError(
                f"{self.world.first_problem(problem)}. This was step {position.step + 1}; the last checkpoint is of step"
                f" {self.saved.step}"
            )

        seconds = time.perf_counter() - began
        position.add(
            segments=segments,
            tokens=valid_tokens,
            applied=result.applied,
            seconds=seconds,
            processor_s=time.process_time() - processor_began,
        )
        self.interval.add(
            segments=segments,
            tokens=valid_tokens,
            input_tokens=counts.input_tokens,
            documents=counts.documents,
            applied=result.applied,
            losses=sums,
            right=were_right,
            drift=drift,
            step_s=seconds,
            rollout_s=window.rollout_s,
            wait_s=self.reader.wait_s - waited,
        )
        ages = len(LOGGED_AGES)
        totals = (sum(sums[:ages]), sum(sums[ages:]), were_right) if result.applied else (0.0, 0.0, 0.0)
        return Trained(result, *totals, window.state_gradient_squares)

    def _finite_lanes(self, state: Tensors) -> Tensors:
        """After a skipped step: lanes whose state is not finite start again from the empty one."""
        empty = self.engine.module.empty_state(len(state[0]), device=self.world.device)
        finite = torch.stack([torch.isfinite(x).reshape(len(x), -1).all(1) for x in state]).all(0)  # [B]
        pairs = zip(state, empty, strict=True)
        return state._make(torch.where(finite.view(-1, *[1] * (x.dim() - 1)), x, fresh) for x, fresh in pairs)

    def _log(self, trained: Trained) -> None:
        """A record of the interval, which begins again. Collective."""
        config, device, tokens = self.config, self.world.device, self.position.tokens
        on_gpu = device.type == "cuda"
        observed = metrics.Observed(
            constants=self.constants,
            interval=self.interval,
            learning_rate=learning_rate(config.optimizer, tokens, config.training.tokens),
            gradient_norm=trained.result.gradient_norm,
            state_gradient_squares=self.world.all_reduce_sum(trained.state_gradient_squares.tolist()),
            diagnosis=self._diagnose(),
            allocated_bytes=torch.cuda.max_memory_allocated() if on_gpu else None,
            allocation_retries=torch.cuda.memory_stats()["num_alloc_retries"] if on_gpu else None,
        )
        scalars, curves = metrics.training_scalars(observed), metrics.training_curves(observed)
        self.monitor.log(self.position, scalars, curves)
        self.progress.update(
            tokens,
            f"step {self.position.step}, loss {observed.losses.loss:.4f}, {observed.tokens_per_s:,.0f} tokens/s",
        )
        self.interval = Interval()

    @torch.no_grad()
    def _diagnose(self) -> dict[str, float]:
        """How the cell uses its memory: the first lane group's last segment, read again with the memory it left."""
        segment = self.reader.segment(self.position.tick - 1, self.groups[0]).to(self.world.device)
        segment = segment._replace(reset=torch.zeros_like(segment.reset))
        self.engine.module.eval()
        found = self.engine("diagnose", segment, self.states[0])
        self.engine.module.train()
        return {name: float(value) for name, value in found.items()}

    def _log_change(self, change: str | None) -> None:
        if change:
            log.info("step %d: %s", self.position.step, change)

    # ---- evaluate ----------------------------------------------------------------------------------------------------

    def _evaluate_if_due(self) -> str | None:
        """Evaluate once every training.evaluate_every_tokens, and at the end; returns who asked to stop meanwhile."""
        position, training = self.position, self.config.training
        every = 1 if self._done() and training.evaluate_every_tokens else training.evaluate_every_tokens
        if not crosses(position.evaluated, position.tokens, every):
            return None
        losses = self._evaluate("eval", training.evaluate_segments)
        if losses is not None:
            position.evaluated = position.tokens
            carried = losses["carried"].loss
            self.held_out.add(
                Evaluation(step=position.step, tokens=position.tokens, loss=carried),
                corpus=self.valid_corpus.fingerprint,
                segments=training.evaluate_segments,
                warmup_segments=training.evaluate_warmup_segments,
            )
            self._log_change(str(self.held_out))
            if not self._done():
                self._log_change(self.curriculum.after_evaluation(carried, losses["no_memory"].loss - carried))
        return self.stop.agreed()

    def _evaluate(self, family: str, segments: int | None) -> dict[str, Losses] | None:
        """Held-out losses by mode, logged as `family`/...; None if the run was asked to stop meanwhile."""
        module, is_final = self.engine.module, family == "final"
        if self.evaluated is not None and self.evaluated[0] == (self.position.step, segments):
            return self._log_losses(family, self.evaluated[1])  # the one at the end has read all documents already
        module.eval()
        losses = evaluate.evaluate(
            self.engine,
            module,
            self.evaluation_plan,
            self.world,
            segments=segments,
            lanes_per_group=self.config.lanes_per_group(self.world.size),
            texts=self.texts,
            show=lambda ticks: tracked(
                ticks,
                "final evaluation" if is_final else "evaluation",
                "segments per lane",
                enabled=self.world.is_main,
                delay_s=0.0 if is_final else EVERY_S,
            ),
            stop=lambda: self.stop.agreed() is not None,
        )
        module.train()
        if losses is None:
            return None
        self.evaluated = (self.position.step, segments), losses
        return self._log_losses(family, losses)

    def _log_losses(self, family: str, losses: dict[str, Losses]) -> dict[str, Losses]:
        self.monitor.log(self.position, metrics.evaluation_scalars(family, losses))
        carried, no_memory, no_state = (losses[mode].loss for mode in ("carried", "no_memory", "no_state"))
        bits = losses["carried"].bits_per_byte
        self._log_change(
            f"held-out loss {carried:.4f}, memory reset {no_memory:.4f}, everything reset {no_state:.4f}"
            + ("" if bits is None else f", {bits:.4f} bits per byte")
        )
        return losses

    # ---- leave -------------------------------------------------------------------------------------------------------

    def finish(self) -> dict | None:
        """Evaluate on the held-out documents and write summary.json; None if stopped on the way.

        Logged as final/..., because evaluations on the way may have read other segments (training.evaluate_segments);
        what they have read is also the last point of their curve.
        """
        path, position = self.run_dir / "summary.json", self.position
        earlier = (read_json(path) or {}) if self.world.is_main else {}
        known = json.dumps(earlier) if earlier.get("steps") == position.step else None
        if known := self.world.broadcast_first(known):  # rank 0 alone reads it: all ranks must go the same way
            summary = json.loads(known)
            ended_by = summary.get("ended_by", "training.tokens")  # the only end of runs of earlier versions
            log.info("this run is finished, see %s; a larger %s continues it", path, ended_by)
            return summary
        log.info("training is over: %s ends it", self._ended_by())
        reason = self._evaluate_if_due()  # the run may have been stopped before
        self._save()
        losses = None if reason else self._evaluate("final", self.config.training.final_evaluate_segments)
        if losses is None:
            return None
        summary = evaluate.summary(losses) | {
            "tokens_per_s": position.tokens / position.seconds,
            "wall_s": time.perf_counter() - self.began,
            "world_size": self.world.size,
            "tokens": position.tokens,
            "steps": position.step,
            "parameters": self.parameters,
            "ended_by": self._ended_by(),
            "best": checkpoint.best_of(self.run_dir, self.held_out),
        }
        if self.world.is_main:
            write_text(path, json.dumps(summary, indent=2) + "\n")
        return summary

    def _is_best_unsaved(self) -> bool:
        return self.config.checkpoint.keep_best and self.held_out.best != self.saved_best

    def _save(self, *, anchor: bool = False) -> None:
        same_step = self.saved.step == self.position.step
        anchor = anchor or (same_step and self.is_anchor)
        if same_step and anchor == self.is_anchor and self.saved.evaluated == self.position.evaluated:
            return
        self.position.wall_s = time.perf_counter() - self.began
        every = self.config.checkpoint.anchor_every_tokens
        self.is_anchor = anchor or crosses(self.saved.tokens, self.position.tokens, every)
        contents = Contents(
            position=self.position,
            interval=self.interval,
            held_out=self.held_out,
            curriculum=self.curriculum.progress,
            readout_group=self.chosen_group,
            corpus=self.train_corpus.fingerprint,
            anchor=self.is_anchor,
            vocabulary=self.train_corpus.vocabulary,
            config=self.config,
        )
        state = self.states[0]._make(torch.cat(column) for column in zip(*self.states, strict=True))
        saving.save(self.run_dir, self.engine, self.world, contents=contents, lanes=self.reader.lanes, state=state)
        self.saved, self.saved_best = self.position.model_copy(), self.held_out.best

    def close(self) -> None:
        self.progress.close()
        self.monitor.close()


def crosses(before: int, after: int, every: int | None) -> bool:
    """Whether a multiple of `every` lies in (before, after]."""
    return every is not None and after // every > before // every
