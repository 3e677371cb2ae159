"""The two splits of a corpus: which documents are held out, and the shards of all partitions joined.

Documents are held out whole, once it is known which of them are usable: those of --valid-input, or a seeded choice.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import TypedDict

import numpy as np
from safetensors.numpy import load as load_safetensors

from memformer_dist.data.format import MANIFEST, Index, Shard, WrittenShard, write_manifest
from memformer_dist.errors import UserError
from memformer_dist.files import sha256_of
from memformer_dist.prepare.encode import ShardRecord
from memformer_dist.prepare.workspace import Workspace
from memformer_dist.tokenizer import SENTENCEPIECE
from memformer_dist.vocabulary import Vocabulary

PADDING_AT = (128, 512)  # segment lengths for which the report gives the share of padding


class SplitReport(TypedDict):
    fingerprint: str  # sha256 of corpus.json
    documents: int
    tokens: int
    characters: int
    padding: dict[str, float]  # by segment length: share of the positions


# ------------------------------------------------------------------------------------------------- validation documents


def held_out_documents(
    held_out: Sequence[bool], usable: Sequence[np.ndarray], unreadable: int, fraction: float, seed: int
) -> list[np.ndarray]:
    """For each partition the numbers of its validation documents, int64 [n].

    held_out   of each partition: its files were given with --valid-input
    usable     of each partition: bool [documents]

    Raises UserError where a split that was asked for would be empty.
    """
    ends = np.cumsum([0] + [len(partition) for partition in usable])
    from_valid_input = np.repeat(np.array(held_out, bool), np.diff(ends))
    is_usable = np.concatenate(usable)
    left_out = f"{len(is_usable) - is_usable.sum() - unreadable} are empty, {unreadable} unreadable"
    for option, chosen in ("--input", ~from_valid_input), ("--valid-input", from_valid_input):
        if (option == "--input" or any(held_out)) and not np.any(is_usable & chosen):
            raise UserError(f"{option}: no usable document; {left_out}")
    valid = from_valid_input if any(held_out) else choose_validation(is_usable, fraction, seed)
    if fraction > 0 and not np.any(valid):
        raise UserError(
            f"--input: found one usable document ({left_out}), and documents are held out whole, so none can be:"
            " give others with --valid-input, or a second document (one book in two files will do);"
            " --valid-fraction 0 writes no validation split, which training needs"
        )
    return [np.flatnonzero(valid[start:stop]) for start, stop in pairwise(ends)]


def choose_validation(usable: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """bool [documents]: a seeded choice among the usable ones; of two or more, at least one for either split."""
    candidates = np.flatnonzero(usable)
    number = 0
    if fraction > 0 and len(candidates) > 1:
        number = min(max(round(fraction * len(candidates)), 1), len(candidates) - 1)
    chosen = np.zeros(len(usable), bool)
    chosen[np.random.Generator(np.random.PCG64(seed)).permutation(candidates)[:number]] = True
    return chosen


# --------------------------------------------------------------------------------------------------------------- merge


def merge(
    workspace: Workspace,
    vocabulary: Vocabulary,
    has_mask: bool,
    records: Sequence[dict[str, ShardRecord]],
    *,
    tokenizer: str = SENTENCEPIECE,
    lossy: bool = False,
) -> dict[str, SplitReport]:
    """Write index and corpus.json of the splits -> their reports. Raises UserError where a split has no label."""
    reports: dict[str, SplitReport] = {}
    for split in "train", "valid":
        shards = {number: record[split] for number, record in enumerate(records) if split in record}
        if not shards:
            workspace.split(split).rmdir()
            continue
        if not sum(entry["labels"] for entry in shards.values()):
            workspace.discard()
            raise UserError(
                f"{split}: found no label that counts in the loss, expected some: its documents have only parts with"
                ' "loss": false'
            )
        written = []
        for number, entry in shards.items():
            index = load_safetensors(workspace.shard_index(number, split).read_bytes())
            written.append(WrittenShard(Shard.model_validate(entry["shard"]), Index(**index)))
        folder = workspace.split(split)
        write_manifest(folder, vocabulary, written, has_mask=has_mask, tokenizer=tokenizer, lossy=lossy)
        lengths = np.concatenate([part.index.length for part in written]).astype(np.int64)
        reports[split] = {
            "fingerprint": sha256_of(workspace.split(split) / MANIFEST),
            "documents": len(lengths),
            "tokens": int(lengths.sum()),
            "characters": sum(entry["characters"] for entry in shards.values()),
            "padding": {str(length): _padding(lengths, length) for length in PADDING_AT},
        }
    return reports


def _padding(lengths: np.ndarray, segment_length: int) -> float:
    """Share of the positions that are padding, where every document begins a segment."""
    return float(1 - lengths.sum() / (-(-lengths // segment_length) * segment_length).sum())
