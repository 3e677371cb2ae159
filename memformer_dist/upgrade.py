"""Configurations and checkpoints of earlier versions, brought to today's names in one place: where they are read.

    raw = upgrade(json.loads(path.read_text()))        # then validate; everything else knows today's names alone

Version 1 of a checkpoint, and the configurations of its time, differ from version 2 in names only:

    training.evaluate_ticks            training.evaluate_segments
    no model.cell                      model.cell "memformer", the only cell there was
    interval.tokens, interval.labels   interval.input_tokens, interval.tokens
"""

from typing import Any

CHECKPOINT_VERSION = 2
RENAMED = {"training.evaluate_ticks": "training.evaluate_segments"}  # fields of a configuration, old name: new name
INTERVAL_RENAMED = {"tokens": "input_tokens", "labels": "tokens"}


def upgrade(raw: Any) -> Any:
    """Return a configuration (an object of sections) or a checkpoint.json, as read from JSON, as it is written today.

    What has today's names already is returned unchanged. So is what is neither of the two: its validation reports what is
    wrong. The argument is not modified.
    """
    if not isinstance(raw, dict):
        return raw
    if "position" not in raw:
        return _configuration(raw)
    if raw.get("version") != 1:
        return raw
    upgraded = raw | {"version": CHECKPOINT_VERSION, "config": _configuration(raw.get("config"))}
    if isinstance(interval := raw.get("interval"), dict):
        upgraded["interval"] = {INTERVAL_RENAMED.get(name, name): value for name, value in interval.items()}
    return upgraded


def outdated_fields(raw: Any) -> dict[str, str]:
    """Return the fields of a configuration that stand under an earlier name, as {old name: new name}."""
    return {old: new for old, new in RENAMED.items() if _has(raw, old)}


def _configuration(raw: Any) -> Any:
    if not isinstance(raw, dict):
        return raw
    model = raw.get("model")
    if isinstance(model, dict) and "cell" not in model:
        raw = raw | {"model": {"cell": "memformer"} | model}
    for old, new in outdated_fields(raw).items():
        (section, old_name), new_name = old.split("."), new.partition(".")[2]
        fields = {new_name if name == old_name else name: value for name, value in raw[section].items()}
        raw = raw | {section: fields}
    return raw


def _has(raw: Any, field: str) -> bool:
    section, name = field.split(".")
    fields = raw.get(section) if isinstance(raw, dict) else None
    return isinstance(fields, dict) and name in fields
