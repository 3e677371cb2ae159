"""A configuration with one field changed, and what is found wrong with it."""

import pytest

from memformer_dist.config import RunConfig
from memformer_dist.errors import UserError


def put(config: dict, name: str, value) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        config = config.setdefault(parent, {})
    config[last] = value


def problems(config: dict, world_size: int = 1) -> list[str]:
    """The lines of the one message, without its first."""
    with pytest.raises(UserError) as caught:
        RunConfig.check(config, world_size)
    first, *lines = str(caught.value).splitlines()
    assert first == f"configuration: {len(lines)} problem{'s' * (len(lines) > 1)}"
    return [line.removeprefix("  ") for line in lines]
