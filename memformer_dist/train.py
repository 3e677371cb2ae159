"""The training loop, readable top to bottom: set up, fit, evaluate, leave.

    deepspeed launch/train.py --config configs/base.json --run-dir runs/base

One step trains on one window: N contiguous segments of every lane. What a step needs is a pure function of the position (tick,
tokens) and the configuration; the only things carried from step to step are weights, Adam's moments and the lanes' states, and
these are what a checkpoint holds. So the same command starts a run, resumes it, or finds it finished.
"""

import dataclasses
import json
import math
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import torch

from memformer_dist import checkpoint, evaluate, monitor
from memformer_dist.checkpoint import Contents, Position, Vocabulary, build_cell
from memformer_dist.config import OptimizerConfig, RunConfig
from memformer_dist.data.corpus import Corpus
from memformer_dist.data.lanes import LaneSchedule
from memformer_dist.data.windows import WindowReader
from memformer_dist.engine import Accumulated, Engine, StepResult, adamw
from memformer_dist.errors import UserError
from memformer_dist.evaluate import AGES, LossByAge, Losses
from memformer_dist.runtime import Process, StopRequest, reseed

LOGGED_AGES = AGES[:4] + ("8+",)


def learning_rate(config: OptimizerConfig, tokens: int, total_tokens: int) -> float:
    """Linear warm-up, then a cosine down to the final ratio, as a function of consumed tokens (this step's included)."""
    if tokens < config.warmup_tokens:
        return config.learning_rate * tokens / config.warmup_tokens
    progress = min(1.0, (tokens - config.warmup_tokens) / max(1, total_tokens - config.warmup_tokens))
    ratio = config.final_learning_rate_ratio
    return config.learning_rate * (ratio + (1 - ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def crosses(before: int, after: int, every: int | None) -> bool:
    """Whether a multiple of `every` lies in (before, after]."""
    return every is not None and after // every > before // every


@dataclasses.dataclass
class Interval:
    """What this rank has seen since the last record of the log."""

    losses: LossByAge
    wait_s: float  # the reader's clock when the interval began
    steps: int = 0
    labels: int = 0  # over all ranks
    documents: int = 0
    skipped: int = 0
    drift: float = 0.0
    step_s: float = 0.0
    rollout_s: float = 0.0


class Step(NamedTuple):
    window: Accumulated
    result: StepResult
    learning_rate: float
    valid_tokens: int


class Trainer:
    """A run on one rank. Collective throughout: every rank makes the same calls in the same order."""

    def __init__(self, config: RunConfig, run_dir: Path, corpora: tuple[Corpus, Corpus], process: Process):
        self.config, self.run_dir, self.process = config, run_dir, process
        self.train_corpus, self.valid_corpus = train_corpus, _ = corpora
        self.stop = StopRequest(run_dir)

        data = config.data
        self.schedule = LaneSchedule(
            train_corpus.lengths, seed=data.seed, lanes=data.lanes, segment_length=data.segment_length
        )
        self.lanes = process.block(data.lanes)
        self.reader = WindowReader(train_corpus, self.schedule, lanes=self.lanes, prefetch=data.prefetch)
        share = config.lanes_per_group(process.world_size)
        self.groups = [range(first, first + share) for first in range(self.lanes.start, self.lanes.stop, share)]

        self.resumed = checkpoint.newest(run_dir, process)
        self.position = self.resumed.contents.position if self.resumed else Position()
        self.changes = self._check_resumption()
        self.vocabulary = Vocabulary.of(train_corpus)
        reseed(
            torch.device("cpu"), config.training.seed
        )  # initial weights are drawn on the CPU: the same on every rank
        cell = build_cell(config, self.vocabulary)
        self.parameters = sum(parameter.numel() for parameter in cell.parameters())
        if self.resumed:
            self.resumed.load_weights(cell)
        elif config.training.init_from:
            checkpoint.open_one(Path(config.training.init_from)).load_weights(cell)
        self.engine = Engine(
            cell,
            adamw(cell, config.optimizer),
            process,
            settings=config.deepspeed,
            precision=config.training.precision,
            gradient_clipping=config.optimizer.gradient_clipping,
            seed=config.training.seed,
        )
        self.states = [self.engine.module.empty_state(len(group), device=process.device) for group in self.groups]
        if self.resumed:
            self.engine.load_moments(self.position.updates, self.resumed.moment)
            self.states = [self.resumed.load_lanes(group, empty) for group, empty in zip(self.groups, self.states)]
        self.saved = self.position.model_copy()
        self.monitor = monitor.Monitor(run_dir, self.position, config.training.tokens, is_main=process.is_main)
        self.peak_flops = monitor.peak_flops(process.device, config.monitor.device_peak_tflops)
        self.flops_per_token = monitor.training_flops_per_token(
            lambda: build_cell(config, self.vocabulary), data.segment_length
        )
        self._introduce()

    def _check_resumption(self) -> dict:
        """The configuration's changes since the checkpoint; UserError where one may not change."""
        if self.resumed is None:
            return {}
        saved = self.resumed.contents
        if saved.corpus != self.train_corpus.fingerprint:
            raise UserError(
                f"data.corpus: {self.config.data.corpus} is not the corpus that this run was trained on (fingerprint"
                f" {self.train_corpus.fingerprint[:12]}, the run has {saved.corpus[:12]}); bring that one back, or start a"
                " fresh run in another --run-dir"
            )
        return self.config.changes_since(saved.config)

    # ---- the loop ---------------------------------------------------------------------------------------------------------

    def fit(self) -> str | None:
        """Train to the end of the token budget, or until asked to stop; returns who asked."""
        config, position = self.config, self.position
        self.engine.module.train()
        interval = self._interval()
        skipped_in_a_row = 0
        while position.tokens < config.training.tokens:
            began, tokens_before = time.perf_counter(), position.tokens
            step = self._step(interval)
            skipped_in_a_row = 0 if step.result.applied else skipped_in_a_row + 1
            reason = self._agreed_stop()
            interval.step_s += time.perf_counter() - began
            position.seconds += time.perf_counter() - began

            done = position.tokens >= config.training.tokens
            if position.step % config.monitor.log_every_steps == 0 or done or reason:
                self._log(interval, step)
                interval = self._interval()
            if skipped_in_a_row == config.training.skipped_steps_limit:
                raise UserError(
                    f"training.skipped_steps_limit: the gradients of {skipped_in_a_row} steps in a row, up to step"
                    f" {position.step}, were not finite; nothing was saved since step {self.saved.step}. A lower"
                    " optimizer.learning_rate usually helps"
                )
            if not (done or reason) and crosses(tokens_before, position.tokens, config.training.evaluate_every_tokens):
                self._evaluate(config.training.evaluate_ticks)
                reason = self._agreed_stop()
            if done or reason or crosses(tokens_before, position.tokens, config.checkpoint.every_tokens):
                self._save()
            if reason:
                return reason
        return None

    def _step(self, interval: Interval) -> Step:
        """One window of every lane: its gradient, one reduction, one update."""
        config, position = self.config, self.position
        segments = config.mrbp.window
        valid_tokens = self.reader.valid_tokens(position.tick, position.tick + segments)

        def observe(t: int, segment, nll) -> None:
            interval.losses.add(segment, nll)
            interval.documents += int(segment.reset.sum())

        window = self.engine.accumulate(
            [self.reader.window(position.tick, segments, group) for group in self.groups],
            self.states,
            valid_tokens=valid_tokens,
            readout_group=config.mrbp.readout_group,
            observe=observe,
        )
        rate = learning_rate(config.optimizer, position.tokens + valid_tokens, config.training.tokens)
        result = self.engine.step(rate)
        self.states = window.states if result.applied else [self._finite_lanes(state) for state in window.states]

        position.step += 1
        position.tick += segments
        position.tokens += valid_tokens
        position.updates += result.applied
        interval.steps += 1
        interval.labels += valid_tokens
        interval.skipped += not result.applied
        interval.drift = max(interval.drift, float(window.drift))
        interval.rollout_s += window.rollout_s
        return Step(window, result, rate, valid_tokens)

    def _finite_lanes(self, state: NamedTuple) -> NamedTuple:
        """After a window whose gradient was not finite: lanes whose state is not finite start again from the empty one."""
        empty = self.engine.module.empty_state(len(state[0]), device=self.process.device)
        finite = torch.stack([torch.isfinite(x).reshape(len(x), -1).all(1) for x in state]).all(0)  # [lanes]
        return state._make(
            torch.where(finite.view(-1, *[1] * (x.dim() - 1)), x, fresh) for x, fresh in zip(state, empty)
        )

    def _agreed_stop(self) -> str | None:
        """Who asked any rank to stop: None, or not None, on all ranks alike."""
        mine = self.stop.reason()
        asked = self.process.sum([mine is not None])[0]
        return (mine or "a signal to another rank") if asked else None

    # ---- evaluation -------------------------------------------------------------------------------------------------------

    def _evaluate(self, ticks: int | None) -> dict[str, Losses] | None:
        """Held-out losses by mode, logged; None when the run was asked to stop meanwhile."""
        module = self.engine.module
        module.eval()
        losses = evaluate.evaluate(
            self.engine,
            module.empty_state,
            self.valid_corpus,
            self.process,
            lanes=self.config.data.lanes,
            segment_length=self.config.data.segment_length,
            ticks=ticks,
            stop=lambda: self._agreed_stop() is not None,
        )
        module.train()
        if losses is None:
            return None
        scalars = {"eval/loss": losses["carried"].loss}
        for mode in evaluate.MODES[1:]:
            scalars[f"eval/loss_{mode}"] = losses[mode].loss
        scalars["eval/gap"] = losses["no_memory"].loss - losses["carried"].loss
        self.monitor.log(self.position, scalars)
        self.monitor.say(
            f"step {self.position.step}: held-out loss {scalars['eval/loss']:.4f}, memory reset"
            f" {scalars['eval/loss_no_memory']:.4f}, everything reset {scalars['eval/loss_no_state']:.4f}"
        )
        return losses

    def finish(self) -> dict | None:
        """Evaluate on every held-out document and write summary.json; None when stopped on the way."""
        began = time.perf_counter()
        path = self.run_dir / "summary.json"
        if path.exists() and (summary := json.loads(path.read_text()))["steps"] == self.position.step:
            self.monitor.say(f"this run is finished: {path} is its summary; a larger training.tokens would continue it")
            self.monitor.close()
            return summary
        losses = self._evaluate(None)
        self.monitor.close()
        if losses is None:
            return None
        position = self.position
        summary = evaluate.summary(losses) | {
            "tokens_per_s": position.tokens / position.seconds,
            "wall_s": position.seconds + time.perf_counter() - began,
            "world_size": self.process.world_size,
            "tokens": position.tokens,
            "steps": position.step,
            "parameters": self.parameters,
        }
        if self.process.is_main:
            path.write_text(json.dumps(summary, indent=2) + "\n")
        return summary

    # ---- what a run leaves ------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.saved.step == self.position.step:
            return
        contents = Contents(
            version=checkpoint.VERSION,
            position=self.position,
            corpus=self.train_corpus.fingerprint,
            anchor=crosses(self.saved.tokens, self.position.tokens, self.config.checkpoint.anchor_every_tokens),
            vocabulary=self.vocabulary,
            config=self.config,
        )
        state = self.states[0]._make(torch.cat(column) for column in zip(*self.states))
        checkpoint.save(self.run_dir, self.engine, self.process, contents=contents, lanes=self.lanes, state=state)
        self.saved = self.position.model_copy()

    def _interval(self) -> Interval:
        return Interval(LossByAge(self.process.device, LOGGED_AGES), wait_s=self.reader.wait_s)

    def _log(self, interval: Interval, step: Step) -> None:
        process, config = self.process, self.config
        sums = process.sum([interval.documents, *interval.losses.sums.flatten().tolist()])
        losses = Losses.of(sums[1:], LOGGED_AGES)
        positions = interval.steps * config.mrbp.window * config.data.lanes * config.data.segment_length
        rate = interval.labels / interval.step_s
        scalars = {
            "loss/train": losses.loss,
            **{f"loss/by_segment_age/{age}": loss for age, loss in losses.by_age.items()},
            "optim/lr": step.learning_rate,
            "optim/grad_norm": step.result.gradient_norm,
            "optim/skipped": interval.skipped,
            **{f"memory/{name}": value for name, value in self._diagnose().items()},
            "mrbp/replay_drift": process.largest(interval.drift),
            "mrbp/rollout_share": interval.rollout_s / interval.step_s,
            "mrbp/state_bytes": config.mrbp.window * sum(x.nbytes for x in self.states[0]),
            "data/pad_fraction": 1 - interval.labels / positions,
            "data/wait_s": self.reader.wait_s - interval.wait_s,
            "data/documents_started": sums[0],
            "perf/tokens_per_s": rate,
            "perf/tokens_per_s_per_device": rate / process.world_size,
            "perf/step_s": interval.step_s / interval.steps,
        }
        if self.peak_flops:
            scalars["perf/mfu"] = rate * self.flops_per_token / (process.world_size * self.peak_flops)
        if process.device.type == "cuda":
            scalars["device/max_allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
            scalars["device/alloc_retries"] = torch.cuda.memory_stats()["num_alloc_retries"]
        self.monitor.log(self.position, scalars)
        self.monitor.advance(self.position, losses.loss, rate)

    @torch.no_grad()
    def _diagnose(self) -> dict[str, float]:
        """How the cell uses its memory, on the next segment of the first lane group."""
        segment = self.reader.segment(self.position.tick, self.groups[0]).to(self.process.device)
        return {name: float(value) for name, value in self.engine("diagnose", segment, self.states[0]).items()}

    def _introduce(self) -> None:
        """Say what is about to happen, and record how the run was started."""
        if not self.process.is_main:
            return
        data, say = self.config.data, self.monitor.say
        (self.run_dir / "config.json").write_text(self.config.to_json())
        shutil.copyfile(Path(data.corpus) / "tokenizer.model", self.run_dir / "tokenizer.model")
        monitor.record_start(self.run_dir, self.process.world_size, self.position.step)
        say(
            f"{self.parameters:,} parameters, vocabulary {self.vocabulary.size}; {len(self.train_corpus.lengths):,} documents,"
            f" {self.train_corpus.total_tokens:,} tokens; {self.process.world_size} ranks on {self.process.device.type}, ZeRO"
            f" {self.config.zero_stage}, {self.config.training.precision}; a step is {data.lanes} lanes x"
            f" {self.config.mrbp.window} segments x {data.segment_length} tokens"
        )
        if self.resumed:
            say(f"resumed from {self.resumed.path} at step {self.position.step}, {self.position.tokens:,} tokens")
        for name, (then, now) in self.changes.items():
            say(f"changed since: {name} was {then!r}, is {now!r}")
        copies = self.schedule.concurrent_copies()
        if copies > 1:
            say(
                f"warning: data.lanes {data.lanes} is so large against this corpus that up to {copies} lanes read the same"
                " document at once; fewer lanes or more text would make steps less alike"
            )


def train(config: RunConfig, run_dir: Path, corpora: tuple[Corpus, Corpus], process: Process) -> dict | None:
    """Start, resume or finish the run in `run_dir`. Returns its summary, or None when it was stopped before the end.

    Args:
        corpora: the training and the validation split.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, run_dir, corpora, process)
    reason = trainer.fit()
    if reason is None:
        summary = trainer.finish()
        if summary is not None:
            return summary
        reason = trainer.stop.reason() or "a signal to another rank"
    trainer.monitor.say(f"stopped by {reason} at step {trainer.position.step}; the same command goes on from there")
    trainer.monitor.close()
    return None
