"""Write on from a prompt with a trained model, printing the text as it comes.

    python launch/generate.py --run-dir runs/small --prompt "It was a dark" --tokens 200 --save it.safetensors
    python launch/generate.py --run-dir runs/small --continue-from it.safetensors --temperature 0.6
    python launch/generate.py --run-dir runs/small/checkpoints/step-00002000 --prompt-file chapter.txt

A prompt may be as long as you like: it is read segment by segment into the memory. Stops at the end of the document
(EOS). The text goes to standard output, all else to standard error.
"""

import argparse
import hashlib
import sys
from pathlib import Path

import torch
from pydantic import ValidationError
from sentencepiece import SentencePieceProcessor

from memformer_dist.checkpoint import Checkpoint, open_one
from memformer_dist.errors import UserError, run_program
from memformer_dist.generate import Generation, Sampling, TextStream


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run-dir", type=Path, required=True, help="the run whose newest checkpoint writes, or a checkpoint"
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="how the document begins, or goes on")
    prompt.add_argument("--prompt-file", type=Path, help="the same from a file")
    parser.add_argument("--tokens", type=int, default=200, help="write at most this many")
    parser.add_argument("--temperature", type=float, default=0.8, help=Sampling.model_fields["temperature"].description)
    parser.add_argument("--top-k", type=int, help=Sampling.model_fields["top_k"].description)
    parser.add_argument("--top-p", type=float, default=1.0, help=Sampling.model_fields["top_p"].description)
    parser.add_argument("--seed", type=int, help="of the sampling; default 0, or where a continued document stopped")
    parser.add_argument("--save", type=Path, help="file to go on from later")
    parser.add_argument("--continue-from", type=Path, help="file written by --save, with the same weights")
    return parser.parse_args(arguments)


def read_prompt(options: argparse.Namespace) -> str:
    if options.prompt_file is None:
        return options.prompt or ""
    try:
        return options.prompt_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-file: found {error}, expected a text file in UTF-8")


def load_tokenizer(saved: Checkpoint) -> SentencePieceProcessor:
    """The tokenizer of the checkpoint's run. Raises UserError where it is not there or is another one."""
    path = saved.path.resolve().parent.parent / "tokenizer.model"
    try:
        model = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"--run-dir: found no {path}, expected the run's tokenizer in the folder that holds its checkpoints/"
        ) from None
    found, expected = hashlib.sha256(model).hexdigest(), saved.contents.vocabulary.tokenizer_sha256
    if found != expected:
        raise UserError(
            f"--run-dir: {path} is not the tokenizer that the model was trained with: found sha256 {found[:16]},"
            f" expected {expected[:16]}"
        )
    return SentencePieceProcessor(model_proto=model)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    try:
        sampling = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    except ValidationError as error:
        problems = [(item["loc"][0].replace("_", "-"), item["input"], item["msg"]) for item in error.errors()]
        raise UserError("\n".join(f"--{option}: found {found}; {message}" for option, found, message in problems))
    if options.save is not None and not options.save.parent.is_dir():
        raise UserError(f"--save: found no directory {options.save.parent}")
    prompt = read_prompt(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    saved = open_one(options.run_dir)
    tokenizer = load_tokenizer(saved)
    cell = saved.cell(device)

    if options.continue_from is None:
        generation = Generation(cell, eos_id=tokenizer.eos_id())
    else:
        generation = Generation.load(options.continue_from, cell, eos_id=tokenizer.eos_id())
        if generation.ended[0]:
            raise UserError(f"--continue-from: {options.continue_from} holds a document that has ended")
    if options.seed is not None:
        generation.generator.manual_seed(options.seed)
    stream = TextStream(tokenizer)
    for token in generation.history[0]:  # in case it was saved in the middle of a character
        stream.push(token)
    read = tokenizer.encode(prompt)
    generation.feed([read])
    if not generation.history[0]:
        raise UserError("--prompt: found no text, expected some: a model is never taught how documents begin")

    print("".join(map(stream.push, read)), end="", flush=True)
    for (token,) in generation.sample(options.tokens, sampling):
        if token is not None:
            print(stream.push(token), end="", flush=True)
    if options.save is not None:
        generation.save(options.save)
        print()  # and nothing of a character whose last bytes may come when the document goes on
    else:
        print(stream.finish())
    if generation.ended[0]:
        print("(the document has ended)", file=sys.stderr)


if __name__ == "__main__":
    run_program(main)
