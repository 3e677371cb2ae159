"""Configurations and checkpoints of earlier versions, in today's words: one function, where they are read and nowhere else."""

import logging
from typing import Any

logger = logging.getLogger(__name__)

CHECKPOINT_VERSION = 2
RENAMED = {"training.evaluate_ticks": "training.evaluate_segments"}  # fields of a configuration, old name: new name


def upgrade(raw: Any) -> Any:
    """A configuration (an object of sections) or a checkpoint.json as read from JSON -> the same as it is written today.

    What is of today already comes back as it is, and so does what is neither: whoever validates it says what is wrong.
    The argument is left as it was.
    """
    if not isinstance(raw, dict):
        return raw
    if raw.get("version") == 1 and "position" in raw:
        interval = raw.get("interval")
        if isinstance(interval, dict):  # version 1 called the tokens that were read `tokens`, the labels `labels`
            names = {"tokens": "input_tokens", "labels": "tokens"}
            interval = {names.get(name, name): value for name, value in interval.items()}
            raw = raw | {"interval": interval}
        return raw | {"version": CHECKPOINT_VERSION, "config": _configuration(raw.get("config"))}
    if "position" in raw:
        return raw
    return _configuration(raw)


def _configuration(raw: Any) -> Any:
    if not isinstance(raw, dict):
        return raw
    if isinstance(raw.get("model"), dict) and "cell" not in raw["model"]:  # there was one cell
        raw = raw | {"model": {"cell": "memformer"} | raw["model"]}
    for old, new in RENAMED.items():
        section, _, name = old.partition(".")
        fields = raw.get(section)
        if isinstance(fields, dict) and name in fields:
            logger.warning("%s is called %s now", old, new)
            renamed = {new.partition(".")[2] if field == name else field: value for field, value in fields.items()}
            raw = raw | {section: renamed}
    return raw
