import errno
import json
import logging
import math
import os
import struct

import numpy as np
import pytest
import torch

from mmtrain.logging import ConsoleWriter, JsonLinesWriter, VisualizerWriter, cut_json_lines
from mmtrain.logging.writers import plain


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_line_is_read_back_bit_for_bit(tmp_path):
    writer = JsonLinesWriter(tmp_path / "vis_data" / "scalars.json")
    generator = torch.Generator().manual_seed(0)
    values = {f"v{i}": torch.rand((), generator=generator, dtype=torch.float64).item() * 10.0**i for i in range(-9, 9)}
    writer.write({"epoch": 1, "iter": 50, **values}, 50, kind="train")
    (line,) = lines_of(writer.path)
    assert {name: struct.pack("<d", line[name]) for name in values} == {
        name: struct.pack("<d", value) for name, value in values.items()
    }
    assert (line["mode"], line["step"], line["epoch"], line["iter"]) == ("train", 50, 1, 50)
    writer.close()


def test_values_that_json_lacks(tmp_path):
    writer = JsonLinesWriter(tmp_path / "scalars.json")
    writer.write({"nan": math.nan, "inf": -math.inf, "t": torch.tensor(2.0), "n": np.arange(2), "p": tmp_path}, 1)
    (line,) = lines_of(writer.path)
    assert math.isnan(line["nan"])
    assert (line["inf"], line["t"], line["n"], line["p"]) == (-math.inf, 2.0, [0, 1], str(tmp_path))
    writer.close()


def test_each_line_is_one_write_and_is_there_at_once(tmp_path, monkeypatch):
    writes = []
    original = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: writes.append(data) or original(fd, data))
    writer = JsonLinesWriter(tmp_path / "scalars.json")
    writer.write({"loss": 1.0}, 1)
    assert len(lines_of(writer.path)) == 1
    writer.write({"loss": 2.0, "eta": None}, 2, kind="val")
    assert [data.count(b"\n") for data in writes] == [1, 1]
    assert all(data.endswith(b"\n") for data in writes)
    writer.close()


def test_a_closed_writer_opens_again(tmp_path):
    writer = JsonLinesWriter(tmp_path / "scalars.json")
    writer.write({"loss": 1.0}, 1)
    writer.close()
    writer.close()
    writer.write({"loss": 2.0}, 2)
    writer.close()
    assert [line["step"] for line in lines_of(writer.path)] == [1, 2]


def test_a_full_disk_does_not_stop_the_run_or_split_a_line(tmp_path, monkeypatch, caplog):
    writer = JsonLinesWriter(tmp_path / "scalars.json")
    writer.write({"loss": 1.0}, 1)
    original, full = os.write, [True]

    def write(fd, data):
        if full[0]:
            return original(fd, data[:7])  # a short write is what a disk that fills up gives first
        return original(fd, data)

    monkeypatch.setattr(os, "write", write)
    with caplog.at_level(logging.WARNING, logger="mmtrain"):
        writer.write({"loss": 2.0}, 2)
        writer.write({"loss": 3.0}, 3)
    assert [record.message for record in caplog.records] == [
        f"cannot write {writer.path} ({os.strerror(errno.ENOSPC)}); will try again"
    ]
    assert [line["step"] for line in lines_of(writer.path)] == [1]
    full[0] = False
    writer.write({"loss": 4.0}, 4)
    assert [line["step"] for line in lines_of(writer.path)] == [1, 2, 3, 4]
    writer.close()


def test_a_writer_appends_to_a_file_that_was_cut(tmp_path):
    writer = JsonLinesWriter(tmp_path / "scalars.json")
    for step in (10, 20, 30):
        writer.write({"loss": float(step)}, step)
        writer.write({"acc": 0.5}, step, kind="val")
    writer.close()
    assert cut_json_lines(writer.path, 20) == 2
    writer.write({"loss": 25.0}, 25)
    writer.close()
    assert [line["step"] for line in lines_of(writer.path)] == [10, 10, 20, 20, 25]


def test_the_console_writer_gives_the_text_to_the_logger(caplog):
    logger = logging.getLogger("test_console_writer")
    writer = ConsoleWriter(logger)
    with caplog.at_level(logging.INFO, logger=logger.name):
        writer.write({"loss": 1.0}, 1, text="100% of it")
        writer.write({"loss": 1.0}, 1)
        writer.flush()
        writer.close()
    assert [record.getMessage() for record in caplog.records] == ["100% of it"]


class Backend:
    def __init__(self):
        self.calls, self.closed, self.flushed = [], False, 0

    @property
    def experiment(self):
        return self

    def flush(self):
        self.flushed += 1

    def add_scalars(self, scalars, step=0, file_path=None):
        self.calls.append((scalars, step))

    def close(self):
        self.closed = True


class LocalVisBackend(Backend):
    pass


class FakeVisualizer:
    def __init__(self, **backends):
        self._vis_backends = backends


def test_the_visualizer_writer_keeps_val_out_of_the_training_curves():
    backend, local = Backend(), LocalVisBackend()
    writer = VisualizerWriter(FakeVisualizer(tb=backend, local=local))
    writer.write({"epoch": 1, "iter": 5, "step": 5, "loss": 2.0, "lr": 0.1, "note": "x"}, 5)
    writer.write({"epoch": 1, "iter": 5, "loss": torch.tensor(1.5), "coco/mAP": 0.3}, 5, kind="val")
    writer.flush()
    writer.close()
    assert backend.calls == [
        ({"epoch": 1, "iter": 5, "loss": 2.0, "lr": 0.1}, 5),
        ({"val/loss": 1.5, "coco/mAP": 0.3}, 5),
    ]
    assert local.calls == []  # its file is the one that JsonLinesWriter writes
    assert (backend.flushed, backend.closed) == (1, True)


def test_a_backend_whose_disk_fails_is_left_out(caplog):
    class Backend:
        def __init__(self, error=None):
            self.error, self.steps = error, []

        def add_scalars(self, scalars, step):
            if self.error is not None:
                raise self.error
            self.steps.append(step)

        def close(self):
            assert self.error is None

    class Visualizer:
        def __init__(self):
            self._vis_backends = {"broken": Backend(OSError(errno.EIO, os.strerror(errno.EIO))), "good": good}

    good = Backend()
    writer = VisualizerWriter(Visualizer())
    with caplog.at_level(logging.WARNING, "mmtrain"):
        for step in (1, 2, 3):
            writer.write({"loss": 1.0}, step)
        writer.flush()
        writer.close()
    assert good.steps == [1, 2, 3]
    assert [record.message for record in caplog.records] == [
        "Backend cannot write (Input/output error); it gets no more scalars in this run, scalars.json has them all"
    ]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(True, True), (None, None), ({"a": (1, torch.ones(2))}, {"a": [1, [1.0, 1.0]]}), (1 + 2j, "(1+2j)")],
)
def test_plain(value, expected):
    assert plain(value) == expected
