"""TensorBoard event files, made of TensorBoard's own messages (which need no torch and import fast).

The file is written here: TensorBoard's writer computes each checksum in Python, and hands every event to a thread,
which takes the interpreter from the loop (docs/log.md).
"""

import itertools
import os
import socket
import struct
import time
from pathlib import Path

import google_crc32c

# pyright: reportAttributeAccessIssue=false
# (protobuf makes these classes when it is imported)
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT, DT_STRING
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2  # its `metadata` would import fsspec: 0.15 s

Scalar = float | int
_files = itertools.count()
_PREFIX = "events.out.tfevents."


class TensorBoard:
    """One writer into one folder, in increasing steps."""

    def __init__(self, folder: Path, first_step: int):
        """Points of an earlier life of the run from `first_step` on are hidden."""
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads a folder's files in the order of their names: after the last one, whatever the clock says.
        number = max(int(time.time()), _last_number(folder) + 1)
        name = f"{_PREFIX}{number:010d}.{socket.gethostname()}.{os.getpid()}.{next(_files):04}"
        self._file = (folder / name).open("wb")
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # TensorBoard's loader in Python takes the first start that it meets in a folder for the beginning of the run
        # and hides nothing; whether files that lie here already begin with one is not known.
        for _ in range(2):
            start = SessionLog(status=SessionLog.START)
            self._add(Event(wall_time=time.time(), step=first_step, session_log=start))
        self.flush()

    def scalars(self, step: int, values: dict[str, Scalar], wall_time: float | None = None) -> None:
        entries = [Summary.Value(tag=tag, simple_value=float(value)) for tag, value in values.items()]
        self._write(step, entries, wall_time)

    def text(self, step: int, tag: str, markdown: str) -> None:
        tensor = TensorProto(
            dtype=DT_STRING,
            string_val=[markdown.encode()],
            tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
        )
        data = SummaryMetadata.PluginData(plugin_name="text", content=b"")
        entry = Summary.Value(tag=f"{tag}/text_summary", metadata=SummaryMetadata(plugin_data=data), tensor=tensor)
        self._write(step, [entry])

    def hparams(self, settings: dict[str, Scalar | str | bool], metrics: list[str]) -> None:
        """Settings of this run and the scalars to compare runs by, for TensorBoard's HParams page."""
        infos = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in metrics]
        experiment = api_pb2.Experiment(
            hparam_infos=[api_pb2.HParamInfo(name=name) for name in settings], metric_infos=infos
        )
        start = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
        for name, value in settings.items():
            match value:
                case bool():
                    start.hparams[name].bool_value = value
                case int() | float():
                    start.hparams[name].number_value = value
                case _:
                    start.hparams[name].string_value = value
        nothing = TensorProto(dtype=DT_FLOAT, tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=0)]))
        for tag, content in (
            ("_hparams_/experiment", plugin_data_pb2.HParamsPluginData(version=0, experiment=experiment)),
            ("_hparams_/session_start_info", plugin_data_pb2.HParamsPluginData(version=0, session_start_info=start)),
        ):
            data = SummaryMetadata.PluginData(plugin_name="hparams", content=content.SerializeToString())
            self._write(0, [Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=data), tensor=nothing)])

    def flush(self) -> None:
        """Show readers what was written. Before that, most of it lies in this process."""
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, step: int, entries: list[Summary.Value], wall_time: float | None = None) -> None:
        self._add(Event(wall_time=wall_time or time.time(), step=step, summary=Summary(value=entries)))

    def _add(self, event: Event) -> None:
        """One TFRecord: length (uint64), its checksum, event, its checksum; little-endian."""
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        self._file.write(b"".join((length, _masked_crc(length), data, _masked_crc(data))))


def _last_number(folder: Path) -> int:
    """Of the event files that lie there; mostly the time at which the last one was begun."""
    numbers = (path.name.removeprefix(_PREFIX).partition(".")[0] for path in folder.glob(f"{_PREFIX}*"))
    return max((int(number) for number in numbers if number.isdigit()), default=0)


def _masked_crc(data: bytes) -> bytes:
    """CRC-32C, rotated and shifted as TFRecord has it (tensorflow/core/lib/hash/crc32c.h)."""
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
