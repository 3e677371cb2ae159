"""Start a program on two gloo ranks of one thread each and take the figures that rank 0 prints."""

import json
import os
import socket
import sys
import tempfile
from pathlib import Path
from subprocess import PIPE
from typing import Any

from memformer_dist import programs

ROOT = Path(__file__).resolve().parent.parent


def on_two_ranks(*program: str) -> list[dict[str, Any]]:
    """The last line of standard output that is a JSON list of objects. `program`: as after torchrun's own options.

    Raises CalledProcessError where it fails; its messages, DeepSpeed's among them, then go to our standard error.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", port]
    with tempfile.TemporaryFile("w+") as messages:
        done = programs.run(
            [sys.executable, "-m", *launcher, *program],
            cwd=ROOT,
            env=environment,
            stdout=PIPE,
            stderr=messages,
            text=True,
        )
        if done.returncode:
            messages.seek(0)
            print(messages.read(), file=sys.stderr)
            done.check_returncode()
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("[{")))
