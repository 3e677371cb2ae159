"""A file server on loopback that fails on request.

    with FileServer(folder) as server:
        server.faults["train/shard-000000.tar"] = ["drop", "truncate", 503, "flip"]
        Corpus.open(f"{server.url}/train")

Each request for a file takes the first fault off the file's list and fails that way; it succeeds once the list is empty.

    drop       the connection is closed without an answer
    truncate   ... in the middle of the file
    stall      nothing follows the first half of the file until the server ends
    hold       no answer until `released` is set
    short      a whole answer, of the first half of the file
    long       a whole answer, of the file twice over
    flip       one bit is wrong
    503        any number: that HTTP status
"""

import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ALWAYS = 1000


class FileServer:
    """requests: the paths requested, in order, each with its outcome: [("train/corpus.json", "served"), ...]"""

    def __init__(self, folder: Path):
        self.folder = folder
        self.requests: list[tuple[str, str]] = []
        self.faults: dict[str, list[str | int]] = defaultdict(list)
        self.released = threading.Event()  # what "stall" and "hold" wait for
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.strip("/")
                with lock:
                    fault = server.faults[name].pop(0) if server.faults[name] else "served"
                    if not (folder / name).is_file():
                        fault = 404
                    server.requests.append((name, str(fault)))
                if fault == "drop":
                    self.close_connection = True
                    return
                if isinstance(fault, int):
                    self.send_error(fault)
                    return
                raw = bytearray((folder / name).read_bytes())
                if fault == "flip":
                    raw[len(raw) // 2] ^= 1
                if fault == "short":  # a whole answer, of less than the file
                    del raw[len(raw) // 2 :]
                if fault == "long":
                    raw *= 2
                if fault == "hold":
                    server.released.wait(60)
                self.send_response(200)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                if fault in ("truncate", "stall"):
                    self.wfile.write(raw[: len(raw) // 2])
                    self.wfile.flush()
                    if fault == "stall":
                        server.released.wait(60)
                    self.close_connection = True
                    return
                self.wfile.write(raw)

            def log_message(self, *_) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self) -> "FileServer":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def count(self, name: str) -> int:
        return sum(asked == name for asked, _ in self.requests)

    def shards(self) -> list[str]:
        return [name for name, _ in self.requests if name.endswith(".tar")]
