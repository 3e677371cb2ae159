"""What test modules share. No test module imports another; tests/test_architecture.py holds them to it.

toy.py        a small recurrent cell, windows for it, and the references that a gradient is compared with
memformer.py  small Memformers and segments for them
engines.py    runs through the DeepSpeed engine, and the same runs in plain torch
runs.py       whole training runs and what they leave on disk
ranks.py      functions run on several ranks, as forks of one warm server
scripts.py    programs run as a user starts them, from that server or cold
corpora.py    texts, tokenizers and corpora
fields.py     a field of a configuration changed, and what is found wrong
files.py      folders compared, files damaged
http.py       a file server that fails on request
waiting.py    waiting for a condition
"""

from pathlib import Path

ROOT = Path(__file__).parents[2]  # of the repository
