"""What README.md and docs/ say is true.

The example runs and its gradient is exact, links lead somewhere, commands have the options that they are given, every
test, file and metric that is named exists, and the table of decays is what a cell does.
"""

import ast
import contextlib
import io
import json
import math
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from memformer_dist import metrics
from memformer_dist.cells.memformer import Memformer, MemformerConfig
from memformer_dist.mrbp.replay import memory_replay
from memformer_dist.segment import IGNORE
from tests.helpers import ROOT
from tests.helpers.scripts import run_script
from tests.helpers.toy import gradients, random_window, relative_error

README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("configs/*.md")])
WORDS = 1500  # of the README: two screens
YOURS = ("mine.json", "mine.py")  # files that a reader is to write


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


# ---- the loop of your own --------------------------------------------------------------------------------------------


def example() -> str:
    """The one block of Python in the README."""
    (found,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert "memory_replay(" in found
    return found


def definitions() -> dict:
    """The names that the example defines before it begins to do something."""
    body = ast.parse(example()).body
    begins = next(number for number, statement in enumerate(body) if isinstance(statement, ast.Expr))
    names: dict = {"__name__": "example"}
    exec(compile(ast.Module(body[:begins], []), "README.md", "exec"), names)
    return names


@pytest.mark.slow
def test_the_example_learns_what_it_says(tmp_path: Path):
    program = tmp_path / "example.py"
    program.write_text(example() + "import sys\nassert 'deepspeed' not in sys.modules\n")
    done = run_script(program, cold=True)  # a warm interpreter has imported DeepSpeed
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^step +\d+ +loss in the last segment (\S+)$", done.stdout, re.MULTILINE)
    losses = [float(loss) for loss in found]
    assert losses[0] == pytest.approx(math.log(8), abs=0.2)
    assert losses[-1] < 0.05


class RecordedDropout(nn.Module):
    """Dropout that records its mask for each row of the batch, and can be made to repeat what it recorded.

    `rows` identifies the rows of the next call: the part of the cell that runs, and the row's tokens. Masks are drawn
    from torch's global generator, as nn.Dropout draws them.
    """

    def __init__(self, share: float):
        super().__init__()
        self.share = share
        self.rows: list[tuple] = []
        self.recorded: dict[tuple, list[Tensor]] = {}
        self.repeats = False

    def forward(self, hidden: Tensor) -> Tensor:
        if self.repeats:
            return hidden * torch.stack([self.recorded[row][-1] for row in self.rows])
        mask = torch.bernoulli(torch.full_like(hidden, 1 - self.share)) / (1 - self.share)
        for row, row_mask in zip(self.rows, mask, strict=True):
            self.recorded.setdefault(row, []).append(row_mask)
        return hidden * mask


@pytest.mark.parametrize("readout_group", [1, 3, 100])
def test_gradient_of_the_example_cell_equals_full_bptt(readout_group):
    """In float64, with dropout and resets, and nothing but what the README's loop passes to memory_replay.

    The reference is one graph over the window, segment by segment, that repeats the masks of the replay. Negative
    controls: the state cut from the graph between segments, and other masks.
    """
    names = definitions()
    own_segment, state_of, symbols = (names[name] for name in ("Segment", "State", "SYMBOLS"))

    class Recorded(names["GRUCell"]):
        def advance(self, segment, state):
            self.dropout.rows = [("advance", *row) for row in segment.tokens.tolist()]
            return super().advance(segment, state)

        def readout(self, segment, features):
            self.dropout.rows = [("readout", *row) for row in segment.tokens.tolist()]
            return super().readout(segment, features)

    torch.manual_seed(3)
    segments, lanes, length = 7, 4, 6
    cell = Recorded().double()
    assert isinstance(cell.dropout, nn.Dropout)
    assert cell.dropout.p > 0
    cell.dropout = RecordedDropout(0.3)
    nn.init.normal_(cell.initial)
    state = state_of(torch.randn(lanes, names["WIDTH"], dtype=torch.float64))
    tokens, labels = torch.randint(symbols, (2, segments, lanes, length))
    assert len(tokens.flatten(0, 1).unique(dim=0)) == segments * lanes  # so that its tokens identify a row
    labels[torch.rand(labels.shape) < 0.3] = IGNORE
    reset = torch.rand(segments, lanes) < 0.3
    assert reset[1:].any()
    window = [own_segment(*columns) for columns in zip(tokens, labels, reset, strict=True)]
    scale = 1 / int((labels != IGNORE).sum())

    def reference(*, detach: bool = False) -> dict[str, Tensor]:
        """The gradient of full BPTT."""
        cell.zero_grad()
        loss, carried = 0.0, state
        for segment in window:
            features, carried = cell.advance(segment, carried)
            loss = loss + cell.readout(segment, features).sum() * scale
            if detach:
                carried = state_of(carried.hidden.detach())
        loss.backward()
        return gradients(cell)

    replayed = memory_replay(cell, window, state, loss_scale=scale, readout_group=readout_group)
    found = gradients(cell)
    assert replayed.drift == 0
    masks = dict(cell.dropout.recorded)
    for (part, *row), drawn in masks.items():
        rolled_out = part == "advance" and row not in tokens[-1].tolist()
        assert len(drawn) == 1 + rolled_out
        assert torch.equal(drawn[0], drawn[-1])  # the replay repeats the rollout
    of_segments = [masks[("advance", *row)][0] for row in tokens[:, 0].tolist()]
    assert not any(torch.equal(mask, of_segments[0]) for mask in of_segments[1:])  # but each segment has its own
    cell.dropout.repeats = True
    assert relative_error(found, reference()) <= 1e-10
    assert relative_error(found, reference(detach=True)) > 1e-4
    cell.dropout.repeats = False
    cell.dropout.recorded.clear()
    assert relative_error(found, reference()) > 1e-4


def test_dropout_of_the_example_differs_from_window_to_window_and_repeats_with_the_seed():
    """What torch.manual_seed promises to a user who passes no executor."""
    names = definitions()
    cell = names["GRUCell"]()

    def gradient_of_two_windows() -> list[dict[str, Tensor]]:
        torch.manual_seed(5)
        window, state, found = names["document"](), cell.empty_state(names["LANES"]), []
        for _ in range(2):
            cell.zero_grad()
            memory_replay(cell, window, state, loss_scale=1.0)
            found.append(gradients(cell))
        return found

    first, second = gradient_of_two_windows()
    assert relative_error(first, second) > 1e-4
    for once, again in zip((first, second), gradient_of_two_windows(), strict=True):
        assert all(torch.equal(once[name], again[name]) for name in once)


# ---- pages -----------------------------------------------------------------------------------------------------------


def test_the_readme_is_two_screens():
    assert len(README.read_text().split()) <= WORDS


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            linked = page.parent / path if path else page
            assert linked.exists(), f"{page_id(page)}: {target}"
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE) if anchor else []
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert not anchor or anchor in anchors, f"{page_id(page)}: {target}"


def commands(page: Path) -> list[list[str]]:
    """The command lines in a page's blocks of bash, continued lines joined, comments dropped."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def options_of(*command: str) -> set[str]:
    """The options in the --help of a program, run in this process, which has imported torch already."""
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        patch.setattr(sys, "argv", [*command, "--help"])
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / command[0]), run_name="__main__")
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", shown.getvalue().partition("options:")[2]))


def test_commands_name_programs_and_options_that_exist():
    """Of the programs in launch/ and tokenizer/; their configurations exist too. All pages together: --help is slow."""
    named: dict[tuple[str, ...], dict[str, Path]] = {}
    for page in PAGES:
        for words in commands(page):
            for number, word in enumerate(words):
                if re.fullmatch(r"(launch|tokenizer|benchmarks|tests)/\w+\.(py|sh)|configs/\w+\.json", word):
                    assert word.endswith(YOURS) or (ROOT / word).exists(), f"{page_id(page)}: {word}"
                if re.fullmatch(r"(launch|tokenizer|benchmarks)/\w+\.py", word):
                    rest = words[number + 1 :]
                    program = (word, *(w for w in rest[:1] if w in ("verify", "show")))
                    options = {option.partition("=")[0]: page for option in rest if option.startswith("--")}
                    named.setdefault(program, {}).update(options)
    assert len(named) > 8
    for program, options in named.items():
        for option in options.keys() - options_of(*program):
            pytest.fail(f"{page_id(options[option])}: {' '.join(program)} has no {option}")


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_tests_and_files_that_are_named_exist(page: Path):
    text = page.read_text()
    if page.name == "CHANGELOG.md":
        text = text.partition("## [0.1.0]")[0]
        text = re.sub(r"^\|.*$", "", text, flags=re.MULTILINE)  # names of the past
    for file, test in re.findall(r"\b(tests/[\w/]+\.(?:py|sh))(?:::(\w+))?", text):
        path = ROOT / file
        assert path.exists(), f"{page_id(page)}: {file}"
        assert not test or re.search(rf"^def {test}\(", path.read_text(), re.MULTILINE), f"{file} has no {test}"
    for file in re.findall(r"`((?:memformer_dist|benchmarks|configs|launch|tokenizer|docs)/[\w/.-]+\.\w+)`", text):
        assert file.endswith(YOURS) or (ROOT / file).exists(), f"{page_id(page)}: {file}"


def test_the_table_of_promises_names_a_test_in_every_row():
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", (ROOT / "docs/promises.md").read_text(), re.MULTILINE)
    assert len(rows) > 40
    for promise, tests in rows:
        assert promise == "promise" or "tests/" in tests, promise


def test_architecture_names_every_module_once():
    """The section `The modules` has one line per file, in the order of the rooms."""
    text = (ROOT / "docs/architecture.md").read_text().partition("## The modules")[2].partition("\n## ")[0]
    listed = re.findall(r"^    ([\w/]+\.py) ", text, re.MULTILINE)
    assert len(listed) == len(set(listed))
    package = ROOT / "memformer_dist"
    there = {str(path.relative_to(package)) for path in package.rglob("*.py") if path.stat().st_size}
    assert there - {"__main__.py"} == set(listed)


def test_every_metric_is_described(trained_run: Path):
    """Each scalar and curve that a run logs, those of GPUs included, and each figure of its summary."""
    text = (ROOT / "docs/metrics.md").read_text()
    rows = re.findall(r"^\| (`.+?`) \|", text, re.MULTILINE)
    described = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    stands_for = [name.removesuffix("*") for name in described if name.endswith("*")]
    records = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    written = {re.sub(r"^final/", "eval/", name) for record in records for name in record}
    unknown = {name for name in written - described if not name.startswith("loss/by_segment_age/")}
    assert not unknown
    assert {"loss/by_segment_age/*", "memory/*"} <= described
    assert all(any(name.startswith(prefix) for name in written) for prefix in stands_for)
    assert json.loads((trained_run / "summary.json").read_text()).keys() <= described
    computed = {metric.name for metric in metrics.TRAINING} | {metrics.BOUNDARY_NORMS}
    computed |= {f"eval/{metric.name}" for metric in metrics.EVALUATION}
    assert computed <= described


# ---- docs/mrbp.md ----------------------------------------------------------------------------------------------------


def shares_passed_on(bmn_init_norm: float, *, alone: bool) -> Tensor:
    """The share of the norm of the state's gradient that each boundary but the last passes on.

    The loss is on the last segment alone. A slot is `alone` where no token is real: a segment of length 0.
    """
    torch.manual_seed(0)
    config = MemformerConfig(
        layout="decoder",
        width=16,
        heads=2,
        feed_forward=32,
        slots=4,
        encoder_layers=0,
        decoder_layers=2,
        dropout=0.0,
        bmn_init_norm=bmn_init_norm,
    )
    segments, lanes, length = 8, 2, 6
    cell = Memformer(config, vocab_size=11, bos_id=1, segment_length=length).double()
    window = [
        segment._replace(
            length=torch.full((lanes,), 0 if alone else length),
            reset=torch.full((lanes,), t == 0),
            labels=segment.tokens if t == segments - 1 else torch.full_like(segment.labels, IGNORE),
        )
        for t, segment in enumerate(random_window(segments, lanes, length, seed=1))
    ]
    replayed = memory_replay(cell, window, cell.empty_state(lanes), loss_scale=1.0)
    norms = replayed.state_gradient_squares[1:].sqrt()  # the first is that of a state which the reset replaces
    return norms[:-1] / norms[1:]


def test_the_table_of_decays():
    """A slot that keeps to itself passes on 1 / (1 + |v|) of the gradient; one that reads tokens does not."""
    rows = re.findall(
        r"^\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (\d+) \|$", (ROOT / "docs/mrbp.md").read_text(), re.MULTILINE
    )
    assert len(rows) == 4
    for norm, formula, measured, horizon in (map(float, row) for row in rows):
        found = shares_passed_on(norm, alone=True)
        assert torch.allclose(found, torch.tensor(measured).double(), atol=1e-4), norm
        assert formula == pytest.approx(1 / (1 + norm), abs=1e-4)
        assert horizon == round(math.log(0.05) / (2 * math.log(formula)))
        assert (shares_passed_on(norm, alone=False) - formula).abs().max() > 0.01, norm
