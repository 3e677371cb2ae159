"""Continue a prompt with a trained model, and print the text as it is written.

    python launch/generate.py --run-dir runs/small --prompt "It was a dark" --tokens 200 --save it.safetensors
    python launch/generate.py --run-dir runs/small --continue-from it.safetensors --temperature 0.6
    python launch/generate.py --run-dir runs/small --checkpoint best --prompt-file chapter.txt
    zcat chapter.txt.gz | python launch/generate.py --run-dir runs/small --prompt-file - > continued.txt
    memformer-generate --run-dir runs/small --prompt "It was a dark"              # installed

A prompt may be of any length: it is read segment by segment into the memory, and standard error says how far, if that
takes more than a few seconds. It is UTF-8 and is kept as it is, like the text of a corpus: "\\r\\n" stays "\\r\\n".

The text stops at the end of the document (EOS). It goes to standard output, everything else to standard error. On a
terminal |> stands between the prompt and its continuation; a pipe or file gets the text alone, in UTF-8. Ctrl-C ends it
after the token at hand; what is written by then is saved.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from memformer_dist import logs, signals
from memformer_dist.cells.base import RecurrentCell
from memformer_dist.checkpoint import NEWEST, WHICH, Checkpoint, open_one
from memformer_dist.commands.options import (
    Options,
    file_to_read,
    integer,
    nonempty_path,
    nonempty_path_or_url,
    not_writable,
    number,
)
from memformer_dist.errors import Stopped, UserError, run_program
from memformer_dist.generate import Generation, Sampling
from memformer_dist.logs import ProgressReport
from memformer_dist.places import is_unicode, text_option
from memformer_dist.tokenizer import TextStream, Tokenizer

NO_TEXT = "--prompt: found no text, expected some: models do not learn how documents begin"
MARK = "|>"  # between prompt and continuation, on a terminal
STANDARD_INPUT = "-"
LEAST_TEMPERATURE = 1e-6
SILENT_S = 2.0  # from when on the reading of a prompt is reported


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, Sampling]:
    """Raises UserError."""
    parser = Options(__doc__, check=_no_text_or_no_place)
    add, about = parser.add_argument, {name: field.description for name, field in Sampling.model_fields.items()}
    add("--run-dir", type=nonempty_path, required=True, help="a run, or one of its checkpoints")
    add("--checkpoint", type=nonempty_path_or_url, default=NEWEST, help=WHICH)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt",
        type=text_option,
        help="the beginning of the document, or more of a continued one; - is standard input",
    )
    prompt.add_argument(
        "--prompt-file",
        type=parser.collecting("--prompt-file", prompt_file),
        help="the same from a file; - is standard input",
    )
    add("--tokens", type=integer(), default=200, help="write at most this many (200)")
    add("--temperature", type=temperature, default=0.8, help=f"{about['temperature']} (0.8)")
    add("--top-k", type=integer(least=1), help=f"{about['top_k']} (all)")
    add("--top-p", type=number(above=0, most=1), default=1.0, help=f"{about['top_p']} (1)")
    add("--seed", type=integer(), help="of the sampling (0; a continued document also continues its random numbers)")
    add("--save", type=nonempty_path, help="file from which the document can be continued later")
    add("--continue-from", type=file_to_read, help="a file written by --save, with the same weights")
    options = parser.parse_args(arguments)
    return options, Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)


def _no_text_or_no_place(options: argparse.Namespace) -> Iterator[str]:
    if not (options.prompt or options.prompt_file or options.continue_from):
        yield NO_TEXT
    yield from not_writable("--save", options.save)


def prompt_file(words: str) -> Path:
    return Path(STANDARD_INPUT) if words == STANDARD_INPUT else file_to_read(words)


def temperature(words: str) -> float:
    """Logits that are divided by less are not finite any more."""
    value = number(least=0)(words)
    if 0 < value < LEAST_TEMPERATURE:
        raise ValueError(f"found {words}, expected 0 (the likeliest token), or at least {LEAST_TEMPERATURE:g}")
    return value


def main(arguments: list[str] | None = None) -> None:
    """Raises UserError."""
    options, sampling = parse(arguments)
    prompt = read_prompt(options)
    saved = open_one(options.run_dir, options.checkpoint)
    tokenizer = saved.tokenizer()
    cell = saved.cell(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    generation = begin(options, cell, saved)
    with signals.noting_the_end() as wish:
        try:
            write(generation, tokenizer, prompt, options, sampling, wish)
        except OSError:  # nobody reads the text any more, or it does not fit on the disk
            save(generation, options)
            raise
        is_saved = save(generation, options)
    if wish.number is not None:
        where = f"; --continue-from {options.save} continues" if is_saved else ""
        raise Stopped(f"stopped{where}", exit_code=128 + wish.number)
    if generation.ended[0]:
        print("(the document has ended)", file=sys.stderr)


def save(generation: Generation, options: argparse.Namespace) -> bool:
    """Write --save, where there is anything to save."""
    saved = options.save is not None and bool(generation.history[0])
    if saved:
        generation.save(options.save)
    return saved


def run() -> None:
    logs.start(0)
    run_program(main)


def read_prompt(options: argparse.Namespace) -> str:
    """The text as it is, like that of a document. Raises UserError where it is no text in UTF-8."""
    if options.prompt_file is None and options.prompt != STANDARD_INPUT:
        if not is_unicode(options.prompt or ""):
            raise UserError(f"--prompt: found {options.prompt!r}, expected text in UTF-8")
        return options.prompt or ""
    option = "--prompt" if options.prompt_file is None else "--prompt-file"
    from_stdin = options.prompt_file in (None, Path(STANDARD_INPUT))
    if from_stdin and sys.stdin is None:
        raise UserError(f"{option}: standard input is closed, expected text in UTF-8")
    try:
        raw = sys.stdin.buffer.read() if from_stdin else options.prompt_file.read_bytes()
        return raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        expected = "text in UTF-8 on standard input" if from_stdin else "a text file in UTF-8"
        raise UserError(f"{option}: found {error}, expected {expected}") from None


def begin(options: argparse.Namespace, cell: RecurrentCell, saved: Checkpoint) -> Generation:
    """A new document, or the one of --continue-from."""
    eos_id = saved.contents.vocabulary.eos_id
    if options.continue_from is None:
        generation = Generation(cell, eos_id=eos_id)
    else:
        generation = Generation.load(options.continue_from, cell, eos_id=eos_id)
        if generation.ended[0]:
            raise UserError(f"--continue-from: the document in {options.continue_from} has ended")
    if options.seed is not None:
        generation.generator.manual_seed(options.seed)
    return generation


def write(
    generation: Generation,
    tokenizer: Tokenizer,
    prompt: str,
    options: argparse.Namespace,
    sampling: Sampling,
    wish: signals.Wish,
) -> None:
    """Feed the prompt, then sample, printing both, until somebody wishes it to end."""
    stream = TextStream(tokenizer)
    for token in generation.history[0]:  # it may have been saved in the middle of a character
        stream.push(token)
    read = tokenizer.encode([prompt])[0].tolist() if prompt else []
    read = read[: feed(generation, read, wish)]
    if not generation.history[0] and wish.number is None:
        raise UserError(NO_TEXT)
    print("".join(map(stream.push, read)), end="", flush=True)
    if read and sys.stdout.isatty():
        print(stream.finish() + MARK, end="", flush=True)
    samples = generation.sample(options.tokens, sampling)  # lazy: a wish that has come already is honoured first
    while wish.number is None and (sampled := next(samples, None)) is not None:
        if sampled[0] is not None:
            print(stream.push(sampled[0]), end="", flush=True)
    # The last bytes of an unfinished character may come when a saved document is continued.
    print(stream.finish() if options.save is None else "")


def feed(
    generation: Generation, tokens: list[int], wish: signals.Wish, clock: Callable[[], float] = time.monotonic
) -> int:
    """Feed the tokens segment by segment, until somebody wishes it to end -> how many were fed.

    Args:
        clock: seconds that have passed, since any moment.
    """
    fed = 0
    progress = ProgressReport("prompt", total=len(tokens), unit="tokens", delay_s=SILENT_S, clock=clock)
    while fed < len(tokens) and wish.number is None:
        size = generation.cell.segment_length
        count = size - generation.used[0] or size
        generation.feed([tokens[fed : fed + count]])
        fed += min(count, len(tokens) - fed)
        progress.update(fed)
    progress.close()
    return fed


if __name__ == "__main__":
    run()
