"""What TensorBoard is given, read with the messages' own classes."""

import math

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jaxtune.events import Events, _checksum
from jaxtune.runlog import RunLog


def read(folder):
    """The events of all files of a folder, in order."""
    events = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:  # a TFRecord: length, its checksum, the event, its checksum
            size = int.from_bytes(data[:8], "little")
            assert data[8:12] == _checksum(data[:8]) and data[12 + size : 16 + size] == _checksum(data[12 : 12 + size])
            events.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return events


def test_the_checksum_is_crc32c():
    crc = 0xE3069283  # of "123456789", RFC 3720's and everyone's example
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    assert _checksum(b"123456789") == masked.to_bytes(4, "little")


def test_numbers_by_tag_and_step(tmp_path):
    events = Events(tmp_path / "events")
    events.add(1, {"train/loss": 2.5, "train/tokens": 1e12})
    events.add(300_000, {"eval/loss": math.nan, "eval/perplexity": 1e60})
    events.close()
    first, one, two = read(tmp_path / "events")
    assert first.file_version == "brain.Event:2" and one.wall_time >= first.wall_time > 1.6e9
    assert [(value.tag, value.simple_value) for value in one.summary.value] == [("train/loss", 2.5), ("train/tokens", pytest.approx(1e12))]
    assert one.step == 1 and two.step == 300_000
    assert math.isnan(two.summary.value[0].simple_value) and two.summary.value[1].simple_value == math.inf


def test_a_resumed_run_makes_later_steps_forgotten(tmp_path):
    RunLog(tmp_path, 10).close()
    log = RunLog(tmp_path, 10, start=4)
    log.write(5, {"loss": 0.25, "eval_loss": 0.5})
    log.close()
    events = read(tmp_path / "tensorboard")
    (start,) = (event for event in events if event.session_log.status == SessionLog.START)
    assert start.step == 5  # this and later ones of the file before
    assert [(value.tag, value.simple_value) for value in events[-1].summary.value] == [("train/loss", 0.25), ("eval/loss", 0.5)]
