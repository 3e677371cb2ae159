"""A run's records as TensorBoard reads them: events, in one folder, which TensorBoard shows as one run.

Every figure is there twice: under its own name by step, and under `tokens/NAME` by tokens trained on, which is how runs
of different batch sizes are compared. Different names, because TensorBoard has one axis for a name, and because thousands
of steps would be a point beside billions of tokens.

With them go a description for every name, the configuration as text, and the layout of the page "Custom Scalars": the
losses of an evaluation in one chart, its gaps in another.

A curve is a histogram per record, whose buckets count nothing but draw: bucket x = 1, 2, ... reaches from x - 1/2 to x +
1/2 and is as high as the value there.

TensorBoard could drop what a resumed run writes again by itself, but only for all names of a run at one x, and these
have two. So `drop_later` takes it out of the files.
"""

import io
import math
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SourceMetadata
from tensorboard.compat.proto.histogram_pb2 import HistogramProto
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR, DATA_CLASS_TENSOR, Summary
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as layout_metadata
from tensorboard.plugins.histogram import metadata as histogram_metadata
from tensorboard.plugins.scalar import metadata as scalar_metadata
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_tensor_proto

from memformer_dist.metrics import EVALUATION, description
from memformer_dist.progress import Position

BY_TOKENS = "tokens/"  # how names begin whose x is the tokens trained on
SCALAR = (scalar_metadata.PLUGIN_NAME, DATA_CLASS_SCALAR)
HISTOGRAM = (histogram_metadata.PLUGIN_NAME, DATA_CLASS_TENSOR)
PATTERN = "events.out.tfevents.*"  # what TensorBoard takes for a file of events

Values = dict[str, float | list[float] | None]  # figures and curves by name


class Encoder:
    """Records as bytes of a file of events. The first event of a name has its description."""

    def __init__(self) -> None:
        self._described: set[str] = set()

    def head(self, position: Position, time: float, configuration: str) -> bytes:
        """What a file begins with: the format's version, the configuration, and the layout of charts."""
        version = Event(wall_time=time, file_version="brain.Event:2", source_metadata=SourceMetadata(writer=__name__))
        metadata = text_metadata.create_summary_metadata("configuration", "the resolved configuration of each start")
        text = make_tensor_proto([f"```json\n{configuration}\n```"])
        layout = make_tensor_proto(charts().SerializeToString())
        start = Summary(
            value=[
                Summary.Value(tag="configuration", metadata=metadata, tensor=text),
                Summary.Value(
                    tag=layout_metadata.CONFIG_SUMMARY_TAG,
                    metadata=layout_metadata.create_summary_metadata(),
                    tensor=layout,
                ),
            ]
        )
        return _framed(version) + _framed(Event(wall_time=time, step=position.step, summary=start))

    def record(self, position: Position, time: float, values: Values) -> bytes:
        """A record, once for either axis. None stands for what was not finite."""
        by_axis = (("", position.step), (BY_TOKENS, position.tokens))
        return b"".join(
            _framed(Event(wall_time=time, step=x, summary=Summary(value=list(self._summaries(prefix, values)))))
            for prefix, x in by_axis
        )

    def _summaries(self, prefix: str, values: Values) -> Iterator[Summary.Value]:
        for name, value in values.items():
            found = Summary.Value(tag=prefix + name)
            if not isinstance(value, list):
                found.simple_value = math.nan if value is None else value
            elif all(x is not None and math.isfinite(x) for x in value):
                found.histo.CopyFrom(_histogram(value[::-1]))
            else:
                continue
            if found.tag not in self._described:
                self._described.add(found.tag)
                plugin, data_class = HISTOGRAM if isinstance(value, list) else SCALAR
                # Without the class of its data TensorBoard's fast loader leaves out what else there is here.
                found.metadata.data_class = data_class
                found.metadata.plugin_data.plugin_name = plugin
                found.metadata.summary_description = ("by tokens trained on: " if prefix else "") + description(name)
            yield found


def charts() -> layout_pb2.Layout:
    """The page "Custom Scalars": what belongs together in one chart."""
    names = [metric.name for metric in EVALUATION]
    layout = layout_pb2.Layout()
    for title, prefix in (("held-out documents", ""), ("held-out documents, by tokens", BY_TOKENS)):
        category = layout.category.add(title=title)
        for start, of_chart in (("loss", "loss by what is taken away"), ("gap", "what the memory is worth")):
            tags = [f"^{prefix}eval/{name}$" for name in names if name.startswith(start)]
            category.chart.add(title=of_chart, multiline=layout_pb2.MultilineChartContent(tag=tags))
    return layout


def new_file(folder: Path, time: float) -> Path:
    """The path of a file that TensorBoard reads after those in the folder: it goes by their names."""
    begun = [int(path.name.split(".")[3]) for path in event_files(folder)]
    second = max([int(time), *(earlier + 1 for earlier in begun)])
    return folder / f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}"


def event_files(folder: Path) -> list[Path]:
    """In the order in which TensorBoard reads them."""
    return sorted(path for path in folder.glob(PATTERN) if path.name.split(".")[3].isdigit())


def drop_later(folder: Path, position: Position) -> None:
    """Take out of the files what was recorded after `position`. Raises OSError."""
    files = event_files(folder)
    for number, path in enumerate(files):
        if _cut(path, lambda event: not _is_kept(event, position)):
            for later in files[number + 1 :]:
                later.unlink()
            return


def _is_kept(event: Event, position: Position) -> bool:
    if not event.summary.value:
        return True
    tag = event.summary.value[0].tag
    by_tokens, name = tag.startswith(BY_TOKENS), tag.removeprefix(BY_TOKENS)
    if not name.startswith("eval/"):
        return event.step <= (position.tokens if by_tokens else position.step)
    # An evaluation at the checkpoint's step may have come after the checkpoint.
    return event.step <= (position.evaluated if by_tokens else position.step - (position.evaluated < position.tokens))


def _cut(path: Path, is_later: Callable[[Event], bool]) -> bool:
    """End a file before its first event that comes later; at one that is not whole, too. Returns whether it did."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        start = 0
        while start < size:
            head = file.read(12)  # length, uint64, and its checksum
            length = struct.unpack("<Q", head[:8])[0] if len(head) == 12 else size
            end = start + 12 + length + 4
            if end > size or is_later(_decoded(file.read(length + 4)[:-4])):
                file.truncate(start)
                return end <= size
            start = end
    return False


def _decoded(raw: bytes) -> Event:
    try:
        return Event.FromString(raw)
    except DecodeError:
        return Event()  # a damaged event, behind which TensorBoard reads nothing of the file


def _framed(event: Event) -> bytes:
    frame = io.BytesIO()
    RecordWriter(frame).write(event.SerializeToString())
    return frame.getvalue()


def _histogram(values: list[float]) -> HistogramProto:
    """A histogram as TensorBoard stores it, whose bucket around x = 1, 2, ... holds `values` in turn.

    TensorBoard drops empty buckets at both ends and takes min and max for the outer edges of what remains. Its
    percentiles divide by num, hence the total.
    """
    drawn = [x for x, value in enumerate(values, start=1) if value] or [1]
    fields: dict[str, Any] = {
        "min": drawn[0] - 0.5,
        "max": drawn[-1] + 0.5,
        "num": sum(values),
        "sum": sum(x * value for x, value in enumerate(values, start=1)),
        "sum_squares": sum(x * x * value for x, value in enumerate(values, start=1)),
        "bucket_limit": [x + 0.5 for x in range(1, len(values) + 1)],
        "bucket": values,
    }
    return HistogramProto(**fields)
