"""The data path: windows against webdataset and against a bare copy, resuming, scheduling, tokenising.

    python benchmarks/data.py                 2 minutes on 2 quiet cores, 3 GB of temporary files
    python benchmarks/data.py --quick         smaller sizes, under a minute, no thresholds
    options: --json PATH, --text FILES... (default: the sources of Python's standard library), --folder PATH

Everything runs on one thread and is compared by processor time, in turns: figures are medians over the rounds, ratios
medians of the rounds' ratios. All readers make the same thing of the same tokens: int64 tokens and labels of 64 lanes x 512
tokens a batch, documents of 10,000 tokens.

    windows             ours: lanes of contiguous segments, checked, labels across segments, ends marked
    memmap              the limit: a loop that copies the lanes' ranges, known beforehand, from one numpy memmap into one batch
    memmap, tokens      the same without labels
    webdataset          the usual pipeline over the same tars: decode, cut into rows, batch; no lanes, no labels across rows
    mosaicml-streaming  StreamingDataset of the same documents, if it is installed, cut and batched in the same way

A resume is measured in a fresh process over a corpus of a million documents, from opening it to the first batch at a random
tick, with nothing of the schedule kept. Tokenising is tokenizer/shard.py's function in one process against bare
SentencePiece on the same texts in batches.
"""

import json
import os
import platform
import random
import statistics
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script has only its own folder there

from benchmarks.figures import print_figures  # noqa: E402
from memformer_dist import programs  # noqa: E402
from memformer_dist.commands.options import Options, file_to_read, nonempty_path, not_writable  # noqa: E402
from memformer_dist.data.corpus import Corpus  # noqa: E402
from memformer_dist.data.dataset import Spans  # noqa: E402
from memformer_dist.data.format import Index, Shard, SplitWriter, WrittenShard, write_manifest  # noqa: E402
from memformer_dist.data.lanes import LaneSchedule  # noqa: E402
from memformer_dist.data.open_data import lane_schedule  # noqa: E402
from memformer_dist.data.segments import CHUNK_TICKS, CHUNKS_HELD  # noqa: E402
from memformer_dist.data.windows import WindowReader  # noqa: E402
from memformer_dist.errors import run_program  # noqa: E402
from memformer_dist.vocabulary import Vocabulary  # noqa: E402

LANES, LENGTH, DOCUMENT_TOKENS = 64, 512, 10_000
MUST_SHOW = {  # of the issue
    "ratio_webdataset": (">=", 10),
    "ratio_memmap": (">=", 0.5),
    "resume_s": ("<=", 2),
    "tokenise_ratio": (">=", 0.9),
    "schedule_1m_s": ("<=", 2),
    "index_10m_s": ("<=", 1),
}


# -------------------------------------------------------------------------------------------------------------- corpora


def read_text(files: list[str], characters: int) -> str:
    """Of the files, repeated if they are too short."""
    pieces, size = [], 0
    for file in files:
        pieces.append(Path(file).read_text(errors="ignore"))
        size += len(pieces[-1])
        if size >= characters:
            break
    text = "\n".join(pieces)
    return (text * (characters // len(text) + 1))[:characters]


def train_model(folder: Path, text: str) -> Path:
    """A SentencePiece model of 4,096 pieces."""
    from memformer_dist.prepare.tokenizer import train_tokenizer

    model = folder / "tokenizer.model"
    model.write_bytes(train_tokenizer(text[:1_000_000].splitlines(), vocab_size=4096))
    return model


def write_documents(folder: Path, tokens: np.ndarray, length: int, documents: int) -> Path:
    """So many documents of `length` tokens, the text over and over from moving starts."""
    split, generator = folder / "train", np.random.default_rng(0)
    with SplitWriter(
        split, Vocabulary(size=4096, bos_id=1, eos_id=2, tokenizer_sha256=""), shard_tokens=10_000_000
    ) as writer:
        for start in generator.integers(0, len(tokens) - length, documents).tolist():
            writer.add(tokens[start : start + length])
    return split


# -------------------------------------------------------------------------------------------------------------- readers


def windows_reader(corpus: Corpus, ticks: int) -> Callable[[], int]:
    schedule = lane_schedule(corpus, seed=0, lanes=LANES, segment_length=LENGTH)
    reader = WindowReader(corpus, schedule, lanes=range(LANES), prefetch=0)  # in this thread

    def read() -> int:
        for start in range(0, ticks, 32):
            window = reader.window(start, 32)
            for t in range(32):
                window[t]
        return ticks * LANES * LENGTH

    return read


def memmap_reader(corpus: Corpus, ticks: int, folder: Path, *, labels: bool) -> Callable[[], int]:
    """The ranges are those of the lane schedule, reckoned before the clock starts."""
    file = folder / "memmap.npy"
    if not file.exists():
        documents = range(len(corpus.lengths))
        np.save(file, np.concatenate([corpus.tokens(document, 0, DOCUMENT_TOKENS) for document in documents]))
    tokens = np.asarray(np.load(file, mmap_mode="r"))  # slicing np.memmap itself takes four times as long
    schedule = lane_schedule(corpus, seed=0, lanes=LANES, segment_length=LENGTH)
    ranges = []
    for tick in range(ticks):
        now = schedule.at(tick)
        first = now.document * DOCUMENT_TOKENS + now.segment * LENGTH
        count = np.minimum(LENGTH, DOCUMENT_TOKENS - now.segment * LENGTH)
        ranges.append(list(zip(range(LANES), first.tolist(), (first + count).tolist(), count.tolist(), strict=True)))

    def read() -> int:
        batch, following = np.zeros((LANES, LENGTH), np.int64), np.zeros((LANES, LENGTH), np.int64)
        for rows in ranges:
            for lane, first, stop, count in rows:
                batch[lane, :count] = tokens[first:stop]
                if labels:
                    following[lane, : count - 1] = tokens[first + 1 : stop]
        return ticks * LANES * LENGTH

    return read


def rows(documents: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and labels int64 [S] of the whole rows of documents."""
    for document in documents:
        document = document.astype(np.int64)
        for start in range(0, len(document) - LENGTH, LENGTH):
            yield document[start : start + LENGTH], document[start + 1 : start + LENGTH + 1]


def count_tokens(batches: Iterator[tuple[np.ndarray, np.ndarray]]) -> int:
    return sum(torch.from_numpy(tokens).numel() for tokens, _ in batches)


def webdataset_reader(split: Path) -> Callable[[], int]:
    import webdataset

    urls = sorted(map(str, split.glob("*.tar")))
    decode = webdataset.handle_extension("u16", lambda raw: np.frombuffer(raw, "<u2"))

    def read() -> int:
        dataset = webdataset.WebDataset(urls, shardshuffle=False).decode(decode).to_tuple("u16")
        documents = dataset.map(lambda sample: sample[0])
        return count_tokens(iter(documents.compose(rows).batched(LANES, partial=False)))

    return read


def streaming_reader(corpus: Corpus, folder: Path) -> Callable[[], int] | None:
    import webdataset

    try:
        from streaming import MDSWriter, StreamingDataset
    except ImportError:
        return None
    target = folder / "mds"
    with MDSWriter(out=str(target), columns={"tokens": "ndarray:uint16"}) as writer:
        for document in range(len(corpus.lengths)):
            writer.write({"tokens": np.array(corpus.tokens(document, 0, DOCUMENT_TOKENS))})
    dataset = StreamingDataset(local=str(target), shuffle=False, batch_size=1)

    def read() -> int:
        documents = (dataset[number]["tokens"] for number in range(len(dataset)))
        return count_tokens(webdataset.filters.batched(LANES, partial=False)(rows(documents)))

    return read


def reading(folder: Path, tokens: np.ndarray, quick: bool) -> dict[str, list[float]]:
    """Tokens a second of processor time, by reader, in each round."""
    documents, ticks = (1000, 320) if quick else (3000, 640)
    assert ticks > CHUNKS_HELD * CHUNK_TICKS  # else a round would find everything read by the one before
    split = write_documents(folder / "long", tokens, DOCUMENT_TOKENS, documents)
    corpus = Corpus.open(split)
    everything = np.arange(documents)
    corpus.check(Spans(everything, everything * 0, everything))  # once per run; not what is measured
    readers = {
        "windows": windows_reader(corpus, ticks),
        "memmap": memmap_reader(corpus, ticks, folder, labels=True),
        "memmap, tokens": memmap_reader(corpus, ticks, folder, labels=False),
        "webdataset": webdataset_reader(split),
        "mosaicml-streaming": streaming_reader(corpus, folder),
    }
    found: dict[str, list[float]] = {name: [] for name, reader in readers.items() if reader}
    for turn in range(4 if quick else 8):
        for name in found:
            began = time.process_time()
            count = readers[name]()
            if turn:  # the first one warms up
                found[name].append(count / (time.process_time() - began))
    return found


# ----------------------------------------------------------------------------------------- resuming, scheduling, the index


RESUME = """
import sys, time
import numpy as np
from memformer_dist.data.corpus import Corpus
from memformer_dist.data.open_data import lane_schedule
from memformer_dist.data.windows import WindowReader
split, tick, lanes, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
began = time.perf_counter()
corpus = Corpus.open(split)
schedule = lane_schedule(corpus, seed=0, lanes=lanes, segment_length=length)
schedule._store = None if sys.argv[5] == "cold" else schedule._store
reader = WindowReader(corpus, schedule, lanes=range(lanes))
reader.counts(tick, tick + 8)
reader.prepare(tick, 8)
reader.window(tick, 8)[0]
print(time.perf_counter() - began)
"""


def resuming(folder: Path, tokens: np.ndarray, documents: int, rounds: int) -> dict[str, float]:
    """Seconds from opening a corpus of short documents to the first batch, at random ticks of the first epoch."""
    split = write_documents(folder / "short", tokens, 100, documents)
    last_tick, generator = documents // LANES - 8, random.Random(0)

    def measure(how: str) -> float:
        command = [sys.executable, "-c", RESUME, split, generator.randrange(last_tick), LANES, LENGTH, how]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = programs.run(list(map(str, command)), env=environment, cwd=ROOT, stdout=PIPE, stderr=PIPE, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return float(done.stdout)

    cold = statistics.median(measure("cold") for _ in range(rounds))
    measure("kept")  # the first one keeps the schedule
    return {"resume_s": cold, "resume_kept_s": statistics.median(measure("kept") for _ in range(rounds))}


def scheduling(documents: int) -> float:
    """Seconds for an epoch of documents of 1 to 40 segments on 256 lanes."""
    lengths = np.random.default_rng(0).integers(1, 40 * LENGTH, documents)
    began = time.perf_counter()
    LaneSchedule(lengths, lanes=256, segment_length=LENGTH).at(0)
    return time.perf_counter() - began


def opening(folder: Path, documents: int) -> dict[str, float]:
    """Seconds to open a corpus of so many documents, and bytes of its index for each. The shards are empty files."""
    split, shards = folder / "many" / "train", 1000
    split.mkdir(parents=True)
    written = []
    for number in range(shards):
        count = documents // shards
        lengths = np.random.default_rng(number).integers(1, 1000, count).astype(np.uint32)
        index = Index(lengths, np.arange(count, dtype=np.uint32) * 5, np.zeros(count, np.uint32))
        name = f"shard-{number:06d}.tar"
        with open(split / name, "wb") as file:
            file.truncate(512)
        shard = Shard(name=name, bytes=512, sha256="", documents=count, tokens=int(lengths.sum()))
        written.append(WrittenShard(shard, index))
    write_manifest(split, Vocabulary(size=4096, bos_id=1, eos_id=2, tokenizer_sha256=""), written)
    size = (split / "index.safetensors").stat().st_size
    began = time.perf_counter()
    Corpus.open(split)
    return {"index_10m_s": time.perf_counter() - began, "index_bytes_a_document": size / documents}


# ----------------------------------------------------------------------------------------------------------- tokenising


def tokenising(folder: Path, model: Path, text: str, rounds: int) -> dict[str, list[float]]:
    """Characters a second of processor time in each round: ours from files to shards, bare SentencePiece from memory."""
    import sentencepiece

    from memformer_dist.prepare.build import shard

    texts = [text[start : start + 40_000] for start in range(0, len(text), 40_000)]
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ours, bare = [], []
    for turn in range(rounds):
        began = time.process_time()
        for start in range(0, len(texts), 100):
            processor.encode(texts[start : start + 100], out_type="numpy", num_threads=1)
        bare.append(len(text) / (time.process_time() - began))
        began = time.process_time()
        shard(folder / f"tokenised-{turn}", model, [str(source)], valid_fraction=0, workers=1)
        ours.append(len(text) / (time.process_time() - began))
    return {"shard": ours, "sentencepiece": bare}


# ---------------------------------------------------------------------------------------------------------------- tables


def ratio(rounds: dict[str, list[float]], one: str, other: str) -> float:
    """Machines change their speed from minute to minute: what is compared was measured in the same round."""
    return statistics.median(a / b for a, b in zip(rounds[one], rounds[other], strict=True))


def medians(rounds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(figures) for name, figures in rounds.items()}


def benchmark(folder: Path, files: list[str], quick: bool) -> dict[str, Any]:
    import sentencepiece

    text = read_text(files, 8_000_000 if quick else 60_000_000)
    model = train_model(folder, text)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokens = np.concatenate(processor.encode(text[:2_000_000].splitlines(), out_type="numpy", num_threads=2))
    readers = reading(folder, tokens, quick)
    tokenised = tokenising(folder, model, text, rounds=3 if quick else 7)
    return {
        "tokens_per_s": statistics.median(readers["windows"]),
        "ratio_webdataset": ratio(readers, "windows", "webdataset"),
        "ratio_memmap": ratio(readers, "windows", "memmap"),
        "memmap_to_webdataset": ratio(readers, "memmap", "webdataset"),
        "memmap_tokens_to_webdataset": ratio(readers, "memmap, tokens", "webdataset"),
        **resuming(folder, tokens, 100_000 if quick else 1_000_000, rounds=1 if quick else 5),
        "tokenise_ratio": ratio(tokenised, "shard", "sentencepiece"),
        "schedule_1m_s": statistics.median(scheduling(1_000_000) for _ in range(3)),
        **({} if quick else {"schedule_10m_s": scheduling(10_000_000)}),
        **opening(folder, 10_000_000),
        "readers": medians(readers),
        "tokenising": medians(tokenised),
        "quick": quick,
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }


def text_file(words: str) -> str:
    return str(file_to_read(words))


def folder_option(words: str) -> Path:
    if not nonempty_path(words).is_dir():
        raise ValueError(f"found no folder {words}")
    return nonempty_path(words)


def main() -> None:
    parser = Options(__doc__, check=lambda options: not_writable("--json", options.json))
    parser.add_argument("--quick", action="store_true", help="smaller sizes, no thresholds")
    parser.add_argument("--json", type=nonempty_path, metavar="PATH", help="write all figures there")
    parser.add_argument("--text", type=text_file, nargs="+", metavar="FILE", help="files of text")
    parser.add_argument("--folder", type=folder_option, help="where temporary files go (default: the system's)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # of webdataset
    files = options.text or sorted(map(str, Path(sysconfig.get_path("stdlib")).rglob("*.py")))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = benchmark(Path(folder), files, options.quick)
    print(f"\n{'reader':<22}{'M tokens/s':>12}{'of the limit':>14}")
    for name, speed in result["readers"].items():
        print(f"{name:<22}{speed / 1e6:>12.1f}{speed / result['readers']['memmap']:>14.2f}")
    print(f"\n{'tokenising':<22}{'M characters/s':>16}")
    for name, speed in result["tokenising"].items():
        print(f"{name:<22}{speed / 1e6:>16.2f}")
    print()
    figures = {key: value for key, value in result.items() if isinstance(value, float)}
    print_figures(figures, MUST_SHOW, compare=not options.quick)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    with programs.handing_on():
        run_program(main)
