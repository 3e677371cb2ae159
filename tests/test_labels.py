"""Corpora whose loss masks leave some documents, or all, without a label: said, or refused, before anything is trained."""

import json
import re
from fractions import Fraction

import numpy as np
import pytest

from memformer_dist.config import RunConfig
from memformer_dist.data import labels
from memformer_dist.data.corpus import Corpus
from memformer_dist.data.labels import expect_labels, expect_labels_ahead
from memformer_dist.data.lanes import LaneSchedule
from memformer_dist.data.mixture import Mixture
from memformer_dist.data.open_data import open_corpora, training_schedule
from memformer_dist.data.sampler import EpochSampler, WeightedDocuments
from memformer_dist.errors import UserError
from memformer_dist.start import find_labels
from tests.helpers.corpora import write_split
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import STEP_TOKENS, records, run_rank, settings
from tests.helpers.scripts import run_script


def split(path, counts, vocabulary=None):
    """A split of one document of 20 tokens per entry, with so many labels; None: without loss masks."""
    texts = [np.random.default_rng(number).integers(4, 100, 20) for number in range(len(counts))]
    masks = None if counts[0] is None else [np.arange(20) < count for count in counts]
    return Corpus.open(write_split(path, texts, masks, **{} if vocabulary is None else {"vocabulary": vocabulary}))


def facts(dataset, names=("books",)):
    return expect_labels(dataset, dataset.sources(), names)


def test_without_masks_every_label_counts(tmp_path):
    assert facts(split(tmp_path / "a", [None] * 3)) == (1.0, [])


def test_documents_without_labels_are_a_fact(tmp_path):
    assert facts(split(tmp_path / "a", [20, 5, 15, 20])) == (0.75, [])
    share, said = facts(split(tmp_path / "b", [20, 0, 5, 0]))
    assert share == 25 / 80
    assert len(said) == 1
    assert said[0].startswith("data.corpus: 2 of 4 documents of books that were looked at have no label that counts in")


def test_no_label_at_all_is_refused(tmp_path):
    with pytest.raises(UserError) as caught:
        facts(split(tmp_path / "a", [0, 0, 0]))
    first, second = str(caught.value).splitlines()
    assert first == "data.corpus: no label of books counts in the loss: 3 documents, all masked"
    assert second.startswith("expected some with a label")


def test_labels_only_in_documents_that_are_left_out(tmp_path):
    """data.min_tokens leaves out what has them."""
    texts, masks = [np.arange(4, 9), np.arange(4, 24)], [np.ones(5, int), np.zeros(20, int)]
    corpus = Corpus.open(write_split(tmp_path / "a", texts, masks))
    assert expect_labels(corpus, corpus.sources(1), ["books"])[0] == 5 / 25
    with pytest.raises(UserError, match="1 documents, all masked"):
        expect_labels(corpus, corpus.sources(6), ["books"])


def test_mixtures(tmp_path):
    """Each corpus by its weight; one without labels is a fact as long as another has some."""
    masked, half, plain = (
        split(tmp_path / name, counts)
        for name, counts in (("masked", [0, 0]), ("half", [10] * 3), ("plain", [None] * 2))
    )
    share, said = facts(Mixture([half, plain], [Fraction(2), Fraction(1)]), ["half", "plain"])
    assert (share, said) == ((2 * 30 + 40) / (2 * 60 + 40), [])
    share, said = facts(Mixture([masked, half], [Fraction(1), Fraction(1)]), ["masked", "half"])
    assert share == 30 / 100
    assert said == ["data.corpus: no label of masked counts in the loss: 2 documents, all masked"]
    with pytest.raises(UserError, match="no label of masked (.|\n)*no label of other"):
        facts(Mixture([masked, masked], [Fraction(1), Fraction(1)]), ["masked", "other"])


def test_a_sample_is_looked_at_and_all_only_where_it_has_no_label(tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "SAMPLE_DOCUMENTS", 5)
    corpus, read = split(tmp_path / "a", [10] * 200), []
    mask = corpus.mask
    monkeypatch.setattr(corpus, "mask", lambda document, *span: read.append(document) or mask(document, *span))
    assert facts(corpus) == (0.5, [])
    assert len(read) == 5 and read == sorted(read) and max(read) > 50
    one = split(tmp_path / "b", [0] * 150 + [20] + [0] * 49)
    assert facts(one)[0] == pytest.approx(1 / 151) and "150 of 151 documents" in facts(one)[1][0]
    with pytest.raises(UserError, match="200 documents, all masked"):
        facts(split(tmp_path / "c", [0] * 200))


def test_labels_that_run_out():
    """A remote corpus is not looked at before: the run ends once every document was read since the last label."""
    lengths = np.array([40, 20, 20, 60])
    for weight, epochs in ((Fraction(1), 1), (Fraction(1, 3), 3)):
        sources = [WeightedDocuments(np.arange(4), weight)]
        schedule = LaneSchedule(lengths, lanes=2, segment_length=20, order=EpochSampler(sources, seed=0))

        def ends(tick, since=5, schedule=schedule, sources=sources) -> bool:
            try:
                expect_labels_ahead(schedule, sources, since=since, tick=tick)
            except UserError:
                return True
            return False

        first = next(tick for tick in range(5, 500) if ends(tick))
        read = schedule.spans(5, first)
        whole = [
            document for document in range(4) if (read.ticks[read.document == document]).sum() * 20 >= lengths[document]
        ]
        assert whole == [0, 1, 2, 3] and all(ends(tick) for tick in range(first, first + 50))
        assert not ends(first + 300, since=first + 300)
        assert first < 5 + 10 * epochs * sum(lengths) / 20, "it does not wait for ever"


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def corpora(corpus_dir, tmp_path):
    """CORPUS folders by name, by how many of 20 labels each of the documents of a split have."""

    def make(name, train, valid):
        vocabulary = open_corpora(corpus_dir)[0].vocabulary
        for part, counts in (("train", train), ("valid", valid)):
            split(tmp_path / name / part, counts, vocabulary)
        (tmp_path / name / "tokenizer.model").write_bytes((corpus_dir / "tokenizer.model").read_bytes())
        return tmp_path / name

    return make


@pytest.mark.slow
def test_the_program_refuses_a_corpus_without_labels(corpora, tmp_path, config):
    config["data"]["corpus"] = str(corpora("masked", [0] * 9, [20] * 4))
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = run_script("launch/train.py", "--config", tmp_path / "config.json", "--run-dir", tmp_path / "run")
    assert done.returncode == 2
    assert re.search(
        "^error: data.corpus: no label of .*masked counts in the loss: 9 documents, all masked", done.stderr, re.M
    )
    assert not (tmp_path / "run" / "checkpoints").exists()


def labels_rank(world, raw, unlabelled, folder):
    run_rank(world, raw, folder / "some")
    with pytest.raises(UserError, match="no label of .*masked counts in the loss"):
        run_rank(world, unlabelled, folder / "none")
    with pytest.MonkeyPatch.context() as patch:  # as if the corpus were remote
        patch.setattr("memformer_dist.start.expect_labels", lambda *arguments: (1.0, []))
        with pytest.raises(UserError, match="found no label that counts in the loss in .* epochs"):
            run_rank(world, unlabelled, folder / "remote")


def test_what_depends_on_a_validation_split_without_labels(corpora, config):
    """Early stopping once took figures that were no numbers for a lack of improvement."""
    config["data"]["corpus"] = str(corpora("masked", [20] * 9, [0] * 4))
    splits = open_corpora(config["data"]["corpus"])

    def found(**training):
        return find_labels(RunConfig.check(config | {"training": config["training"] | training}), splits)

    assert found() == (
        1.0,
        ["data.corpus: no label of the validation split counts in the loss: evaluations will have no figures"],
    )
    with pytest.raises(
        UserError, match="^training.early_stopping_patience: found without a figure of the validation split\n"
    ):
        found(evaluate_every_tokens=100, early_stopping_patience=2)
    config["mrbp"]["window"] = {"first": 1, "last": 2, "metric": "eval/gap", "threshold": 0.1}
    with pytest.raises(UserError, match="^mrbp.window.metric: found without a figure"):
        found(evaluate_every_tokens=100)


@pytest.mark.slow
def test_runs_on_masked_corpora(corpora, tmp_path, capfd):
    raw = settings(corpora("some", [20, 0] * 8, [0] * 4), tokens=STEP_TOKENS)
    unlabelled = settings(corpora("masked", [0] * 16, [20] * 4), tokens=STEP_TOKENS)
    run_ranks(2, labels_rank, raw, unlabelled, tmp_path)
    said = capfd.readouterr().err
    assert f"data.corpus: 8 of 16 documents of {tmp_path / 'some'} that were looked at have no label" in said
    assert "data.corpus: no label of the validation split counts in the loss: evaluations will have no figures" in said
    config = RunConfig.check(raw)
    epoch = training_schedule(config.data, open_corpora(tmp_path / "some")[0]).documents(0)
    assert len(epoch) == 16 and records(tmp_path / "some")[-1][1] >= STEP_TOKENS
    assert not (tmp_path / "remote" / "checkpoints").exists()
