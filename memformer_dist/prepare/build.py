"""From text to a corpus, partition by partition, on many workers: encode, write, merge.

    shard(Path("corpora/books"), Path("books_4k.model"), ["books/train"], ["books/valid"], workers=8)

The inputs are cut into partitions before anything is read (partitions.py). What the tokenizer loses of a sample is found
first (loss.py). Workers then encode the partitions (encode.py), reading every byte of the inputs once; after that it is
known which documents are usable, and the validation documents are chosen. Then the workers write the shards: for each
partition at most one in either split, which bears the partition's number. So no shard depends on what another worker
does, and the corpus is the same bytes for any number of workers.

Until the corpus is whole, everything lies in CORPUS.partial (workspace.py). An interrupted run resumes with the
partitions that are not finished.
"""

import json
import math
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, TypeVar

from tqdm import tqdm
from typing_extensions import NotRequired

from memformer_dist.data.format import read_split, wrong_size
from memformer_dist.errors import UserError
from memformer_dist.files import expect_writable
from memformer_dist.prepare.documents import Place, shown_places
from memformer_dist.prepare.encode import (
    QUARANTINE,
    Encoded,
    EncodeTask,
    ShardRecord,
    WriteTask,
    already_encoded,
    encode_partition,
    finished_record,
    usable_documents,
    write_partition,
)
from memformer_dist.prepare.loss import Loss, compare
from memformer_dist.prepare.partitions import Ignored, Partition, cut_partitions, describe_ignored, discover
from memformer_dist.prepare.pool import Pool, open_pool
from memformer_dist.prepare.splits import SplitReport, held_out_documents, merge
from memformer_dist.prepare.workspace import RECIPE_VERSION, RECORD, ListedFile, Recipe, Workspace, is_empty, listed
from memformer_dist.tokenizer import SENTENCEPIECE, Tokenizer, open_tokenizer, vocabulary
from memformer_dist.vocabulary import Vocabulary

Task = TypeVar("Task", EncodeTask, WriteTask)
Result = TypeVar("Result")


class Report(TypedDict):
    """What the corpus holds and what was left out."""

    splits: dict[str, SplitReport]
    empty: int  # documents
    unreadable: int  # documents, listed in quarantine.jsonl
    ignored: int  # files in folders, listed in ignored.jsonl
    lost: NotRequired[int]  # files of which no document could be read, if any
    loss: NotRequired[dict[str, object]]  # what the tokenizer loses of a sample, if anything (loss.py)


def shard(
    output: Path,
    tokenizer: Path,
    inputs: Sequence[str | Path],
    valid_inputs: Sequence[str | Path] = (),
    *,
    exclude: Sequence[str] = (),
    valid_fraction: float = 0.05,
    seed: int = 0,
    partition_mib: float = 64,
    workers: int = 1,
    strict: bool = False,
    overwrite: bool = False,
    text_field: str | None = None,
    lossy: bool = False,
    bos: str | None = None,
    eos: str | None = None,
) -> Report | None:
    """Make the corpus, or find it already made -> its report; under MPI in rank 0, and None in the others.

    The result does not depend on `workers`, nor on MPI. Raises UserError for what a user can put right; the partitions
    that are finished by then stay in CORPUS.partial.
    """
    with open_pool(workers) as pool:
        if pool is None:  # another rank: it has worked for rank 0
            return None
        _check_options(valid_fraction, seed, partition_mib)
        workspace = Workspace.of(output)
        workspace.restore()
        there_already = is_corpus(workspace.output)
        if not there_already or overwrite:
            expect_writable(workspace.lock, "--output")
        opened = open_tokenizer(tokenizer)
        meaning = vocabulary(opened, bos, eos)
        sources, ignored = list_sources(inputs, valid_inputs, exclude, max(1, int(partition_mib * 2**20)), text_field)
        recipe = Recipe(
            version=RECIPE_VERSION,
            tokenizer_sha256=meaning.tokenizer_sha256,
            inputs=_listing(sources, held_out=False),
            valid_inputs=_listing(sources, held_out=True),
            valid_fraction=valid_fraction,
            seed=seed,
            partition_mib=partition_mib,
            text_field=text_field,
            bos_and_eos=unless_its_own(opened, meaning),
        )
        if ignored:
            print(describe_ignored(ignored), file=sys.stderr)
        if there_already and not overwrite:
            report = existing_report(workspace.output, recipe, strict, lossy)
            workspace.remove_leftover()
        else:
            if recipe.bos_and_eos is not None:
                print(describe_special(opened, meaning), file=sys.stderr)
            loss = compare([source.partition for source in sources], opened, text_field)
            loss.accept(tokenizer, lossy)
            with workspace.locked():
                report = Build(workspace, recipe, meaning, opened, sources, ignored, strict, loss).run(pool)
        warn_of_one_document(report)
        return report


def warn_of_one_document(report: Report) -> None:
    """Say what a validation split of one document cannot tell."""
    valid = report["splits"].get("valid")
    if valid is not None and valid["documents"] == 1:
        print(
            "warning: the validation split has one document. It is read by one lane, however many there are, and there"
            " is no other document whose memory could be tried in its place: that figure of an evaluation will be n/a."
            " Give more with --valid-input, or raise --valid-fraction",
            file=sys.stderr,
        )


def _check_options(valid_fraction: float, seed: int, partition_mib: float) -> None:
    problems = []
    if not 0 <= valid_fraction < 1:
        problems.append(f"--valid-fraction {valid_fraction}: expected at least 0 and less than 1")
    if seed < 0:
        problems.append(f"--seed {seed}: expected 0 or more")
    if not 0 < partition_mib < math.inf:
        problems.append(f"--partition-mib {partition_mib}: expected more than 0")
    if problems:
        raise UserError("\n".join(problems))


def is_corpus(output: Path) -> bool:
    """Whether there is a corpus, rather than nothing. Raises UserError where something else is there."""
    if (output / RECORD).exists():
        return True
    if output.exists() and not (output.is_dir() and is_empty(output)):
        raise UserError(f"--output: {output} exists and is not a corpus; it is not overwritten")
    return False


def unless_its_own(tokenizer: Tokenizer, vocabulary: Vocabulary) -> list[int] | None:
    """The ids of BOS and EOS; None where they are those that a SentencePiece model itself has, which its hash stands for."""
    chosen = [vocabulary.bos_id, vocabulary.eos_id]
    own = [tokenizer.bos_id, tokenizer.eos_id]
    return None if tokenizer.file_name == SENTENCEPIECE and chosen == own else chosen


def describe_special(tokenizer: Tokenizer, vocabulary: Vocabulary) -> str:
    bos, eos = (f"{token} {tokenizer.piece(token)!r}" for token in (vocabulary.bos_id, vocabulary.eos_id))
    return f"BOS is token {bos}, EOS is token {eos}; --bos and --eos name others"


def existing_report(output: Path, recipe: Recipe, strict: bool, lossy: bool = False) -> Report:
    """The report of an existing corpus. Raises UserError where it was made by another recipe or is damaged."""
    try:
        record = json.loads((output / RECORD).read_text())
        report: Report = record["report"]
        unreadable = report["unreadable"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{output / RECORD}: is damaged; --overwrite makes the corpus again") from None
    if differences := recipe.differences(record):
        raise UserError(f"--output: {output} exists, with other {', '.join(differences)}; --overwrite replaces it")
    if strict and unreadable:
        raise UserError(
            f"--strict: {unreadable} documents could not be read when the corpus was made: {output}/quarantine.jsonl"
        )
    if not lossy and "loss" in report:
        raise UserError(
            f"--tokenizer: {output} was made with --lossy: the tokenizer loses text, see the field loss in {output / RECORD};"
            " --lossy keeps the corpus"
        )
    for split in report["splits"]:
        for entry in read_split(output / split).manifest.shards:
            if problem := wrong_size(output / split, entry):
                raise UserError(problem)
    print(f"{output} exists already, made of the same files with the same settings")
    return report


# ------------------------------------------------------------------------------------------------------------- sources


class Source(NamedTuple):
    partition: Partition
    held_out: bool  # from --valid-input


def list_sources(
    inputs: Sequence[str | Path],
    valid_inputs: Sequence[str | Path],
    exclude: Sequence[str],
    partition_bytes: int,
    text_field: str | None = None,
) -> tuple[list[Source], list[Ignored]]:
    """The partitions in the order of the corpus, and the files in folders that are not read."""
    files, ignored = discover(inputs, exclude, text_field)
    valid_files, valid_ignored = discover(valid_inputs, exclude, text_field)
    if both := {file.path for file in files} & {file.path for file in valid_files}:
        raise UserError(f"--valid-input: {min(both)} is among the files of --input too")
    sources = [Source(partition, held_out=False) for partition in cut_partitions(files, partition_bytes)]
    sources += [Source(partition, held_out=True) for partition in cut_partitions(valid_files, partition_bytes)]
    return sources, ignored + valid_ignored


def _listing(sources: Sequence[Source], held_out: bool) -> list[ListedFile]:
    pieces = [piece for source in sources if source.held_out == held_out for piece in source.partition.pieces]
    return [listed(file) for file in dict.fromkeys(piece.file for piece in pieces)]


# ----------------------------------------------------------------------------------------------------- encode and write


@dataclass(frozen=True)
class Build:
    """A corpus that is to be made in a locked workspace."""

    workspace: Workspace
    recipe: Recipe
    vocabulary: Vocabulary
    tokenizer: Tokenizer
    sources: Sequence[Source]
    ignored: Sequence[Ignored]
    strict: bool
    loss: Loss

    def run(self, pool: Pool) -> Report:
        """Raises UserError where nothing can be made of the documents, or one cannot be read and `strict` is set."""
        tasks = [self._encode_task(number, source.partition) for number, source in enumerate(self.sources)]
        self.workspace.begin(self.recipe, self.tokenizer, encoded={task.stem.name for task in tasks})
        encoded = self._work(pool, "tokenising", encode_partition, tasks, already_encoded)
        unreadable = sum(partition.unreadable for partition in encoded)
        lost = lost_files(tasks, encoded)
        self._show_unreadable(unreadable, lost, quarantine(tasks, encoded))
        valid = held_out_documents(
            [source.held_out for source in self.sources],
            [usable_documents(task.stem) for task in tasks],
            unreadable,
            self.recipe.valid_fraction,
            self.recipe.seed,
        )
        has_mask = any(partition.masked for partition in encoded)
        write_tasks = [
            WriteTask(task.number, self.workspace, task.stem, held_out, self.vocabulary, has_mask)
            for task, held_out in zip(tasks, valid, strict=True)
        ]
        records = self._work(pool, "writing", write_partition, write_tasks, finished_record)
        splits = self._merge(has_mask, records)
        documents = sum(partition.documents for partition in encoded)
        report: Report = {
            "splits": splits,
            "empty": documents - unreadable - sum(split["documents"] for split in splits.values()),
            "unreadable": unreadable,
            "ignored": len(self.ignored),
        }
        if lost:
            report["lost"] = len(lost)
        if self.loss.documents:
            report["loss"] = self.loss.record()
        ignored = ({"file": name, "reason": reason} for name, reason in self.ignored)
        self.workspace.finish(self.recipe, dict(report), quarantine(tasks, encoded), ignored)
        return report

    def _encode_task(self, number: int, partition: Partition) -> EncodeTask:
        text_field = self.recipe.text_field
        stem = self.workspace.stem(partition, self.vocabulary.tokenizer_sha256, text_field)
        tokenizer = self.workspace.tokenizer(self.tokenizer.file_name)
        return EncodeTask(number, self.workspace, stem, partition, self.vocabulary, tokenizer, text_field)

    def _merge(self, has_mask: bool, records: Sequence[dict[str, ShardRecord]]) -> dict[str, SplitReport]:
        name, lossy = self.tokenizer.file_name, self.loss.documents > 0
        return merge(self.workspace, self.vocabulary, has_mask, records, tokenizer=name, lossy=lossy)

    def _work(
        self,
        pool: Pool,
        verb: str,
        function: Callable[[Task], tuple[int, Result]],
        tasks: Sequence[Task],
        finished: Callable[[Task], Result | None],
    ) -> list[Result]:
        """The results of all tasks, in their order; what `finished` finds of an earlier run is not done again."""
        results = dict(enumerate(map(finished, tasks)))
        missing = [task for task in tasks if results[task.number] is None]
        sizes = [source.partition.bytes for source in self.sources]
        total, left = (sum(sizes[task.number] for task in some) for some in (tasks, missing))
        if len(missing) < len(tasks):
            print(
                f"{verb}: {len(tasks) - len(missing)} of {len(tasks)} partitions were finished by an earlier run",
                file=sys.stderr,
            )
        with tqdm(desc=verb, total=total, initial=total - left, unit="B", unit_scale=True, disable=None) as progress:
            for number, result in pool.run(function, missing):
                results[number] = result
                progress.update(sizes[number])
        return [result for result in results.values() if result is not None]

    def _show_unreadable(self, unreadable: int, lost: Collection[str], lines: Iterator[dict[str, Any]]) -> None:
        """Print the first documents that cannot be read, one per lost file; raise UserError with `strict`."""
        places = shown_places((Place(*line.values()) for line in lines), lost)
        for place in places:
            print(f"cannot read {place}", file=sys.stderr)
        if self.strict and unreadable:
            raise UserError(
                f"--strict: {unreadable} documents cannot be read, no corpus is made. {'; '.join(places)}. What could"
                f" be read is tokenised in {self.workspace.folder}: without --strict, or once these are corrected, the"
                " command resumes there"
            )


def quarantine(tasks: Sequence[EncodeTask], encoded: Sequence[Encoded]) -> Iterator[dict[str, Any]]:
    """The lines of quarantine.jsonl. Positions in a part of a file become positions in the file."""
    lines_before: dict[str, int] = {}  # by .jsonl file: its lines in the partitions so far
    for task, partition in zip(tasks, encoded, strict=True):
        piece = task.partition.pieces[-1]
        offset = lines_before.get(piece.file.name, 0)
        if piece.stop is not None:
            lines_before[piece.file.name] = offset + partition.lines
        if partition.unreadable:
            with open(task.stem.with_suffix(QUARANTINE), "rb") as file:
                for file_name, position, reason in map(json.loads, file):
                    yield {"file": file_name, "position": position + offset, "reason": reason}


def lost_files(tasks: Sequence[EncodeTask], encoded: Sequence[Encoded]) -> frozenset[str]:
    """The files of which no document could be read, in any of their parts."""
    lost: set[str] = set()
    kept: set[str] = set()
    for task, partition in zip(tasks, encoded, strict=True):
        lost.update(partition.lost)
        if partition.documents > partition.unreadable:
            kept.update(piece.file.name for piece in task.partition.pieces if piece.stop is not None)
    return frozenset(lost - kept)
