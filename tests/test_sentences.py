"""Errors of pydantic in our words."""

import pytest
from pydantic import BaseModel, ValidationError, field_validator, model_validator

from memformer_dist.errors import Problems, sentences


class Inner(BaseModel, extra="forbid"):
    size: int


class Outer(BaseModel, extra="forbid"):
    name: str
    inner: Inner
    several: list[Inner] = []

    @field_validator("name")
    @classmethod
    def _not_empty(cls, name: str) -> str:
        if not name:
            raise ValueError("found no name, expected one")
        return name

    @model_validator(mode="after")
    def _fits(self) -> "Outer":
        if self.inner.size < 0:
            raise Problems(["inner.size: found less than 0, expected more", "name: found another"])
        return self


def sentences_about(raw: dict, *arguments, **endings) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(raw)
    return sentences(caught.value, *arguments, **endings)


def test_one_sentence_for_each_problem():
    raw = {"name": "", "inner": {"size": "x"}, "several": [{"size": 1}, {"sise": 2}], "more": 1}
    assert sentences_about(raw) == [
        "name: found no name, expected one",
        "inner.size: found 'x'; input should be a valid integer, unable to parse string as an integer",
        "several.1.size: missing",
        "several.1.sise: unknown key",
        "more: unknown key",
    ]
    endings = {"unknown": lambda field: f", {field}!", "missing": lambda field: f", {field}?"}
    assert sentences_about(raw, "file", **endings)[2:4] == [
        "file.several.1.size: missing, file.several.1.size?",
        "file.several.1.sise: unknown key, file.several.1.sise!",
    ]


def test_several_problems_of_one_validator():
    raw = {"name": "a", "inner": {"size": -1}}
    expected = ["inner.size: found less than 0, expected more", "name: found another"]
    assert sentences_about(raw) == expected
    assert sentences_about(raw, "model") == [f"model.{problem}" for problem in expected]


def test_a_long_value_is_cut_off():
    (sentence,) = sentences_about({"name": ["x" * 1000], "inner": {"size": 1}})
    assert len(sentence) < 200 and " ...; input should be a valid string" in sentence
