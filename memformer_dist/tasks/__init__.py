"""The tasks there are. `data.task.name` in a configuration names one of them; docs/proof.md says what each one asks."""

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from memformer_dist.tasks.base import TaskConfig
from memformer_dist.tasks.copying import CopyConfig
from memformer_dist.tasks.needle import NeedleConfig
from memformer_dist.tasks.retrieval import RetrievalConfig
from memformer_dist.tasks.stories import StoriesConfig

TASKS: dict[str, type[TaskConfig]] = {
    config.model_fields["name"].default: config for config in (NeedleConfig, CopyConfig, RetrievalConfig, StoriesConfig)
}


def task_model(value: Any) -> type[TaskConfig] | None:
    """Return which task a raw or validated `data.task` is meant to be, None if it is none."""
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return TASKS.get(name) if isinstance(name, str) else None


def _tag(value: Any) -> str | None:
    model = task_model(value)
    return None if model is None else f"<{model.model_fields['name'].default}>"


TaskSection = Annotated[
    Annotated[NeedleConfig, Tag("<needle>")]
    | Annotated[CopyConfig, Tag("<copy>")]
    | Annotated[RetrievalConfig, Tag("<retrieval>")]
    | Annotated[StoriesConfig, Tag("<stories>")],
    Discriminator(
        _tag,
        custom_error_type="task",
        custom_error_message=f"expected an object whose `name` is one of {', '.join(TASKS)}",
    ),
]
