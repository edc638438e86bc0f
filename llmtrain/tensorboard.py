"""TensorBoard event files, written with TensorBoard's own writer (which needs no torch and imports fast)."""

import time
from pathlib import Path

# pyright: reportAttributeAccessIssue=false
# (protobuf makes these classes when it is imported)
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter

Scalar = float | int


class TensorBoard:
    """One writer into one folder, in increasing steps."""

    def __init__(self, folder: Path, first_step: int):
        """With `first_step` above 0, points of an earlier life of the run from that step on are hidden."""
        self._writer = EventFileWriter(str(folder), flush_secs=10)
        if first_step > 0:
            start = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=time.time(), step=first_step, session_log=start))

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
        for tag, data in (
            (metadata.EXPERIMENT_TAG, plugin_data_pb2.HParamsPluginData(experiment=experiment)),
            (metadata.SESSION_START_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_start_info=start)),
        ):
            entry = Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(data), tensor=metadata.NULL_TENSOR)
            self._write(0, [entry])

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _write(self, step: int, entries: list[Summary.Value], wall_time: float | None = None) -> None:
        event = Event(wall_time=wall_time or time.time(), step=step, summary=Summary(value=entries))
        self._writer.add_event(event)
