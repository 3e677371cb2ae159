"""From inputs to a corpus in partitions: any kinds of files, any number of workers, any mistake."""

import gzip
import io
import itertools
import json
import os
import random
import re
import sys
import tracemalloc
import zlib
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from memformer_dist.errors import UserError
from memformer_dist.prepare import encode as encode_module
from memformer_dist.prepare.build import shard
from memformer_dist.prepare.documents import Reader, look, zstd
from memformer_dist.prepare.partitions import cut_partitions, discover
from tests.helpers import ROOT
from tests.helpers.corpora import documents, encode, mib, read_back
from tests.helpers.files import tree
from tests.helpers.scripts import SHARD, run_command

# ------------------------------------------------------------------------------------------------ any files, any partitions

PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstd.compress}
words = st.text(st.sampled_from("abc dé\n\t\r\u2581中😀"), max_size=30)


@st.composite
def files(draw) -> tuple[str, list[str], bytes, list[int]]:
    """(name without number, its documents, its bytes, lines or rows that cannot be read)"""
    kind, packed = draw(st.sampled_from([".txt", ".jsonl", ".parquet"])), draw(st.sampled_from(sorted(PACK)))
    texts = draw(st.lists(words, min_size=1, max_size=1 if kind == ".txt" else 6))
    bad = []
    if kind == ".txt":
        raw = texts[0].encode()
    elif kind == ".jsonl":
        lines, kept = [], []
        for text in texts:
            lines += draw(st.sampled_from([[], [], [b""], [b"  "], [b'{"text": 3}'], [b"\xff"]]))
            if lines and lines[-1].strip() and not lines[-1].startswith(b'{"text": "'):
                bad.append(len(lines))
            lines.append(json.dumps({"text": text}, ensure_ascii=draw(st.booleans())).encode())
            kept.append(text)
        ending = draw(st.sampled_from([b"\n", b"\r\n"]))
        raw = ending.join(lines) + draw(st.sampled_from([b"", ending, ending * 2]))
    else:
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file, row_group_size=draw(st.integers(1, 3)))
        raw = file.getvalue()
    cut = draw(st.integers(0, len(raw)))  # several members of .gz, frames of .zst
    pack = PACK[packed]
    return kind + packed, texts, pack(raw[:cut]) + pack(raw[cut:]), bad


def write_files(folder: Path, made: list) -> tuple[list[str], list[str], list[tuple[str, int]]]:
    """Paths in the order of reading, all documents, all places that cannot be read."""
    paths, texts, bad = [], [], []
    for number, (ending, documents_of_it, raw, bad_lines) in enumerate(made):
        path = folder / f"ä b {number}{ending}"
        path.write_bytes(raw)
        paths.append(str(path))
        texts += documents_of_it
        bad += [(str(path), line) for line in bad_lines]
    return paths, [text for text in texts if text], bad


def quarantined(corpus: Path) -> list[tuple[str, int]]:
    lines = (corpus / "quarantine.jsonl").read_text().splitlines()
    return [(line["file"], line["position"]) for line in map(json.loads, lines)]


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(made=st.lists(files(), min_size=1, max_size=6), partition=st.integers(1, 400))
def test_the_corpus_holds_each_document_as_sentencepiece_encodes_it(tmp_path_factory, model_file, made, partition):
    folder = tmp_path_factory.mktemp("any")
    paths, expected, bad = write_files(folder, made)
    if not expected:
        return
    shard(folder / "corpus", model_file, paths, valid_fraction=0, partition_mib=mib(partition))
    assert read_back(folder / "corpus" / "train") == encode(model_file, expected)
    assert quarantined(folder / "corpus") == bad


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(made=st.lists(files(), min_size=2, max_size=8), partition=st.integers(1, 200), seed=st.integers(0, 3))
def test_the_same_bytes_for_any_number_of_workers(tmp_path_factory, model_file, made, partition, seed):
    folder = tmp_path_factory.mktemp("workers")
    paths, expected, _ = write_files(folder, made)
    if len(expected) < 2:
        return
    options = dict(partition_mib=mib(partition), valid_fraction=0.3, seed=seed)
    for workers in 1, 2, 3:
        shard(folder / str(workers), model_file, paths, workers=workers, **options)
    assert tree(folder / "1") == tree(folder / "2") == tree(folder / "3")
    shard(folder / "other", model_file, paths[1:] + paths[:1], **options)  # the control
    assert tree(folder / "other") != tree(folder / "1")


def texts_of(path: Path, partition: int) -> list[list[str]]:
    """The documents of every partition of a file."""
    found = []
    for cut in cut_partitions([look(str(path))], partition):
        found.append([document.text for piece in cut.pieces for document in Reader(piece)])
    return found


LINES = ["a", "", "é" * 9, "x" * 100, "b", "c" * 30, "😀"]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_a_line_belongs_to_the_range_in_which_it_starts(tmp_path, ending, last):
    """Units of every size: cuts in characters, at line ends and starts, several within one line."""
    path, lines = tmp_path / "a.jsonl", [json.dumps({"text": text}, ensure_ascii=False) for text in LINES]
    path.write_bytes((ending.join(lines) + (ending if last else "")).encode())
    starts = {len((ending.join(lines[:number]) + ending).encode()) for number in range(1, len(lines))}
    exactly = 0
    for partition in range(1, path.stat().st_size + 2):
        found = texts_of(path, partition)
        assert sum(found, []) == LINES
        cuts = cut_partitions([look(str(path))], partition)
        exactly += sum(cut.pieces[0].start in starts for cut in cuts)
        assert all(cut.bytes <= partition for cut in cuts)
    assert exactly > 10


def test_a_range_that_skips_its_first_line_loses_some(tmp_path):
    """Negative control: without a look at the byte before, a line that starts with the range is passed over."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in "abcdefgh"))  # 14 bytes each

    def naive(piece):
        with open(path, "rb") as file:
            file.seek(piece.start)
            piece.start and file.readline()
            while file.tell() < piece.stop:
                yield json.loads(file.readline())["text"]

    cuts = cut_partitions([look(str(path))], 28)
    assert [piece.start for cut in cuts for piece in cut.pieces] == [0, 28, 56, 84]
    assert [text for cut in cuts for text in naive(cut.pieces[0])] != list("abcdefgh")
    assert sum(texts_of(path, 28), []) == list("abcdefgh")


def test_units_are_whole_files_or_parts_of_large_ones(tmp_path):
    for name, size in [
        ("a.txt", 50),
        ("b.txt", 60),
        ("c.txt", 500),
        ("d.jsonl", 250),
        ("e.jsonl.gz", 900),
        ("f.txt", 1),
    ]:
        (tmp_path / name).write_bytes(b"\n" * size)
    table = pyarrow.table({"text": [random.Random(n).randbytes(40).hex() for n in range(100)]})
    pyarrow.parquet.write_table(table, tmp_path / "g.parquet", row_group_size=10, use_dictionary=False)
    found = discover([tmp_path]).files

    def described(partition_bytes):
        return [
            [(Path(piece.file.name).name, piece.start, piece.stop) for piece in partition.pieces]
            for partition in cut_partitions(found, partition_bytes)
        ]

    assert described(100)[:6] == [
        [("a.txt", 0, None), ("b.txt", 0, None)],
        [("c.txt", 0, None)],
        [("d.jsonl", 0, 83)],
        [("d.jsonl", 83, 166)],
        [("d.jsonl", 166, 250)],
        [("e.jsonl.gz", 0, None)],
    ]
    groups = [partition[0] for partition in described(2000) if partition[0][0] == "g.parquet"]
    assert groups[0][1] == 0 and groups[-1][2] == 10 and len(groups) == 5
    assert all(before[2] == after[1] for before, after in itertools.pairwise(groups))
    assert len(described(10**6)) == 1
    assert described(100) == described(100)


# ----------------------------------------------------------------------------------------------------- damaged files


def decompressed(raw: bytes, suffix: str) -> bytes:
    """What a decompressor makes of a stream that was cut off, by itself."""
    return (zlib.decompressobj(31) if suffix == ".gz" else zstd.ZstdDecompressor()).decompress(raw)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_what_comes_before_the_damage_is_kept(tmp_path, model_file, suffix):
    generator = random.Random(0)
    texts = [generator.randbytes(20).hex() for _ in range(40_000)]
    raw = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    whole = PACK[suffix](raw)
    for share in 0.3, 0.9, 1 - 3 / len(whole):
        cut = whole[: int(share * len(whole))]
        readable = decompressed(cut, suffix).count(b"\n")
        (tmp_path / f"a.jsonl{suffix}").write_bytes(cut)
        *good, bad = Reader(cut_partitions([look(str(tmp_path / f"a.jsonl{suffix}"))], 1)[0].pieces[0])
        assert [document.text for document in good] == texts[:readable] and readable > 9_000
        assert bad.position == readable and "EOFError" in bad.unreadable
    (tmp_path / f"a.txt{suffix}").write_bytes(PACK[suffix](b"a text")[:-3])
    (bad,) = Reader(cut_partitions([look(str(tmp_path / f"a.txt{suffix}"))], 1)[0].pieces[0])
    assert bad.position == 0 and bad.unreadable
    assert list(
        Reader(cut_partitions([look(str(tmp_path / f"a.jsonl{suffix}"))], 1)[0].pieces[0])
    )  # the last cut again


def damaged_parquet(path: Path, texts: list[str], group: int) -> None:
    table = pyarrow.table({"text": texts})
    options = dict(row_group_size=10, use_dictionary=False, write_page_checksum=True, compression="none")
    pyarrow.parquet.write_table(table, path, **options)
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(group).column(0)
    raw = bytearray(path.read_bytes())
    raw[column.data_page_offset + column.total_compressed_size - 5] ^= 1
    path.write_bytes(raw)


def test_a_damaged_row_group_costs_no_other(tmp_path, model_file):
    texts = [f"row {number}" for number in range(40)]
    damaged_parquet(tmp_path / "a.parquet", texts, group=1)
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-100])
    for partition in 10, 10**6:  # a partition for each row group, or one for all
        output = tmp_path / f"corpus{partition}"
        shard(output, model_file, [str(tmp_path / "*.parquet")], valid_fraction=0, partition_mib=mib(partition))
        assert read_back(output / "train") == encode(model_file, texts[:10] + texts[20:])
        assert quarantined(output) == [(str(tmp_path / "a.parquet"), 10), (str(tmp_path / "b.parquet"), 0)]


def test_parquet_of_parts_and_of_nothing(tmp_path, model_file):
    parts = [[{"text": "ask", "loss": False}, {"text": "answer", "loss": True}], None, [{"text": "x", "loss": True}]]
    pyarrow.parquet.write_table(pyarrow.table({"parts": parts, "other": [1, 2, 3]}), tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "b.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"good", b"\xff", b"y"]}), tmp_path / "c.parquet")
    twice = pyarrow.Table.from_arrays([pyarrow.array(["x"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "d.parquet")
    report = shard(tmp_path / "corpus", model_file, [tmp_path], valid_fraction=0)
    listed = [json.loads(line) for line in (tmp_path / "corpus" / "quarantine.jsonl").read_text().splitlines()]
    assert [(Path(line["file"]).name, line["position"]) for line in listed] == [
        ("b.parquet", 0),
        ("c.parquet", 2),
        ("d.parquet", 0),
    ]
    assert "expected a column text or parts, found body" in listed[0]["reason"]
    assert report["splits"]["train"]["documents"] == 4
    model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    assert read_back(tmp_path / "corpus" / "train")[0] == model.encode("ask") + model.encode("answer")


def test_parquet_without_pyarrow(tmp_path, model_file, monkeypatch):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"]}), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"a.parquet: .*pip install 'memformer_dist\[parquet\]'"):
        shard(tmp_path / "corpus", model_file, [tmp_path])


def test_positions_are_those_in_the_whole_file_and_strict_refuses(tmp_path, model_file, capsys):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"line {number}"}) for number in range(1, 200)]
    for number in 3, 77, 150, 199:
        lines[number - 1] = "bad"
    lines[9] = ""  # a line that is no document
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match="--strict: 4 documents.*line 3: .*line 77: .*line 199: "):
        shard(tmp_path / "corpus", model_file, [path], partition_mib=mib(300), strict=True)
    assert not (tmp_path / "corpus").exists()
    shard(tmp_path / "corpus", model_file, [path], partition_mib=mib(300))
    assert quarantined(tmp_path / "corpus") == [(str(path), number) for number in (3, 77, 150, 199)]
    told = capsys.readouterr().err
    assert "line 150" in told and re.search(r"tokenising: (\d+) of \1 partitions were finished by an earlier run", told)
    shard(tmp_path / "good", model_file, [SHARD, ROOT / "setup.py"], strict=True)  # the control


def test_a_file_seen_through_two_globs_is_read_once(tmp_path, model_file):
    for name in "a b.txt", "ä.txt", "c.txt":
        (tmp_path / name).write_text(name)
    shard(tmp_path / "corpus", model_file, [f"{tmp_path}/*b.txt", f"{tmp_path}/*.txt"], valid_fraction=0)
    assert read_back(tmp_path / "corpus" / "train") == encode(model_file, ["a b.txt", "c.txt", "ä.txt"])


# --------------------------------------------------------------------------------------------- files that change


def other_size(path):
    path.write_text("changed, and longer")


def other_time(path):
    os.utime(path, ns=(1, 1))


def changing(monkeypatch, step, change, path):
    """Have `path` changed when the workers are about to take a step."""
    function = getattr(encode_module, step)

    def after_a_change(task):
        if path.exists():
            change(path)
        return function(task)

    monkeypatch.setattr(f"memformer_dist.prepare.build.{step}", after_a_change)


@pytest.mark.parametrize("change", [other_size, other_time, Path.unlink])
def test_a_file_that_changes_is_named(tmp_path, model_file, two_files, monkeypatch, change):
    changing(monkeypatch, "encode_partition", change, tmp_path / "two.txt")
    with pytest.raises(UserError, match="two.txt: changed while it was read"):
        shard(tmp_path / "corpus", model_file, [two_files])
    assert not (tmp_path / "corpus").exists()


def test_files_are_read_once(tmp_path, model_file, two_files, monkeypatch):
    shard(tmp_path / "expected", model_file, [two_files])
    changing(monkeypatch, "write_partition", Path.unlink, tmp_path / "two.txt")
    shard(tmp_path / "corpus", model_file, [two_files])
    assert not (tmp_path / "two.txt").exists()
    assert tree(tmp_path / "corpus") == tree(tmp_path / "expected")


# -------------------------------------------------------------------------------------------- mistakes and memory


def test_strict_about_a_corpus_that_is_there(tmp_path, model_file):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\nbad\n')
    shard(tmp_path / "corpus", model_file, [tmp_path / "a.jsonl"], valid_fraction=0)
    shard(tmp_path / "corpus", model_file, [tmp_path / "a.jsonl"], valid_fraction=0)
    with pytest.raises(UserError, match="--strict: 1 documents could not be read when the corpus was made"):
        shard(tmp_path / "corpus", model_file, [tmp_path / "a.jsonl"], valid_fraction=0, strict=True)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(seed=-1), "--seed -1: expected 0 or more"),
        (dict(partition_mib=float("nan")), "--partition-mib nan: expected more than 0"),
        (dict(partition_mib=float("inf")), "--partition-mib inf"),
        (
            dict(seed=-1, valid_fraction=1, partition_mib=0),
            "(?s)--valid-fraction 1: .*--seed -1: .*--partition-mib 0: ",
        ),
        (dict(output=Path("setup.py")), "setup.py exists and is not a corpus"),
        (dict(output=Path(".")), "exists and is not a corpus"),
        (dict(valid_inputs=["file://{folder}/two.txt"]), "two.txt is among the files of --input too"),
    ],
)
def test_mistakes(tmp_path, model_file, two_files, options, message):
    options = {"output": tmp_path / "corpus"} | options
    if "valid_inputs" in options:
        options["valid_inputs"] = [name.format(folder=tmp_path) for name in options["valid_inputs"]]
    with pytest.raises(UserError, match=message):
        shard(tokenizer=model_file, inputs=[two_files], **options)


def test_a_damaged_record_of_a_corpus(tmp_path, model_file, two_files):
    shard(tmp_path / "corpus", model_file, [two_files])
    for damage in "", "{}", "[]":
        (tmp_path / "corpus" / "sharding.json").write_text(damage)
        with pytest.raises(UserError, match="sharding.json: is damaged; --overwrite"):
            shard(tmp_path / "corpus", model_file, [two_files])
    shard(tmp_path / "corpus", model_file, [two_files], overwrite=True)


def peak(action) -> int:
    tracemalloc.start()
    action()
    _, highest = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return highest


def test_memory_does_not_grow_with_the_corpus(tmp_path, model_file):
    """Of a partition as long as the corpus, read and tokenised. The control holds all documents."""
    peaks, control = {}, {}
    for name, copies in ("warm-up", 1), ("small", 1), ("large", 8):
        path, output = tmp_path / f"{name}.jsonl", tmp_path / name
        path.write_text("".join(json.dumps({"text": text * 30}) + "\n" for text in documents(60)) * copies)
        peaks[name] = peak(lambda: shard(output, model_file, [path], valid_fraction=0.1))
        (partition,) = cut_partitions([look(str(path))], 2**26)
        control[name] = peak(lambda: list(Reader(partition.pieces[0])))
    assert path.stat().st_size > 8_000_000
    assert peaks["large"] < 1.2 * peaks["small"] and control["large"] > 6 * control["small"], (peaks, control)


@pytest.mark.parametrize("line", ['{"text": ""}', '{"body": "x"}'])
def test_documents_without_text_take_no_memory(tmp_path, model_file, monkeypatch, line):
    """But some bytes each for their lengths. The control holds them all."""
    monkeypatch.setattr(encode_module, "BATCH_DOCUMENTS", 100)
    found, control, few, many = [], [], 500, 2000
    for count in few, few, many:
        path, output = tmp_path / f"{count}.jsonl", tmp_path / str(len(found))
        path.write_text('{"text": "x"}\n' + f"{line}\n" * count)
        found.append(peak(lambda: shard(output, model_file, [path], valid_fraction=0)))
        control.append(peak(lambda: list(Reader(cut_partitions([look(str(path))], 2**26)[0].pieces[0]))))
    growth = (found[2] - found[1]) / (many - few)
    assert growth < 60 < 200 < (control[2] - control[1]) / (many - few), growth


# ----------------------------------------------------------------------------------------------------------- workers


@pytest.mark.parametrize("module", ["prepare.encode", "prepare.build", "commands.prepare"])
def test_workers_import_neither_torch_nor_the_reader(module):
    heavy = "{'torch', 'memformer_dist.data.corpus'} & set(sys.modules)"
    done = run_command(sys.executable, "-c", f"import sys, memformer_dist.{module}; sys.exit(bool({heavy}))")
    assert done.returncode == 0, done.stderr
