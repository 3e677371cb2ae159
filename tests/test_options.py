"""Every option of every program has its range checked where the command line is read, and all mistakes come in one message."""

import re

import pytest

from memformer_dist.commands import corpus, evaluate, generate, prepare, train, train_tokenizer
from memformer_dist.commands.options import Options, file_to_read, integer, number
from memformer_dist.errors import UserError
from tests.helpers import ROOT
from tests.helpers.scripts import run_script

GOOD = {
    "evaluate": (evaluate.parse, ["--run-dir=runs/a"]),
    "generate": (generate.parse, ["--run-dir=runs/a", "--prompt=It"]),
    "prepare": (prepare.main, ["--output=c", f"--tokenizer={ROOT}/README.md", "--input=a"]),
    "train": (train.parse, ["--config=small"]),
    "train_tokenizer": (train_tokenizer.main, ["--input=a", "--output=t"]),
    "verify": (corpus.main, ["verify", "c"]),
    "show": (corpus.main, ["show", "c"]),
}


def mistakes(program: str, *arguments: str, instead_of: str = "\0") -> list[str]:
    """The lines of the one message about a good command line with further arguments, or with one of them left out."""
    parse, good = GOOD[program]
    with pytest.raises(UserError) as caught:
        parse([word for word in good if not word.startswith(instead_of)] + list(arguments))
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    "program, argument, expected",
    [
        ("evaluate", "--lanes=0", "--lanes: found 0, expected at least 1"),
        ("evaluate", "--lanes=-4", "--lanes: found -4, expected at least 1"),
        ("evaluate", "--lanes=4.5", "--lanes: found '4.5', expected an integer"),
        ("evaluate", f"--lanes={10**9}", "--lanes: found 1000000000, expected at most 1048576"),
        ("evaluate", "--max-segments=0", "--max-segments: found 0, expected at least 1"),
        ("evaluate", "--corpus=", "--corpus: found '', expected a path or a URL"),
        ("evaluate", "--json=/", "--json: cannot write /: Is a directory"),
        ("evaluate", "--json=/nowhere/at/all.json", "--json: found no folder /nowhere/at"),
        ("evaluate", "--json= ", "--json: found ' ', expected a path"),
        ("generate", "--tokens=-1", "--tokens: found -1, expected at least 0"),
        ("generate", "--tokens=many", "--tokens: found 'many', expected an integer"),
        ("generate", "--temperature=-0.1", "--temperature: found -0.1, expected at least 0"),
        ("generate", "--temperature=nan", "--temperature: found 'nan', expected a number"),
        ("generate", "--temperature=inf", "--temperature: found 'inf', expected a number"),
        (
            "generate",
            "--temperature=1e-40",
            "--temperature: found 1e-40, expected 0 (the likeliest token), or at least 1e-06",
        ),
        ("generate", "--top-k=0", "--top-k: found 0, expected at least 1"),
        ("generate", "--top-p=0", "--top-p: found 0, expected more than 0"),
        ("generate", "--top-p=1.5", "--top-p: found 1.5, expected at most 1"),
        ("generate", "--seed=-1", "--seed: found -1, expected at least 0"),
        ("generate", f"--seed={2**63}", f"--seed: found {2**63}, expected at most {2**63 - 1}"),
        ("generate", "--save=/", "--save: cannot write /: Is a directory"),
        ("generate", "--continue-from=/", "--continue-from: found the folder /, expected a file"),
        ("generate", "--continue-from=/nowhere", "--continue-from: found no file /nowhere"),
        ("prepare", "--valid-fraction=1", "--valid-fraction: found 1, expected less than 1"),
        ("prepare", "--valid-fraction=-0.1", "--valid-fraction: found -0.1, expected at least 0"),
        ("prepare", "--seed=-1", "--seed: found -1, expected at least 0"),
        ("prepare", "--partition-mib=0", "--partition-mib: found 0, expected more than 0"),
        ("prepare", "--partition-mib=inf", "--partition-mib: found 'inf', expected a number"),
        ("prepare", "--workers=0", "--workers: found 0, expected at least 1"),
        ("prepare", "--text-field=", "--text-field: found '', expected some text"),
        ("prepare", "--bos=", "--bos: found '', expected some text"),
        ("train_tokenizer", "--vocab-size=0", "--vocab-size: found 0, expected at least 1"),
        ("train_tokenizer", "--vocab-size=1e4", "--vocab-size: found '1e4', expected an integer"),
        ("train_tokenizer", "--sample-characters=-1", "--sample-characters: found -1, expected at least 0"),
        ("train_tokenizer", "--threads=0", "--threads: found 0, expected at least 1"),
        ("train_tokenizer", "--seed=-3", "--seed: found -3, expected at least 0"),
        ("verify", "--threads=0", "--threads: found 0, expected at least 1"),
        ("show", "--lane=-1", "--lane: found -1, expected at least 0"),
        ("show", "--segment=-1", "--segment: found -1, expected at least 0"),
        ("show", "--segments=0", "--segments: found 0, expected at least 1"),
        ("show", "--lanes=0", "--lanes: found 0, expected at least 1"),
        ("show", "--segment-length=0", "--segment-length: found 0, expected at least 1"),
        ("show", "--seed=-1", "--seed: found -1, expected at least 0"),
        ("show", "--run-dir=runs/a", "found CORPUS and --run-dir, expected one of them"),
    ],
)
def test_a_value_out_of_its_range(program, argument, expected):
    assert mistakes(program, argument) == [expected]


@pytest.mark.parametrize(
    "program, argument, expected",
    [
        ("evaluate", "--run-dir=", "--run-dir: found '', expected a path"),
        ("generate", "--prompt=", "--prompt: found no text, expected some: models do not learn how documents begin"),
        ("generate", "--prompt-file=/", "--prompt-file: found the folder /, expected a file"),
        ("generate", "--prompt-file=/nowhere", "--prompt-file: found no file /nowhere"),
        ("prepare", "--output=", "--output: found '', expected a path"),
        ("prepare", "--tokenizer=/", "--tokenizer: found the folder /, expected a file"),
        ("prepare", "--tokenizer=/nowhere.model", "--tokenizer: found no file /nowhere.model"),
        ("prepare", "--input=", "--input: found '', expected a path or a URL"),
        ("train_tokenizer", "--output=", "--output: found '', expected a path"),
        ("train", "--run-dir=", "--run-dir: found '', expected a path"),
        ("train", "--config=", "--config: found '', expected a path or a URL"),
    ],
)
def test_a_required_option_without_sense(program, argument, expected):
    name = "--prompt" if "prompt" in argument else argument.partition("=")[0]
    assert mistakes(program, argument, instead_of=name) == [expected]


def test_all_mistakes_come_in_one_message():
    assert mistakes("generate", "--tokens=-1", "--top-p=2", "--seed=x", "--save=/nowhere/it") == [
        "--tokens: found -1, expected at least 0",
        "--top-p: found 2, expected at most 1",
        "--seed: found 'x', expected an integer",
        "--save: found no folder /nowhere",
    ]
    assert mistakes("show", "--run-dir=runs/a", "--lanes=0", "--seed=5") == [
        "--lanes: found 0, expected at least 1",
        "found CORPUS and --run-dir, expected one of them",
        "--lanes: found with --run-dir, which sets it",
        "--seed: found with --run-dir, which sets it",
    ]
    assert mistakes("prepare", "--workers=0", "--valid-fraction=7", "--exclude", "", "b") == [
        "--workers: found 0, expected at least 1",
        "--valid-fraction: found 7, expected less than 1",
        "--exclude: found '', expected some text",
    ]


def test_what_is_in_its_range_is_taken(tmp_path):
    options, sampling = generate.parse(
        [*GOOD["generate"][1], "--tokens=0", "--temperature=0", "--top-k=1", "--top-p=1", f"--seed={2**63 - 1}"]
    )
    assert (options.tokens, sampling.temperature, sampling.top_k, sampling.top_p) == (0, 0.0, 1, 1.0)
    assert options.seed == 2**63 - 1 and sampling == type(sampling)(temperature=0.0, top_k=1, top_p=1.0)
    assert str(generate.parse(["--run-dir=a", "--prompt-file=-"])[0].prompt_file) == "-"
    options = evaluate.parse(["--run-dir=a", "--lanes=1", "--max-segments=3", f"--json={tmp_path}/it.json"])
    assert (options.lanes, options.max_segments, options.json) == (1, 3, tmp_path / "it.json")


def test_types():
    assert integer(least=-5, most=5)("-5") == -5 and number(above=0, below=1)("0.5") == 0.5
    for limits, text, expected in (
        ({"above": 0}, "0", "more than 0"),
        ({"below": 1}, "1", "less than 1"),
        ({"most": 3}, "4", "at most 3"),
        ({}, "1e999", "a number"),
        ({}, "", "a number"),
    ):
        with pytest.raises(ValueError, match=f"expected {expected}"):
            number(**limits)(text)
    parser = Options("about", check=lambda options: ["--b: also wrong"])
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--a", type=parser.collecting("--a", file_to_read))
    with pytest.raises(UserError, match="^--a: found no file /nowhere\n--b: also wrong$"):
        parser.parse_args(["--a=/nowhere"])


@pytest.mark.parametrize(
    "command",
    [
        ("launch/train.py", "--config", "small", "--run-dir", ""),
        ("launch/evaluate.py", "--run-dir", "a", "--lanes", "0", "--max-segments", "0"),
        ("launch/corpus.py", "show", "c", "--lane", "-1"),
        ("launch/draw_evaluation.py", "--run-dir", "a", "--output", "it.txt"),
        ("launch/quickstart.py", "--runs", ""),
        ("benchmarks/mrbp.py", "--repeats", "0", "--json", "/nowhere/it.json"),
        ("benchmarks/precision.py", "--repeats", "-1"),
        ("benchmarks/data.py", "--folder", "/nowhere", "--text", "/nowhere"),
    ],
    ids=lambda command: command[0].rpartition("/")[2],
)
def test_programs_end_with_exit_code_2(command):
    done = run_script(*command)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    options = [word for word in command if word.startswith("--") and word not in ("--run-dir", "--config")]
    assert all(f"{option}: found" in done.stderr for option in options)


def test_no_option_is_taken_as_it_comes():
    """Numbers and paths of programs go through the types of commands/options.py."""
    sources = [*(ROOT / "memformer_dist/commands").glob("*.py"), *(ROOT / "launch").glob("*.py")]
    found = {
        f"{path.parent.name}/{path.name}": re.findall(
            r"type=(?:int|float|Path|str|path_option|text_option)\b", path.read_text()
        )
        for path in sources
    }
    assert found.pop("commands/options.py") == ["type=text_option"], "--set, which config.py checks"
    assert found.pop("commands/generate.py") == ["type=text_option"], "--prompt"
    assert not any(found.values()), found
