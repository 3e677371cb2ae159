"""The best checkpoint: how it is recognised, kept and found; early stopping; the weights of another run."""

import errno
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from memformer_dist import checkpoint, files, saving
from memformer_dist.checkpoint import Checkpoint, Contents, FileRecord, open_one
from memformer_dist.commands import generate
from memformer_dist.config import RunConfig
from memformer_dist.data.open_data import open_corpora, open_data
from memformer_dist.errors import UserError
from memformer_dist.initial import open_initial
from memformer_dist.metrics import Losses
from memformer_dist.progress import Evaluation, HeldOut, Position
from memformer_dist.vocabulary import Vocabulary
from tests.helpers.files import flip
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import STEP_TOKENS, last_checkpoint, records, run_rank, settings, tensors
from tests.helpers.scripts import run_script
from tests.helpers.toy import ToyCell


def after(*losses: float, segments: int | None = 3) -> HeldOut:
    """What evaluations at steps 1, 2, ... leave."""
    held_out = HeldOut()
    for step, loss in enumerate(losses, start=1):
        found = Evaluation(step=step, tokens=10 * step, loss=loss)
        held_out.add(found, corpus="f" * 64, segments=segments, warmup_segments=None)
    return held_out


# ---- the count of evaluations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "losses, best, since",
    [
        ([], None, 0),
        ([3.0], 1, 0),
        ([3.0, 2.0, 2.0], 2, 1),  # as low is no improvement
        ([3.0, 2.5, 2.6, 2.7], 2, 2),
        ([3.0, 3.1, 3.2, 2.9], 4, 0),
        ([math.nan, math.nan], None, 2),
        ([math.nan, 3.0, math.inf], 2, 1),
    ],
)
def test_the_lowest_loss_is_the_best(losses, best, since):
    found = after(*losses)
    assert (found.best and found.best.step, found.without_improvement) == (best, since)
    assert found.best is None or (found.best.tokens, found.best.loss) == (10 * best, losses[best - 1])


def test_evaluations_of_other_documents_are_not_compared():
    """A loss on the first segments, where a memory knows little, says nothing of one on whole documents."""
    found = after(2.0, 2.5)
    read = {"corpus": "f" * 64, "segments": 3, "warmup_segments": None}
    for other in ({"corpus": "e" * 64}, {"segments": None}, {"segments": 4}, {"warmup_segments": 0}):
        anew = found.model_copy()
        anew.add(Evaluation(step=9, tokens=90, loss=3.0), **read | other)
        assert (anew.best.step, anew.without_improvement) == (9, 0)
    found.add(Evaluation(step=9, tokens=90, loss=3.0), **read)
    assert (found.best.step, found.without_improvement) == (1, 2), "the control"


# ---- which are kept, and found ---------------------------------------------------------------------------------------


class FakeEngine:
    def __init__(self, step: int):
        self.step = step

    def tensors(self):
        for name, parameter in ToyCell().named_parameters():
            weight = torch.full_like(parameter, self.step)
            yield name, weight, {"exp_avg": 2 * weight, "exp_avg_sq": 3 * weight}


def save(run_dir: Path, world, step: int, held_out: HeldOut | None = None, **about) -> Path:
    held_out = held_out or HeldOut()
    contents = Contents(
        position=Position(step=step, tokens=10 * step, evaluated=10 * step * (held_out.best is not None)),
        held_out=held_out,
        corpus="f" * 64,
        anchor=False,
        vocabulary=Vocabulary(size=11, bos_id=1, eos_id=2, tokenizer_sha256="0" * 64),
        config=RunConfig(
            model={"cell": "plain", "width": 8, "heads": 2, "feed_forward": 12, "layers": 1},
            data={"corpus": "nowhere", "lanes": 2, "segment_length": 6},
            mrbp={"window": 1},
            training={"tokens": 1000},
            checkpoint=about,
        ),
    )
    state = ToyCell().empty_state(2)
    return saving.save(run_dir, FakeEngine(step), world, contents=contents, lanes=range(2), state=state)


def steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*"))


def test_the_best_checkpoint_is_kept_until_there_is_a_better_one(tmp_path, world):
    losses, kept = [5.0, 3.0, 4.0, 3.5, 3.2, 2.0, 2.1, 2.2], []
    for step in range(1, 9):
        save(tmp_path, world, step, after(*losses[:step]))
        kept.append(steps(tmp_path))
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [2, 5, 6], [6, 7], [6, 7, 8]]
    save(tmp_path, world, 9, after(*losses), keep_best=False)
    assert steps(tmp_path) == [8, 9], "the control"


def test_a_damaged_newest_checkpoint_does_not_cost_the_best_one_before(tmp_path, world):
    """At step 6 another one is the best: the one before it still names step 2, should step 6 be damaged."""
    losses = [5.0, 3.0, 4.0, 3.5, 3.2, 2.0]
    for step in range(1, 7):
        save(tmp_path, world, step, after(*losses[:step]))
    assert steps(tmp_path) == [2, 5, 6]
    flip(tmp_path / "checkpoints" / "step-00000006" / "weights-00000.safetensors")
    found = checkpoint.newest(tmp_path, world).contents
    assert found.position.step == 5 and found.held_out == after(*losses[:5])
    assert open_one(tmp_path, "best").contents.position.step == 2


def test_nothing_is_removed_while_it_is_not_known_which_is_the_best(tmp_path, world, monkeypatch, caplog):
    read_bytes = Path.read_bytes

    def stale(path):
        if path.parent.name == "step-00000003":
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return read_bytes(path)

    for step in (1, 2, 3):
        save(tmp_path, world, step, after(3.0, 2.0))
    assert steps(tmp_path) == [2, 3]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", stale)
        save(tmp_path, world, 4, after(*[3.0] * 3, 1.0))
    assert steps(tmp_path) == [2, 3, 4]
    assert "step-00000003 cannot be read (Stale file handle); no checkpoint is removed" in caplog.text


class Crash(BaseException):
    pass


@pytest.mark.parametrize("alone", [True, False])
def test_a_step_that_is_saved_again_is_there_at_any_moment(tmp_path, world, monkeypatch, alone):
    """A run that was stopped before an evaluation makes it when it is resumed, and then saves the same step again.

    The n-th change of the disk does not happen, nor any after it, for every n: even where it is the only checkpoint,
    it is found, as it was or as it is to be.
    """
    changes = [(saving, "save_file"), (saving, "flush"), (files.shutil, "rmtree")]
    changes += [(Path, name) for name in ("write_text", "write_bytes", "mkdir", "rename")]
    if not alone:
        save(tmp_path, world, 1)
    save(tmp_path, world, 3)
    crash, found, completed = 0, [], False
    while not completed:
        left = crash = crash + 1
        with monkeypatch.context() as patch:
            for owner, name in changes:
                original = getattr(owner, name)

                def change(*arguments, original=original, **named):
                    nonlocal left
                    left -= 1
                    if left <= 0:
                        raise Crash
                    return original(*arguments, **named)

                patch.setattr(owner, name, change)
            try:
                save(tmp_path, world, 3, after(5.0, 4.0, 3.0))
                completed = True
            except Crash:
                pass
        newest = checkpoint.newest(tmp_path, world)
        assert newest.path.name == "step-00000003"
        found.append(newest.contents.held_out)
        if not completed:  # as it was before
            save(tmp_path, world, 3)
    assert crash > 10 and {repr(each) for each in found} == {repr(HeldOut()), repr(after(5.0, 4.0, 3.0))}
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000001"] * (not alone) + [
        "step-00000003"
    ]


def test_which_checkpoint_is_meant(tmp_path, world):
    run, losses = tmp_path / "run", [5.0, 3.0, 4.0, 3.5]
    for step in range(1, 5):
        save(run, world, step, after(*losses[:step]))
    folder = run / "checkpoints"
    assert steps(run) == [2, 3, 4]
    for which, step in (("newest", 4), ("best", 2), ("step-00000003", 3), (str(folder / "step-00000003"), 3)):
        assert open_one(run, which).contents.position.step == step
    assert open_one(run).contents.position.step == 4
    assert open_one(folder / "step-00000002").contents.position.step == 2

    for which, message in {
        "step-3": "found no step-3 in .*; expected newest, best, or one of step-00000002, step-00000003, step-00000004$",
        "latest": "found no latest in",
        str(tmp_path): f"found no {tmp_path} in",
    }.items():
        with pytest.raises(UserError, match=f"^--checkpoint: {message}"):
            open_one(run, which)
    with pytest.raises(UserError, match=r"^--checkpoint: found best, but .* is a checkpoint itself; expected a run's"):
        open_one(folder / "step-00000002", "best")
    with pytest.raises(UserError, match="no checkpoint found"):
        open_one(tmp_path, "best")

    flip(folder / "step-00000004" / "checkpoint.json")  # then the one before says which is the best
    flip(folder / "step-00000002" / "weights-00000.safetensors")
    with pytest.raises(UserError, match="step-00000002: damaged\n  .*weights-00000.safetensors: found"):
        open_one(run, "best")
    files.remove_folder(folder / "step-00000002")
    message = "^--checkpoint: found no .*step-00000002, which is the best with a held-out loss of 3.0000"
    with pytest.raises(UserError, match=message):
        open_one(run, "best")
    save(tmp_path / "without", world, 1)
    with pytest.raises(UserError, match="^--checkpoint: found no evaluation in .*training.evaluate_every_tokens"):
        open_one(tmp_path / "without", "best")


# ---- runs ------------------------------------------------------------------------------------------------------------

LOSSES = [5.0, 4.0, 4.5, 3.0, 3.5, 3.25, math.nan, 1.0]  # held out, after each step; where it is to end by patience


def scripted_rank(world, losses: list[float] | None, parts) -> None:
    """Each part is (raw, folder, stop_after): a run that finds these held-out losses, or lower ones after every step.

    `stop_after`: the step after which it is asked to stop, and so before its evaluation; "end": the one at which the
    first of the parts ended. None: to the end, with its summary.
    """
    from memformer_dist import evaluate, train

    at = [0]

    class Watched(train.Trainer):
        def _evaluate(self, family, segments):
            at[0] = self.position.step
            return super()._evaluate(family, segments)

    def scripted(*arguments, segments, **named):
        asked.append((at[0], segments))
        loss = losses[at[0] - 1] if losses else 9 - 0.1 * at[0]
        return {mode: Losses(loss, {"0": loss}) for mode in evaluate.MODES}

    for raw, folder, stop_after in parts:
        asked: list[tuple] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "Trainer", Watched)
            patch.setattr(evaluate, "evaluate", scripted)
            if stop_after is None:
                config = RunConfig.check(raw, world.size)
                assert train.train(config, folder, open_data(config.data), world) is not None
            else:
                run_rank(world, raw, folder, summary(parts[0][1])["steps"] if stop_after == "end" else stop_after)
        if world.is_main:
            with (folder / "asked.jsonl").open("a") as file:
                file.write(json.dumps(asked) + "\n")


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def asked(folder: Path) -> list[list]:
    """(step, segments) of the evaluations of every part."""
    return [json.loads(line) for line in (folder / "asked.jsonl").read_text().splitlines()]


def last(folder: Path) -> Contents:
    return Checkpoint(last_checkpoint(folder)).contents


@pytest.mark.slow
def test_early_stopping_and_the_best_checkpoint_through_interruptions(corpus_dir, tmp_path, capfd):
    """Stopped between a step and its evaluation: the same end, best checkpoint, weights and records; on two ranks too.

    The lowest loss is the fourth; the third one without improvement after it ends the run.
    """
    training = {"evaluate_every_tokens": 1, "evaluate_segments": 3, "early_stopping_patience": 3}
    raw = settings(corpus_dir, stage=1, dropout=0.1, tokens=10**6, training=training)
    raw["monitor"] = {"log_every_steps": 5}
    whole, cut, two = tmp_path / "whole", tmp_path / "parts", tmp_path / "two"
    parts = [(raw, whole, None), *((raw, cut, stop) for stop in (2, 5, 7)), (raw, cut, None), (raw, cut, None)]
    run_ranks(1, scripted_rank, LOSSES, parts)
    run_ranks(2, scripted_rank, LOSSES, [(raw, two, 7), (raw, two, None)])
    assert steps(whole) == [4, 7] and 4 in steps(cut) and max(steps(cut)) == 7
    for folder in whole, cut, two:
        found = summary(folder)
        assert (found["steps"], found["ended_by"]) == (7, "training.early_stopping_patience")
        best = found["best"]
        assert (best["step"], best["loss"], best["checkpoint"]) == (4, 3.0, "checkpoints/step-00000004")
        assert last(folder).held_out == HeldOut(
            best=Evaluation(step=4, tokens=best["tokens"], loss=3.0),
            without_improvement=3,
            corpus=open_corpora(corpus_dir)[1].fingerprint,
            segments=3,
        )
        assert open_one(folder, "best").path == folder / best["checkpoint"]
        assert [row[0] for row in records(folder, having="loss/train")] == [5]
    for prefix in ("weights", "moments", "lanes"):
        expected, found = (tensors(folder / "checkpoints" / "step-00000004", prefix) for folder in (whole, cut))
        assert expected and all(torch.equal(expected[name], found[name]) for name in expected), prefix
    evaluated = [records(folder, "eval/loss", having="eval/loss") for folder in (whole, cut)]
    assert evaluated[0] == evaluated[1] and [row[0] for row in evaluated[0]] == [*range(1, 8)]
    # The final evaluation is on all segments. What has ended is not evaluated again.
    assert asked(whole) == [[*([step, 3] for step in range(1, 8)), [7, None]]]
    assert asked(cut) == [[[1, 3]], [[2, 3], [3, 3], [4, 3]], [[5, 3], [6, 3]], [[7, 3], [7, None]], []]

    said = capfd.readouterr().err
    assert "training is over: training.early_stopping_patience ends it\n" in said
    assert "step 6: evaluation 2 in a row without improvement, the best is 3.0000 of step 4\n" in said
    assert "the best checkpoint is checkpoints/step-00000004, with a held-out loss of 3.0000: --checkpoint best" in said
    assert "this run is finished, see" in said and "a larger training.early_stopping_patience continues it" in said

    more = settings(corpus_dir, stage=1, dropout=0.1, tokens=10**6, training=training | {"early_stopping_patience": 4})
    run_ranks(1, scripted_rank, [*LOSSES, 1.5, 1.25, 1.75, 1.5], [(more, cut, None)])
    found = summary(cut)
    assert (found["steps"], found["best"]["step"]) == (12, 8) and 8 in steps(cut)


@pytest.mark.slow
def test_the_end_of_the_budget_is_evaluated_too(corpus_dir, tmp_path):
    """A loss that falls to the end: the last checkpoint is the best, also where the run was stopped just before it
    was evaluated; what it was besides, here an anchor, it still is. Nothing is read twice for the final figures.
    """
    raw = settings(corpus_dir, tokens=3 * STEP_TOKENS, training={"evaluate_every_tokens": 10**9})
    raw["checkpoint"] = {"anchor_every_tokens": 1}
    parts = [(raw, tmp_path / "whole", None), (raw, tmp_path / "parts", "end"), (raw, tmp_path / "parts", None)]
    plain = settings(corpus_dir, tokens=3 * STEP_TOKENS)
    run_ranks(1, scripted_rank, None, [*parts, (plain, tmp_path / "plain", None)])
    end = summary(tmp_path / "whole")["steps"]
    for folder in tmp_path / "whole", tmp_path / "parts":
        found = summary(folder)
        assert (found["ended_by"], found["best"]["step"], found["steps"]) == ("training.tokens", end, end)
        assert last(folder).held_out.best.step == end and last(folder).anchor
        assert [row[0] for row in records(folder, having="eval/loss")] == [end]
        assert asked(folder)[-1] == [[end, None]]
    assert summary(tmp_path / "plain")["best"] is None and asked(tmp_path / "plain") == [[[end, None]]]
    with pytest.raises(UserError, match="found no evaluation"):
        open_one(tmp_path / "plain", "best")


def test_programs_take_the_best_checkpoint(trained_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    older, newest = sorted((run / "checkpoints").iterdir())
    raw = json.loads((newest / "checkpoint.json").read_text())
    raw["held_out"] = after(*[1.0] * 2).model_dump()
    raw["held_out"]["best"]["step"] = int(older.name.removeprefix("step-"))
    (newest / "checkpoint.json").write_text(json.dumps(raw))
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["checkpoint.json"] = FileRecord.of(newest / "checkpoint.json").model_dump()
    (newest / "manifest.json").write_text(json.dumps(manifest))

    written = {}
    for place in (older,), (newest,), (run, "--checkpoint", "best"), (run, "--checkpoint", older.name), (run,):
        generate.main(["--run-dir", *map(str, place), "--prompt", "Bada", "--tokens", "40"])
        written[place] = capsys.readouterr().out
    expected = [written[older,], written[newest,]]
    assert list(written.values())[2:] == [expected[0], expected[0], expected[1]] and expected[0] != expected[1]
    with pytest.raises(UserError, match="--checkpoint: found no worst in"):
        generate.main(["--run-dir", str(run), "--checkpoint", "worst", "--prompt", "Bada"])
    options = ("--checkpoint", "best", "--max-segments", "2", "--json", tmp_path / "it.json")
    done = run_script("launch/evaluate.py", "--run-dir", run, *options)
    assert done.returncode == 0 and str(older) in done.stdout, done.stderr
    assert json.loads((tmp_path / "it.json").read_text())["checkpoint"] == str(older)


# ---- the weights of another run --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_weights_of_another_run_are_said(config, trained_run, tmp_path):
    """In the log and in starts.jsonl: which checkpoint, at which step and tokens. Not when the run is resumed."""
    source = open_one(trained_run)
    position = source.contents.position
    config["training"] |= {"init_from": str(trained_run), "tokens": 100}
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = ("launch/train.py", "--config", tmp_path / "config.json", "--run-dir", tmp_path / "run")
    for options in (), ("--set", "training.tokens=200"):
        done = run_script(*command, *options)
        assert done.returncode == 0, done.stderr
    log = (tmp_path / "run" / "log.txt").read_text()
    said = (
        f"training.init_from: the weights are those of {source.path}, at step {position.step}, {position.tokens} tokens;"
        " moments, learning rate, states and documents begin anew\n"
    )
    assert log.count(said) == log.count("init_from") == 1
    starts = [json.loads(line) for line in (tmp_path / "run" / "starts.jsonl").read_text().splitlines()]
    expected = {"checkpoint": str(source.path), "step": position.step, "tokens": position.tokens}
    assert [start["init_from"] for start in starts] == [expected, None]


@pytest.mark.parametrize("where", ["nowhere", "file", "empty"])
def test_weights_that_are_not_there(tmp_path, where):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"^training.init_from: {tmp_path / where}: no checkpoint found"):
        open_initial(tmp_path / where, Vocabulary(size=1, bos_id=0, eos_id=0, tokenizer_sha256=""))
