"""tokenizer/train.py and tokenizer/shard.py."""

import gzip
import hashlib
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memformer_dist.data.corpus import Corpus
from memformer_dist.errors import UserError
from memformer_dist.prepare.build import shard
from memformer_dist.prepare.splits import choose_validation
from memformer_dist.prepare.tokenizer import sample_lines, train_tokenizer
from tests.helpers import ROOT
from tests.helpers.scripts import run_script

SOURCE = "".join((ROOT / "memformer_dist" / "prepare" / name).read_text() for name in ("tokenizer.py", "documents.py"))
CONTROL_LOOKALIKES = ["<s>", "</s>", "<pad>", "<unk>", "<0x41>", "<0x0A>"]


def train_on(text, **options):
    model = train_tokenizer(text.split("\n"), **({"vocab_size": 700} | options))
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def tokenizer(request):
    # The lookalikes are so frequent that the trainer would like to make pieces of them.
    return train_on(SOURCE + "\n" + "\n".join(CONTROL_LOOKALIKES * 200), model_type=request.param)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small.model"
    path.write_bytes(train_tokenizer(SOURCE.split("\n"), vocab_size=700))
    return path


# ------------------------------------------------------------------------------------------------------------- train.py

awkward = st.lists(
    st.one_of(
        st.sampled_from(
            [*CONTROL_LOOKALIKES, "\n", "\t", "\r\n", "\0", " ", "    ", "\u2581", "\ue000", "\ue001", "\ue002"]
        ),
        st.sampled_from(["\u2585", " \u2047 ", "\ufeff", "e\u0301", "\ufb01", "\u00a0", "\u3000", "def ", "return"]),
        st.text(max_size=8),
    ),
    max_size=12,
).map("".join)


@settings(max_examples=400, deadline=None)
@given(text=awkward)
@example(text="")
@example(text="\n\n\tif x:\r\n        return  x \n\n")
@example(text="".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)])))
def test_lossless(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert min(ids, default=4) >= 4  # neither a control token nor unknown


def test_plain_sentencepiece_is_not_lossless():
    """Negative control: the trainer's defaults fail the test above."""
    writer = io.BytesIO()
    lines = SOURCE.split("\n")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=writer, vocab_size=500, minloglevel=2
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=writer.getvalue())
    assert model.decode(model.encode("a  b\n\tc")) != "a  b\n\tc"


def test_special_tokens(tokenizer):
    assert [tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id()] == [0, 1, 2, 3]
    assert [tokenizer.id_to_piece(token) for token in tokenizer.encode("\n\t\n\n")] == ["\n", "\t", "\n", "\n"]
    assert len(tokenizer.encode("        ")) < 8  # indentation is cheap


def test_a_text_without_spaces_still_gives_a_token_for_the_space():
    for model_type in "unigram", "bpe":
        model = train_on("ab", model_type=model_type, cap_vocabulary=True)
        assert model.decode(model.encode(" a b ")) == " a b "


def test_vocabulary_that_does_not_fit():
    tiny = "the quick brown fox jumps over the lazy"
    with pytest.raises(UserError, match="too high.*cap-vocabulary"):
        train_on(tiny, vocab_size=2048)
    with pytest.raises(UserError, match="smaller than required"):
        train_on(tiny, vocab_size=200, cap_vocabulary=True)
    with pytest.raises(UserError, match="no text"):
        train_on("\n\n")
    for model_type in "unigram", "bpe":
        model = train_on(tiny, vocab_size=2048, model_type=model_type, cap_vocabulary=True)
        assert 262 < model.vocab_size() < 2048 and model.decode(model.encode(tiny)) == tiny


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
@pytest.mark.parametrize("characters, vocab_size", [(1800, 2048), (3000, 300)])
def test_more_characters_than_the_vocabulary_has_room_for(model_type, characters, vocab_size):
    """The rarest are spelt in bytes, the others are not; the same text gives the same model."""
    generator = np.random.Generator(np.random.PCG64(0))
    codes = 0x4E00 + generator.integers(0, characters, 20_000)
    codes[::5] = 0x3042  # one of them is frequent
    text = "\n".join("".join(map(chr, line)) for line in codes.reshape(-1, 50)) + " \u2581\ue000 "
    assert len(set(text)) > vocab_size - 4 - 256
    options = dict(vocab_size=vocab_size, model_type=model_type, cap_vocabulary=True)
    with pytest.raises(UserError, match="smaller than required"):  # the control: without bytes there is no way out
        train_on(text, **options | dict(vocab_size=characters // 2, byte_fallback=False))
    model = train_on(text, **options)
    assert model.vocab_size() <= vocab_size and model.decode(model.encode(text)) == text
    assert model.encode(text) == train_on(text, **options).encode(text)
    occurrences = Counter(character for character in text if "\u3042" <= character < "\ue000")
    cost = {character: len(model.encode(character)) for character in occurrences}
    assert set(cost.values()) == {1, 3}
    assert min(occurrences[c] for c in cost if cost[c] == 1) >= max(occurrences[c] for c in cost if cost[c] == 3)


def test_sample(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text("".join(f"{name} line {number}\n" for number in range(5000)))
    files = [tmp_path / "a", tmp_path / "b"]
    everything = sample_lines(files, None)
    assert len(everything) == 10_000
    sample = sample_lines(files, 20_000, seed=1)
    assert 18_000 < sum(map(len, sample)) < 22_000
    assert 0.4 < sum(line[0] == "a" for line in sample) / len(sample) < 0.6
    assert sample == sample_lines(files, 20_000, seed=1) != sample_lines(files, 20_000, seed=2)
    assert sample_lines(files, 10**9) == everything


def test_long_lines_are_cut_not_dropped(tmp_path):
    (tmp_path / "a").write_text("x" * 10_000)
    assert "".join(sample_lines([tmp_path / "a"], None)) == "x" * 10_000


# ------------------------------------------------------------------------------------------------------------- shard.py


def write_texts(folder, number):
    folder.mkdir()
    for index in range(number):
        (folder / f"{index:03d}.py").write_text(f"def f{index}(x):\n\treturn x + {index}\n" * (1 + index % 7))
    return folder


def read_split(split, model_file):
    model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    corpus = Corpus.open(split)
    return [
        model.decode(corpus.tokens(number, 0, int(length)).tolist()) for number, length in enumerate(corpus.lengths)
    ]


def tree_hash(folder):
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


def test_corpus_holds_the_text(tmp_path, model_file):
    texts = write_texts(tmp_path / "texts", 40)
    report = shard(tmp_path / "corpus", model_file, [texts], valid_fraction=0.1)
    train, valid = (read_split(tmp_path / "corpus" / split, model_file) for split in ("train", "valid"))
    assert len(train) == 36 and len(valid) == 4
    assert sorted(train + valid) == sorted(path.read_text() for path in texts.iterdir())
    assert report["splits"]["train"]["characters"] == sum(map(len, train))
    assert (tmp_path / "corpus" / "tokenizer.model").read_bytes() == model_file.read_bytes()
    assert (
        Corpus.open(tmp_path / "corpus" / "train").vocabulary.tokenizer_sha256
        == hashlib.sha256(model_file.read_bytes()).hexdigest()
    )


def test_same_bytes_whatever_the_workers_and_other_bytes_with_another_seed(tmp_path, model_file):
    texts = write_texts(tmp_path / "texts", 40)
    for name, options in {"a": dict(workers=1), "b": dict(workers=2), "c": dict(seed=1)}.items():
        shard(tmp_path / name, model_file, [texts], partition_mib=1000 / 2**20, **options)
    assert len(Corpus.open(tmp_path / "a" / "train").manifest.shards) > 3
    assert tree_hash(tmp_path / "a") == tree_hash(tmp_path / "b") != tree_hash(tmp_path / "c")


def test_choice_of_validation_documents():
    usable = np.array([True, False] * 50)
    for fraction, expected in (0.05, 2), (0.001, 1), (0.999, 49), (0, 0):
        chosen = choose_validation(usable, fraction, seed=3)
        assert chosen.sum() == expected and not (chosen & ~usable).any()
    assert (choose_validation(usable, 0.2, 3) == choose_validation(usable, 0.2, 3)).all()
    assert (choose_validation(usable, 0.2, 3) != choose_validation(usable, 0.2, 4)).any()
    assert choose_validation(np.array([True]), 0.5, 0).sum() == 0
    assert choose_validation(np.array([True, True]), 0.05, 0).sum() == 1


def test_valid_input(tmp_path, model_file):
    train, valid = write_texts(tmp_path / "train", 5), write_texts(tmp_path / "valid", 3)
    shard(tmp_path / "corpus", model_file, [train], [valid])
    assert read_split(tmp_path / "corpus" / "train", model_file) == [
        path.read_text() for path in sorted(train.iterdir())
    ]
    assert read_split(tmp_path / "corpus" / "valid", model_file) == [
        path.read_text() for path in sorted(valid.iterdir())
    ]
    with pytest.raises(UserError, match="000.py is among the files of --input"):
        shard(tmp_path / "leaky", model_file, [tmp_path], [valid])


def test_one_document_cannot_be_divided(tmp_path, model_file, capsys):
    """One document held out is warned of: no evaluation can read it with the memory of another one."""
    (tmp_path / "texts").mkdir()
    book, other = tmp_path / "texts" / "book.txt", tmp_path / "other.txt"
    book.write_text("the only book\n")
    other.write_text("another one\n")
    (tmp_path / "texts" / "empty.txt").touch()
    with pytest.raises(UserError, match="one usable document.*1 are empty.*--valid-input.*second.*--valid-fraction 0"):
        shard(tmp_path / "corpus", model_file, [tmp_path / "texts"])
    assert not (tmp_path / "corpus").exists()
    asked = shard(tmp_path / "corpus", model_file, [tmp_path / "texts"], valid_fraction=0)
    assert list(asked["splits"]) == ["train"]
    given = shard(tmp_path / "both", model_file, [tmp_path / "texts"], [other])
    assert [figures["documents"] for figures in given["splits"].values()] == [1, 1]
    for _ in range(2):  # made, and found already made
        assert capsys.readouterr().err.count("warning: the validation split has one document.") == 1
        shard(tmp_path / "both", model_file, [tmp_path / "texts"], [other])
    shard(tmp_path / "two", model_file, [other], [tmp_path / "texts" / "book.txt", write_texts(tmp_path / "more", 1)])
    capsys.readouterr()
    assert shard(tmp_path / "two", model_file, [other], [book, tmp_path / "more"])["splits"]["valid"]["documents"] == 2
    assert "warning" not in capsys.readouterr().err


def test_a_split_without_a_label_to_learn(tmp_path, model_file):
    """Every part is masked out; or all but the first token, which is no label."""
    texts, output = tmp_path / "a.jsonl", tmp_path / "corpus"
    silent = {"parts": [{"text": "x"}, {"text": "read but not learnt", "loss": False}]}
    learnt = {"parts": [{"text": "asked", "loss": False}, {"text": "answered"}]}

    def write(*documents):
        texts.write_text("".join(json.dumps(document) + "\n" for document in documents))
        return texts

    assert len(sentencepiece.SentencePieceProcessor(model_file=str(model_file)).encode("x")) == 1
    with pytest.raises(UserError, match="train: found no label"):
        shard(output, model_file, [write(silent, silent)], valid_fraction=0)
    (tmp_path / "valid.jsonl").write_text(json.dumps(silent))
    with pytest.raises(UserError, match="valid: found no label"):
        shard(output, model_file, [write(learnt)], [tmp_path / "valid.jsonl"])
    assert not output.exists() and not list(tmp_path.glob("*.partial"))
    shard(output, model_file, [write(learnt, silent)], valid_fraction=0)
    assert (output / "train").exists()


def test_what_cannot_be_used_is_counted_and_listed(tmp_path, model_file):
    texts = write_texts(tmp_path / "texts", 6)
    (texts / "empty.txt").write_text("")
    (texts / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (texts / "image.png").write_bytes(b"\x89PNG")
    (texts / "lines.jsonl").write_text('{"text": "good\\n"}\n{"text": 3}\n{"text": ""}\n')
    (texts / "cut.txt.gz").write_bytes(gzip.compress(b"hello" * 1000)[:-20])
    report = shard(tmp_path / "corpus", model_file, [texts])
    assert (report["empty"], report["unreadable"], report["ignored"]) == (2, 3, 1)
    assert sum(split["documents"] for split in report["splits"].values()) == 7
    listed = [json.loads(line) for line in (tmp_path / "corpus" / "quarantine.jsonl").read_text().splitlines()]
    assert [(Path(entry["file"]).name, entry["position"]) for entry in listed] == [
        ("cut.txt.gz", 0),
        ("latin.txt", 0),
        ("lines.jsonl", 2),
    ]


def test_loss_mask_follows_the_parts(tmp_path, model_file):
    parts = [{"text": "ask: 1 + 1\n", "loss": False}, {"text": "two\n"}, {"text": "ask: 2 + 2\n", "loss": False}]
    lines = [{"parts": parts}, {"text": "plain\n"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shard(tmp_path / "corpus", model_file, [tmp_path / "a.jsonl"], valid_fraction=0)
    corpus = Corpus.open(tmp_path / "corpus" / "train")
    model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    pieces = [model.encode(part["text"]) for part in parts]
    assert corpus.tokens(0, 0, 10**6).tolist() == sum(pieces, [])
    # By token: is it learnt? EOS goes with the last part. Labels are one token ahead.
    learnt = [0] * len(pieces[0]) + [1] * len(pieces[1]) + [0] * len(pieces[2]) + [0]
    assert corpus.mask(0, 0, 10**6).tolist() == learnt[1:]
    assert corpus.mask(1, 0, 10**6).all()
    assert not (tmp_path / "corpus" / "valid").exists()


def test_existing_corpus(tmp_path, model_file, capsys):
    texts, corpus = write_texts(tmp_path / "texts", 6), tmp_path / "corpus"
    first = shard(corpus, model_file, [texts])
    before = tree_hash(corpus)
    assert shard(corpus, model_file, [texts], workers=2) == first and "exists already" in capsys.readouterr().out
    with pytest.raises(UserError, match="with other seed; --overwrite"):
        shard(corpus, model_file, [texts], seed=1)
    (texts / "new.txt").write_text("something new")
    with pytest.raises(UserError, match="with other inputs; --overwrite"):
        shard(corpus, model_file, [texts])
    assert tree_hash(corpus) == before
    assert shard(corpus, model_file, [texts], overwrite=True) != first and tree_hash(corpus) != before
    (corpus / "train" / "shard-000000.tar").unlink()
    with pytest.raises(UserError, match="shard-000000.tar: missing"):
        shard(corpus, model_file, [texts])


def test_a_folder_that_is_no_corpus_is_never_overwritten(tmp_path, model_file):
    texts = write_texts(tmp_path / "texts", 3)
    with pytest.raises(UserError, match="is not a corpus"):
        shard(texts, model_file, [texts], overwrite=True)
    assert len(list(texts.iterdir())) == 3


def test_a_failure_leaves_no_corpus_behind(tmp_path, model_file, monkeypatch):
    texts = write_texts(tmp_path / "texts", 6)
    monkeypatch.setattr("memformer_dist.prepare.encode.tokenise", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        shard(tmp_path / "corpus", model_file, [texts])
    assert {path.name for path in tmp_path.iterdir()} == {"texts", "corpus.partial"}


def test_user_mistakes(tmp_path, model_file):
    (tmp_path / "empty.txt").write_text("")
    for inputs, message in (
        ([tmp_path / "nothing"], "nothing"),
        ([tmp_path / "empty.txt"], "no usable document; 1 are empty"),
    ):
        with pytest.raises(UserError, match=message):
            shard(tmp_path / "corpus", model_file, inputs)
    (tmp_path / "no.model").write_bytes(b"no model")
    for path in tmp_path / "no.model", tmp_path / "missing.model":
        with pytest.raises(UserError, match=path.name):
            shard(tmp_path / "corpus", path, [tmp_path])
    with pytest.raises(UserError, match="valid-fraction 5"):
        shard(tmp_path / "corpus", model_file, [tmp_path], valid_fraction=5)


# -------------------------------------------------------------------------------------------------------- command lines


def test_command_lines(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("the quick brown fox jumps over the lazy\n")
    (tmp_path / "texts" / "b.txt").write_text("pack my box with five dozen liquor jugs\n")
    options = ["--input", "texts", "--vocab-size", "2048", "--cap-vocabulary", "--output"]
    for name in "one", "two":
        done = run_script("tokenizer/train.py", *options, name, cwd=tmp_path, cold=name == "one")
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "one.model").read_bytes() == (tmp_path / "two.model").read_bytes()
    shard_it = ("tokenizer/shard.py", "--input", "texts", "--tokenizer", "one.model", "--output", "corpus/")
    result = run_script(*shard_it, cwd=tmp_path)
    assert result.returncode == 0 and "padding at 128" in result.stdout
    assert (
        len(Corpus.open(tmp_path / "corpus" / "train").lengths)
        == len(Corpus.open(tmp_path / "corpus" / "valid").lengths)
        == 1
    )


@pytest.mark.parametrize(
    "script, arguments",
    [
        ("train.py", ["--input", "nowhere", "--output", "x"]),
        ("train.py", ["--input", __file__, "--vocab-size", "300", "--output", "/dev/null/nowhere/x"]),
        ("shard.py", ["--input", ".", "--tokenizer", "nowhere", "--output", "x"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, script, arguments):
    result = run_script(f"tokenizer/{script}", *arguments, cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "nowhere" in result.stderr
    assert not list(tmp_path.iterdir())
