"""The training loop, readable top to bottom: set up, fit, evaluate, leave.

    deepspeed launch/train.py --config configs/base.json --run-dir runs/base

One step trains on one window: N contiguous segments of every lane. What a step needs is a pure function of the position
(tick, tokens) and the configuration; the only things carried from step to step are weights, Adam's moments, the lanes'
states and the curriculum's, and these are what a checkpoint holds. So the same command starts a run, resumes it, or
finds it finished.
"""

import json
import math
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from memformer_dist import checkpoint, evaluate, monitor
from memformer_dist.checkpoint import Contents, ReadoutGroup, build_cell
from memformer_dist.config import RunConfig
from memformer_dist.curriculum import Curriculum
from memformer_dist.data.dataset import TokenDataset
from memformer_dist.data.open_data import first_epoch, training_schedule
from memformer_dist.data.windows import Counts, WindowReader
from memformer_dist.errors import CorpusError, UserError
from memformer_dist.evaluate import AGES, LossByAge, Losses
from memformer_dist.mrbp.executor import reseed
from memformer_dist.mrbp.readout_size import choose_readout_group
from memformer_dist.optimizer import adamw, learning_rate
from memformer_dist.progress import Interval, Position
from memformer_dist.runtime import StopRequest, lock_run_dir
from memformer_dist.segment import Segment
from memformer_dist.world import World
from memformer_dist.zero.engine import Engine, StepResult

LOGGED_AGES = AGES[:4] + ("8+",)


def crosses(before: int, after: int, every: int | None) -> bool:
    """Whether a multiple of `every` lies in (before, after]."""
    return every is not None and after // every > before // every


class Trained(NamedTuple):
    """What a step leaves for the log and the curriculum."""

    result: StepResult
    nll: float  # over all ranks; 0, as the labels, where the step was skipped
    labels: float
    state_gradient_squares: Tensor  # [N], of this rank's lanes and of the loss that the engine scales


class Trainer:
    """A run on one rank. Collective throughout: every rank makes the same calls in the same order."""

    def __init__(self, config: RunConfig, run_dir: Path, corpora: tuple[TokenDataset, TokenDataset], world: World):
        self.config, self.run_dir, self.world = config, run_dir, world
        self.train_corpus, self.valid_corpus = corpora
        self.started = time.perf_counter()
        self.lock = lock_run_dir(run_dir, world)
        self.stop = StopRequest(run_dir, world)

        data = config.data
        self.schedule = training_schedule(data, self.train_corpus)
        self.lanes = world.lanes_of_rank(data.lanes)
        self.reader = WindowReader(
            self.train_corpus, self.schedule, lanes=self.lanes, prefetch=data.prefetch, device=world.device
        )
        share = config.lanes_per_group(world.size)
        self.groups = [range(first, first + share) for first in range(self.lanes.start, self.lanes.stop, share)]

        self.resumed = checkpoint.newest(run_dir, world)
        self.position = self.resumed.contents.position if self.resumed else Position()
        self.interval = self.resumed.contents.interval if self.resumed else Interval()
        self.earlier_s = self.position.wall_s
        self.changes = self.resumed.changes(config, self.train_corpus) if self.resumed else {}
        self.curriculum = Curriculum(
            config.mrbp.window,
            self.position.step,
            self.resumed and self.resumed.contents.curriculum,
            changed="mrbp.window" in self.changes,
        )
        auto = config.mrbp.readout_group == "auto"
        self.chosen_group = self.resumed.contents.readout_group if self.resumed and auto else None
        self.vocabulary = self.train_corpus.vocabulary
        reseed(torch.device("cpu"), config.training.seed)  # weights are drawn on the CPU: the same on every rank
        cell = build_cell(config, self.vocabulary)
        self.parameters = sum(parameter.numel() for parameter in cell.parameters())
        if self.resumed:
            self.resumed.load_weights(cell)
        elif config.training.init_from:
            checkpoint.open_initial(Path(config.training.init_from), self.vocabulary).load_weights(cell)
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
        if self.resumed:
            self.engine.load_moments(self.position.updates, self.resumed.moment)
            self.states = [self.resumed.load_lanes(group, empty) for group, empty in zip(self.groups, self.states)]
        self.saved = self.position.model_copy()
        self.monitor = monitor.Monitor(run_dir, self.position, config.training.tokens, is_main=world.is_main)
        self.peak_flops = monitor.peak_flops(world.device, config.monitor.device_peak_tflops)
        self.flops_per_token = monitor.training_flops_per_token(
            lambda: build_cell(config, self.vocabulary), data.segment_length
        )
        self._introduce()

    # ---- the loop ---------------------------------------------------------------------------------------------------------

    def fit(self) -> str | None:
        """Train to the end of the token budget, or until asked to stop; returns who asked."""
        config, position = self.config, self.position
        self.engine.module.train()
        if self.world.is_main and not self._done():
            (self.run_dir / "summary.json").unlink(missing_ok=True)  # of a shorter run, which this one continues
        reason = self._evaluate_if_due()  # where the run was stopped before it could
        readout_group = None if reason or self._done() else self._readout_group()
        skipped_in_a_row = 0
        while not (reason or self._done()):
            self._check_next_window()
            tokens_before = position.tokens
            trained = self._step(readout_group)
            reason = self._agreed_stop()
            skipped_in_a_row = 0 if trained.result.applied else skipped_in_a_row + 1
            if position.step % config.monitor.log_every_steps == 0 or self._done():
                self._log(trained)
            if skipped_in_a_row == config.training.skipped_steps_limit:
                raise UserError(
                    f"training.skipped_steps_limit: the gradients of {skipped_in_a_row} steps in a row, up to step"
                    f" {position.step}, were not finite; the last checkpoint is of step {self.saved.step}. A lower"
                    " optimizer.learning_rate usually helps"
                )
            self._tell(self.curriculum.after_step(position.step, trained.nll, trained.labels))
            if not reason:
                reason = self._evaluate_if_due()
            if reason or self._done() or crosses(tokens_before, position.tokens, config.checkpoint.every_tokens):
                self._save()
        return reason

    def _done(self) -> bool:
        return self.position.tokens >= self.config.training.tokens

    def _check_next_window(self) -> None:
        """Raise CorpusError on all ranks where one of them would meet a damaged document; what was trained is saved first."""
        problem = self.world.broadcast_first(self.reader.prepare(self.position.tick, self.curriculum.window))
        if problem is not None:
            self._save()
            raise CorpusError(problem)

    def _readout_group(self) -> int:
        """mrbp.readout_group. "auto" is chosen once, by measuring a segment, and kept in the checkpoint.

        The choice leaves room for the longest window to come. It is made anew where lane groups have another size.
        """
        configured, lanes, frozen = self.config.mrbp.readout_group, self.groups[0], self.chosen_group
        if configured != "auto":
            return configured
        if frozen is None or frozen.lanes != len(lanes):
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
            self.chosen_group = ReadoutGroup(segments=choice.readout_group, lanes=len(lanes))
            self.monitor.say(
                f"mrbp.readout_group: {choice.readout_group} segments, for a segment of {len(lanes)} lanes takes"
                f" {choice.segment_bytes / 2**20:,.1f} MiB, {choice.free_bytes / 2**20:,.0f} MiB are free, and"
                f" a window has {window} segments at most; kept for the rest of the run"
            )
        return self.chosen_group.segments

    def _labels(self, counts: Counts) -> int:
        """Labels of the next window, over the lanes of all ranks; each rank reads the loss masks of its own, if any."""
        if counts.labels is not None:
            return counts.labels
        tick, window = self.position.tick, self.curriculum.window
        return int(self.world.all_reduce_sum([self.reader.labels(tick, tick + window, self.lanes)])[0])

    def _step(self, readout_group: int) -> Trained:
        """One window of every lane: its gradient, one reduction, one update."""
        began, waited = time.perf_counter(), self.reader.wait_s
        config, position, interval = self.config, self.position, self.interval
        segments = self.curriculum.window
        counts = self.reader.counts(position.tick, position.tick + segments)
        valid_tokens = self._labels(counts)
        losses = LossByAge(self.world.device, LOGGED_AGES)

        def observe(t: int, segment: Segment, nll: Tensor) -> None:
            losses.add(segment, nll)

        window = self.engine.accumulate(
            [self.reader.window(position.tick, segments, group) for group in self.groups],
            self.states,
            valid_tokens=valid_tokens,
            readout_group=readout_group,
            observe=observe,
        )
        result = self.engine.step(
            learning_rate(config.optimizer, position.tokens + valid_tokens, config.training.tokens)
        )
        self.states = window.states if result.applied else [self._finite_lanes(state) for state in window.states]
        drift, *sums = self.world.all_reduce_sum([float(window.drift), *losses.sums.flatten().tolist()])

        position.step += 1
        position.tick += segments
        position.tokens += valid_tokens
        position.updates += result.applied
        interval.steps += 1
        interval.ticks += segments
        interval.tokens += valid_tokens
        interval.input_tokens += counts.input_tokens
        interval.documents += counts.documents
        interval.skipped += not result.applied
        if result.applied:
            interval.losses = [x + y for x, y in zip(interval.losses or [0.0] * len(sums), sums)]
        interval.drift = max(interval.drift, drift if math.isfinite(drift) else math.inf)
        interval.rollout_s += window.rollout_s
        interval.wait_s += self.reader.wait_s - waited
        interval.step_s += time.perf_counter() - began
        position.seconds += time.perf_counter() - began
        ages = len(LOGGED_AGES)
        nll, labels = (sum(sums[:ages]), sum(sums[ages:])) if result.applied else (0.0, 0.0)
        return Trained(result, nll, labels, window.state_gradient_squares)

    def _finite_lanes(self, state: NamedTuple) -> NamedTuple:
        """After a window whose gradient was not finite: lanes whose state is not finite start again from the empty one."""
        empty = self.engine.module.empty_state(len(state[0]), device=self.world.device)
        finite = torch.stack([torch.isfinite(x).reshape(len(x), -1).all(1) for x in state]).all(0)  # [lanes]
        return state._make(
            torch.where(finite.view(-1, *[1] * (x.dim() - 1)), x, fresh) for x, fresh in zip(state, empty)
        )

    def _agreed_stop(self) -> str | None:
        """Who asked any rank to stop: the same answer on all of them."""
        return self.world.broadcast_first(self.stop.reason())

    def _tell(self, change: str | None) -> None:
        if change:
            self.monitor.say(f"step {self.position.step}: {change}")

    def _evaluate_if_due(self) -> str | None:
        """Evaluate once every training.evaluate_every_tokens; returns who asked to stop meanwhile."""
        position, training = self.position, self.config.training
        if self._done() or not crosses(position.evaluated, position.tokens, training.evaluate_every_tokens):
            return None
        losses = self._evaluate("eval", training.evaluate_segments)
        if losses is not None:
            position.evaluated = position.tokens
            carried = losses["carried"].loss
            self._tell(self.curriculum.after_evaluation(carried, losses["no_memory"].loss - carried))
        return self._agreed_stop()

    # ---- evaluation -------------------------------------------------------------------------------------------------------

    def _evaluate(self, family: str, ticks: int | None) -> dict[str, Losses] | None:
        """Held-out losses by mode, logged as `family`/...; None when the run was asked to stop meanwhile."""
        module = self.engine.module
        module.eval()
        losses = evaluate.evaluate(
            self.engine,
            module.empty_state,
            self.valid_corpus,
            self.world,
            lanes=self.config.data.lanes,
            segment_length=self.config.data.segment_length,
            ticks=ticks,
            lanes_per_group=self.config.lanes_per_group(self.world.size),
            stop=lambda: self._agreed_stop() is not None,
        )
        module.train()
        if losses is None:
            return None
        carried, no_memory, no_state, shuffled = (losses[mode].loss for mode in evaluate.MODES)
        self.monitor.log(
            self.position,
            {
                f"{family}/loss": carried,
                f"{family}/loss_no_memory": no_memory,
                f"{family}/loss_no_state": no_state,
                f"{family}/loss_shuffled": shuffled,
                f"{family}/gap": no_memory - carried,
            },
        )
        self.monitor.say(
            f"step {self.position.step}: held-out loss {carried:.4f}, memory reset {no_memory:.4f},"
            f" everything reset {no_state:.4f}"
        )
        return losses

    def finish(self) -> dict | None:
        """Evaluate on every held-out document and write summary.json; None when stopped on the way.

        Logged as final/..., because evaluations on the way may have read only the beginnings (training.evaluate_segments).
        """
        path = self.run_dir / "summary.json"
        if path.exists() and (summary := json.loads(path.read_text()))["steps"] == self.position.step:
            self.monitor.say(f"this run is finished: {path} is its summary; a larger training.tokens would continue it")
            return summary
        losses = self._evaluate("final", None)
        if losses is None:
            return None
        position = self.position
        summary = evaluate.summary(losses) | {
            "tokens_per_s": position.tokens / position.seconds,
            "wall_s": self._wall_s(),
            "world_size": self.world.size,
            "tokens": position.tokens,
            "steps": position.step,
            "parameters": self.parameters,
        }
        if self.world.is_main:
            path.write_text(json.dumps(summary, indent=2) + "\n")
        return summary

    def _wall_s(self) -> float:
        """Seconds that this run has taken, in all its parts up to what each has saved."""
        return self.earlier_s + time.perf_counter() - self.started

    # ---- what a run leaves ------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.saved.step == self.position.step:
            return
        self.position.wall_s = self._wall_s()
        contents = Contents(
            version=checkpoint.VERSION,
            position=self.position,
            interval=self.interval,
            curriculum=self.curriculum.progress,
            readout_group=self.chosen_group,
            corpus=self.train_corpus.fingerprint,
            anchor=crosses(self.saved.tokens, self.position.tokens, self.config.checkpoint.anchor_every_tokens),
            vocabulary=self.vocabulary,
            config=self.config,
        )
        state = self.states[0]._make(torch.cat(column) for column in zip(*self.states))
        checkpoint.save(self.run_dir, self.engine, self.world, contents=contents, lanes=self.lanes, state=state)
        self.saved = self.position.model_copy()

    def _log(self, trained: Trained) -> None:
        """A record of the interval, which begins anew. Collective."""
        world, config, interval, position = self.world, self.config, self.interval, self.position
        losses = Losses.of(interval.losses, LOGGED_AGES)
        positions = interval.ticks * config.data.lanes * config.data.segment_length
        window = len(trained.state_gradient_squares)
        rate = interval.tokens / interval.step_s
        scalars = {
            "loss/train": losses.loss,
            **{f"loss/by_segment_age/{age}": loss for age, loss in losses.by_age.items()},
            "optim/lr": learning_rate(config.optimizer, position.tokens, config.training.tokens),
            "optim/grad_norm": trained.result.gradient_norm,
            "optim/skipped": interval.skipped,
            **{f"memory/{name}": value for name, value in self._diagnose().items()},
            "mrbp/window": window,
            "mrbp/replay_drift": interval.drift,
            "mrbp/rollout_share": interval.rollout_s / interval.step_s,
            "mrbp/state_bytes": window * sum(x.nbytes for x in self.states[0]),
            "data/pad_fraction": 1 - interval.input_tokens / positions,
            "data/wait_s": interval.wait_s,
            "data/documents_started": interval.documents,
            "perf/tokens_per_s": rate,
            "perf/tokens_per_s_per_device": rate / world.size,
            "perf/step_s": interval.step_s / interval.steps,
        }
        if self.peak_flops:
            scalars["perf/mfu"] = rate * self.flops_per_token / (world.size * self.peak_flops)
        if world.device.type == "cuda":
            scalars["device/max_allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
            scalars["device/alloc_retries"] = torch.cuda.memory_stats()["num_alloc_retries"]
        curves = {}
        if window > 1:
            curves["memory/grad_norm_by_boundary"] = monitor.boundary_norms(trained.state_gradient_squares, world)
        self.monitor.log(position, scalars, curves)
        self.monitor.advance(position, losses.loss, rate)
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

    def _introduce(self) -> None:
        """Say what is about to happen, and record how the run was started."""
        if not self.world.is_main:
            return
        data, window, say = self.config.data, self.config.mrbp.window, self.monitor.say
        (self.run_dir / "config.json").write_text(self.config.to_json())
        shutil.copyfile(self.train_corpus.tokenizer(), self.run_dir / "tokenizer.model")
        epoch = first_epoch(self.train_corpus, self.schedule)
        monitor.record_start(self.run_dir, self.world.size, self.position.step)
        say(
            f"{self.parameters:,} parameters, vocabulary {self.vocabulary.size}; an epoch is"
            f" {epoch.documents:,} documents, {epoch.tokens:,} tokens, {epoch.padding:.1%} of the positions are padding;"
            f" {self.world.size} ranks on {self.world.device.type}, ZeRO"
            f" {self.config.zero_stage}, {self.config.training.precision}; a step is {data.lanes} lanes x"
            f" {self.curriculum.window} segments x {data.segment_length} tokens"
            + ("" if isinstance(window, int) else f"; mrbp.window: {window}")
        )
        if self.resumed:
            say(f"resumed from {self.resumed.path} at step {self.position.step}, {self.position.tokens:,} tokens")
        for name, (then, now) in self.changes.items():
            say(f"changed since: {name} was {then!r}, is {now!r}")
        if "mrbp.window" in self.changes:
            say(f"windows of {self.curriculum.window} segments from here")
        # Of interest where an epoch is short; of millions of documents it would take as long as dealing them again.
        copies = self.schedule.concurrent_copies() if epoch.documents < 100 * data.lanes else 1
        if copies > 1:
            say(
                f"warning: data.lanes {data.lanes} is so large against this corpus that up to {copies} lanes read the same"
                " document at once; fewer lanes or more text would make steps less alike"
            )


def train(config: RunConfig, run_dir: Path, corpora: tuple[TokenDataset, TokenDataset], world: World) -> dict | None:
    """Start, resume or finish the run in `run_dir`. Returns its summary, or None when it was stopped before the end.

    Args:
        corpora: the training and the validation split.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, run_dir, corpora, world)
    try:
        reason = trainer.fit()
        summary = None if reason else trainer.finish()
        if summary is None:
            reason = reason or world.broadcast_first(trainer.stop.reason())
            trainer.monitor.say(
                f"stopped by {reason} at step {trainer.position.step}; the same command goes on from there"
            )
            trainer.stop.clear()
        return summary
    finally:
        trainer.monitor.close()
