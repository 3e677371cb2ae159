"""What a file is taken for, what is left out and how that is said; odd inputs from other programs.

Unless a docstring says otherwise, each was read wrongly or passed over in silence by commit 1e99b32.
"""

import gzip
import io
import json
import os
import socket
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from memformer_dist.commands import train_tokenizer
from memformer_dist.commands.prepare import describe
from memformer_dist.errors import UserError
from memformer_dist.prepare import documents as documents_module
from memformer_dist.prepare import partitions
from memformer_dist.prepare.build import shard
from memformer_dist.prepare.documents import Part, read_documents, zstd
from memformer_dist.prepare.partitions import discover
from tests.helpers.corpora import encode, mib, read_back

LINES = b'{"text": "one"}\n{"text": "two\\n"}\n'


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def texts(path: Path, text_field: str | None = None) -> list[str | None]:
    """The documents of a file; of unreadable ones the reason, after an exclamation mark."""
    found = read_documents([path], text_field)
    return [document.text if document.unreadable is None else f"!{document.unreadable}" for document in found]


def ignored(folder: Path) -> dict[str, str]:
    return {Path(name).name: reason for name, reason in discover([folder]).ignored}


def quarantined(corpus: Path) -> list[dict]:
    return [json.loads(line) for line in (corpus / "quarantine.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------ what a file is


@pytest.mark.parametrize(
    "name, raw, expected",
    [
        ("a.json", LINES, ["one", "two\n"]),
        ("a.json.gz", gzip.compress(LINES, mtime=0), ["one", "two\n"]),
        ("a.ndjson", LINES, ["one", "two\n"]),
        ("a.JSONLINES.zst", zstd.compress(LINES), ["one", "two\n"]),
        ("part-00000", LINES, ["one", "two\n"]),
        ("part-00000.gz", gzip.compress(LINES, mtime=0), ["one", "two\n"]),
        ("dump.bak", LINES, ["one", "two\n"]),
        ("a.json", b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two\\n"}', ["one", "two\n"]),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES, ["one", "two\n"]),
        ("a.json", b'{"text": "only"}', ["only"]),
        ("a.json", b'{\n  "text": "only",\n  "id": 1\n}\n', ["only"]),
        ("a.json", b'[{"text": "one"}, {"text": "two\\n"}]', ["one", "two\n"]),
        ("a.json", b'[\n{"text": "one"},\n{"text": "two\\n"}\n]\n', ["one", "two\n"]),
        ("a.json", b' [\n  "one",\n  "two\\n"\n]\n', ["one", "two\n"]),
        ("a.json", b'{"text": "' + b"x" * 100_000 + b'"}\n{"text": "two"}', ["x" * 100_000, "two"]),
        ("a.json", b'{"te\n{"text": "' + b"x" * 100_000 + b'"}\n', ["!", "x" * 100_000]),
        ("a.json", b"", [""]),
        ("notes", b"{curly} and [square] text\n", ["{curly} and [square] text\n"]),
        ("notes.log", b'[1] text\n{}\n{"not": "the first line"}\n', ['[1] text\n{}\n{"not": "the first line"}\n']),
        ("a.html", b"<p>caf\xc3\xa9</p>", ["<p>café</p>"]),
    ],
)
def test_a_file_is_what_it_holds(tmp_path, name, raw, expected):
    """.json, .ndjson and files without a suffix that hold JSON lines were one text each. Controls: the last four."""
    write(tmp_path, {name: raw})
    found = texts(tmp_path / name)
    assert [text[:1] if text[:1] == "!" else text for text in found] == expected


@pytest.mark.parametrize(
    "name, raw, reason",
    [
        ("a.csv", b"id,text\n1,one\n", "not text but a table (.csv), expected JSON lines or Parquet"),
        ("a.tsv.gz", gzip.compress(b"id\ttext\n", mtime=0), "a table (.tsv)"),
        ("a.bin", bytes(range(256)), "a binary file"),
        ("a.dat", b"A\0B\0" * 50, "a binary file"),
        ("a.pdf", b"%PDF-1.7\nplain", "a PDF"),
        ("a.gz", gzip.compress(gzip.compress(b"twice", mtime=0), mtime=0), "compressed by gzip"),
        ("a.xz", b"\xfd7zXZ\x00rest", "compressed by xz, which is not read"),
        ("a.txt", b"\xff\xfea\0b\0", "not UTF-8: .*UTF-16"),
        ("b.txt", gzip.compress(b"x", mtime=0), "not UTF-8: .*compressed by gzip; a file with the suffix .gz"),
    ],
)
def test_what_is_not_text_is_never_taken_for_text(tmp_path, name, raw, reason):
    """.csv, archives of texts and binary files that are valid UTF-8 became documents."""
    write(tmp_path, {name: raw})
    (found,) = texts(tmp_path / name)
    assert found.startswith("!") and all(part in found for part in reason.split(".*"))


def test_archives_are_never_taken_for_text(tmp_path):
    """A .tar.gz of texts is valid UTF-8."""
    write(tmp_path, {"a.txt": b"a text\n"})
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "a.txt", "a.txt")
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.write(tmp_path / "a.txt", "a.txt")
    gzip.decompress((tmp_path / "b.tar.gz").read_bytes()).decode()
    assert texts(tmp_path / "b.tar.gz") == ["!not text but a tar archive"]
    assert texts(tmp_path / "c.zip")[0].startswith("!not text but a ZIP archive")


def test_large_json_lines_are_cut_whatever_their_suffix(tmp_path, model_file):
    lines = [f"line {number}" for number in range(100)]
    write(tmp_path, {"a.json": "".join(json.dumps({"text": line}) + "\n" for line in lines).encode()})
    shard(tmp_path / "corpus", model_file, [tmp_path / "a.json"], valid_fraction=0, partition_mib=mib(500))
    assert read_back(tmp_path / "corpus" / "train") == encode(model_file, lines)
    assert len(list((tmp_path / "corpus" / "train").glob("*.tar"))) > 3


@pytest.mark.parametrize("frames", [1, 2])
def test_zstd_with_a_long_window(tmp_path, frames):
    """Such a file, larger than 128 MiB, was one "unreadable" document. Here the header of a frame asks for 2 GiB."""
    done = subprocess.run(["zstd", "--long=31", "-1", "-c"], input=LINES, stdout=subprocess.PIPE, check=True)
    write(tmp_path, {"a.jsonl.zst": done.stdout * frames})
    with pytest.raises(zstd.ZstdError):  # the control: what is allowed by default
        io.BufferedReader(zstd.ZstdFile(io.BytesIO(done.stdout))).read()
    assert texts(tmp_path / "a.jsonl.zst") == ["one", "two\n"] * frames


def test_limits_of_zstd_are_no_damage(tmp_path, monkeypatch):
    """A dictionary is named; where memory is too small for a window the program ends."""
    dictionary = zstd.train_dict([LINES * 5 + b"%d" % number for number in range(2000)], 1024)
    write(tmp_path, {"a.jsonl.zst": zstd.compress(LINES, zstd_dict=dictionary)})
    assert "compressed with a dictionary is not read" in texts(tmp_path / "a.jsonl.zst")[0]

    def fail(raw):
        raise zstd.ZstdError("Unable to decompress Zstandard data: Allocation error : not enough memory")

    monkeypatch.setattr(documents_module, "_open_zstd", fail)
    with pytest.raises(UserError, match="a.jsonl.zst: .*not enough memory: its window needs up to 2 GiB"):
        texts(tmp_path / "a.jsonl.zst")


# ----------------------------------------------------------------------------------------------------------- documents


def test_a_field_that_is_null_is_no_mistake(tmp_path):
    """{"text": null} was an unreadable document."""
    write(tmp_path, {"a.jsonl": b'{"text": null}\n{"parts": null}\n{"messages": []}\n{"text": null, "parts": []}\n'})
    assert texts(tmp_path / "a.jsonl") == [""] * 4
    pyarrow.parquet.write_table(pyarrow.table({"text": [None, "x"], "n": [1, 2]}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == ["", "x"]


def test_another_field(tmp_path, model_file):
    write(tmp_path, {"a.jsonl": b'{"body": "one", "text": 3}\n{"body": null}\n{"url": "x", "id": 1}\n{"body": 3}\n'})
    pyarrow.parquet.write_table(pyarrow.table({"body": ["two", b"three"[:5].decode()]}), tmp_path / "b.parquet")
    one, empty, missing, wrong = texts(tmp_path / "a.jsonl", "body")
    assert (one, empty) == ("one", "")
    assert missing == "!--text-field: expected a field body, found url, id"
    assert wrong == "!body: found '3'; expected a string"
    assert texts(tmp_path / "b.parquet", "body") == ["two", "three"]
    usual = texts(tmp_path / "a.jsonl")[2]
    assert "found url, id" in usual and "--text-field NAME" in usual
    assert "found body" in texts(tmp_path / "b.parquet")[0] and "--text-field NAME" in texts(tmp_path / "b.parquet")[0]

    def make(**options):
        shard(tmp_path / "corpus", model_file, [tmp_path / "b.parquet"], valid_fraction=0, **options)

    make(text_field="body")
    assert json.loads((tmp_path / "corpus" / "sharding.json").read_text())["text_field"] == "body"
    make(text_field="body")  # it is recognised
    for other in {}, {"text_field": "url"}:
        with pytest.raises(UserError, match="with other text_field; --overwrite"):
            make(**other)


def test_a_corpus_that_needs_no_new_option_has_the_record_that_it_had(tmp_path, model_file):
    """So corpora of older versions are recognised. The control: a file that was taken for something else."""
    write(tmp_path, {"a.txt": b"a", "b.jsonl": LINES, "c.log": b"text", "d.png": b"\x89PNG\r\n\x1a\n\xff"})
    shard(tmp_path / "corpus", model_file, [f"{tmp_path}/?.*"], valid_fraction=0)
    record = json.loads((tmp_path / "corpus" / "sharding.json").read_text())
    fields = [
        "version",
        "tokenizer_sha256",
        "inputs",
        "valid_inputs",
        "valid_fraction",
        "seed",
        "partition_mib",
        "report",
    ]
    assert list(record) == fields and [len(file) for file in record["inputs"]] == [3] * 4
    write(tmp_path, {"e.json": LINES, "f.csv": b"x"})
    shard(tmp_path / "other", model_file, [f"{tmp_path}/?.*"], valid_fraction=0)
    record = json.loads((tmp_path / "other" / "sharding.json").read_text())
    assert [file[3:] for file in record["inputs"]] == [[]] * 4 + [["json lines"], ["foreign"]]


CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "ask"}]},
    {"role": "assistant", "content": " answer"},
    {"role": "assistant", "content": None},
]
CHAT_PARTS = [Part("be brief", False), Part("ask", False), Part(" answer", True), Part("", True)]


def test_messages_of_a_chat(tmp_path):
    """The assistant's are trained on, the others are read. Where there is a text, it is the text, as before."""
    lines = [{"messages": CHAT}, {"text": None, "messages": CHAT}, {"text": "text", "messages": 3}]
    write(tmp_path, {"a.jsonl": "\n".join(map(json.dumps, lines)).encode(), "b.json": json.dumps(lines[:1]).encode()})
    one, two, three = read_documents([tmp_path / "a.jsonl"])
    assert one.parts == two.parts == CHAT_PARTS and three.parts == [Part("text")]
    assert [document.parts for document in read_documents([tmp_path / "b.json"])] == [CHAT_PARTS]
    strings = [{"role": message["role"], "content": "x"} for message in CHAT]
    pyarrow.parquet.write_table(pyarrow.table({"messages": [strings], "id": [1]}), tmp_path / "c.parquet")
    (row,) = read_documents([tmp_path / "c.parquet"])
    assert [part.loss for part in row.parts] == [False, False, True, True]


@pytest.mark.parametrize(
    "messages, reason",
    [
        ("text", "messages: found 'text'; expected a list"),
        ([{"role": "user"}], "messages.0: found .*; expected an object with role and content"),
        ([{"role": "user", "content": [{"type": "image"}]}], "messages.0.content: found .*; expected text"),
        ([{"role": "assistant", "content": None, "tool_calls": [1]}], "messages.0.tool_calls: cannot be turned into"),
    ],
)
def test_messages_that_would_lose_something(tmp_path, messages, reason):
    write(tmp_path, {"a.jsonl": json.dumps({"messages": messages}).encode()})
    (found,) = texts(tmp_path / "a.jsonl")
    assert all(part in found for part in reason.split(".*")), found


def test_the_mask_of_a_chat_is_that_of_its_parts(tmp_path, model_file):
    parts = [{"text": part.text, "loss": part.loss} for part in CHAT_PARTS]
    write(
        tmp_path, {"a.jsonl": json.dumps({"messages": CHAT}).encode(), "b.jsonl": json.dumps({"parts": parts}).encode()}
    )
    for name in "ab":
        shard(tmp_path / name, model_file, [tmp_path / f"{name}.jsonl"], valid_fraction=0)
    assert (tmp_path / "a/train/shard-000000.tar").read_bytes() == (tmp_path / "b/train/shard-000000.tar").read_bytes()


# --------------------------------------------------------------------------------------------------------------- Arrow


def write_arrow(path: Path, table, rows: int, as_file: bool = False) -> None:
    with (pyarrow.ipc.new_file if as_file else pyarrow.ipc.new_stream)(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


@pytest.mark.parametrize("as_file", [False, True])
def test_arrow(tmp_path, as_file):
    """As a stream, which `save_to_disk` of the datasets library writes, and as a file."""
    found = [f"row {number}" for number in range(7)]
    write_arrow(tmp_path / "a.arrow", pyarrow.table({"id": range(7), "text": found}), 3, as_file)
    raw = (tmp_path / "a.arrow").read_bytes()
    write(tmp_path, {"a.arrow.gz": gzip.compress(raw), "cut.arrow": raw[: int(len(raw) * 0.7)], "no.arrow": b"no"})
    assert texts(tmp_path / "a.arrow") == texts(tmp_path / "a.arrow.gz") == found
    assert texts(tmp_path / "cut.arrow")[-1].startswith("!") and texts(tmp_path / "no.arrow")[0].startswith("!")
    write_arrow(tmp_path / "b.arrow", pyarrow.table({"body": found}), 3, as_file)
    assert "found body" in texts(tmp_path / "b.arrow")[0] and texts(tmp_path / "b.arrow", "body") == found


def test_a_folder_by_save_to_disk(tmp_path, model_file):
    train = tmp_path / "train"
    train.mkdir()
    for number in range(2):
        table = pyarrow.table({"text": [f"{number} {row}" for row in range(3)]})
        write_arrow(train / f"data-0000{number}-of-00002.arrow", table, 2)
    write_arrow(train / "cache-0123456789abcdef.arrow", table, 2)
    write(
        train,
        {"dataset_info.json": b'{"features": {"text": {"dtype": "string"}}}', "state.json": b'{\n "_split": null\n}'},
    )
    write(tmp_path, {"dataset_dict.json": b'{"splits": ["train"]}'})
    report = shard(tmp_path / "corpus", model_file, [tmp_path], valid_fraction=0)
    expected = [f"{number} {row}" for number in range(2) for row in range(3)]
    assert read_back(tmp_path / "corpus" / "train") == encode(model_file, expected)
    assert (report["unreadable"], report["ignored"]) == (0, 4)


# ------------------------------------------------------------------------------------------------ what is left out


def test_in_a_folder_everything_is_read_or_named(tmp_path, model_file, capsys):
    """.log, .html, .csv ... were counted and not named; .json with documents was among them."""
    folder = tmp_path / "in"
    write(folder, {f"a.{suffix}": b"text" for suffix in ("log", "html", "csv", "srt", "adoc", "zip", "txt")})
    write(
        folder, {"b.json": LINES, "package.json": b'{\n "name": "x",\n "nested": {"text": "y"}\n}', "README": b"text"}
    )
    write(folder, {"c.json.gz": b"damaged", "part-0": LINES, "empty": b""})
    report = shard(tmp_path / "corpus", model_file, [folder], valid_fraction=0)
    assert read_back(tmp_path / "corpus" / "train") == encode(model_file, ["text", "one", "two\n", "one", "two\n"])
    listed = [json.loads(line) for line in (tmp_path / "corpus" / "ignored.jsonl").read_text().splitlines()]
    left = [f"a.{suffix}" for suffix in ("adoc", "csv", "html", "log", "srt", "zip")]
    assert sorted(Path(line["file"]).name for line in listed) == ["README", *left, "c.json.gz", "empty", "package.json"]
    told = capsys.readouterr().err
    assert f"not read: {folder}/a.log: not text by its suffix .log (a glob reads text whatever its suffix)" in told
    assert "package.json: JSON without a field text or parts or messages (--text-field NAME reads another)" in told
    assert report["ignored"] == 10 and "10 files in folders that are not text (ignored.jsonl)" in describe(report)
    found = read_documents(file.name for file in discover([f"{folder}/*.log"]).files)  # named by the user
    assert [document.text for document in found] == ["text"]
    assert not discover([folder / "a.txt"]).ignored


def test_many_files_that_are_left_out_take_few_lines(tmp_path):
    write(tmp_path, {f"{number}.x{number % 13}": b"" for number in range(60)} | {"a.txt": b""})
    found = partitions.describe_ignored(discover([tmp_path]).ignored).splitlines()
    assert len(found) == 11 and " and 4 more: not text by its suffix .x" in found[0]
    assert found[-1] == "not read: 12 more files, for 3 other reasons"


def test_links_that_lead_nowhere_and_what_is_no_file(tmp_path):
    """They vanished uncounted, and a FIFO that was named would have been waited for without end."""
    write(tmp_path, {"a.txt": b"text"})
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s.txt"))
    expected = {
        "gone": "a link that leads nowhere (No such file or directory)",
        "gone.txt": "a link that leads nowhere (No such file or directory)",
        "pipe.txt": "a FIFO",
        "s.txt": "a socket",
    }
    assert ignored(tmp_path) == ignored(f"{tmp_path}/*") == expected
    with pytest.raises(UserError, match="pipe.txt: is a FIFO, expected a file or a folder"):
        discover([tmp_path / "pipe.txt"])
    with pytest.raises(UserError, match="gone.txt: No such file"):
        discover([tmp_path / "gone.txt"])
    with pytest.raises(UserError, match="/dev/null: is a device"):
        discover(["/dev/null"])


def test_a_file_that_may_not_be_looked_into_is_named(tmp_path, monkeypatch):
    """In a folder it ends nothing, since it was not asked for. The control: one that was."""
    write(tmp_path, {"a.txt": b"text", "secret": b"x"})

    def refuse(name):
        raise PermissionError(13, "Permission denied", name)

    monkeypatch.setattr(documents_module, "_open_local", refuse)
    assert ignored(tmp_path) == {"secret": "cannot be read: Permission denied"}
    with pytest.raises(UserError, match="secret: cannot be read: Permission denied"):
        discover([tmp_path / "secret"])


def test_a_folder_that_may_not_be_listed_can_be_excluded(tmp_path, monkeypatch):
    write(tmp_path, {"in/a.txt": b"", "in/closed/b.txt": b""})
    scan = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(UserError, match="in/closed: Permission denied .--exclude NAME"):
        discover([tmp_path / "in"])
    assert len(discover([tmp_path / "in"], ["closed"]).files) == 1


def test_a_file_lost_whole_is_reported_as_a_file(tmp_path, model_file, capsys):
    """Thousands of lines of one file hid what else was unreadable. d.jsonl, of which a line is good, is the control."""
    bad = b'{"body": "x"}\n' * 20
    write(tmp_path, {"a.csv": b"x", "b.jsonl": bad, "c.txt": b"\xff", "d.jsonl": b'bad\n{"text": "good"}\n' + bad})
    report = shard(tmp_path / "corpus", model_file, [f"{tmp_path}/*.*"], valid_fraction=0, partition_mib=mib(100))
    assert (report["unreadable"], report["lost"]) == (43, 3) and len(quarantined(tmp_path / "corpus")) == 43
    assert "43 unreadable (quarantine.jsonl; nothing could be read of 3 files)" in describe(report)
    told = capsys.readouterr().err
    assert (
        told.count("b.jsonl") == 1 and "b.jsonl: nothing in it can be read; line 1: expected either the field" in told
    )
    assert f"cannot read {tmp_path}/c.txt: not UTF-8" in told and f"cannot read {tmp_path}/d.jsonl, line 1: " in told


# ---------------------------------------------------------------------------------------------- both programs say the same


def test_both_programs_say_the_same(tmp_path, model_file, capsys):
    """tokenizer/train.py skipped what it could not read without a word."""
    text = b"the quick brown fox jumps over the lazy dog\n"
    write(
        tmp_path / "in",
        {"a.txt": text, "b.log": b"x", "c.jsonl": b'bad\n{"text": ""}\n', "d.txt": b"\xff", "e.jsonl": b"1\n2\n"},
    )
    shard(tmp_path / "corpus", model_file, [tmp_path / "in"], valid_fraction=0)
    told = [line for line in capsys.readouterr().err.splitlines() if "read" in line]
    train = ["--vocab-size", "2000", "--cap-vocabulary", "--output", str(tmp_path / "m"), "--input"]
    train_tokenizer.main([*train, str(tmp_path / "in")])
    captured = capsys.readouterr()
    assert len(told) == 4 and [line for line in captured.err.splitlines() if "read" in line] == told
    assert "left out: 1 empty documents, 4 unreadable (nothing could be read of 2 files)" in captured.out
    with pytest.raises(UserError, match="--input: no usable document; 0 are empty, 2 unreadable"):
        train_tokenizer.main([*train, str(tmp_path / "in" / "e.jsonl")])
    write(tmp_path, {"body.json": json.dumps([{"body": text.decode()}]).encode()})
    train_tokenizer.main([*train, str(tmp_path / "body.json"), "--text-field", "body"])
