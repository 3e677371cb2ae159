"""Tasks: documents against slow constructions, answers that only earlier segments hold, and runs that are trained on them."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from memformer_dist.config import RunConfig
from memformer_dist.data.lanes import LaneSchedule
from memformer_dist.data.open_data import task_documents
from memformer_dist.data.task_documents import TaskDocuments, TaskReader
from memformer_dist.data.windows import WindowReader
from memformer_dist.errors import UserError
from memformer_dist.segment import IGNORE, Segment, concatenate
from memformer_dist.tasks import TASKS
from memformer_dist.tasks.base import HELD_OUT, Draws, keys
from memformer_dist.tasks.copying import CopyConfig
from memformer_dist.tasks.needle import NeedleConfig
from memformer_dist.tasks.retrieval import RetrievalConfig
from memformer_dist.tasks.stories import OBJECTS, PERSONS, PLACES, StoriesConfig
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import last_checkpoint, records, run_rank, tensors
from tests.helpers.scripts import run_script

WORDS = "the night was dark and a wind from the sea had taken the lamp , so anna sat by the window . where is it ?"


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    random = np.random.default_rng(0)
    path.write_text(" ".join(random.choice(WORDS.split(), 3000)))
    return str(path)


@pytest.fixture(scope="module")
def cases(text_file) -> dict:
    """name: (configuration, segments, segment_length)"""
    return {
        "needle": (NeedleConfig(), 5, 8),
        "needle anywhere": (NeedleConfig(place="random"), 5, 8),
        "needle overwritten": (NeedleConfig(needles=3), 4, 8),
        "copy": (CopyConfig(), 10, 12),
        "copy twice": (CopyConfig(symbols=10, per_segment=8, times=2), 9, 8),
        "reverse": (CopyConfig(symbols=10, per_segment=8, order="reversed"), 6, 8),
        "retrieval": (RetrievalConfig(), 4, 6),
        "retrieval of several": (RetrievalConfig(pairs=6, queries=3), 5, 8),
        "person": (StoriesConfig(texts=[text_file]), 6, 10),
        "object": (StoriesConfig(texts=[text_file], question="object", facts=8), 7, 10),
        "bytes": (StoriesConfig(texts=[text_file], tokens="bytes", question="object"), 7, 10),
    }


CASES = (
    "needle",
    "needle anywhere",
    "needle overwritten",
    "copy",
    "copy twice",
    "reverse",
    "retrieval",
    "retrieval of several",
    "person",
    "object",
    "bytes",
)

# ---- random numbers --------------------------------------------------------------------------------------------------


def test_draws_are_splitmix64():
    """In Python's integers; the first numbers of seed 1234567 as its authors publish them."""

    def mixed(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    key = 1234567
    draws = Draws(np.array([key], np.uint64))
    found = [int(x) for x in draws.bits(3)[0]]
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert found == [mixed((key + n * 0x9E3779B97F4A7C15) % 2**64) for n in (1, 2, 3)]
    fourth = mixed((key + 4 * 0x9E3779B97F4A7C15) % 2**64)
    assert draws.integers(10, 1).item() == (fourth >> 33) * 10 >> 31


def test_draws_of_a_document_depend_on_its_key_and_the_calls_alone():
    some, one = Draws(keys(3, np.arange(40))), Draws(keys(3, np.array([17])))
    for shape in ((2,), (), (3, 4)):
        assert (some.bits(*shape)[17] == one.bits(*shape)[0]).all()
    assert (some.integers(9, 5)[17] == one.integers(9, 5)[0]).all()
    assert (some.distinct(9, 5)[17] == one.distinct(9, 5)[0]).all()


def test_draws_are_even():
    draws = Draws(keys(0, np.arange(2000)))
    counts = np.bincount(draws.integers(7, 10).ravel(), minlength=7)
    assert len(counts) == 7 and abs(counts / 20000 - 1 / 7).max() < 5 * math.sqrt(1 / 7 * 6 / 7 / 20000)
    distinct = draws.distinct(6, 6)
    assert (np.sort(distinct, axis=1) == np.arange(6)).all()
    assert abs((distinct[:, 0] == 0).mean() - 1 / 6) < 5 * math.sqrt(1 / 6 * 5 / 6 / 2000)


# ---- documents -------------------------------------------------------------------------------------------------------


def made(case, count: int = 300, seed: int = 0):
    config, segments, size = case
    task = config.build(size)
    return task, task.documents(keys(seed, np.arange(count)), segments)


def read_needle(names: list[str], config, segments: int, size: int) -> list[str]:
    """What a needle's reader answers: the symbol behind the last mark."""
    marks = [i for i, name in enumerate(names) if name == "!"]
    assert len(marks) == config.needles and marks[-1] + 1 < (segments - 1) * size
    assert (0 in marks) or config.place == "random"
    assert names[-1] == "?" and names.count("?") == 1
    return [names[marks[-1] + 1]]


def read_copy(names: list[str], config, segments: int, size: int) -> list[str]:
    symbols = []
    question = names.index("?")
    assert question % size == 0
    for start in range(0, question, size):
        segment = names[start : start + size]
        if config.per_segment < size:
            assert segment[0] == "!"
            symbols += segment[1 : 1 + config.per_segment]
        else:
            assert "!" not in segment
            symbols += segment
    # There are as many as the answer's segments can hold.
    needed = math.ceil(len(symbols) * config.times / size)
    assert question // size + needed <= segments
    assert question // size + 1 + math.ceil((len(symbols) + config.per_segment) * config.times / size) > segments
    return (symbols[::-1] if config.order == "reversed" else symbols) * config.times


def read_retrieval(names: list[str], config, segments: int, size: int) -> list[str]:
    question = names.index("?")
    before, after = names[:question], names[question + 1 :]
    assert question >= (segments - 1) * size
    pairs = {key: value for key, value in pairwise(before) if key.startswith("key")}
    assert len(pairs) == config.pairs and sum(name.startswith("key") for name in before) == config.pairs
    asked = [name for name in after if name.startswith("key")]
    assert len(asked) == len(set(asked)) == config.queries
    assert after == [name for key in asked for name in (key, pairs[key])][:-1]
    return [pairs[key] for key in asked]


def read_story(names: list[str], config, segments: int, size: int) -> list[str]:
    """Follows everybody through the facts, word by word."""
    where, holder, left = {}, {}, {}
    question = len(names) - (4 if config.question == "person" else 5)
    assert names[question : question + 2] == ["where", "is"] and names[-1] == "?"
    facts = 0
    for i, person in enumerate(names[:question]):
        if person not in PERSONS:
            continue
        facts += 1
        words = names[i + 1 :]
        if words[:3] == ["went", "to", "the"]:
            where[person] = words[3]
            end, stop = words[3] in PLACES, words[4]
        elif words[:2] == ["took", "the"]:
            thing = words[2]
            assert person in where and thing not in holder
            assert thing not in left or left[thing] == where[person]
            holder[thing] = person
            end, stop = thing in OBJECTS, words[3]
        else:
            assert words[:3] == ["put", "down", "the"]
            thing = words[3]
            assert holder.pop(thing) == person
            left[thing] = where[person]
            end, stop = thing in OBJECTS, words[4]
        assert end and stop == "."
        assert i + 5 <= (segments - 1) * size
    assert facts == min(config.facts, (segments - 1) * size // 6)
    subject = names[question + 2 :][0 if config.question == "person" else 1]
    if config.question == "person":
        return [where[subject]]
    return [where[holder[subject]] if subject in holder else left[subject]]


READERS = {NeedleConfig: read_needle, CopyConfig: read_copy, RetrievalConfig: read_retrieval, StoriesConfig: read_story}


@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_of_a_slow_reader(cases, name):
    """Who follows the rules one document at a time; the answers are the labels, and nothing else has one."""
    config, segments, size = cases[name]
    task, documents = made(cases[name])
    assert documents.tokens.shape == documents.labels.shape == (300, segments * size)
    assert documents.tokens.min() >= 0 and documents.tokens.max() < task.vocabulary.size
    for tokens, labels in zip(*documents, strict=True):
        named = [task.names[token] for token in tokens]
        expected = READERS[type(config)](named, config, segments, size)
        assert [task.names[label] for label in labels[labels != IGNORE]] == expected
        asked = np.flatnonzero(labels[:-1] != IGNORE)
        inside = asked[labels[asked] == tokens[asked + 1]]
        assert len(inside) == len(asked)  # an answer is the next token, so that later ones are given in sight of it


def share_told_by(column: np.ndarray, answer: np.ndarray) -> float:
    """How often the answer is right that a token makes the likeliest."""
    joint = np.zeros((column.max() + 1, answer.max() + 1))
    np.add.at(joint, (column, answer), 1)
    return joint.max(axis=1).sum() / len(answer)


@pytest.mark.parametrize("name", CASES)
def test_nothing_in_its_own_segment_tells_an_answer(cases, name):
    """No token of it, alone or with its neighbour, says more than chance; an earlier segment's tokens do."""
    config, segments, size = cases[name]
    _, documents = made(cases[name], count=6000)
    answers = len(PLACES) if isinstance(config, StoriesConfig) else getattr(config, "symbols", None) or config.values
    bound = 1 / answers + 0.1
    places = [i for i in range(segments * size) if (documents.labels[:, i] != IGNORE).all()]
    assert places
    for i in places[:: max(1, len(places) // 4)]:
        own = range(i // size * size, i + 1)
        told = [share_told_by(documents.tokens[:, j], documents.labels[:, i]) for j in own]
        assert max(told) < bound, (i, told)
    if name in ("needle", "copy", "copy twice", "reverse"):  # the control: there a token at a fixed place is the answer
        i = places[0]
        before = range(i // size * size)
        assert max(share_told_by(documents.tokens[:, j], documents.labels[:, i]) for j in before) == 1


@pytest.mark.parametrize("name", CASES)
def test_documents_are_a_function_of_key_and_length(cases, name):
    config, segments, size = cases[name]
    task, documents = made(cases[name], count=50)
    again = config.build(size).documents(keys(0, np.array([31, 7])), segments)
    assert (again.tokens == documents.tokens[[31, 7]]).all() and (again.labels == documents.labels[[31, 7]]).all()
    for seed, stream in ((1, 0), (0, HELD_OUT)):
        others = task.documents(keys(seed, np.arange(50), stream), segments)
        assert not (others.tokens == documents.tokens).all(1).any()


def test_no_document_comes_twice(cases):
    """Over lanes, steps, seeds and streams; those of copy are random through and through."""
    task = CopyConfig(symbols=16).build(16)
    found = [task.documents(keys(seed, np.arange(1000), stream), 3).tokens for seed in (0, 1, 2) for stream in (0, 1)]
    assert len(np.unique(np.concatenate(found), axis=0)) == 6000


def test_facts_are_spread_over_all_that_may_hold_them(cases):
    """Places of facts, kinds of facts, and how far back the last one is."""
    config, segments, size = cases["object"]
    task, documents = made(cases["object"], count=2000)
    persons = [task.names.index(person) for person in PERSONS]
    starts = np.isin(documents.tokens[:, : (segments - 1) * size], persons).mean(0)
    strip = (segments - 1) * size // config.facts
    possible = starts[: config.facts * strip].reshape(config.facts, strip)[:, : strip - 5]
    assert (possible > 0).all() and possible.sum() == pytest.approx(config.facts)
    verbs = [task.names.index(word) for word in ("went", "took", "put")]
    shares = [(documents.tokens == verb).sum() / 2000 / config.facts for verb in verbs]
    assert min(shares) > 0.05


def test_held_out_stories_are_in_text_that_training_does_not_read(text_file):
    config = StoriesConfig(texts=[text_file])
    train, valid = config.build(8), config.build(8, held_out=True)
    assert len(valid.text) == pytest.approx(0.1 * (len(train.text) + len(valid.text)), abs=1)
    assert not {train.names[i] for i in np.unique(train.text)} & set(PERSONS)
    assert train.vocabulary == valid.vocabulary and "lamp" in {train.names[i] for i in np.unique(train.text)}


def test_bytes_of_a_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(256)) * 5)
    task = StoriesConfig(texts=[str(tmp_path)], tokens="bytes").build(8)
    own = len(task.names) - 256
    assert (task.text[:256] == own + np.arange(256)).all() and task.names[own + 65] == "byte 65"


@pytest.mark.parametrize(
    "config, segments, size, problem",
    [
        (NeedleConfig(), 1, 8, "found 1 segments, expected at least 2"),
        (NeedleConfig(needles=5), 2, 8, "found 2 segments of 8 tokens, which have no room for the needles"),
        (CopyConfig(per_segment=9), 3, 8, "found 9 symbols per segment of 8 tokens, expected at most 8"),
        (CopyConfig(per_segment=8, times=2), 2, 8, "found 2 segments, expected at least 3"),
        (RetrievalConfig(pairs=5), 2, 8, "found 2 segments of 8 tokens, which have no room for the pairs"),
        (RetrievalConfig(queries=3), 2, 4, "found 3 queries in a segment of 4 tokens, expected at most 2"),
        (RetrievalConfig(queries=5), 2, 10, "found 5 queries, 4 pairs and 16 keys"),
        (RetrievalConfig(pairs=20), 9, 10, "found 1 queries, 20 pairs and 16 keys"),
    ],
)
def test_documents_that_cannot_be(config, segments, size, problem):
    task = config.build(size)
    assert (task.problem(segments) or "").startswith(problem)
    assert task.problem(20) is None or type(config) in (CopyConfig, RetrievalConfig)


def test_a_shortest_document_can_be_made(cases):
    for config, _, size in cases.values():
        task = config.build(size)
        least = next(segments for segments in range(1, 20) if task.problem(segments) is None)
        assert least >= task.least and (task.documents(keys(0, np.arange(9)), least).labels != IGNORE).any(1).all()


# ---- as training and evaluation read them ----------------------------------------------------------------------------


def reader(config, lanes: range, all_lanes: int = 12, *, carry: float = 0.0, seed: int = 5) -> TaskReader:
    train, _ = task_documents(config, 8, seed)
    return TaskReader(train, lanes=lanes, all_lanes=all_lanes, carry=carry)


def equal(one: Segment, other: Segment) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def test_a_window_is_a_document_of_every_lane():
    window = reader(NeedleConfig(), range(12)).window(6, 4)
    assert window.start == 6 and len(window) == 4
    document = NeedleConfig().build(8).documents(keys(5, 6 * 12 + np.arange(12)), 4)
    for t, segment in enumerate(window):
        assert segment.tokens.dtype == segment.labels.dtype == torch.int64
        assert (segment.tokens.numpy() == document.tokens[:, t * 8 : (t + 1) * 8]).all()
        assert (segment.labels.numpy() == document.labels[:, t * 8 : (t + 1) * 8]).all()
        assert (segment.offset == t * 8).all() and (segment.length == 8).all() and not segment.reset_memory.any()
        assert segment.reset.all() if t == 0 else not segment.reset.any()
    assert equal(window[0:2][1], window[1])


def test_ranks_and_lane_groups_read_the_same_documents():
    config = NeedleConfig(place="random")
    whole, left, right = (reader(config, lanes, carry=0.5) for lanes in (range(12), range(6), range(6, 12)))
    for start, segments in ((0, 2), (2, 3), (5, 3), (8, 7)):
        windows = [one.window(start, segments) for one in (whole, left, right)]
        groups = [right.window(start, segments, range(first, first + 3)) for first in (6, 9)]
        for t in range(segments):
            assert equal(windows[0][t], concatenate([windows[1][t], windows[2][t]]))
            assert equal(windows[2][t], concatenate([group[t] for group in groups]))
        assert equal(right.segment(start + segments - 1, range(9, 12)), groups[1][-1])
        assert left.labels(start, start + segments) + right.labels(start, start + segments) == 12
        assert left.counts(start, start + segments) == (None, segments * 12 * 8, 12)
    assert left.prepare(0, 4) is None and whole.wait_s > 0


def test_every_window_has_new_documents_and_a_new_reader_the_same():
    def rows(one: TaskReader, start: int) -> torch.Tensor:
        return torch.cat([segment.tokens for segment in one.window(start, 4)], 1)

    first = reader(NeedleConfig(), range(12))
    found = torch.cat([rows(first, start) for start in range(0, 400, 4)])
    assert len(torch.unique(found, dim=0)) == 1200
    assert torch.equal(rows(reader(NeedleConfig(), range(12)), 200), found[600:612])
    assert not torch.equal(rows(reader(NeedleConfig(), range(12), seed=6), 200), found[600:612])


def test_a_share_of_documents_starts_from_what_the_lane_remembers():
    carrying, plain = (reader(NeedleConfig(), range(12), carry=carry) for carry in (0.25, 0.0))
    assert carrying.window(0, 2)[0].reset.all()
    carried = 0
    for start in range(2, 400, 2):
        windows = carrying.window(start, 2), plain.window(start, 2)
        assert torch.equal(windows[0][0].tokens, windows[1][0].tokens) and windows[1][0].reset.all()
        assert not windows[0][1].reset.any()
        carried += int((~windows[0][0].reset).sum())
    assert carried / (12 * 199) == pytest.approx(0.25, abs=0.05)
    assert not reader(NeedleConfig(), range(12), carry=1.0).window(2, 2)[0].reset.any()


@pytest.mark.parametrize("name", CASES)
def test_an_evaluation_reads_the_same_labels_through_ordinary_lanes(cases, name):
    """TaskDocuments as a TokenDataset, cut by the reader of corpora, against the segments side by side."""
    config, segments, size = cases[name]
    config = config.model_copy(update={"held_out_documents": 5, "held_out_segments": segments})
    valid = TaskDocuments(config, segment_length=size, seed=0, held_out=True)
    assert valid.total_tokens == 5 * segments * size
    schedule = LaneSchedule(valid.lengths, lanes=5, segment_length=size, epochs=1)
    through_lanes = WindowReader(valid, schedule, lanes=range(5))
    expected = valid.segments(np.arange(5), segments)
    for t in range(segments):
        found = through_lanes.segment(t)
        order = torch.argsort(found.document)
        for field in ("tokens", "labels", "length", "reset", "document", "offset"):
            assert torch.equal(getattr(found, field)[order], getattr(expected[t], field)), (t, field)
    labels = sum(int((segment.labels != IGNORE).sum()) for segment in expected)
    assert through_lanes.labels(0, segments) == labels > 0


def test_datasets_of_one_task_are_known_by_it():
    one, other = task_documents(NeedleConfig(), 8, 0)
    assert one.vocabulary == other.vocabulary and one.fingerprint == other.fingerprint
    assert one.vocabulary != task_documents(NeedleConfig(symbols=8), 8, 0)[0].vocabulary
    with pytest.raises(UserError, match="task needle has no tokenizer"):
        one.tokenizer()


# ---- the section data ------------------------------------------------------------------------------------------------


def problems(config: dict) -> list[str]:
    with pytest.raises(UserError) as error:
        RunConfig.check(config)
    return str(error.value).split("\n  ")[1:]


@pytest.fixture
def on_a_task(config) -> dict:
    del config["data"]["corpus"]
    config["data"] |= {"task": {"name": "needle", "held_out_documents": 8, "held_out_segments": 3}, "segment_length": 6}
    return config


def test_the_configuration_of_these_tests_is_good(on_a_task):
    assert RunConfig.check(on_a_task).data.task == NeedleConfig(held_out_documents=8, held_out_segments=3)


@pytest.mark.parametrize(
    "data, expected",
    [
        ({"task": None}, "data.corpus: missing; folder or URL of a corpus, if there is no data.task"),
        ({"corpus": "books"}, "data.corpus: found 'books' beside data.task, expected one of them"),
        ({"task": {"name": "nedle"}}, "data.task: found {'name': 'nedle'}; expected an object whose `name` is one of"),
        ({"task": "needle"}, "data.task: found 'needle'; expected an object whose `name` is one of needle, copy,"),
        ({"task": {"name": "needle", "symbol": 3}}, "data.task.symbol: unknown key, did you mean symbols?"),
        ({"task": {"name": "needle", "carry": 2}}, "data.task.carry: found 2; input should be less than or equal to 1"),
        ({"task": {"name": "stories"}}, "data.task.texts: missing; text files"),
        (
            {"task": {"name": "stories", "texts": ["/no/such"]}},
            "data.task.texts: cannot read /no/such: No such file or directory",
        ),
        (
            {"task": {"name": "copy", "per_segment": 6}, "segment_length": 4},
            "data.task.held_out_segments: found 6 symbols per segment of 4 tokens",
        ),
        ({"mode": "stream"}, "data.mode: found 'stream' with data.task, which makes its own documents; expected"),
        ({"min_tokens": 3}, "data.min_tokens: found 3 with data.task"),
        ({"shuffle_shards": 3}, "data.shuffle_shards: found 3 with data.task"),
    ],
)
def test_mistakes(on_a_task, data, expected):
    on_a_task["data"] |= data
    assert problems(on_a_task)[0].startswith(expected)


def test_a_window_that_is_too_short_for_a_document(on_a_task):
    for window in (1, {"by_step": {"0": 1, "5": 3}}, dict(first=1, last=4, metric="eval/loss", threshold=1)):
        on_a_task["mrbp"]["window"], on_a_task["training"]["evaluate_every_tokens"] = window, 100
        assert problems(on_a_task) == [
            "mrbp.window: a window is a document of data.task: found 1 segments, expected at least 2"
        ]


def test_every_task_is_named_by_its_configuration():
    assert list(TASKS) == ["needle", "copy", "retrieval", "stories"]


# ---- runs ------------------------------------------------------------------------------------------------------------

STOP_AFTER = 5


def task_run(world, raw: dict, runs) -> None:
    run_rank(world, raw, runs / f"{world.size}-whole")
    if world.size == 2:
        run_rank(world, raw, runs / "2-stopped", stop_after=STOP_AFTER)
        run_rank(world, raw, runs / "2-stopped")


@pytest.fixture
def task_settings(on_a_task) -> dict:
    """Ten steps whose windows grow in the middle, with carried memories, dropout and two lane groups per rank."""
    on_a_task["data"]["task"] |= {"carry": 0.5, "needles": 2}
    on_a_task["data"]["lanes"] = 8
    on_a_task["mrbp"] = {
        "lanes_per_group": 2,
        "window": dict(first=2, last=5, growth=1.5, metric="accuracy/train", threshold=-1, every_steps=3),
    }
    on_a_task["training"]["tokens"] = 80
    on_a_task["checkpoint"] = {}
    return on_a_task


@pytest.mark.slow
def test_a_run_on_a_task_resumes_bit_by_bit_on_any_number_of_ranks(task_settings, tmp_path):
    for ranks in (1, 2):
        run_ranks(ranks, task_run, task_settings, tmp_path)
    one, whole, stopped = (tmp_path / name for name in ("1-whole", "2-whole", "2-stopped"))
    names = "loss/train", "accuracy/train", "mrbp/window", "optim/grad_norm"
    assert records(whole, *names) == records(stopped, *names)
    for prefix in ("weights", "moments", "lanes"):
        left, right = (tensors(last_checkpoint(path), prefix) for path in (whole, stopped))
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    assert [window for *_, window in records(one, "mrbp/window")] == [2, 2, 2, 3, 3, 3, 4, 4, 4, 5]
    figures = [torch.tensor(records(path, *names), dtype=torch.float64) for path in (one, whole)]
    assert torch.allclose(*figures, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_programs_read_a_run_on_a_task(on_a_task, tmp_path):
    """Trained, evaluated on its held-out documents, and refused where text is needed."""
    path, run = tmp_path / "needle.json", tmp_path / "run"
    on_a_task["training"]["tokens"] = 20
    path.write_text(json.dumps(on_a_task))
    done = run_script("launch/train.py", "--config", path, "--run-dir", run)
    assert done.returncode == 0, done.stderr
    assert "task needle, new documents in every step" in done.stderr and not (run / "tokenizer.model").exists()
    summary = json.loads((run / "summary.json").read_text())
    done = run_script("launch/evaluate.py", "--run-dir", run, "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "found.json").read_text())["eval_loss"] == pytest.approx(summary["eval_loss"])
    for command, expected in (
        (("launch/evaluate.py", "--run-dir", run, "--corpus", "books"), "the run was trained on the task needle"),
        (("launch/generate.py", "--run-dir", run, "--prompt", "a"), "found a run on a task"),
        (("launch/corpus.py", "show", "--run-dir", run), "task needle"),
    ):
        done = run_script(*command)
        assert done.returncode == 2 and expected in done.stderr, done.stderr
