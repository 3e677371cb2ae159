"""launch/corpus.py show against texts and masks that the test chose."""

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor

from memformer_dist.commands.corpus import main
from memformer_dist.data.open_data import lane_schedule, open_corpora, open_mixture
from memformer_dist.errors import UserError
from memformer_dist.inspect.show import open_corpus, open_run, show
from memformer_dist.prepare.build import shard
from memformer_dist.prepare.tokenizer import train_tokenizer
from tests.helpers.corpora import documents
from tests.helpers.http import FileServer
from tests.helpers.scripts import run_script

LANES, LENGTH = 3, 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Conversations: a question, which is masked, and an answer."""
    folder = tmp_path_factory.mktemp("shown")
    texts = documents(24)
    (folder / "model").write_bytes(train_tokenizer(texts, vocab_size=300))
    with (folder / "texts.jsonl").open("w") as file:
        for text in texts:
            words = text.split(" ")
            middle = len(words) // 2
            parts = [
                {"text": " ".join(words[:middle]), "loss": False},
                {"text": " ".join(words[middle:]), "loss": True},
            ]
            file.write(json.dumps({"parts": [part for part in parts if part["text"]]}) + "\n")
    shard(folder / "corpus", folder / "model", [str(folder / "texts.jsonl")], valid_fraction=0.25)
    return folder / "corpus"


def blocks(lines):
    """[(heading, text)] of what `show` yields; nothing is read on a lane that has run dry."""
    found = []
    for line in lines:
        if re.match(r"segment \d+, lane \d+: ", line):
            found.append([line, ""])
        else:
            found[-1][1] += line
    return found


def whole_documents(corpus, split, lane, segments):
    """[(number, text with its marks)] of documents that a lane reads from their first token to their last."""
    texts, current = [], None
    shown = show(
        *open_corpus(str(corpus), split, lanes=LANES, segment_length=LENGTH, seed=0), lane=lane, segments=segments
    )
    for heading, text in blocks(shown):
        number, first, last, length = map(
            int, re.search(r"document (\d+), tokens (\d+) to (\d+) of (\d+)", heading).groups()
        )
        assert (first == 0) == (", reset" in heading)
        assert ("positions of padding" in heading) == (last - first + 1 < LENGTH)
        if first == 0:
            current = ""
        if current is not None:
            current += text
            if last == length - 1:
                texts.append((number, current))
    return texts


@pytest.mark.parametrize("split", ["train", "valid"])
def test_every_document_is_shown_as_it_is(corpus, split):
    """What is outside of the brackets is what was to be learned; with what is inside it is the whole text."""
    opened = open_corpora(corpus)[split == "valid"]
    tokenizer = SentencePieceProcessor(model_file=str(corpus / "tokenizer.model"))
    seen = set()
    for lane in range(LANES):
        for number, text in whole_documents(corpus, split, lane, range(400)):
            seen.add(number)
            tokens = opened.tokens(number, 0, 10**9).tolist()
            assert text.replace("⟦", "").replace("⟧", "").replace("⟨EOS⟩", "") == tokenizer.decode(tokens)
            assert text.endswith("⟨EOS⟩") and text.count("⟨EOS⟩") == 1
            counted = re.sub("⟦.*?⟧", "", text.replace("\n", " ")).removesuffix("⟨EOS⟩")
            mask = opened.mask(number, 0, 10**9)[:-1].astype(bool)  # of tokens 1 and on
            learned = [
                token for token, counts in zip(tokens, [mask[0] if len(mask) else True, *mask], strict=True) if counts
            ]
            # A text that begins with a space is decoded without it.
            assert counted.strip() == tokenizer.decode(learned).replace("\n", " ").strip()
            assert ("⟦" in text) == (not mask.all())
    assert seen == set(range(len(opened.lengths)))


def test_the_place_is_where_the_tokens_lie(corpus):
    dataset, schedule = open_corpus(str(corpus), "train", lanes=LANES, segment_length=LENGTH, seed=0)
    for heading, _ in blocks(show(dataset, schedule, lane=1, segments=range(5, 30))):
        found = re.search(r"document (\d+), tokens (\d+) to (\d+) of \d+, epoch (\d+).*, (\S+) at byte (\d+)$", heading)
        number, first, last, epoch = map(int, found.groups()[:4])
        raw = Path(found[5]).read_bytes()
        expected = dataset.tokens(number, first, last + 1)
        assert np.array_equal(np.frombuffer(raw, expected.dtype, last + 1 - first, int(found[6])), expected)
        tick = int(re.match(r"segment (\d+)", heading)[1])
        assert schedule.at(tick).document[1] == number and schedule.at(tick).epoch[1] == epoch


def test_tokens_one_by_one(corpus):
    dataset, schedule = open_corpus(str(corpus), "train", lanes=LANES, segment_length=LENGTH, seed=0)
    tick = next(tick for tick in range(100) if schedule.at(tick).reset[0])
    document = int(schedule.at(tick).document[0])
    heading, *lines = show(dataset, schedule, lane=0, segments=range(tick, tick + 1), tokens=True)
    text, mask = dataset.tokens(document, 0, LENGTH + 1).tolist(), dataset.mask(document, 0, LENGTH)
    assert len(lines) == LENGTH and "reset" in heading
    for position, line in enumerate(lines):
        if position >= dataset.lengths[document]:
            assert line.split() == [str(position), "padding"]
            continue
        label = text[position + 1] if position + 1 < len(text) else dataset.vocabulary.eos_id
        assert line.split()[:2] == [str(position), str(text[position])]
        assert line.split("-> ")[1].split()[0] == (str(label) if mask[position] else "masked")


def test_a_run_and_a_stream(trained_run, corpus_dir, tmp_path):
    """The settings of the run: its lanes, its segment length, its order; a stream has no document of its own."""
    config = json.loads((trained_run / "config.json").read_text())
    _, schedule = open_run(trained_run, "train")
    expected = lane_schedule(open_corpora(corpus_dir)[0], seed=0, lanes=4, segment_length=16)
    assert all(np.array_equal(schedule.at(t).document, expected.at(t).document) for t in range(50))
    assert open_run(trained_run, "valid")[1].ticks > 0
    config["data"]["mode"] = "stream"
    (tmp_path / "config.json").write_text(json.dumps(config))
    dataset, schedule = open_run(tmp_path, "train")
    shown = blocks(show(dataset, schedule, lane=2, segments=range(40)))
    assert all(re.search(r"part \d+, tokens .* begins in /.*/train/shard-\d+.tar$", heading) for heading, _ in shown)
    assert any("⟨EOS⟩" in text for _, text in shown)
    done = run_script(
        "launch/corpus.py", "show", "--run-dir", trained_run, "--lane", "3", "--segment", "2", "--segments", "2"
    )
    assert done.returncode == 0 and re.match(
        r"segment 2, lane 3: document \d+, .*\n(.|\n)+\nsegment 3, lane 3: ", done.stdout
    )


def test_a_lane_that_has_run_dry_and_mistakes(corpus, trained_run):
    dataset, schedule = open_run(trained_run, "valid")
    last = schedule.ticks
    (line,) = show(dataset, schedule, lane=0, segments=range(last, last + 1))
    assert line == f"segment {last}, lane 0: nothing, the lane has no more documents"
    with pytest.raises(UserError, match=f"--lane: found {schedule.lanes}, expected 0 to {schedule.lanes - 1}"):
        list(show(dataset, schedule, lane=schedule.lanes, segments=range(1)))


@pytest.mark.parametrize(
    "arguments, problems",
    [
        ([], ["expected CORPUS or --run-dir"]),
        (["c", "--run-dir", "r"], ["found CORPUS and --run-dir, expected one of them"]),
        (["c", "--segment", "-1", "--segments", "0"], ["--segment: found -1, .* 0", "--segments: found 0, .* 1"]),
        (
            ["--run-dir", "r", "--lanes", "0", "--seed", "1"],
            ["--lanes: found 0", "--lanes: .* sets it", "--seed: .* it"],
        ),
    ],
)
def test_mistakes_of_the_command(arguments, problems):
    with pytest.raises(UserError) as raised:
        main(["show", *arguments])
    lines = str(raised.value).splitlines()
    assert len(lines) == len(problems)
    for line, problem in zip(lines, problems, strict=True):
        assert re.match(problem, line)


def test_over_http(corpus_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("memformer_dist.inspect.show.open_mixture", partial(open_mixture, cache=tmp_path))
    sizes = dict(lanes=LANES, segment_length=LENGTH, seed=0)
    with FileServer(corpus_dir) as server:
        there = list(show(*open_corpus(server.url, "train", **sizes), lane=1, segments=range(20)))
    here = list(show(*open_corpus(str(corpus_dir), "train", **sizes), lane=1, segments=range(20)))
    # The place alone differs.
    assert [re.sub(", [^,]+ at byte", ", at byte", line) for line in there] == [
        re.sub(", [^,]+ at byte", ", at byte", line) for line in here
    ]
    assert f"{server.url}/train/shard-000000.tar (cached as {tmp_path}" in there[0]
