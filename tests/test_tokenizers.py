"""Tokenizers of both kinds behind their interface: what a file is, BOS and EOS, ids, bytes, text token by token."""

import builtins
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers as hugging_face
from hypothesis import given, settings
from hypothesis import strategies as st

from memformer_dist.errors import UserError
from memformer_dist.prepare.tokenizer import train_tokenizer
from memformer_dist.tokenizer import FILES, HuggingFaceTokenizer, TextStream, Tokenizer, open_tokenizer, vocabulary
from tests.helpers import tokenizers as made

OURS = ["x\u2581\u2581y \ue000\ue000z"] * 50 + ["the quick\u2581brown\ue000 fox \ue001\ue002"] * 50
MAKERS = {
    "ours": lambda: train_tokenizer(OURS, vocab_size=320, cap_vocabulary=True),
    "sentencepiece": made.ordinary_sentencepiece,
    "byte level": made.byte_level,
    "byte fallback": made.byte_fallback,
    "lower case": made.lower_case_words,
    "metaspace": made.metaspace,
    "words": made.words,
}
LOSSLESS = ("ours", "byte level", "byte fallback")


def opened(folder: Path, raw: bytes, name: str = "file") -> Tokenizer:
    (folder / name).write_bytes(raw)
    return open_tokenizer(folder / name)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> dict[str, Tokenizer]:
    """By name; ours has pieces that hold escapes whole and in halves."""
    return {name: opened(tmp_path_factory.mktemp("kind"), make()) for name, make in MAKERS.items()}


awkward = st.lists(
    st.sampled_from(
        [*"xyz \n\t\u2581\ue000\ue001\ue002\ufffdé漢\N{FOX FACE}", "\r\n", "  ", "the quick", made.END, "</s>"]
    )
    | st.text(max_size=3),
    max_size=10,
).map("".join)


# ---- encoding and decoding -------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(text=awkward)
def test_some_give_back_what_they_were_given(kinds, text):
    for name in LOSSLESS:
        if name == "byte fallback":
            text = text.replace("\u2581", "")  # its sign for a space
        (ids,) = kinds[name].encode([text])
        assert kinds[name].decode(ids.tolist()) == text, name
        spelt = [kinds[name].bytes_of(token) for token in ids.tolist()]
        if None not in spelt:
            prefix = b" " if name == "byte fallback" and text else b""  # which its decoder takes off the start
            assert b"".join(spelt) == prefix + text.encode(), name


def test_others_do_not(kinds):
    """The control of the test above."""
    for name in MAKERS.keys() - LOSSLESS:
        text = "The quick\nbrown  fox"
        assert kinds[name].decode(kinds[name].encode([text])[0].tolist()) != text, name


def test_ids_are_those_of_the_packages(kinds, tmp_path):
    text = "It was a dark\r\nand 漢 stormy night"
    raw = made.byte_level()
    expected = hugging_face.Tokenizer.from_str(raw.decode()).encode(text, add_special_tokens=False).ids
    assert kinds["byte level"].encode([text, ""])[0].tolist() == expected
    model = sentencepiece.SentencePieceProcessor(model_proto=kinds["sentencepiece"].raw)
    assert kinds["sentencepiece"].encode(["", text])[1].tolist() == model.encode(text)


def test_special_tokens_in_a_text_are_text(kinds):
    """They were taken for tokens: a document that quotes one would end in its middle."""
    tokenizer = kinds["byte level"]
    (ids,) = tokenizer.encode([f"a {made.END} b"])
    assert tokenizer.eos_id not in ids.tolist()
    raw = hugging_face.Tokenizer.from_str(made.byte_level().decode())
    assert tokenizer.eos_id in raw.encode(f"a {made.END} b").ids  # the control
    assert tokenizer.decode([*ids.tolist(), tokenizer.eos_id]) == f"a {made.END} b"


def test_truncation_padding_and_dropout_are_not_heeded(tmp_path):
    """A file may carry them from whoever used it last: text would be cut, or encoded differently each time."""
    plain = hugging_face.Tokenizer.from_str(made.byte_level().decode())
    text = made.LINES[0] * 3
    expected = plain.encode(text).ids
    plain.enable_truncation(5)
    plain.enable_padding(length=200)
    changed = json.loads(plain.to_str())
    changed["model"]["dropout"] = 0.5
    as_it_is = hugging_face.Tokenizer.from_str(json.dumps(changed))
    assert as_it_is.encode(text).ids != as_it_is.encode(text).ids != expected  # the control
    tokenizer = opened(tmp_path, json.dumps(changed).encode())
    assert all(tokenizer.encode([text])[0].tolist() == expected for _ in range(10))


def test_a_vocabulary_with_gaps(tmp_path):
    """Ids reach beyond the number of tokens; one that stands for nothing decodes to nothing."""
    described = json.loads(made.byte_level())
    (special,) = described["added_tokens"]
    special["id"] = 900
    described["model"]["vocab"][made.END] = 900
    tokenizer = opened(tmp_path, json.dumps(described).encode())
    assert tokenizer.size == 901 and tokenizer.eos_id == 900
    assert tokenizer.decode([899]) == tokenizer.piece(899) == "" and tokenizer.bytes_of(899) == b""


# ---- what a file is --------------------------------------------------------------------------------------------------


def test_content_says_what_a_file_is(tmp_path):
    for raw, name in ((made.byte_level(), "some.model"), (b"\xef\xbb\xbf \n" + made.byte_level(), "bom")):
        if name == "bom":
            with pytest.raises(UserError, match="cannot load .*bom as a tokenizer.json"):
                opened(tmp_path, raw, name)
        else:
            assert opened(tmp_path, raw, name).file_name == FILES[1]
    assert opened(tmp_path, made.ordinary_sentencepiece(), "tokenizer.json").file_name == FILES[0]


@pytest.mark.parametrize(
    "raw, message",
    [
        (b"no model", "as a SentencePiece model"),
        (b"", "as a SentencePiece model"),
        (b'{"bos_token": "<s>"}', "as a tokenizer.json: expected an object with the field model, found bos_token"),
        (b'{"model": 3}', "as a tokenizer.json: "),
        (b"[1, 2]", "as a SentencePiece model"),
    ],
)
def test_files_that_are_no_tokenizer(tmp_path, raw, message):
    with pytest.raises(UserError, match=f"^--tokenizer: cannot load {tmp_path}/file {message}"):
        opened(tmp_path, raw)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="cannot load /nowhere: No such file or directory"):
        open_tokenizer(Path("/nowhere"))
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(UserError, match="is a folder with tokenizer.json, expected a file"):
        open_tokenizer(tmp_path)


def test_the_package_that_is_missing_is_named(tmp_path, monkeypatch):
    (tmp_path / "t.json").write_bytes(made.byte_level())
    imported = builtins.__import__

    def without(name, *rest):
        if name == "tokenizers":
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"needs the package tokenizers: pip install 'memformer_dist\[tokenizers\]'$"):
        open_tokenizer(tmp_path / "t.json")
    opened(tmp_path, made.ordinary_sentencepiece())


# ---- BOS and EOS -----------------------------------------------------------------------------------------------------


def special_ids(tokenizer: Tokenizer, **named) -> list[str]:
    found = vocabulary(tokenizer, **named)
    return [tokenizer.piece(found.bos_id), tokenizer.piece(found.eos_id)]


def test_which_tokens_are_bos_and_eos(kinds, tmp_path):
    assert special_ids(kinds["ours"]) == special_ids(kinds["sentencepiece"]) == ["<s>", "</s>"]
    assert special_ids(kinds["byte level"]) == [made.END, made.END]  # as in GPT-2
    assert special_ids(kinds["byte fallback"]) == ["<s>", "</s>"]  # by the post-processor and by its name
    assert special_ids(kinds["lower case"]) == ["[CLS]", "[SEP]"]
    assert special_ids(kinds["metaspace"]) == ["</s>", "</s>"]
    assert special_ids(kinds["words"], eos="dog") == ["dog", "dog"]
    assert special_ids(kinds["words"], eos="dog", bos="fox") == ["fox", "dog"]
    without_bos = opened(tmp_path, made.ordinary_sentencepiece(bos_id=-1))
    assert special_ids(without_bos) == ["</s>", "</s>"]
    assert special_ids(without_bos, bos="<unk>") == ["<unk>", "</s>"]


def test_what_other_files_of_a_model_say(tmp_path):
    raw = made.byte_level(special=["<|pad|>", "<|im_start|>", "<|im_end|>", made.END])
    assert special_ids(opened(tmp_path, raw)) == [made.END, made.END]
    stated = {"eos_token": {"content": "<|im_end|>"}, "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(stated))
    assert special_ids(opened(tmp_path, raw)) == ["<|im_end|>", "<|im_end|>"]
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<|im_start|>", "eos_token": "<|pad|>"}')
    assert special_ids(opened(tmp_path, raw)) == ["<|im_start|>", "<|im_end|>"]
    assert special_ids(opened(tmp_path, raw), eos=made.END) == ["<|im_start|>", made.END]
    (tmp_path / "tokenizer_config.json").write_text("no JSON")
    assert special_ids(opened(tmp_path, raw)) == ["<|im_start|>", "<|pad|>"]


def test_what_cannot_be_known_is_an_error(kinds, tmp_path):
    with pytest.raises(UserError, match="^--eos: .* expected --eos TOKEN; it has no special tokens$"):
        vocabulary(kinds["words"])
    several = opened(tmp_path, made.byte_level(special=["<eos>", made.END]))
    with pytest.raises(UserError, match=f"^--eos: .* expected --eos TOKEN; its special tokens are '<eos>', '{END}'$"):
        vocabulary(several)
    for tokenizer in kinds["byte level"], kinds["ours"]:
        with pytest.raises(UserError, match="^--bos: found no token 'nowhere'.*\n--eos: found no token 'nor here'"):
            vocabulary(tokenizer, "nowhere", "nor here")


END = made.END.replace("|", r"\|")


# ---- text, token by token --------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(text=awkward, numbers=st.lists(st.integers(0, 10**6), max_size=20))
def test_the_streamed_text_is_that_of_decode(kinds, text, numbers):
    """Of any tokens, in any order: what a model writes need be no text's."""
    for name, tokenizer in kinds.items():
        ids = tokenizer.encode([text])[0].tolist()
        escapes = kinds["ours"].encode(["\u2581\ue000\ue001 "])[0].tolist()
        for number in numbers:
            awkward_token = escapes[number % 3] if name == "ours" else number // 7 % min(tokenizer.size, 256)
            token = number % tokenizer.size if number % 2 else awkward_token
            ids.insert(number % (len(ids) + 1), token)
        stream = TextStream(tokenizer)
        assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids), name


def test_text_streams_whole_characters(kinds):
    text = "the fox é 漢字 \N{FOX FACE} over"
    for name in "ours", "sentencepiece", "byte level", "byte fallback":
        tokenizer = kinds[name]
        ids = tokenizer.encode([text])[0].tolist()
        stream = TextStream(tokenizer)
        pieces = [stream.push(token) for token in [tokenizer.bos_id or tokenizer.eos_id, *ids, tokenizer.eos_id]]
        assert "".join([*pieces, stream.finish()]).strip() == text, name
        assert not any("\ufffd" in piece for piece in pieces), name
        assert sum(map(bool, pieces)) > 5, name  # it does not wait for the end
        assert any("\ufffd" in tokenizer.decode([token]) for token in ids), name  # the control: token by token
        half = next(token for token in ids if (tokenizer.bytes_of(token) or b"\0")[0] >= 0xC0)
        stream.push(half)
        assert stream.finish() == "\ufffd", name


def test_text_does_not_wait_longer_than_it_must(kinds):
    for name in "ours", "byte level":
        tokenizer = kinds[name]
        stream = TextStream(tokenizer)
        ids = tokenizer.encode(["the quick\nbrown fox"])[0].tolist()
        assert all(stream.push(token) == tokenizer.decode([token]) != "" for token in ids)
    ours = kinds["ours"]
    stream = TextStream(ours)
    escaped = ours.encode(["\u2581\ue000"])[0].tolist()
    assert [ours.decode([token]) for token in escaped] != [stream.push(token) for token in escaped]  # the control


def test_bytes_that_follow_one_another_are_decoded_together(kinds):
    """Hugging Face's ByteFallback takes back a character that is complete if a wrong byte follows: it must wait."""
    tokenizer = kinds["byte fallback"]
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    ids = [tokenizer.id_of(piece) for piece in ("<0xE2>", "<0x82>", "<0xAC>", "<0xE2>", "a")]
    assert tokenizer.decode(ids[:3]) == "\u20ac" and tokenizer.decode(ids) == "\ufffd" * 4 + "a"
    stream = TextStream(tokenizer)
    assert [stream.push(token) for token in ids] == ["", "", "", "", "\ufffd" * 4 + "a"]
