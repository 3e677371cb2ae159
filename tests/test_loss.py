"""What a tokenizer loses of the text is found before a corpus is made, and said; corpora with a tokenizer.json.

Commit a736152 made these corpora without a word, or could not read the tokenizer.
"""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memformer_dist.commands.corpus import main as corpus_program
from memformer_dist.data.corpus import Corpus
from memformer_dist.data.open_data import open_split
from memformer_dist.errors import UserError
from memformer_dist.inspect.verify import verify
from memformer_dist.prepare import loss as loss_module
from memformer_dist.prepare.build import shard
from memformer_dist.prepare.documents import File, Piece, look
from memformer_dist.prepare.loss import beginning, changes, sample
from memformer_dist.tokenizer import open_tokenizer
from tests.helpers import tokenizers as made
from tests.helpers.corpora import documents, mib, read_back
from tests.helpers.files import tree
from tests.helpers.http import FileServer
from tests.helpers.runs import STEP_TOKENS
from tests.helpers.runs import settings as run_settings
from tests.helpers.scripts import run_script

PLAIN = "It was a dark and stormy night; the rain fell in torrents."  # nothing that an ordinary model changes


def write(folder: Path, *texts: str) -> Path:
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:03d}.txt").write_text(text)
    return folder


def tokenizer_file(folder: Path, raw: bytes, name: str = "other.model") -> Path:
    (folder / name).write_bytes(raw)
    return folder / name


@pytest.fixture
def ordinary(tmp_path) -> Path:
    return tokenizer_file(tmp_path, made.ordinary_sentencepiece())


def refused(output: Path, tokenizer: Path, inputs: object, **options) -> list[str]:
    """The lines of the message."""
    with pytest.raises(UserError) as raised:
        shard(output, tokenizer, [str(inputs)], **options)
    assert not output.exists() and not list(output.parent.glob("*.partial*"))
    return str(raised.value).splitlines()


# ---- what is lost ----------------------------------------------------------------------------------------------------


def test_a_lossless_tokenizer_passes_silently(tmp_path, model_file, capsys):
    texts = write(tmp_path / "texts", *documents(10), "a\r\n\tb  c\u2581\ue000 \N{FOX FACE}")
    report = shard(tmp_path / "corpus", model_file, [texts])
    said = capsys.readouterr()
    assert "loss" not in report and "los" not in said.err and "BOS" not in said.err
    manifest = json.loads((tmp_path / "corpus" / "train" / "corpus.json").read_text())
    assert not {"lossy", "tokenizer"} & manifest.keys()  # such corpora are the same bytes as ever
    assert "bos_and_eos" not in json.loads((tmp_path / "corpus" / "sharding.json").read_text())


def test_an_ordinary_sentencepiece_model_drops_newlines(tmp_path, ordinary):
    texts = write(tmp_path / "texts", "It was a dark\nand stormy night\n\tthe  rain\n", PLAIN, PLAIN, PLAIN)
    head, lost, changed, example, advice = refused(tmp_path / "corpus", ordinary, texts)
    assert head.startswith(f"--tokenizer: {ordinary} loses text: 1 of 4 documents (25.0%) of a sample")
    assert lost == "  lost: U+000A (newline) 3 times, U+0009 (tab) 1 times, U+0020 (space) 1 times"
    assert changed == "  changed: '\\n' to ' ' 1 times, '\\n\\t' to ' ' 1 times, ' ' to '' 1 times, '\\n' to '' 1 times"
    assert example.startswith(f"  for example {texts}/000.txt, character 14: 'It was a dark\\nand stormy night\\n\\t")
    assert "becomes 'It was a dark and stormy night t" in example
    assert "tokenizer/train.py" in advice and advice.endswith("--lossy makes the corpus all the same")


@pytest.mark.parametrize(
    "make, text, lost, changed",
    [
        (made.lower_case_words, "The dog", "latin capital letter t", "'T' to 't'"),
        (made.lower_case_words, "the caf\u00e9 and", "U+00E9", None),
        (made.ordinary_sentencepiece, "the \ufb01re", "U+FB01 (latin small ligature fi)", "'\ufb01' to 'fi'"),
        (made.ordinary_sentencepiece, "night ", "(space) 2 times", "' ' to ''"),
        (made.ordinary_sentencepiece, "the dog\r", "U+000D (carriage return)", "'\\r' to ''"),
        (lambda: made.ordinary_sentencepiece(byte_fallback=False, vocab_size=60), "fox \u6f22", "U+6F22", None),
    ],
)
def test_other_losses(tmp_path, make, text, lost, changed):
    tokenizer = tokenizer_file(tmp_path, make())
    message = refused(tmp_path / "corpus", tokenizer, write(tmp_path / "texts", text, text))
    assert "2 of 2 documents (100.0%)" in message[0] and lost in message[1], message
    assert changed is None or changed in message[2], message


def test_a_rare_loss_in_many_small_files_is_found(tmp_path, ordinary):
    texts = write(tmp_path / "texts", *[PLAIN] * 149, f"{PLAIN}\t{PLAIN}")
    message = refused(tmp_path / "corpus", ordinary, texts)
    assert "1 of 150 documents (0.7%)" in message[0] and f"{texts}/149.txt, character 59: " in message[3]


def test_the_place_in_json_lines(tmp_path, ordinary):
    lines = [{"text": PLAIN}, {"text": 3}, {"parts": [{"text": "It was "}, {"text": "a\ndark"}]}, {"text": ""}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    message = refused(tmp_path / "corpus", ordinary, path)
    assert "1 of 2 documents" in message[0]
    assert f"{path}, line 3, character 9: 'It was a\\ndark' becomes 'It was a dark'" in message[3]
    path.write_text("".join(json.dumps({"text": f"{PLAIN}\n"}) + "\n" for _ in range(50)))
    parts = refused(tmp_path / "corpus", ordinary, path, partition_mib=mib(1000))
    assert "50 of 50 documents" in parts[0] and f"{path}, line 1, character 59: " in parts[3]


def test_lossy_makes_the_corpus_and_says_so(tmp_path, ordinary, capsys):
    texts, corpus = write(tmp_path / "texts", "a\nb", PLAIN, PLAIN), tmp_path / "corpus"
    report = shard(corpus, ordinary, [texts], lossy=True)
    assert f"warning: --lossy: {ordinary} loses text: 1 of 3 documents" in capsys.readouterr().err
    assert report["loss"] == {"compared": 3, "documents": 1, "lost": {"\n": 1}, "changed": [["\n", " ", 1]]}
    assert all(Corpus.open(corpus / split).manifest.lossy for split in ("train", "valid"))
    assert verify(corpus).problems == []
    before = tree(corpus)
    assert shard(corpus, ordinary, [texts], lossy=True) == report and "exists already" in capsys.readouterr().out
    with pytest.raises(UserError, match="was made with --lossy: .* see the field loss in .*; --lossy keeps the corpus"):
        shard(corpus, ordinary, [texts])
    assert tree(corpus) == before
    (texts / "000.txt").write_text("a b")
    harmless = shard(corpus, ordinary, [texts], lossy=True, overwrite=True)
    assert "loss" not in harmless and not Corpus.open(corpus / "train").manifest.lossy


# ---- the comparison --------------------------------------------------------------------------------------------------

short = st.text("ab \n\u00e9", max_size=40)


@settings(max_examples=300)
@given(text=short, decoded=short)
def test_changes_make_one_text_of_the_other(text, decoded):
    """Whatever they are; where they are equal there is none."""
    rebuilt, place = "", 0
    for change in changes(text, decoded):
        assert text.startswith(change.before, change.position) and change.position >= place
        assert change.before != change.after
        rebuilt += text[place : change.position] + change.after
        place = change.position + len(change.before)
    assert rebuilt + text[place:] == decoded


def test_a_change_is_what_a_person_would_call_it():
    assert [change[1:] for change in changes("one\ntwo\n\n\tthree  four", "one two three four")] == [
        ("\n", " "),
        ("\n\n\t", " "),
        (" ", ""),
    ]
    shouted = "THE END OF A LONG AND WINDING TALE"
    assert [change[1:] for change in changes(shouted, shouted.lower())][:5] == [(x, x.lower()) for x in "THEEN"]


@given(text=st.text("ab \n", max_size=60), characters=st.integers(0, 70))
def test_a_text_is_cut_within_a_word_or_not_at_all(text, characters):
    found = beginning(text, characters)
    assert text.startswith(found) and len(found) >= min(characters, len(text))
    assert found == text or (found[-1] + text[len(found)]).isalnum()


def test_a_sample_is_spread_and_bounded(tmp_path, monkeypatch):
    """Small inputs are taken whole, and what they leave goes to the large ones."""
    write(tmp_path / "texts", *["x y " * 25] * 10, "word " * 5_000, "other " * 5_000)
    pieces = [Piece(look(str(path))) for path in sorted((tmp_path / "texts").iterdir())]
    sizes = Counter({Path(p.file.name).stem: len(document.text) for p, document in sample(pieces)})
    assert sizes.total() == 10 * 100 + 25_000 + 30_000
    monkeypatch.setattr(loss_module, "SAMPLE_CHARACTERS", 21_000)
    sizes = Counter({Path(p.file.name).stem: len(document.text) for p, document in sample(pieces)})
    assert [sizes[f"{number:03d}"] for number in range(10)] == [100] * 10
    assert all(9_990 <= sizes[name] < 10_010 for name in ("010", "011"))
    monkeypatch.setattr(loss_module, "SAMPLE_PIECES", 5)
    assert len({piece.file.name for piece, _ in sample(pieces)}) == 5
    monkeypatch.setattr(loss_module, "READ_CHARACTERS", 150)
    assert len(list(sample(pieces[:10]))) == 2


def test_lines_of_a_large_file_are_taken_from_all_its_parts(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{number} " * 20}) + "\n" for number in range(1000, 2000)))
    size = path.stat().st_size
    parts = [Piece(File(str(path), size), start, start + size // 10) for start in range(0, size, size // 10)]
    monkeypatch.setattr(loss_module, "SAMPLE_CHARACTERS", 5_000)
    numbers = [int(document.text.split()[0]) // 100 for _, document in sample(parts)]
    assert set(numbers) >= set(range(10, 20)) and len(numbers) < 100


# ---- tokenizer.json --------------------------------------------------------------------------------------------------


def test_a_corpus_with_a_tokenizer_json(tmp_path, capsys):
    texts = [f"It was a dark\nand {number}  stormy {made.END} night \N{FOX FACE}\r\n" for number in range(20)]
    raw, folder, corpus = made.byte_level(), write(tmp_path / "texts", *texts), tmp_path / "corpus"
    tokenizer = tokenizer_file(tmp_path, raw, "some.file")
    shard(corpus, tokenizer, [folder], valid_fraction=0.2, partition_mib=mib(300))
    assert f"BOS is token 0 '{made.END}', EOS is token 0 '{made.END}'; --bos and --eos" in capsys.readouterr().err
    assert (corpus / "tokenizer.json").read_bytes() == raw and not (corpus / "tokenizer.model").exists()
    opened = Corpus.open(corpus / "train")
    assert opened.tokenizer() == corpus / "tokenizer.json" and opened.manifest.tokenizer == "tokenizer.json"
    decoder = open_tokenizer(tokenizer)
    found = [decoder.decode(ids) for split in ("train", "valid") for ids in read_back(corpus / split)]
    assert sorted(found) == sorted(texts)
    assert (opened.vocabulary.size, opened.vocabulary.bos_id, opened.vocabulary.eos_id) == (decoder.size, 0, 0)
    assert verify(corpus).problems == [] == verify(corpus / "valid").problems
    with FileServer(corpus) as server:
        fetched = open_split(f"{server.url}/train", cache=tmp_path / "cache").tokenizer()
        assert fetched.name == "tokenizer.json" and fetched.read_bytes() == raw
    (corpus / "tokenizer.model").touch()
    assert verify(corpus).problems == [f"{corpus}/tokenizer.model: does not belong to the corpus"]
    for workers in 1, 2:
        shard(tmp_path / f"{workers}", tokenizer, [folder], valid_fraction=0.2, partition_mib=mib(300), workers=workers)
    assert tree(tmp_path / "1") == tree(tmp_path / "2")


def test_the_choice_of_bos_and_eos_is_part_of_the_recipe(tmp_path, capsys):
    texts, corpus = write(tmp_path / "texts", *documents(4)), tmp_path / "corpus"
    tokenizer = tokenizer_file(tmp_path, made.byte_level(special=["<a>", "<b>"]))
    with pytest.raises(UserError, match="^--eos: .* its special tokens are '<a>', '<b>'$"):
        shard(corpus, tokenizer, [texts])
    shard(corpus, tokenizer, [texts], eos="<b>", bos="<a>")
    assert "BOS is token 0 '<a>', EOS is token 1 '<b>'" in capsys.readouterr().err
    shard(corpus, tokenizer, [texts], eos="<b>", bos="<a>")
    with pytest.raises(UserError, match="with other bos_and_eos; --overwrite"):
        shard(corpus, tokenizer, [texts], eos="<b>")


def test_what_tokens_look_like(tmp_path, capsys):
    texts, corpus = write(tmp_path / "texts", *["the dog \u6f22\n"] * 2), tmp_path / "corpus"
    shard(corpus, tokenizer_file(tmp_path, made.byte_level()), [texts])
    capsys.readouterr()
    corpus_program(["show", str(corpus), "--lanes", "1", "--segment-length", "32"])
    assert "\nthe dog \u6f22\n\u27e8EOS\u27e9\n" in capsys.readouterr().out
    corpus_program(["show", str(corpus), "--lanes", "1", "--segment-length", "32", "--tokens"])
    shown = capsys.readouterr().out
    assert "'\u0120dog'" in shown and f"'{made.END}'" in shown


@pytest.mark.slow
def test_a_run_with_a_tokenizer_json(tmp_path):
    """From preparation to generation; the run keeps the tokenizer."""
    generator = random.Random(0)
    lines = [" ".join(generator.choices(PLAIN.split(), k=60)) + " caf\u00e9\n" for _ in range(40)]
    tokenizer = tokenizer_file(tmp_path, made.byte_level(lines))
    shard(tmp_path / "corpus", tokenizer, [write(tmp_path / "texts", *lines)], valid_fraction=0.25)
    config, run = tmp_path / "config.json", tmp_path / "run"
    config.write_text(json.dumps(run_settings(tmp_path / "corpus", tokens=3 * STEP_TOKENS)))
    done = run_script("launch/train.py", "--config", config, "--run-dir", run)
    assert done.returncode == 0, done.stderr
    assert (run / "tokenizer.json").read_bytes() == tokenizer.read_bytes() and not (run / "tokenizer.model").exists()
    (tmp_path / "corpus").rename(tmp_path / "moved")  # generation needs the run alone
    prompt = ("--prompt", "It was caf\u00e9", "--tokens", "20", "--temperature", "0")
    done = run_script("launch/generate.py", "--run-dir", run, *prompt)
    assert done.returncode == 0 and done.stdout.startswith("It was caf\u00e9"), done.stderr
    evaluated = run_script("launch/evaluate.py", "--run-dir", run, "--corpus", tmp_path / "moved")
    assert evaluated.returncode == 0 and "memory carried" in evaluated.stdout, evaluated.stderr
    raw = json.loads((run / "tokenizer.json").read_text())
    (run / "tokenizer.json").write_text(json.dumps(raw | {"version": "1.1"}))
    damaged = run_script("launch/generate.py", "--run-dir", run, *prompt)
    assert damaged.returncode == 2 and "is not the tokenizer that the model was trained with" in damaged.stderr
