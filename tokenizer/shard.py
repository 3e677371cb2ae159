"""Turn text into a corpus: token shards with a train and a validation split.

    python tokenizer/shard.py --input my_texts/ --tokenizer tokenizer_8k.model --output corpora/my_texts

Inputs are folders, globs and files of text, source code or JSON lines, also gzipped; memformer_dist/data/documents.py
says how they are read. The files are read twice: first to count the documents and find those that cannot be used, then
to tokenise them, a batch at a time. The validation documents are a seeded choice of the usable ones, or those of
--valid-input; training needs some, so a single document is an error unless --valid-fraction 0 asks for no validation.

Documents that cannot be read are listed in quarantine.jsonl. The corpus appears under its name when it is whole. One
that is there already is kept if it was made of the same files with the same settings (sharding.json), and is an error
otherwise.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple, Sequence

import numpy as np
from sentencepiece import SentencePieceProcessor, SetMinLogLevel
from tqdm import tqdm

from memformer_dist.data.corpus import Corpus
from memformer_dist.data.documents import Document, discover, read_documents
from memformer_dist.data.shards import SHARD_TOKENS, Facts, SplitWriter
from memformer_dist.errors import UserError

RECORD = "sharding.json"
BATCH_CHARACTERS = 4_000_000
PADDING_AT = (128, 512)  # segment lengths for which the report gives the share of padding


def shard(
    output: Path,
    tokenizer: Path,
    inputs: Sequence[str],
    valid_inputs: Sequence[str] = (),
    *,
    exclude: Sequence[str] = (),
    valid_fraction: float = 0.05,
    seed: int = 0,
    shard_tokens: int = SHARD_TOKENS,
    threads: int = 1,
    overwrite: bool = False,
) -> dict:
    """Write the corpus, or find it already there; returns the report. The result does not depend on `threads`."""
    if not 0 <= valid_fraction < 1:
        raise UserError(f"--valid-fraction {valid_fraction}: expected at least 0 and less than 1")
    model, model_sha256 = load_tokenizer(tokenizer)
    files, ignored = discover(inputs, exclude)
    valid_files, valid_ignored = discover(valid_inputs, exclude)
    if both := {*map(os.path.realpath, files)} & {*map(os.path.realpath, valid_files)}:
        raise UserError(f"--valid-input: {min(both)} is among the files of --input too")
    recipe = {
        "tokenizer_sha256": model_sha256,
        "inputs": _listing(files),
        "valid_inputs": _listing(valid_files),
        "valid_fraction": valid_fraction,
        "seed": seed,
        "shard_tokens": shard_tokens,
    }
    if (output / RECORD).exists():
        if not overwrite:
            return find_existing(output, recipe)
    elif output.exists() and any(output.iterdir()):
        raise UserError(f"--output: {output} is there and is no corpus; it is not overwritten")

    found = survey(files, valid_files)
    for document in found.unreadable[:5]:
        line = f", line {document.position}" if document.position else ""
        print(f"cannot read {document.source}{line}: {document.unreadable}", file=sys.stderr)
    valid = found.held_out if valid_files else choose_validation(found.usable, valid_fraction, seed)
    for option, chosen in ("--input", ~found.held_out), ("--valid-input", found.held_out):
        if (option == "--input" or valid_files) and not np.any(found.usable & chosen):
            raise UserError(
                f"{option}: no usable document; {found.empty} are empty, {len(found.unreadable)} unreadable"
            )
    if not valid_files and valid_fraction > 0 and not np.any(valid):
        raise UserError(
            f"--input: found one usable document ({found.empty} are empty, {len(found.unreadable)} unreadable) and"
            " documents are held out whole, so none can be; give others with --valid-input, or a second document"
            " (one book in two files will do); --valid-fraction 0 writes no validation split, which training needs"
        )

    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an interrupted run
    try:
        settings = dict(
            vocab_size=model.vocab_size(),
            bos_id=model.bos_id(),
            eos_id=model.eos_id(),
            tokenizer_sha256=model_sha256,
            has_mask=found.has_mask,
        )
        splits = write_splits(partial, files + valid_files, found, valid, model, threads, settings, shard_tokens)
        shutil.copyfile(tokenizer, partial / "tokenizer.model")
        with open(partial / "quarantine.jsonl", "w") as file:
            for document in found.unreadable:
                line = {"file": document.source, "position": document.position, "reason": document.unreadable}
                file.write(json.dumps(line) + "\n")
        empty = len(found.usable) - len(found.unreadable) - sum(split["documents"] for split in splits.values())
        report = {
            "splits": splits,
            "empty": empty,
            "unreadable": len(found.unreadable),
            "ignored": ignored + valid_ignored,
        }
        (partial / RECORD).write_text(json.dumps(recipe | {"report": report}, indent=1) + "\n")
        if output.exists():
            shutil.rmtree(output)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return report


def load_tokenizer(path: Path) -> tuple[SentencePieceProcessor, str]:
    """The model and the sha256 of its file."""
    SetMinLogLevel(2)  # errors arrive as exceptions
    try:
        raw = path.read_bytes()
        model = SentencePieceProcessor(model_proto=raw)
    except (OSError, RuntimeError) as error:
        raise UserError(f"--tokenizer: cannot load {path}: {error}") from None
    if min(model.bos_id(), model.eos_id()) < 0:
        raise UserError(f"--tokenizer: {path} has no BOS or no EOS token; train it with tokenizer/train.py")
    return model, hashlib.sha256(raw).hexdigest()


def find_existing(output: Path, recipe: dict) -> dict:
    """The report of the corpus at `output`. Raises UserError if it was made by another recipe or is damaged."""
    record = json.loads((output / RECORD).read_text())
    if differing := [name for name in recipe if record[name] != recipe[name]]:
        raise UserError(f"--output: {output} is there, with other {', '.join(differing)}; --overwrite replaces it")
    for split in record["report"]["splits"]:
        Corpus.open(output / split)
    print(f"{output} is there already, made of the same files with the same settings")
    return record["report"]


class Survey(NamedTuple):
    """What a first reading of the files finds. Arrays are bool [documents], in the order of reading."""

    usable: np.ndarray
    held_out: np.ndarray  # from --valid-input
    characters: int
    empty: int
    unreadable: list[Document]
    has_mask: bool


def survey(files: Sequence[Path], valid_files: Sequence[Path]) -> Survey:
    usable, held_out, characters, unreadable, has_mask = [], [], 0, [], False
    with tqdm(desc="reading", unit=" documents", disable=None) as progress:
        for group in files, valid_files:
            for document in read_documents(group):
                size = len(document.text)
                usable.append(size > 0)
                held_out.append(group is valid_files)
                characters += size
                if document.unreadable:
                    unreadable.append(document)
                has_mask |= not all(part.loss for part in document.parts)
                progress.update()
    empty = len(usable) - sum(usable) - len(unreadable)
    return Survey(np.array(usable, bool), np.array(held_out, bool), characters, empty, unreadable, has_mask)


def choose_validation(usable: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """bool [documents]: a seeded choice among the usable ones; of two or more, at least one for either split."""
    candidates = np.flatnonzero(usable)
    number = 0
    if fraction > 0 and len(candidates) > 1:
        number = min(max(round(fraction * len(candidates)), 1), len(candidates) - 1)
    chosen = np.zeros(len(usable), bool)
    chosen[np.random.Generator(np.random.PCG64(seed)).permutation(candidates)[:number]] = True
    return chosen


def write_splits(
    folder: Path,
    files: Sequence[Path],
    found: Survey,
    valid: np.ndarray,  # bool [documents]
    model: SentencePieceProcessor,
    threads: int,
    settings: dict,  # of SplitWriter
    shard_tokens: int,
) -> dict[str, dict]:
    """Tokenise the usable documents into folder/train and folder/valid; returns the figures of the splits."""
    split_of = np.where(valid, "valid", "train")[found.usable]
    writers = {split: SplitWriter(folder / split, Facts(**settings), shard_tokens=shard_tokens) for split in np.unique(split_of).tolist()}
    characters, labels = dict.fromkeys(writers, 0), dict.fromkeys(writers, 0)
    usable = (document for document, use in zip(read_documents(files), found.usable, strict=True) if use)
    with tqdm(desc="tokenising", total=found.characters, unit=" characters", unit_scale=True, disable=None) as progress:
        for split, (document, tokens, mask) in zip(split_of.tolist(), tokenise(usable, model, threads)):
            if len(tokens):  # a tokenizer from elsewhere may make nothing of blanks
                writers[split].add(tokens, mask if found.has_mask else None)
            characters[split] += len(document.text)
            labels[split] += int(mask.sum())
            progress.update(len(document.text))
    figures = {}
    for split, writer in writers.items():
        if not labels[split]:
            raise UserError(
                f"{split}: found no label that counts in the loss, expected some: its documents have only parts with"
                ' "loss": false'
            )
        writer.close()
        lengths = Corpus.open(writer.path).lengths
        padding = {str(length): 1 - lengths.sum() / (-(-lengths // length) * length).sum() for length in PADDING_AT}
        figures[split] = {
            "documents": len(lengths),
            "tokens": int(lengths.sum()),
            "characters": characters[split],
            "padding": padding,
        }
    return figures


def tokenise(
    documents: Iterable[Document], model: SentencePieceProcessor, threads: int
) -> Iterator[tuple[Document, np.ndarray, np.ndarray]]:
    """Each document with its tokens int32 [n] and mask uint8 [n]. The parts of a document are encoded one by one."""
    for batch in _batches(documents):
        texts = [part.text for document in batch for part in document.parts]
        encoded = iter(model.encode(texts, out_type="numpy", num_threads=threads))
        for document in batch:
            pieces = [next(encoded) for _ in document.parts]
            learnt = np.concatenate([np.full(len(piece), part.loss) for piece, part in zip(pieces, document.parts)])
            # Label i is token i + 1; the last label, EOS, belongs to the part that ends the document.
            mask = np.append(learnt[1:], document.parts[-1].loss).astype(np.uint8)
            yield document, np.concatenate(pieces), mask


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _listing(files: Sequence[Path]) -> list[list]:
    """[absolute path, size, time of the last change in ns] of each file."""
    return [[os.path.abspath(path), (status := path.stat()).st_size, status.st_mtime_ns] for path in files]


def _describe(report: dict) -> str:
    titles = ["", "documents", "tokens", "characters/token", *(f"padding at {length}" for length in PADDING_AT)]
    rows = [titles]
    for split, figures in report["splits"].items():
        ratio = figures["characters"] / figures["tokens"]
        padding = [f"{share:.1%}" for share in figures["padding"].values()]
        rows.append([split, f"{figures['documents']:,}", f"{figures['tokens']:,}", f"{ratio:.2f}", *padding])
    table = "\n".join("  ".join(f"{cell:>{len(title) or 5}}" for cell, title in zip(row, titles)) for row in rows)
    return (
        f"{table}\nleft out: {report['empty']:,} empty documents, {report['unreadable']:,} unreadable "
        f"(quarantine.jsonl), {report['ignored']:,} files in folders that are not text by their suffix"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="CORPUS", help="the folder to make")
    add("--tokenizer", type=Path, required=True, metavar="MODEL", help="a SentencePiece model, see tokenizer/train.py")
    add("--input", nargs="+", required=True, help="folders, globs and files")
    add(
        "--exclude", nargs="+", default=[], metavar="PATTERN", help="names of files and folders to pass over in folders"
    )
    add("--valid-input", nargs="+", default=[], help="the validation documents, instead of a share of the input")
    add("--valid-fraction", type=float, default=0.05, help="share of the documents for validation (0.05)")
    add("--seed", type=int, default=0, help="of the choice of the validation documents")
    add("--shard-tokens", type=int, default=SHARD_TOKENS, help="size of a shard (100 million tokens)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="for tokenising (all cores)")
    add("--overwrite", action="store_true", help="replace a corpus made of other files or with other settings")
    options = vars(parser.parse_args())

    begin = time.perf_counter()
    report = shard(inputs=options.pop("input"), valid_inputs=options.pop("valid_input"), **options)
    print(f"{options['output']}, {time.perf_counter() - begin:.1f} s\n{_describe(report)}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
