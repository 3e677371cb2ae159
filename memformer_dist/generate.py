"""Sample documents from a trained cell, several at once, each of its own length.

    generation = Generation(cell, eos_id=2)
    generation.feed([prompt])                                   # token ids, as many as you like
    for (token,) in generation.sample(100, Sampling(top_p=0.9)):
        ...                                                     # None once the document has ended

A document is fed tokens in any portions (a prompt, then what was sampled) and is cut into segments as in training.
Documents reach the end of a segment at different times; the lanes that do are taken out of the batch (index_select),
closed, opened for the next segment and put back. So no lane is ever padded, and every document gets the numbers that it
would get alone.

A saved generation is one safetensors file: the cell's cache (the state and the unfinished segment), the logits from
which the next token is sampled, the tokens so far and the random state. It continues exactly where it stopped, with the
weights that made it.

A model is never trained to predict a document's first token (there is no BOS in the data), so a document starts with
a prompt.
"""

import itertools
import json
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveInt
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from typing_extensions import Self

from memformer_dist.cells.base import Cache, RecurrentCell
from memformer_dist.errors import UserError
from memformer_dist.files import named_in_utf8, write_bytes

VERSION = 1


class Sampling(BaseModel, extra="forbid", frozen=True):
    """How the next token is chosen."""

    temperature: NonNegativeFloat = Field(1.0, description="divides the logits; 0: always the likeliest token")
    top_k: PositiveInt | None = Field(None, description="sample among the k likeliest tokens")
    top_p: float = Field(
        1.0, gt=0, le=1, description="sample among the likeliest tokens that together reach this probability"
    )

    def choose(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """logits [documents, vocabulary] -> int64 [documents]. top_p applies to what temperature and top_k leave."""
        if self.temperature == 0:
            return logits.argmax(-1)
        ranked, tokens = (logits / self.temperature).sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            ranked[:, self.top_k :] = -torch.inf
        probabilities = ranked.softmax(-1)
        probabilities[probabilities.cumsum(-1) - probabilities >= self.top_p] = 0  # the token that crosses top_p stays
        return tokens.gather(-1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(-1)


class Generation:
    """Documents in the making: `history`, the tokens of each, and `ended`, whether it has reached its EOS.

    The EOS is not part of the history.
    """

    def __init__(self, cell: RecurrentCell, *, eos_id: int, documents: int = 1, seed: int = 0):
        self.cell, self.eos_id = cell.eval(), eos_id
        self.device = next(cell.parameters()).device
        self.history: list[list[int]] = [[] for _ in range(documents)]
        self.ended = [False] * documents
        self.logits = torch.zeros(documents, cell.vocab_size)  # of each document's next token, on the CPU
        self.generator = torch.Generator().manual_seed(seed)
        self.used = [0] * documents  # tokens in the open segment; the cache has them too, on the device
        self.cache = cell.open(cell.empty_state(documents), torch.ones(documents, dtype=torch.bool, device=self.device))

    def feed(self, tokens: Sequence[Sequence[int]]) -> None:
        """Append to each document its tokens, any number of them."""
        pending = [list(queue) for queue in tokens]
        size = self.cell.segment_length
        while any(pending):
            waiting = [document for document, queue in enumerate(pending) if queue]
            if full := [document for document in waiting if self.used[document] == size]:
                self._on_lanes(full, self._next_segment)
                for document in full:
                    self.used[document] = 0
            groups = defaultdict(list)
            for document in waiting:
                groups[min(len(pending[document]), size - self.used[document])].append(document)
            for count, documents in groups.items():
                block = [pending[document][:count] for document in documents]
                logits = self._on_lanes(documents, self.cell.extend, torch.tensor(block, device=self.device))
                self.logits[documents] = logits[:, -1].float().cpu()
                for document, taken in zip(documents, block, strict=True):
                    self.history[document] += taken
                    self.used[document] += count
                    del pending[document][:count]

    def sample(self, count: int, sampling: Sampling) -> Iterator[list[int | None]]:
        """Sample up to `count` tokens per document. Yields the token of every document, None for one that has ended.

        Raises UserError if a document has no tokens yet.
        """
        if not all(self.history):
            raise UserError("a document has no tokens, expected at least one: models do not learn how documents begin")
        for _ in range(count):
            if all(self.ended):
                return
            chosen = sampling.choose(self.logits, self.generator).tolist()
            self.ended = [ended or token == self.eos_id for ended, token in zip(self.ended, chosen, strict=True)]
            self.feed([[] if ended else [token] for ended, token in zip(self.ended, chosen, strict=True)])
            yield [None if ended else token for ended, token in zip(self.ended, chosen, strict=True)]

    def _next_segment(self, cache: Cache) -> tuple[None, Cache]:
        state = self.cell.close(cache)
        return None, self.cell.open(state, torch.zeros(len(state[0]), dtype=torch.bool, device=self.device))

    def _on_lanes(self, documents: list[int], function: Callable, *arguments: Any) -> Any:
        """Run function(*arguments, cache) -> (result, cache) on the lanes of some documents alone."""
        if len(documents) == len(self.history):
            result, self.cache = function(*arguments, self.cache)
            return result
        lanes = torch.tensor(documents, device=self.device)
        result, part = function(*arguments, map_leaves(lambda leaf: leaf.index_select(0, lanes), self.cache))
        self.cache = map_leaves(lambda leaf, rows: leaf.index_copy(0, lanes, rows), self.cache, part)
        return result

    def save(self, path: Path) -> None:
        """Write everything that is needed to continue, except the weights."""
        tensors = {f"cache.{number}": leaf.contiguous() for number, leaf in enumerate(leaves(self.cache))}
        tensors["logits"] = self.logits
        tensors["history"] = torch.tensor([token for tokens in self.history for token in tokens], dtype=torch.int64)
        tensors["random_state"] = self.generator.get_state()
        about = {
            "version": VERSION,
            "model": checksum(self.cell),
            "lengths": [len(tokens) for tokens in self.history],
            "used": self.used,
            "ended": self.ended,
        }
        write_bytes(path, save(tensors, {"generation": json.dumps(about)}))

    @classmethod
    def load(cls, path: Path, cell: RecurrentCell, *, eos_id: int) -> Self:
        """Continue a saved generation. Raises UserError if `path` is none, or was made by other weights."""
        try:
            with named_in_utf8(path) as name, safe_open(name, "pt") as file:
                about = json.loads((file.metadata() or {}).get("generation", "{}"))
                # Cloned, because they are views of the file, which then stays mapped. SIM118: `file` is no dict.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: found no saved generation: {error}") from None
        if about.get("version") != VERSION:
            raise UserError(f"{path}: found version {about.get('version')}, expected a generation of version {VERSION}")
        if about["model"] != checksum(cell):
            raise UserError(f"{path}: was made by other weights, expected a generation of the model in --run-dir")
        generation = cls(cell, eos_id=eos_id, documents=len(about["lengths"]))
        number = itertools.count()
        generation.cache = map_leaves(lambda leaf: tensors[f"cache.{next(number)}"].to(leaf.device), generation.cache)
        generation.logits = tensors["logits"]
        generation.generator.set_state(tensors["random_state"])
        generation.history = [tokens.tolist() for tokens in tensors["history"].split(about["lengths"])]
        generation.used, generation.ended = about["used"], about["ended"]
        return generation


def map_leaves(function: Callable, *caches: Any) -> Any:
    """Apply a function to corresponding tensors of caches: NamedTuples of tensors or of further NamedTuples."""
    if isinstance(caches[0], Tensor):
        return function(*caches)
    return caches[0]._make(map_leaves(function, *parts) for parts in zip(*caches, strict=True))


def leaves(cache: Cache) -> list[Tensor]:
    """The tensors of a cache, depth first."""
    found: list[Tensor] = []
    map_leaves(found.append, cache)
    return found


def checksum(cell: RecurrentCell) -> int:
    """crc32 of the weights and the segment length: the meaning of a cache depends on both."""
    result = cell.segment_length
    for weight in cell.state_dict().values():
        result = zlib.crc32(weight.cpu().flatten().view(torch.uint8).numpy(), result)
    return result
