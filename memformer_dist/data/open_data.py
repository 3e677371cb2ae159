"""What a run reads: the `data` section of its configuration, and the datasets and the lane schedule made of it.

train, valid = open_data(config.data)
schedule = training_schedule(config.data, train)

split = open_split("https://host/corpora/books/train")
schedule = lane_schedule(split, seed=0, lanes=16, segment_length=64)
"""

from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Discriminator, Field, PositiveFloat, PositiveInt, Tag, ValidationInfo, field_validator

from memformer_dist.data.cache import CACHE_FOLDER, CACHE_GIB
from memformer_dist.data.corpus import Corpus
from memformer_dist.data.dataset import TokenDataset
from memformer_dist.data.format import MANIFEST
from memformer_dist.data.lanes import LaneSchedule
from memformer_dist.data.maps import Maps
from memformer_dist.data.mixture import Mixture
from memformer_dist.data.sampler import EpochSampler
from memformer_dist.data.stream import Stream
from memformer_dist.data.task_documents import TaskDocuments, TaskReader
from memformer_dist.data.windows import WindowReader
from memformer_dist.errors import UserError
from memformer_dist.places import Places, configured, is_url
from memformer_dist.section import Extent, Section
from memformer_dist.tasks import TaskSection
from memformer_dist.tasks.base import TaskConfig

Mode = Literal["documents", "stream"]
IN_A_CORPUS = f"train/{MANIFEST}"  # by which a folder is known to be one


def _folder_or_weights(value: Any) -> str | None:
    return "<folder>" if isinstance(value, str) else "<weights>" if isinstance(value, dict) and value else None


class DataConfig(Section):
    """The section `data`."""

    task: TaskSection | None = Field(
        None,
        description="documents made up in place of a corpus's, which ask for what they said segments before: `name` is the"
        " task, the other fields are that task's own",
    )
    corpus: (
        Annotated[
            Annotated[str, Tag("<folder>")] | Annotated[dict[str, PositiveFloat], Tag("<weights>")],
            Discriminator(
                _folder_or_weights,
                custom_error_type="corpus",
                custom_error_message="expected a folder, a URL, or an object of weights by folder or URL",
            ),
        ]
        | None
    ) = Field(
        None,
        validate_default=True,
        description="folder or URL of a corpus written by tokenizer/shard.py; or an object of several, each with its"
        " weight: how often its documents are dealt per epoch (2 is twice, 0.5 every second epoch); null: see `task`",
    )
    mode: Mode = Field(
        "documents",
        description="documents: lanes read whole documents in a shuffled order, each from an empty memory; stream: all"
        " documents are joined by EOS and cut evenly among the lanes, as papers on WikiText-103 do",
    )
    min_tokens: PositiveInt = Field(1, description="documents of fewer tokens are left out of training")
    shuffle_shards: PositiveInt | None = Field(
        None,
        description="shuffle within groups of this many shards, for a remote corpus that the cache cannot hold; null:"
        " shuffle through the whole epoch",
    )
    lanes: Extent = Field(
        description="B, documents read side by side by all ranks together, the rows of the global batch; a multiple of"
        " the number of ranks"
    )
    segment_length: Extent = Field(description="S, tokens per segment")
    seed: int = Field(0, ge=0, description="seed of the order of the documents")
    prefetch: int = Field(2, ge=0, description="segments that a thread prepares ahead of need; 0: none")
    cache: str = Field(
        CACHE_FOLDER, description="folder on this machine in which the shards of remote corpora are kept"
    )
    cache_gib: PositiveFloat = Field(CACHE_GIB, description="GiB that the shards of one split may take in the cache")

    @field_validator("corpus")
    @classmethod
    def _one_of_corpus_and_task(cls, corpus: Any, info: ValidationInfo) -> Any:
        if "task" in info.data and corpus is None and info.data["task"] is None:
            raise ValueError("missing; folder or URL of a corpus, if there is no data.task")
        if corpus is not None and info.data.get("task") is not None:
            raise ValueError(f"found {corpus!r} beside data.task, expected one of them")
        return corpus

    @property
    def corpora(self) -> dict[str, float]:
        """Weights by folder or URL; none of a task."""
        return {self.corpus: 1.0} if isinstance(self.corpus, str) else self.corpus or {}


def open_split(split: str | Path, *, cache: str | Path = CACHE_FOLDER, cache_gib: float = CACHE_GIB) -> Corpus:
    """Open a split in a folder or at a URL.

    The shards of a URL are fetched when they are needed (remote.py); up to `cache_gib` GiB of them are kept in `cache`.

    Raises UserError, for a URL mostly CorpusError, naming a file that is missing, cannot be fetched or is not the one
    that was written.
    """
    if not is_url(split):
        return Corpus.open(split)
    from memformer_dist.data.remote import RemoteShards, fetch_split  # imports fsspec, which is optional and slow

    found, remote, kept = fetch_split(str(split), Path(cache), int(cache_gib * 2**30))
    maps = Maps()
    return Corpus(split, found, RemoteShards(remote, kept, found.manifest, on_evict=maps.unmap), maps)


def open_corpora(
    corpus: str | Path, *, cache: str | Path = CACHE_FOLDER, cache_gib: float = CACHE_GIB
) -> tuple[Corpus, Corpus]:
    """The training and the validation split of a corpus in a folder or at a URL (see open_split).

    Raises UserError where a split was made with another tokenizer than the corpus holds.
    """
    folder = str(corpus).rstrip("/")
    train, valid = (open_split(f"{folder}/{name}", cache=cache, cache_gib=cache_gib) for name in ("train", "valid"))
    for split in (train, valid):
        split.tokenizer()
    return train, valid


def open_mixture(
    weights: dict[str, float], *, cache: str | Path = CACHE_FOLDER, cache_gib: float = CACHE_GIB
) -> tuple[Corpus | Mixture, Corpus | Mixture]:
    """The training and the validation split of several corpora, by folder or URL (see open_corpora).

    Raises UserError where they were made with different tokenizers.
    """
    cache = configured(str(cache))
    opened = [open_corpora(corpus, cache=cache, cache_gib=cache_gib) for corpus in weights]
    train, valid = [train for train, _ in opened], [valid for _, valid in opened]
    exact = [Fraction(str(weight)) for weight in weights.values()]
    if exact == [1]:
        return train[0], valid[0]
    return Mixture(train, exact), valid[0] if len(valid) == 1 else Mixture(valid, [Fraction(1)] * len(valid))


def as_read(dataset: TokenDataset, mode: Mode, lanes: int) -> TokenDataset:
    """The dataset as `mode` reads it: itself, or a stream of as many parts as lanes."""
    return Stream(dataset, lanes) if mode == "stream" else dataset


def corpora_from_here(data: DataConfig, places: Places | None = None) -> dict[str, float]:
    """Weights by folder or URL, as they are found from the working folder. `places`: those of the run."""
    places = places or Places()
    return {places.found("data.corpus", corpus, IN_A_CORPUS): weight for corpus, weight in data.corpora.items()}


def open_data(data: DataConfig, places: Places | None = None) -> tuple[TokenDataset, TokenDataset]:
    """The training and the validation dataset of a run, in its `places`. Raises UserError naming the field or file."""
    if data.task is not None:
        return task_documents(data.task, data.segment_length, data.seed)
    train, valid = open_mixture(corpora_from_here(data, places), cache=data.cache, cache_gib=data.cache_gib)
    return as_read(train, data.mode, data.lanes), as_read(valid, data.mode, data.lanes)


def lane_schedule(
    dataset: TokenDataset,
    *,
    seed: int,
    lanes: int,
    segment_length: int,
    min_tokens: int = 1,
    shuffle_shards: int | None = None,
) -> LaneSchedule:
    """The endless schedule of training. Large epochs are stored next to the dataset's index.

    Raises UserError if no document has `min_tokens`, or the weights leave less than one document to an epoch.
    """
    sources = dataset.sources(min_tokens)
    dealt = sum(source.weight * len(source.documents) for source in sources)
    if dealt < 1:
        raise UserError(
            f"data.corpus: an epoch deals {float(dealt):.2g} documents; expected weights that make at least 1"
        )
    order = EpochSampler(sources, seed=seed, shard_ends=dataset.shard_ends, shuffle_shards=shuffle_shards)
    return LaneSchedule(
        dataset.lengths,
        seed=seed,
        lanes=lanes,
        segment_length=segment_length,
        order=order,
        store=dataset.folder / "schedules",
        order_key=f"{dataset.fingerprint} {min_tokens} {shuffle_shards}",
    )


def task_documents(task: TaskConfig, segment_length: int, seed: int) -> tuple[TaskDocuments, TaskDocuments]:
    """The training documents of a task, by their seed, and the held-out ones, which are always the same."""
    train = TaskDocuments(task, segment_length=segment_length, seed=seed, held_out=False)
    return train, TaskDocuments(task, segment_length=segment_length, seed=0, held_out=True)


def training_reader(
    data: DataConfig, dataset: TokenDataset, *, lanes: range, device: torch.device
) -> WindowReader | TaskReader:
    """The reader of the global lanes `lanes` of a run's training dataset."""
    if isinstance(dataset, TaskDocuments):
        assert data.task is not None
        return TaskReader(dataset, lanes=lanes, all_lanes=data.lanes, carry=data.task.carry, device=device)
    return WindowReader(dataset, training_schedule(data, dataset), lanes=lanes, prefetch=data.prefetch, device=device)


def training_schedule(data: DataConfig, dataset: TokenDataset) -> LaneSchedule:
    """The schedule of a run's training dataset (see lane_schedule)."""
    return lane_schedule(
        dataset,
        seed=data.seed,
        lanes=data.lanes,
        segment_length=data.segment_length,
        min_tokens=data.min_tokens,
        shuffle_shards=data.shuffle_shards,
    )


class Epoch(NamedTuple):
    """The size of an epoch."""

    documents: int
    tokens: int
    padding: float  # share of the positions of all segments


def first_epoch(dataset: TokenDataset, schedule: LaneSchedule) -> Epoch:
    """The size of a schedule's first epoch."""
    documents = schedule.documents(0)
    tokens = int(dataset.lengths[documents].sum())
    positions = int(schedule.segments[documents].sum()) * schedule.segment_length
    return Epoch(len(documents), tokens, 1 - tokens / positions if positions else 0.0)
