"""Discovery and reading of documents."""

import errno
import gzip
import io
import json
import os
import re
from pathlib import Path

import pytest

from memformer_dist.errors import UserError
from memformer_dist.prepare.documents import Part, read_documents, zstd
from memformer_dist.prepare.partitions import discover


def make(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def names(folder, inputs):
    return [str(Path(file.name).relative_to(folder)) for file in discover(inputs).files]


def test_discovery(tmp_path):
    make(
        tmp_path,
        b_txt=b"",
        a__deep__c_py=b"",
        a__d_TXT=b"",
        a__e_jsonl_gz=b"",
        a__f_png=b"",
        a__g_rs_gz=b"",
        a__h_zip=b"",
        a__i_md_zst=b"",
        a__j_parquet=b"",
    )
    assert names(tmp_path, [tmp_path]) == [
        "a/d.TXT",
        "a/deep/c.py",
        "a/e.jsonl.gz",
        "a/g.rs.gz",
        "a/i.md.zst",
        "a/j.parquet",
        "b.txt",
    ]
    assert [Path(name).name for name, _ in discover([tmp_path]).ignored] == ["f.png", "h.zip"]
    assert names(tmp_path, [tmp_path / "b.txt", tmp_path]) == [
        "b.txt",
        "a/d.TXT",
        "a/deep/c.py",
        "a/e.jsonl.gz",
        "a/g.rs.gz",
        "a/i.md.zst",
        "a/j.parquet",
    ]
    assert names(tmp_path, [tmp_path / "**" / "*.py"]) == ["a/deep/c.py"]
    assert names(tmp_path, [tmp_path / "a" / "f.png"]) == ["a/f.png"]  # named by the user
    assert names(tmp_path, [tmp_path / "*"]) == names(tmp_path, [tmp_path / "a", tmp_path / "b.txt"])


def test_the_same_file_is_read_once(tmp_path):
    make(tmp_path, a_txt=b"")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    assert names(tmp_path, [tmp_path, tmp_path / "a.txt"]) == ["a.txt"]


def test_links_to_folders_are_followed(tmp_path):
    make(tmp_path, real__x_txt=b"", in__a_txt=b"", in__deep__b_txt=b"")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "in" / "deep" / "round").symlink_to(tmp_path / "in")
    assert names(tmp_path, [tmp_path / "in"]) == ["in/a.txt", "in/deep/b.txt", "in/linked/x.txt"]


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    make(tmp_path, in__a_txt=b"", in__closed__b_txt=b"")
    scan = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(UserError, match="in/closed: Permission denied"):
        discover([tmp_path / "in"])


@pytest.mark.parametrize("name", ["a.txt", "b.jsonl", "c.parquet", "d.parquet.gz"])
def test_what_is_wrong_with_the_machine_is_no_unreadable_document(tmp_path, monkeypatch, name):
    """A bad disk, a full folder of temporary files. The control: a file that is damaged."""
    (tmp_path / name).write_bytes(gzip.compress(b"x") if name.endswith(".gz") else b'{"text": 1}')
    if name.endswith(".gz"):
        monkeypatch.setattr("shutil.copyfileobj", failing(errno.ENOSPC))
    else:
        monkeypatch.setattr("memformer_dist.prepare.documents.open", lambda *_: FailingFile(), raising=False)
    with pytest.raises(UserError, match=f"{name}: cannot be read: "):
        list(read_documents([tmp_path / name]))
    monkeypatch.undo()
    assert [bool(document.unreadable) for document in read_documents([tmp_path / name])] == [name != "a.txt"]


def failing(number: int):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


class FailingFile(io.BytesIO):
    read = readline = readinto = seek = failing(errno.EIO)


@pytest.mark.parametrize("missing", ["nowhere", "nowhere/*.txt", "pictures"])
def test_missing_input_is_named(tmp_path, missing):
    make(tmp_path, pictures__a_png=b"")
    with pytest.raises(UserError, match=missing.replace("*", r"\*")):
        discover([tmp_path / missing])


def test_text_is_kept_exactly(tmp_path):
    raw = "\ufeffa\r\nb\rc\n\n\t \0d ".encode()
    make(tmp_path, a_txt=raw, b_py_gz=gzip.compress(raw), c_md_zst=zstd.compress(raw))
    documents = list(read_documents(file.name for file in discover([tmp_path]).files))
    assert [document.text.encode() for document in documents] == [raw] * 3
    assert all(document.position == 0 and not document.unreadable for document in documents)


@pytest.mark.parametrize("suffix, compress", [("", bytes), (".gz", gzip.compress), (".ZST", zstd.compress)])
def test_json_lines(tmp_path, suffix, compress):
    lines = [
        json.dumps({"text": "one\n", "url": "ignored"}),
        json.dumps({"parts": [{"text": "ask", "loss": False}, {"text": "answer"}]}),
        "",
        json.dumps({"text": ""}),
    ]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress("\n".join(lines).encode()))
    one, two, empty = read_documents([path])
    assert (one.text, one.position) == ("one\n", 1)
    assert list(two.parts) == [Part("ask", False), Part("answer", True)] and two.text == "askanswer"
    assert (empty.text, empty.position, empty.unreadable) == ("", 4, None)  # empty is readable; the caller decides


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"text": "cut', "JSON"),
        (b"[1, 2]", "object"),
        (b'{"text": 3}', "text: .*string"),
        (b'{"body": "x"}', "either the field text or the field parts"),
        (b'{"text": "x", "parts": []}', "either"),
        (b'{"parts": [{"text": "x", "loss": "perhaps"}]}', "parts.0.loss"),
        (b'{"text": "\\ud800"}', "hex escape"),
        (b'{"text": "\xff"}', "JSON|UTF-8|unicode"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_a_bad_line_does_not_stop_the_others(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    before, bad, after = read_documents([path])
    assert (before.text, after.text) == ("before", "after")
    assert (bad.source, bad.position, bad.parts) == (str(path), 2, ())
    assert re.search(reason, bad.unreadable)


def test_damaged_files(tmp_path):
    whole = gzip.compress(b"".join(b'{"text": "%d"}\n' % number for number in range(50_000)))
    flipped, garbled = bytearray(whole), bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    garbled[1000:2000] = b"\xff" * 1000
    make(
        tmp_path,
        a_txt=b"\xff",
        b_txt_gz=b"no gzip",
        c_txt_gz=whole[:-30],
        d_jsonl_gz=whole[: len(whole) // 2],
        g_txt=b"good",
    )
    (tmp_path / "e.txt.gz").write_bytes(flipped)
    (tmp_path / "f.txt.gz").write_bytes(garbled)
    documents = list(read_documents(file.name for file in discover([tmp_path]).files))
    bad = [document for document in documents if document.unreadable]
    assert [Path(document.source).name for document in bad] == [
        "a.txt",
        "b.txt.gz",
        "c.txt.gz",
        "d.jsonl.gz",
        "e.txt.gz",
        "f.txt.gz",
    ]
    lines = [document for document in documents if document.source.endswith("d.jsonl.gz")]
    # The lines before the damage are read; the damage itself is one entry.
    assert [line.text for line in lines[:-1]] == [str(number) for number in range(len(lines) - 1)] and len(lines) > 100
    assert lines[-1].unreadable and lines[-1].position == len(lines) - 1
    assert documents[-1].text == "good"


def test_reading_is_lazy(tmp_path):
    make(tmp_path, a_txt=b"first", b_txt=b"second")
    reader = read_documents(file.name for file in discover([tmp_path]).files)
    assert next(reader).text == "first"
    (tmp_path / "b.txt").unlink()
    with pytest.raises(UserError, match="b.txt: cannot be read: No such file"):  # nothing is wrong with a document
        next(reader)


def test_excluded_names_are_passed_over_in_folders(tmp_path):
    for name in ("kept.py", "left_test.py", "site-packages/left.py", "deep/site-packages/left.py", "deep/kept.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    found = discover([tmp_path], ["site-packages", "*_test.py"])
    assert [Path(file.name).name for file in found.files] == ["kept.txt", "kept.py"]
    assert len(discover([tmp_path]).files) == 5
