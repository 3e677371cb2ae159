"""The programs: command lines in front of the functions that do the work.

`launch/train.py` and its like, and the names of an installed package (memformer-train), begin here: signals are heard
before a program is imported, because torch takes seconds.
"""

from importlib import import_module

from memformer_dist import signals


def run_train() -> None:
    """A request to stop is noted from here on; the run honours it once it is set up."""
    signals.note_stop_requests()
    _run("train")


def run_prove() -> None:
    """A request to stop is noted from here on, as for training."""
    signals.note_stop_requests()
    _run("prove")


def run_continual() -> None:
    """A request to stop is noted from here on, as for training."""
    signals.note_stop_requests()
    _run("continual")


def run_prepare() -> None:
    """Ctrl-C is a KeyboardInterrupt once everything is imported: preparation tidies up."""
    listener = signals.end_at_once()
    program = import_module(f"{__name__}.prepare")
    listener.close()
    program.run()


def run_evaluate() -> None:
    _run_until_ctrl_c("evaluate")


def run_generate() -> None:
    _run_until_ctrl_c("generate")


def run_train_tokenizer() -> None:
    _run_until_ctrl_c("train_tokenizer")


def run_corpus() -> None:
    _run_until_ctrl_c("corpus")


def _run_until_ctrl_c(name: str) -> None:
    signals.end_at_once()
    _run(name)


def _run(name: str) -> None:
    import_module(f"{__name__}.{name}").run()
