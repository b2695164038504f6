"""Files and servers that are damaged, odd or hostile: weights or one CheckpointError, and never a hang or much memory."""

import collections
import contextlib
import functools
import json
import os
import pickle
import random
import re
import socket
import struct
import threading
import time
import zipfile

import pytest
import torch
from limits import limited
from safetensors.torch import save_file

from mmtrain.checkpoint import CheckpointStore, load_weights
from mmtrain.checkpoint.foreign import deepspeed_files, fetch
from mmtrain.errors import CheckpointError

STATE = {"w": torch.arange(600.0).reshape(2, 300), "b": torch.ones(2).bfloat16()}
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@pytest.fixture(autouse=True)
def _nothing_takes_long_or_much():
    with limited(100):
        yield


def outcome(source):
    """The sentence of the error, or None where weights were found."""
    try:
        load_weights(source)
    except CheckpointError as error:
        text = str(error)
        assert not CONTROL.search(text)
        assert "\n" not in text
        assert len(text) < 2000
        return text
    return None


def refused(source, match):
    text = outcome(source)
    assert text is not None, f"{source} was read"
    assert re.search(match, text), text


# ---- files
def zip_file(folder):
    torch.save({"state_dict": STATE, "meta": {"epoch": 1}}, folder / "a.pth")
    return folder / "a.pth"


def legacy_file(folder):
    torch.save(STATE, folder / "old.pth", _use_new_zipfile_serialization=False)
    return folder / "old.pth"


def safetensors_file(folder):
    save_file(STATE, folder / "a.safetensors")
    return folder / "a.safetensors"


def sharded(folder):
    save_file(STATE, folder / "part-1.safetensors")
    weight_map = dict.fromkeys(STATE, "part-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder / "model.safetensors.index.json"


def deepspeed_model(folder):
    optimizer = {"single_partition_of_fp32_groups": [torch.arange(602.0)]}
    shapes = collections.OrderedDict((name, tensor.shape) for name, tensor in STATE.items())
    torch.save({"module": STATE, "param_shapes": [shapes], "dp_world_size": 1}, folder / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": optimizer}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (folder / "latest").write_text(".")
    return folder / "mp_rank_00_model_states.pt"


def deepspeed_optimizer(folder):
    deepspeed_model(folder)
    return folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"


def mmtrain_tensors(folder):
    with contextlib.closing(CheckpointStore(folder)) as store:
        store.save("iter_1.pth", {"model": STATE}, blocking=True)
    return folder / "iter_1.pth" / "model" / "rank_00000_part_00000.safetensors"


def source_of(path):
    """What a user names: the file, or the directory that it is in."""
    if "iter_1.pth" in path.parts:
        return path.parent.parent
    return path if path.name in ("a.pth", "old.pth", "a.safetensors") else path.parent


MAKERS = [zip_file, legacy_file, safetensors_file, sharded, deepspeed_model, deepspeed_optimizer, mmtrain_tensors]


@pytest.mark.parametrize("make", MAKERS)
def test_what_is_made_here_can_be_read(make, tmp_path):
    assert outcome(source_of(make(tmp_path))) is None


@pytest.mark.parametrize("make", MAKERS)
def test_a_file_that_was_cut_or_filled_with_noise(make, tmp_path):
    path = make(tmp_path)
    data = path.read_bytes()
    generator = random.Random(7)
    cuts = [data[:length] for length in (0, 1, 7, 8, 9, len(data) // 2, len(data) - 1)]
    cuts += [data[: generator.randrange(len(data))] for _ in range(5)]
    for cut in [*cuts, bytes(len(data)), b"\xff" * len(data), b"[" * 100_000, generator.randbytes(5_000)]:
        path.write_bytes(cut)
        refused(source_of(path), re.escape(tmp_path.name))
    for _ in range(25):
        place = generator.randrange(len(data))
        path.write_bytes(data[:place] + generator.randbytes(8) + data[place + 8 :])
        outcome(source_of(path))  # noise among the values is found by hashes alone


@pytest.mark.slow
@pytest.mark.parametrize("make", MAKERS)
def test_noise_anywhere(make, tmp_path):
    path = make(tmp_path)
    data = path.read_bytes()
    generator = random.Random(8)
    for _ in range(1_500):
        place, length = generator.randrange(len(data)), generator.choice((1, 2, 8, 64))
        path.write_bytes(data[:place] + generator.randbytes(length) + data[place + length :])
        outcome(source_of(path))


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "device", "folder", "link to itself", "sparse"])
def test_what_is_not_a_file(make, kind, tmp_path):
    path = make(tmp_path)
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a pipe":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to itself":
        path.symlink_to(path.name)
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    refused(source_of(path), re.escape(tmp_path.name))


@pytest.mark.parametrize("kind", ["pipe", "device", "sparse", "nul"])
def test_the_tag_of_a_deepspeed_directory_is_a_small_file(kind, tmp_path):
    deepspeed_model(tmp_path)
    latest = tmp_path / "latest"
    latest.unlink()
    if kind == "pipe":
        os.mkfifo(latest)
    elif kind == "device":
        latest.symlink_to("/dev/zero")
    elif kind == "nul":
        latest.write_text("a\0b")
    else:
        with latest.open("wb") as file:
            file.truncate(1 << 40)
    assert outcome(tmp_path) is None  # the files beside it are enough


INDEXES = {
    "itself": ({"w": "model.safetensors.index.json"}, "index itself"),
    "another index": ({"w": "other.index.json"}, "index itself"),
    "outside": ({"w": "../a.safetensors"}, "not a file beside it"),
    "absent": ({"w": "absent.safetensors"}, "missing"),
    "a NUL": ({"w": "a\0.safetensors"}, "missing"),
    "half a surrogate": ({"w": "\ud800.safetensors"}, "missing|cannot be read"),
    "a name that is too long": ({"w": "a" * 70_000}, "not a file beside it"),
    "the folder": ({"w": "."}, "not a file beside it|directory"),
    "no text": ({"w": 3}, "missing"),
    "a list": ([1], "not an index"),
    "null": (None, "not an index"),
    "a name that it has not": ({"w": "part-1.safetensors", "q\x1b[2J": "part-1.safetensors"}, "not in any file"),
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_of_sharded_weights(name, tmp_path):
    path = sharded(tmp_path)
    weight_map, match = INDEXES[name]
    (tmp_path / "other.index.json").write_text(path.read_text())
    path.write_text(json.dumps({"weight_map": weight_map}))
    refused(tmp_path, match)


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "3", '{"weight_map": ' + "[" * 100_000, "9" * 5_000])
def test_an_index_that_is_none(text, tmp_path):
    path = sharded(tmp_path)
    path.write_text(text)
    refused(tmp_path, "not an index of sharded weights")


HEADERS = [
    {"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
    {"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}},
    {"w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
    {"w": {"dtype": "NOPE", "shape": [2], "data_offsets": [0, 8]}},
    {"w": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 8]}},
    {"w": 3},
    {"__metadata__": {"a": 1}},
    [],
    None,
]


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_of_safetensors(header, tmp_path):
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    refused(tmp_path / "a.safetensors", "cannot be read as safetensors")


@pytest.mark.parametrize("length", [0, 1, 1 << 20, (1 << 63) - 1, (1 << 64) - 1])
def test_a_length_of_safetensors(length, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length) + b"{" * 1000)
    refused(tmp_path / "a.safetensors", "cannot be read as safetensors")


# ---- pickles
def holds_itself():
    value: list = []
    value.append(value)
    return {"state_dict": STATE, "meta": value}


def doubled():
    value: tuple = ()
    for _ in range(60):
        value = (value, value)
    return {"state_dict": STATE, "meta": value}


def nested():
    value: list = []
    for _ in range(100_000):
        value = [value]
    return value


def test_contents_that_hold_themselves_or_are_shared_many_times(tmp_path):
    for number, make in enumerate((holds_itself, doubled)):
        folder = tmp_path / str(number)
        folder.mkdir()
        torch.save(make(), folder / "a.pth")
        assert outcome(folder / "a.pth") is None
        (folder / "a.pth").rename(folder / "mp_rank_00_model_states.pt")
        with pytest.raises(CheckpointError, match="too many values, or holds itself"):  # as `checkpoint diff` reads it
            list(deepspeed_files.contents(folder))


def raw_pickle(*parts):
    return b"\x80\x02" + b"".join(parts) + b"."


PICKLES = {
    "a bytearray of any size": (raw_pickle(b"cbuiltins\nbytearray\n", b"\x8a\x05\x00\x00\x00\x00\x02", b"\x85R"), "bytearray"),
    "thousands of classes": (raw_pickle(b"(", b"".join(b"cother%d\nThing\n" % i for i in range(200)), b"l"), "128 classes"),
    "an opcode that there is not": (b"\x80\x02\xf9.", "cannot be read as weights"),
    "an empty stack": (raw_pickle(b"R"), "cannot be read as weights"),
    "a memo that is not there": (raw_pickle(b"h\x05"), "cannot be read as weights"),
    "a version of its own": (b"\x80\x63N.", "cannot be read as weights"),
    "only a number": (raw_pickle(b"K\x07"), "cannot be read as weights|expected a dict"),
    "nothing": (b".", "cannot be read as weights"),
}  # fmt: skip


@pytest.mark.parametrize("form", ["zip", "plain"])
@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle(name, form, tmp_path):
    data, match = PICKLES[name]
    path = tmp_path / "a.pth"
    if form == "plain":
        path.write_bytes(data)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for part, content in (("data.pkl", data), ("version", b"3\n"), ("byteorder", b"little")):
                archive.writestr(f"a/{part}", content)
    refused(path, match if form == "plain" or "classes" not in match else "expected a dict|cannot be read")


def test_a_pickle_nested_deeply(tmp_path):
    depth = 100_000
    data = raw_pickle(b"}X\x01\x00\x00\x00w", b"]" * depth, b"a" * (depth - 1), b"s")
    (tmp_path / "a.pth").write_bytes(data)
    refused(tmp_path / "a.pth", "no tensors by name|cannot be read")


def test_an_archive_that_unpacks_to_more_than_it_is(tmp_path):
    torch.save(STATE, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as old, zipfile.ZipFile(tmp_path / "a.pth", "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry), compress_type=zipfile.ZIP_DEFLATED)
        new.writestr("plain/data/9", bytes(1 << 26), compress_type=zipfile.ZIP_DEFLATED)
    refused(tmp_path / "a.pth", "is compressed or larger than the file")


@pytest.mark.parametrize(
    ("kind", "make"),
    {
        "meta": lambda: torch.empty(2, 300, device="meta"),
        "sparse": lambda: torch.eye(3).to_sparse(),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    }.items(),
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_without_plain_values(kind, make, tmp_path):
    torch.save({"w\x1b[2J": make()}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", f"is a {kind}.* tensor, expected a dense one|cannot be read as weights")


def test_names_of_sources(tmp_path):
    for source in (
        "",
        "\0",
        "a" * 1_500,
        "~nosuchuser/a.pth",
        "file://",
        "file:///absent%00",
        str(tmp_path / "a\x1b[2J"),
    ):
        assert outcome(source) is not None, source


# ---- servers
@contextlib.contextmanager
def server(serve):
    """A server whose every connection is handed to ``serve`` after the request was read; yields its address."""
    listening = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def answer(connection):
        with connection, contextlib.suppress(OSError):
            connection.recv(65_536)
            serve(connection, over)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(listening.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        over.set()
        listening.close()


def slowly(before):
    def serve(connection, over):
        connection.sendall(before)
        while not over.wait(0.05):
            connection.sendall(b"x")

    return serve


ANSWERS = {
    "nothing": b"",
    "no HTTP": b"hello\r\n\r\n",
    "noise": bytes(range(256)) * 300,
    "a line without an end": b"HTTP/1.1 200 OK\r\nA: " + b"x" * 100_000,
    "too many headers": b"HTTP/1.1 200 OK\r\n" + b"A: x\r\n" * 1_000 + b"\r\n",
    "a length that is no number": b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\nshort",
    "a negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nshort",
    "more promised than sent": b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\nshort",
    "more than the disk has": b"HTTP/1.1 200 OK\r\nContent-Length: 9000000000000000\r\n\r\nshort",
    "broken chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nshort",
    "an end within a chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n500\r\nshort",
    "a redirect to itself": b"HTTP/1.1 302 Found\r\nLocation: /a.pth\r\nContent-Length: 0\r\n\r\n",
    "a redirect to a file": b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n",
    "an error": b"HTTP/1.1 500 \x1b[2J\r\nContent-Length: 0\r\n\r\n",
    "an empty file": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_a_server_that_is_broken(name):
    with server(lambda connection, _: connection.sendall(ANSWERS[name])) as address:
        refused(f"{address}/a.pth", "127.0.0.1|a.pth: ")


@pytest.mark.parametrize(
    "before",
    [b"", b"HTTP/1.1 200 OK\r\nA: ", b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n"],
)
def test_a_server_that_sends_a_byte_now_and_then(before, monkeypatch):
    monkeypatch.setattr(fetch, "PATIENCE", 1.0)
    begin = time.monotonic()
    with server(slowly(before)) as address:
        refused(f"{address}/a.pth", r"the download is too slow \(\d+ bytes in \d seconds\)")
    assert time.monotonic() - begin < 10


def test_a_server_that_never_answers(monkeypatch):
    monkeypatch.setattr(fetch, "PATIENCE", 1.0)
    with server(lambda _, over: over.wait()) as address:
        refused(f"{address}/a.pth", "too slow|timed out")


def test_a_slow_but_steady_server_is_waited_for(tmp_path, monkeypatch):
    """Slower than its patience alone: what arrives gives it more time."""
    save_file({"w": torch.zeros(8_000)}, tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()

    def serve(connection, over):
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data))
        for start in range(0, len(data), 2_000):
            connection.sendall(data[start : start + 2_000])
            over.wait(0.1)

    monkeypatch.setattr(fetch, "PATIENCE", 1.0)
    monkeypatch.setattr(fetch, "MIN_RATE", 5_000)
    with server(serve) as address:
        assert load_weights(f"{address}/a.safetensors").tensors["w"].shape == (8_000,)


@pytest.mark.parametrize(
    "address",
    ["http://", "http://[", "http://127.0.0.1:no", "http://127.0.0.1:1/a", "http://a b/c", "https://\x1b[2J/a"],
)
def test_addresses(address):
    assert outcome(address) is not None


def test_pickles_here_are_what_they_say():
    assert isinstance(pickle.loads(PICKLES["only a number"][0]), int)
    assert nested()
    functools.reduce(lambda value, _: value[0], range(99_999), nested())
