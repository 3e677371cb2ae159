"""Every script explains itself: --help works and shows a command to copy."""

import re
import runpy
import sys

import pytest

from tests.helpers import ROOT

SCRIPTS = sorted(
    str(path.relative_to(ROOT)) for folder in ("launch", "tokenizer") for path in (ROOT / folder).glob("*.py")
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_an_example(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")  # in this process, which has imported torch already
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and shown.startswith(f"usage: {script.rpartition('/')[2]}")
    example = rf"^    (python|deepspeed|bash) {re.escape(script.removesuffix('.py'))}\.(py|sh)( .+)?$"
    assert re.search(example, shown, re.MULTILINE), shown
