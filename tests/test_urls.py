"""Inputs behind URLs, from an HTTP server on this machine that breaks connections."""

import functools
import gzip
import json
import re
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar
from urllib.parse import urlsplit

import pyarrow
import pyarrow.parquet
import pytest

from memformer_dist.data import transfer
from memformer_dist.errors import UserError
from memformer_dist.prepare.build import shard
from memformer_dist.prepare.documents import zstd
from tests.helpers.corpora import documents, encode, mib, read_back


class Ranges(SimpleHTTPRequestHandler):
    """Serves byte ranges too; `faults` are taken one by one by requests for files: the number of bytes to break off at."""

    faults: ClassVar[list[int]] = []
    ranges = lengths = True  # `lengths`: a body says how long it is
    encoding: str | None = None  # Content-Encoding of .gz files
    unavailable = 0  # the next requests, whatever they are for, are answered with 503

    def log_message(self, *_):
        pass

    def end_headers(self):
        if self.encoding and self.path.endswith(".gz"):
            self.send_header("Content-Encoding", self.encoding)
        super().end_headers()

    def translate_path(self, path):
        return super().translate_path(urlsplit(path).path)  # of a whole URL, which a proxy is asked for

    def do_HEAD(self):
        if not self.is_unavailable():
            super().do_HEAD()

    def is_unavailable(self) -> bool:
        if not self.unavailable:
            return False
        type(self).unavailable -= 1
        self.send_error(503)
        return True

    def do_GET(self):
        if self.is_unavailable():
            return None
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return super().do_GET()
        raw, wanted = path.read_bytes(), self.headers.get("Range") if self.ranges else None
        first, last = 0, len(raw) - 1
        if wanted:
            first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            last = min(last, len(raw) - 1)
        body = raw[first : last + 1]
        self.send_response(206 if wanted else 200)
        if self.lengths:
            self.send_header("Content-Length", str(len(body)))
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(raw)}")
        self.end_headers()
        if self.faults:
            body = body[: self.faults.pop(0)]
            self.close_connection = True
        self.wfile.write(body)


@pytest.fixture
def served(tmp_path, monkeypatch):
    """(folder, its URL, the handler)"""
    folder = tmp_path / "served"
    (folder / "deep er").mkdir(parents=True)
    handler = type("Handler", (Ranges,), {"faults": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(transfer, "TRIES", 3)
    monkeypatch.setattr(transfer, "FIRST_PAUSE_S", 0.01)
    yield folder, f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


def fill_folder(folder: Path) -> None:
    found = documents(40)
    (folder / "a.txt").write_text(found[0])
    (folder / "deep er" / "b c.txt.gz").write_bytes(gzip.compress(found[1].encode()))
    (folder / "deep er" / "c.jsonl.zst").write_bytes(zstd.compress(json.dumps({"text": found[2]}).encode()))
    (folder / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in found[3:20]))
    pyarrow.parquet.write_table(pyarrow.table({"text": found[20:]}), folder / "e.parquet", row_group_size=5)
    (folder / "picture.png").write_bytes(b"\x89PNG")


@pytest.mark.parametrize("workers", [1, 2])
def test_inputs_behind_urls(served, tmp_path, model_file, workers):
    folder, url, _ = served
    fill_folder(folder)
    options = dict(valid_fraction=0, partition_mib=mib(1500), workers=workers)
    names = ["a.txt", "d.jsonl", "deep er/b c.txt.gz", "deep er/c.jsonl.zst", "e.parquet"]
    shard(tmp_path / "local", model_file, [folder / name for name in names], **options)
    expected = read_back(tmp_path / "local" / "train")
    report = shard(tmp_path / "remote", model_file, [f"{url}/"], **options)
    assert read_back(tmp_path / "remote" / "train") == expected and report["ignored"] == 1
    assert len(json.loads((tmp_path / "remote/train/corpus.json").read_text())["shards"]) > 6
    if workers == 1:
        shard(tmp_path / "globbed", model_file, [f"{url}/*.txt", f"{url}/d.jsonl"], **options)
        assert read_back(tmp_path / "globbed" / "train") == expected[:18]
        shard(tmp_path / "file", model_file, [f"file://{folder}/a.txt", f"file://{folder}/*.jsonl"], **options)
        assert read_back(tmp_path / "file" / "train") == expected[:18]


def test_a_broken_connection_is_tried_again(served, tmp_path, model_file, caplog):
    folder, url, handler = served
    text = "".join(documents(60))
    (folder / "a.txt").write_text(text)
    handler.faults += [1000, 0]
    shard(tmp_path / "corpus", model_file, [f"{url}/a.txt"], valid_fraction=0)
    assert read_back(tmp_path / "corpus" / "train") == encode(model_file, [text])
    assert len(re.findall(r"a.txt: byte \d+: .*; try [12] of 3, the next in", caplog.text)) == 2
    handler.faults += [0] * 3
    with pytest.raises(UserError, match=r"a.txt: byte \d+: given up after 3 tries: "):
        shard(tmp_path / "broken", model_file, [f"{url}/a.txt"], valid_fraction=0)
    assert not (tmp_path / "broken").exists()
    caplog.clear()
    shard(tmp_path / "whole", model_file, [f"{url}/a.txt"], valid_fraction=0)  # the control: no fault
    assert not caplog.records


def test_a_body_that_ends_too_early_is_no_end_of_a_file(served, tmp_path, model_file, caplog):
    """Where it says no length, only the one that was listed tells."""
    folder, url, handler = served
    text = "".join(documents(60))
    (folder / "a.txt").write_text(text)
    handler.lengths = False
    handler.faults += [len(text) // 3]
    shard(tmp_path / "corpus", model_file, [f"{url}/a.txt"], valid_fraction=0)
    assert read_back(tmp_path / "corpus" / "train") == encode(model_file, [text])
    assert "ends here, expected" in caplog.text
    handler.faults += [len(text) // 3] * 3
    with pytest.raises(UserError, match=r"a.txt: byte \d+: given up after 3 tries: OSError: ends here, expected"):
        shard(tmp_path / "broken", model_file, [f"{url}/a.txt"], valid_fraction=0)


def test_a_gzip_file_that_http_has_decompressed(served, tmp_path, model_file):
    folder, url, handler = served
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"once compressed"))
    for handler.encoding in None, "gzip":
        name = str(handler.encoding)
        shard(tmp_path / name, model_file, [f"{url}/a.txt.gz"], valid_fraction=0)
        assert read_back(tmp_path / name / "train") == encode(model_file, ["once compressed"])


def test_a_folder_without_its_slash(served, tmp_path, model_file):
    folder, url, _ = served
    (folder / "sub").mkdir()
    (folder / "sub" / "a.txt").write_text("in a folder")
    shard(tmp_path / "corpus", model_file, [f"{url}/sub"], valid_fraction=0)
    assert read_back(tmp_path / "corpus" / "train") == encode(model_file, ["in a folder"])


def test_a_server_that_is_away_is_no_missing_file(served, tmp_path, model_file, caplog):
    """While files are looked for: fsspec says "not found" of both, and only one is tried again."""
    folder, url, handler = served
    (folder / "sub").mkdir()
    (folder / "sub" / "a.txt").write_text("in a folder")
    handler.unavailable = 4  # of the HEAD and GET that look at the folder, twice
    shard(tmp_path / "corpus", model_file, [f"{url}/sub"], valid_fraction=0)
    assert read_back(tmp_path / "corpus" / "train") == encode(model_file, ["in a folder"])
    told = caplog.text
    assert len(re.findall(r"/sub: ClientResponseError: 503, .*; try [12] of 3, the next in", told)) == 2
    handler.unavailable = 1000
    with pytest.raises(UserError, match="/sub: given up after 3 tries: ClientResponseError: 503"):
        shard(tmp_path / "away", model_file, [f"{url}/sub"])
    handler.unavailable = 0
    caplog.clear()
    with pytest.raises(UserError, match="/nothing: not found"):
        shard(tmp_path / "missing", model_file, [f"{url}/nothing"])
    assert not caplog.records


def test_the_proxy_of_the_environment(served, tmp_path, model_file, monkeypatch):
    """For inputs and for shards: the server plays a proxy, and the host behind it does not exist."""
    folder, url, _ = served
    (folder / "a.txt").write_text("behind a proxy")
    with pytest.raises(UserError, match="given up after 3 tries"):  # the control
        shard(tmp_path / "corpus", model_file, ["http://nowhere.invalid/a.txt"])
    monkeypatch.setenv("http_proxy", url)
    shard(tmp_path / "corpus", model_file, ["http://nowhere.invalid/a.txt"], valid_fraction=0)
    assert read_back(tmp_path / "corpus" / "train") == encode(model_file, ["behind a proxy"])
    assert transfer.Remote("http://nowhere.invalid").read("a.txt", bytes.decode) == "behind a proxy"


def test_mistakes_with_urls(served, tmp_path, model_file):
    folder, url, handler = served
    fill_folder(folder)
    for asked, message in [
        (f"{url}/nothing.txt", "nothing.txt: not found"),
        (f"{url}/*.nothing", "found no file or folder"),
        ("gopher://x/y.txt", "gopher://x/y.txt: Protocol not known"),
    ]:
        with pytest.raises(UserError, match=message):
            shard(tmp_path / "corpus", model_file, [asked])
    handler.ranges = False
    for name in "d.jsonl", "e.parquet":
        with pytest.raises(UserError, match=f"{name}: the server does not serve byte ranges.*--partition-mib"):
            shard(tmp_path / "corpus", model_file, [f"{url}/{name}"], partition_mib=mib(1500))
    shard(tmp_path / "corpus", model_file, [f"{url}/d.jsonl"])  # the control: whole
