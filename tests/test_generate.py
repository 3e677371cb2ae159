"""Generation against advance + readout: a document in any pieces, alone or not, gives the same predictions."""

import io
import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from memformer_dist import logs, signals
from memformer_dist.cells.layers import TokenEmbedding
from memformer_dist.commands import generate as command
from memformer_dist.config import cell_configs
from memformer_dist.errors import UserError
from memformer_dist.generate import Generation, Sampling
from memformer_dist.prepare.documents import read_documents
from memformer_dist.tokenizer import SentencePieceTokenizer
from tests.helpers.memformer import BOS, LAYOUTS, SIZE, VOCABULARY, make, make_segment
from tests.helpers.tokenizers import ordinary_sentencepiece

EOS = 2
CELLS = {layout: make(layout) for layout in LAYOUTS}
OTHERS = {"rmt": {"slots": 2}, "hmt": {"slots": 2, "sensory_tokens": 3}}  # a cache of its own; recomputation
for name, fields in OTHERS.items():
    other = cell_configs()[name](width=8, heads=2, feed_forward=12, layers=2, dropout=0.0, init_std=0.4, **fields)
    CELLS[name] = other.build(vocab_size=VOCABULARY, bos_id=BOS, segment_length=SIZE).double()
tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=3 * SIZE + 2)


def predictions(cell, document: list[int]) -> torch.Tensor:
    """log p of every token after every position, [tokens, vocabulary], by advance and readout: one label at a time."""
    state, rows = cell.empty_state(1), []
    for start in range(0, len(document), SIZE):
        part = document[start : start + SIZE]
        segment = make_segment([len(part)], reset=[start == 0])
        segment.tokens[0, : len(part)] = torch.tensor(part)
        features, state = cell.advance(segment, state)
        for_label = [segment._replace(labels=torch.full((1, SIZE), label)) for label in range(VOCABULARY)]
        nll = torch.stack([cell.readout(one, features)[0] for one in for_label], dim=1)
        rows.append(-nll[: len(part)])
    return torch.cat(rows)


@st.composite
def portions(draw):
    """Documents of unequal length, and how they are fed: for each call the portion of each document, perhaps none."""
    documents = draw(st.lists(tokens, min_size=1, max_size=3))
    rest, calls = [list(document) for document in documents], []
    while any(rest):
        sizes = [draw(st.integers(0, min(len(queue), SIZE + 2))) for queue in rest]
        calls.append([queue[:size] for queue, size in zip(rest, sizes, strict=True)])
        rest = [queue[size:] for queue, size in zip(rest, sizes, strict=True)]
        if not any(sizes):  # move on
            calls.append(rest)
            break
    return documents, calls


@pytest.mark.parametrize("layout", CELLS)
@settings(max_examples=40, deadline=None)
@given(fed=portions())
@torch.no_grad()
def test_any_portions_of_documents_of_unequal_length(layout, fed):
    cell, (documents, calls) = CELLS[layout], fed
    expected = [predictions(cell, document) for document in documents]
    generation = Generation(cell, eos_id=EOS, documents=len(documents))
    for call in calls:
        generation.feed(call)
        for document, history in enumerate(generation.history):
            if history:
                found = generation.logits[document].log_softmax(-1).double()
                assert torch.allclose(found, expected[document][len(history) - 1], atol=1e-5)
    assert generation.history == documents


@pytest.mark.parametrize("layout", CELLS)
@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, SIZE - 1), unique=True).map(sorted), short=st.integers(0, 1))
@torch.no_grad()
def test_extend_in_pieces_is_a_segment_and_close_its_state(layout, cuts, short):
    """Every logit of every piece, over three segments of two lanes; the last segment ends early."""
    cell = CELLS[layout]
    documents = torch.randint(VOCABULARY, (2, 3 * SIZE - short), generator=torch.Generator().manual_seed(len(cuts)))
    expected = [predictions(cell, document.tolist()) for document in documents]
    state, reference = cell.empty_state(2), cell.empty_state(2)
    for start in range(0, 3 * SIZE - short, SIZE):
        part = documents[:, start : start + SIZE]
        cache, logits = cell.open(state, torch.tensor([start == 0] * 2)), []
        for piece in part.tensor_split([cut for cut in cuts if cut < part.shape[1]], dim=1):
            some, cache = cell.extend(piece, cache)
            logits.append(some)
        for lane, log_p in enumerate(torch.cat(logits, dim=1).log_softmax(-1)):
            assert torch.allclose(log_p, expected[lane][start : start + part.shape[1]], atol=1e-10)
        state = cell.close(cache)
        segment = make_segment([part.shape[1]] * 2, reset=[start == 0] * 2)
        segment.tokens[:, : part.shape[1]] = part
        _, reference = cell.advance(segment._replace(tokens=segment.tokens.clone()), reference)
        assert torch.allclose(state.memory, reference.memory, atol=1e-12)
        if layout == "encoder_decoder":
            length = part.shape[1]
            assert torch.equal(state.context[:, :length], reference.context[:, :length])
            assert torch.equal(state.context_length, reference.context_length)


@torch.no_grad()
def test_the_memory_is_carried_across_segments():
    """The control: another first segment changes what is predicted in the third."""
    cell = CELLS["encoder_decoder"]
    ends = []
    for first in (3, 4):
        generation = Generation(cell, eos_id=EOS)
        generation.feed([[first] * SIZE + [5] * (SIZE + 1)])
        ends.append(generation.logits)
    assert not torch.allclose(*ends, atol=1e-4)


# ------------------------------------------------------------------------------------------------- sampling


def everything(generation: Generation, count: int, **fields) -> list:
    return list(generation.sample(count, Sampling(**fields)))


def begun(documents: int = 2, seed: int = 0, layout: str = "encoder_decoder") -> Generation:
    generation = Generation(CELLS[layout], eos_id=-1, documents=documents, seed=seed)
    generation.feed([[3, 1, 4, 1, 5, 9, 2][: 7 - document] for document in range(documents)])
    return generation


def test_sampling_repeats_with_the_seed():
    assert everything(begun(), 12) == everything(begun(), 12) != everything(begun(seed=1), 12)


def test_the_likeliest_token():
    generation = begun()
    likeliest = generation.logits.argmax(-1).tolist()
    assert everything(generation, 1, temperature=0) == [likeliest]
    expected = everything(begun(), 9, temperature=0)
    assert everything(begun(seed=1), 9, top_k=1) == everything(begun(seed=2), 9, top_p=1e-6) == expected


@pytest.mark.parametrize(
    "fields", [{}, {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.6}, {"temperature": 2, "top_k": 3, "top_p": 0.7}]
)
def test_sampled_frequencies(fields):
    """Against the definition, token by token."""
    logits = torch.tensor([0.1, 2.0, 1.0, -1.0, 1.5])
    sampling = Sampling(**fields)
    kept = sorted(range(5), key=lambda token: -logits[token])[: sampling.top_k]
    weights = {token: float(torch.exp(logits[token] / sampling.temperature)) for token in kept}
    total, mass, expected = sum(weights.values()), 0.0, torch.zeros(5)
    for token in kept:
        if mass < sampling.top_p * total:
            expected[token] = weights[token]
            mass += weights[token]
    chosen = sampling.choose(logits.expand(20000, 5), torch.Generator().manual_seed(0))
    found = chosen.bincount(minlength=5) / 20000
    assert torch.allclose(found, expected / expected.sum(), atol=0.015)
    assert ((found > 0) == (expected > 0)).all()
    assert fields == {} or not torch.allclose(found, logits.softmax(-1), atol=0.015)


def test_a_document_ends_at_its_eos_and_the_others_go_on():
    free = everything(begun(), 12, temperature=0)
    generation = begun()
    first, second = zip(*free, strict=True)
    generation.eos_id = next(token for token in second if token not in first[:1])
    stop = second.index(generation.eos_id)
    written = everything(generation, 12, temperature=0)
    assert [step[1] for step in written[: stop + 1]] == [*second[:stop], None]
    assert generation.ended[1] and generation.eos_id not in generation.history[1][6:]
    until = first.index(generation.eos_id) if generation.eos_id in first else 12
    assert [step[0] for step in written[:until]] == list(first[:until])


def test_a_document_without_a_prompt():
    with pytest.raises(UserError, match="no tokens"):
        everything(Generation(CELLS["decoder"], eos_id=EOS), 1)


# ------------------------------------------------------------------------------------------------- saved generations


@pytest.mark.parametrize("layout", CELLS)
@pytest.mark.parametrize("before", [0, 3, 8])
def test_a_saved_generation_continues_exactly(tmp_path, layout, before):
    whole = begun(layout=layout)
    expected = everything(whole, 20)
    generation = begun(layout=layout)
    written = everything(generation, before)
    generation.save(tmp_path / "saved")
    loaded = Generation.load(tmp_path / "saved", CELLS[layout], eos_id=-1)
    assert written + everything(loaded, 20 - before) == expected
    assert loaded.history == whole.history and torch.equal(loaded.logits, whole.logits)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_what_cannot_be_continued(tmp_path):
    path = tmp_path / "saved"
    begun().save(path)
    with pytest.raises(UserError, match="made by other weights"):
        Generation.load(path, make(init_std=0.03), eos_id=EOS)
    with pytest.raises(UserError, match="missing.*no saved generation"):
        Generation.load(tmp_path / "missing", CELLS["decoder"], eos_id=EOS)
    path.write_bytes(b"no safetensors at all")
    with pytest.raises(UserError, match="no saved generation"):
        Generation.load(path, CELLS["decoder"], eos_id=EOS)
    save_file({"x": torch.zeros(1)}, path, metadata={"generation": json.dumps({"version": 99})})
    with pytest.raises(UserError, match="version 99"):
        Generation.load(path, CELLS["decoder"], eos_id=EOS)


# ------------------------------------------------------------------------------------------------- text, command line


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Its main, with an untrained cell in place of a run's."""
    tokenizer = SentencePieceTokenizer(ordinary_sentencepiece())
    vocabulary = tokenizer.size
    cell = make(dtype=torch.float32)
    cell.embedding = TokenEmbedding(vocabulary, 8, std=0.3)
    cell.vocab_size = vocabulary
    contents = SimpleNamespace(vocabulary=SimpleNamespace(eos_id=tokenizer.eos_id))
    saved = SimpleNamespace(tokenizer=lambda: tokenizer, cell=cell.to, contents=contents)
    monkeypatch.setattr(command, "open_one", lambda *which: saved)
    return lambda *arguments: command.main(["--run-dir", str(tmp_path), *arguments])


def test_command_line(program, tmp_path, capsys):
    prompt, saved = ("--prompt", "the quick fox"), str(tmp_path / "saved")
    program(*prompt, "--tokens", "30", "--seed", "3")
    whole = capsys.readouterr().out
    assert whole.startswith("the quick fox") and len(whole) > 30
    (tmp_path / "prompt.txt").write_text("the quick fox")
    program("--prompt-file", str(tmp_path / "prompt.txt"), "--tokens", "11", "--seed", "3", "--save", saved)
    begin = capsys.readouterr().out
    program("--continue-from", saved, "--tokens", "19")
    assert begin.removesuffix("\n") + capsys.readouterr().out == whole
    program(*prompt, "--tokens", "30", "--seed", "4")
    assert capsys.readouterr().out != whole


# ---- prompts ---------------------------------------------------------------------------------------------------------


def standard_input(monkeypatch, raw: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="ascii"))


def saved_history(path: Path) -> list[int]:
    return load_file(path)["history"].tolist()


@pytest.mark.parametrize("raw", [b"one\r\ntwo\r\n", b"\xef\xbb\xbfone\n", "caf\u00e9\u2028x".encode(), b" \0 \x0c"])
def test_a_prompt_is_kept_as_a_document_is(program, tmp_path, monkeypatch, raw):
    """A file was read with its newlines translated, so that it had other ids than the same text in a corpus."""
    (tmp_path / "prompt.txt").write_bytes(raw)
    (document,) = read_documents([tmp_path / "prompt.txt"])
    expected = SentencePieceTokenizer(ordinary_sentencepiece()).encode([document.text])[0].tolist()
    for arguments in ("--prompt-file", f"{tmp_path}/prompt.txt"), ("--prompt-file", "-"), ("--prompt", "-"):
        standard_input(monkeypatch, raw)
        program(*arguments, "--tokens", "0", "--save", f"{tmp_path}/saved")
        assert saved_history(tmp_path / "saved") == expected


def test_a_prompt_that_is_no_text(program, tmp_path, monkeypatch):
    standard_input(monkeypatch, b"caf\xe9")
    with pytest.raises(
        UserError, match="^--prompt-file: found 'utf-8' codec .*, expected text in UTF-8 on standard input$"
    ):
        program("--prompt-file", "-")
    (tmp_path / "prompt.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="^--prompt-file: found 'utf-8' codec .*, expected a text file in UTF-8$"):
        program("--prompt-file", f"{tmp_path}/prompt.txt")
    with pytest.raises(UserError, match=r"^--prompt: found 'caf\\udce9', expected text in UTF-8$"):
        program("--prompt", "caf\udce9")
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match="^--prompt: standard input is closed"):
        program("--prompt", "-")


def test_a_terminal_has_a_mark_between_prompt_and_continuation(program, monkeypatch, capsys):
    """What is piped is the text alone."""
    arguments = ("--prompt", "the quick fox", "--tokens", "20", "--temperature", "0")
    program(*arguments)
    piped = capsys.readouterr().out
    assert piped.startswith("the quick fox") and command.MARK not in piped
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    program(*arguments)
    shown = capsys.readouterr().out
    assert shown.startswith(f"the quick fox{command.MARK}") and shown.replace(command.MARK, "", 1) == piped


def test_a_continued_document_has_a_mark_only_behind_more_of_a_prompt(program, monkeypatch, tmp_path, capsys):
    program("--prompt", "the quick fox", "--tokens", "2", "--save", f"{tmp_path}/saved")
    capsys.readouterr()
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    program("--continue-from", f"{tmp_path}/saved", "--tokens", "2")
    assert command.MARK not in capsys.readouterr().out
    program("--continue-from", f"{tmp_path}/saved", "--tokens", "2", "--prompt", " and")
    assert capsys.readouterr().out.count(command.MARK) == 1


def test_a_long_prompt_is_read_with_progress(capsys):
    """How much of how much, and the time that is left; a short one says nothing."""
    seconds = itertools.count(step=0.4)  # each look at the clock; there are a few for a segment
    logs.start(0)
    generation, wish = begun(documents=1), signals.Wish()
    assert command.feed(generation, [3] * 2 * SIZE, wish, clock=lambda: 0.0) == 2 * SIZE
    assert capsys.readouterr().err == ""
    assert command.feed(generation, [3] * 50 * SIZE, wish, clock=lambda: next(seconds)) == 50 * SIZE
    logs.stop()
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 4 and lines[-1].endswith(f"prompt: {50 * SIZE} of {50 * SIZE} tokens (100%)")
    assert all("prompt: " in line and f" of {50 * SIZE} tokens" in line for line in lines)
    assert all(line.endswith(" left") for line in lines[:-1])


def test_a_long_prompt_is_read_with_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    for delay_s in 60.0, 0.0:
        monkeypatch.setattr(command, "SILENT_S", delay_s)
        assert command.feed(begun(documents=1), [3] * 10 * SIZE, signals.Wish()) == 10 * SIZE
        said = capsys.readouterr().err
        assert (f"{10 * SIZE}/{10 * SIZE} [" in said and "prompt: 100%" in said) == (delay_s == 0.0), said
    assert command.feed(begun(documents=1), [], signals.Wish()) == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "--prompt: found no text"),
        (("--prompt", "x", "--top-p", "1.5"), "--top-p: found 1.5"),
        (("--prompt", "x", "--save", "/no/such/file"), "--save: found no folder /no/such"),
        (("--prompt-file", "/no/such/file"), "--prompt-file"),
        (("--continue-from", "/no/such/file"), "--continue-from: found no file /no/such/file"),
    ],
)
def test_mistakes_on_the_command_line(program, arguments, message):
    with pytest.raises(UserError, match=message):
        program(*arguments)


def test_a_run_or_one_of_its_checkpoints_with_their_tokenizer(trained_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    saved = max((run / "checkpoints").iterdir())
    written = []
    for place in run, saved:
        command.main(["--run-dir", str(place), "--prompt", "Bada", "--tokens", "5"])
        written.append(capsys.readouterr().out)
    assert written[0] == written[1] != ""
    shutil.copytree(saved, tmp_path / "alone" / saved.name)
    with pytest.raises(
        UserError, match="found no tokenizer.model or tokenizer.json in .*, expected the run's tokenizer"
    ):
        command.main(["--run-dir", str(tmp_path / "alone" / saved.name), "--prompt", "Bada"])
    with (run / "tokenizer.model").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(UserError, match="is not the tokenizer that the model was trained with"):
        command.main(["--run-dir", str(run), "--prompt", "Bada"])
