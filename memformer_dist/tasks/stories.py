"""Stories: facts about persons, places and objects, scattered through any text, and where one of them is.

    ... the lamp was lit , and he  anna went to the kitchen .  opened the letter which had  anna took the apple .  come by
    the evening post ...                                                                      where is the apple ?  -> kitchen

In the manner of bAbI's first two questions (Weston et al., arXiv 1502.05698) in the setting of BABILong (arXiv 2406.10149):
"person" needs the last of one kind of facts, "object" two of them. Persons go to places, take objects and put them down;
an object is where its bearer is, or where it was put down. The facts of a document and their places are random; they
stand over the words of the text that would stand there, none of them in the last segment.

The text is read as bytes, or as its frequent words. The story's words are tokens in either case, so that every answer is
one token. A word that both have is one token, but for the persons: none of them is in the text.
"""

import re
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field, PositiveInt

from memformer_dist.errors import UserError
from memformer_dist.segment import IGNORE
from memformer_dist.tasks.base import Documents, Draws, Task, TaskConfig

PERSONS = ("anna", "boris", "clara", "david", "elena", "felix")
PLACES = ("attic", "bathroom", "cellar", "garden", "hallway", "kitchen", "office", "stable")
OBJECTS = ("apple", "book", "coin", "lamp")
MOVE, TAKE, DROP = range(3)
SENTENCES = ("{} went to the {} .", "{} took the {} .", "{} put down the {} .")
QUESTIONS = {"person": "where is {} ?", "object": "where is the {} ?"}
LONGEST = 6  # tokens of a sentence
OWN = (*PLACES, *PERSONS, *OBJECTS, "went", "to", "the", "took", "put", "down", ".", "where", "is", "?")
UNKNOWN = "<other>"
HELD_OUT_SHARE = 0.1  # of the text, its end


class StoriesConfig(TaskConfig):
    name: Literal["stories"] = Field("stories", description="facts in any text, and where somebody or something is")
    texts: list[str] = Field(
        min_length=1, description="text files, or folders of *.txt, that the facts are scattered through"
    )
    tokens: Literal["words", "bytes"] = Field("words", description="what the text is read as")
    words: PositiveInt = Field(
        2000, description="the text's most frequent words that are tokens; all others are one and the same token"
    )
    question: Literal["person", "object"] = Field(
        "person", description="where a person is, which takes one fact, or an object, which takes two"
    )
    facts: int = Field(6, ge=2, description="facts in a document; fewer in one too short for them")

    def build(self, segment_length: int, *, held_out: bool = False) -> "Stories":
        return Stories(self, segment_length, held_out)


class Stories(Task):
    def __init__(self, config: StoriesConfig, segment_length: int, held_out: bool):
        super().__init__(config.name, segment_length)
        self.config = config
        text = _read(tuple(config.texts), config.words if config.tokens == "words" else None)
        cut = int(len(text.ids) * (1 - HELD_OUT_SHARE))
        self.text = text.ids[cut:] if held_out else text.ids[:cut]
        self.names = text.names
        needed = 2 if config.question == "object" else 1
        self.least = 1 + -(-needed * LONGEST // segment_length)
        things = (PLACES, OBJECTS, OBJECTS)
        self._sentences = np.full((len(things), len(PERSONS), len(PLACES), LONGEST), -1)
        for kind, person, thing in np.ndindex(self._sentences.shape[:3]):
            if thing < len(things[kind]):
                words = _own(SENTENCES[kind], PERSONS[person], things[kind][thing])
                self._sentences[kind, person, thing, : len(words)] = words
        subjects = PERSONS if config.question == "person" else OBJECTS
        self._questions = np.array([_own(QUESTIONS[config.question], subject) for subject in subjects])

    def documents(self, keys: np.ndarray, segments: int) -> Documents:
        draws, length, room = Draws(keys), segments * self.segment_length, (segments - 1) * self.segment_length
        lanes = np.arange(len(keys))
        start = draws.integers(len(self.text), 1)
        tokens = self.text[(start + np.arange(length)) % len(self.text)].astype(np.int64)
        facts = min(self.config.facts, room // LONGEST)
        strip = room // facts  # each fact has one to lie in
        world = World.empty(len(keys))
        for number in range(facts):
            fact = world.happen(draws, has_taken=self.config.question == "object" and number == 1)
            sentence = self._sentences[fact]  # [B, LONGEST]
            at = number * strip + draws.integers(strip - LONGEST + 1, 1) + np.arange(LONGEST)
            tokens[lanes[:, None], at] = np.where(sentence < 0, tokens[lanes[:, None], at], sentence)
        places = world.places if self.config.question == "person" else world.object_places()
        subject = np.where(places >= 0, draws.bits(places.shape[1]) | np.uint64(1), np.uint64(0)).argmax(1)
        question = self._questions[subject]
        tokens[:, -question.shape[1] :] = question
        labels = np.full_like(tokens, IGNORE)
        labels[:, -1] = places[lanes, subject]  # the places are the first tokens
        return Documents(tokens, labels)


class World(NamedTuple):
    """Where everybody and everything is in B stories; -1: not known."""

    places: np.ndarray  # int64 [B, persons]: of each person
    bearers: np.ndarray  # int64 [B, objects]: who has an object; -1: nobody
    left_at: np.ndarray  # int64 [B, objects]: where an object was put down last

    @classmethod
    def empty(cls, stories: int) -> "World":
        return cls(*(np.full((stories, count), -1) for count in (len(PERSONS), len(OBJECTS), len(OBJECTS))))

    def object_places(self) -> np.ndarray:
        """int64 [B, objects]"""
        borne = np.take_along_axis(self.places, np.maximum(self.bearers, 0), axis=1)
        return np.where(self.bearers >= 0, borne, self.left_at)

    def happen(self, draws: Draws, *, has_taken: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One more fact in every story: its kind, person and thing, int64 [B] each.

        Args:
            has_taken: somebody who has moved takes something, so that some object's place is known.
        """
        rows = np.arange(len(self.places))
        kind, person, place, thing = (
            draws.integers(below, 1)[:, 0] for below in (3, len(PERSONS), len(PLACES), len(OBJECTS))
        )
        if has_taken:
            kind, person = np.full_like(kind, TAKE), (self.places >= 0).argmax(1)
        bearer = self.bearers[rows, thing]
        person = np.where((kind == DROP) & (bearer >= 0), bearer, person)
        here = self.places[rows, person]
        within_reach = (self.left_at[rows, thing] < 0) | (self.left_at[rows, thing] == here)
        takes = (kind == TAKE) & (here >= 0) & (bearer < 0) & within_reach
        drops = (kind == DROP) & (bearer >= 0)
        moves = ~takes & ~drops  # also who could not take or put down what was drawn
        self.places[rows[moves], person[moves]] = place[moves]
        self.bearers[rows[takes], thing[takes]] = person[takes]
        self.bearers[rows[drops], thing[drops]] = -1
        self.left_at[rows[drops], thing[drops]] = here[drops]
        kind = np.where(moves, MOVE, np.where(takes, TAKE, DROP))
        return kind, person, np.where(moves, place, thing)


def _own(sentence: str, *words: str) -> list[int]:
    return [OWN.index(word) for word in sentence.format(*words).split()]


class Text(NamedTuple):
    ids: np.ndarray  # int32 [tokens]
    names: list[str]  # of all tokens, the story's first


@lru_cache(maxsize=4)
def _read(paths: tuple[str, ...], words: int | None) -> Text:
    """The texts one after the other; `words`: how many of their words are tokens, None for bytes. Raises UserError."""
    files = [file for path in map(Path, paths) for file in (sorted(path.rglob("*.txt")) if path.is_dir() else [path])]
    try:
        raw = b"\n".join(file.read_bytes() for file in files)
    except OSError as error:
        raise UserError(f"data.task.texts: cannot read {error.filename}: {error.strerror}") from None
    if words is None:
        ids, others = np.frombuffer(raw, np.uint8).astype(np.int32) + len(OWN), [f"byte {i}" for i in range(256)]
    else:
        found = re.findall(r"\w+|[^\w\s]", raw.decode("utf-8", errors="replace").lower())
        counts = Counter(found)
        for word in OWN:
            counts.pop(word, None)
        others = [UNKNOWN, *(word for word, _ in counts.most_common(words))]
        id_of = {word: number for number, word in enumerate((*OWN, *others)) if word not in PERSONS}
        unknown = len(OWN)
        ids = np.array([id_of.get(word, unknown) for word in found], np.int32)
    if len(ids) < 1000:
        raise UserError(f"data.task.texts: found {len(ids)} tokens in {', '.join(paths)}, expected at least 1000")
    return Text(ids, [*OWN, *others])
