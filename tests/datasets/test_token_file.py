import fcntl
import json
import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mmtrain.datasets import ByteTokenizer, TextFiles, prepare_tokens
from mmtrain.datasets import token_file as module
from mmtrain.errors import ConfigError, RunError


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "text"
    root.mkdir()
    (root / "a.txt").write_text("first file")
    (root / "b.txt").write_text("second")
    return root


def prepare(folder, tokenizer=None):
    tokenizer = tokenizer or ByteTokenizer()
    return prepare_tokens(TextFiles(folder), tokenizer, split="all", cache_dir=str(folder.parent / "cache"))


def content(tokens):
    return bytes(tokens.open().astype(np.uint8))


@pytest.fixture
def counted(monkeypatch):
    """The number of times that tokens were made."""
    calls = []
    make = module._make
    monkeypatch.setattr(module, "_make", lambda *args: calls.append(1) or make(*args))
    return calls


def test_files_follow_each_other_with_separators(folder):
    tokens = prepare(folder)
    assert content(tokens) == b"first file\0second\0"
    assert (tokens.dtype, tokens.count) == ("uint8", 18)
    assert not tokens.open().flags.writeable
    names = sorted(path.name.split("-")[-1] for path in Path(tokens.path).parent.iterdir())
    assert names == ["all.bin", "all.json", "all.lock"]


def test_the_cache_is_made_once_and_again_when_a_file_changes(folder, counted):
    first = prepare(folder)
    assert prepare(folder) == first
    assert len(counted) == 1
    (folder / "b.txt").write_text("other!")
    os.utime(folder / "b.txt", (1, 1))  # of the same size, and maybe written in the same tick of the clock
    changed = prepare(folder)
    assert len(counted) == 2
    assert content(changed) == b"first file\0other!\0"
    (folder / "c.txt").write_text("third")
    assert content(prepare(folder)) == b"first file\0other!\0third\0"


def test_a_touched_file_has_the_same_digest(folder, counted):
    first = prepare(folder)
    os.utime(folder / "a.txt", (1, 1))
    second = prepare(folder)
    assert len(counted) == 2
    assert second.path != first.path
    assert second.digest == first.digest


def test_a_larger_vocabulary_takes_more_bytes(folder):
    class Large(ByteTokenizer):
        vocab_size = 50_257

        def fingerprint(self):
            return "large"

    tokens = prepare(folder, Large())
    assert tokens.dtype == "uint16"
    assert tokens.open().tolist() == list(b"first file\0second\0")


@pytest.mark.parametrize(
    "damage", ["cut", "empty", "flipped", "no bin", "no json", "torn json", "odd json", "old format"]
)
def test_a_damaged_cache_is_made_again(folder, counted, damage):
    tokens = prepare(folder)
    data, description = Path(tokens.path), Path(tokens.path).with_suffix(".json")
    if damage == "cut":
        data.write_bytes(data.read_bytes()[:-3])
    elif damage == "empty":
        data.write_bytes(b"")
    elif damage == "flipped":
        data.write_bytes(b"X" + data.read_bytes()[1:])
    elif damage == "no bin":
        data.unlink()
    elif damage == "no json":
        description.unlink()
    elif damage == "torn json":
        description.write_text(description.read_text()[:20])
    elif damage == "odd json":
        description.write_text("[1, 2]")
    else:
        description.write_text(json.dumps({**json.loads(description.read_text()), "format": 0}))
    assert content(prepare(folder)) == b"first file\0second\0"
    assert len(counted) == 2
    prepare(folder)
    assert len(counted) == 2


def test_a_failure_leaves_nothing_behind(folder, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fsync", full)
        with pytest.raises(ConfigError, match=r"dataset.cache_dir: .* No space left on device; name another"):
            prepare(folder)
    assert [path.suffix for path in (folder.parent / "cache").iterdir()] == [".lock"]
    assert content(prepare(folder)) == b"first file\0second\0"


def test_an_unreadable_or_unwritable_file_is_named(folder, monkeypatch):
    with pytest.raises(ConfigError, match=r"dataset.cache_dir: cannot write tokens to"):
        prepare_tokens(TextFiles(folder), ByteTokenizer(), split="all", cache_dir=str(folder / "a.txt"))
    (folder / "b.txt").unlink()
    (folder / "b.txt").symlink_to("nowhere.txt")
    with pytest.raises(RunError, match=r"b.txt' cannot be read: No such file"):
        prepare(folder)


def test_files_without_text_are_refused(folder):
    class Mute(ByteTokenizer):
        separator = None

    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("")
    with pytest.raises(ConfigError, match=r"the 2 files below .* contain no text"):
        prepare(folder, Mute())


@pytest.fixture
def long(folder):
    for path in folder.iterdir():
        path.unlink()
    (folder / "long.txt").write_text("x" * 300_000)
    return folder


def check_one_result(folder, digests):
    assert len(set(digests)) == 1
    assert content(prepare(folder)) == b"x" * 300_000 + b"\0"
    assert sorted(path.suffix for path in (folder.parent / "cache").iterdir()) == [".bin", ".json", ".lock"]


def test_two_processes_that_start_at_once(long):
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        check_one_result(long, [tokens.digest for tokens in pool.map(prepare, [long, long], chunksize=1)])


@pytest.mark.parametrize("locks", [True, False])
def test_many_that_start_at_once_with_and_without_locks(long, locks, monkeypatch, counted):
    if not locks:
        monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError("no locks here")))
    barrier = threading.Barrier(4)
    with ThreadPoolExecutor(4) as threads:
        digests = list(threads.map(lambda _: barrier.wait() is None or prepare(long).digest, range(4)))
    assert len(counted) == 1 or not locks
    check_one_result(long, digests)


@pytest.mark.parametrize("kind", ["symlink_to", "hardlink_to"])
def test_a_lock_that_leads_to_another_file_is_refused_and_that_file_stays(folder, kind):
    tokens = prepare(folder)
    victim = folder.parent / "notes.txt"
    victim.write_text("precious")
    path = Path(tokens.path).with_suffix(".lock")
    path.unlink()
    getattr(path, kind)(victim)
    with pytest.raises(ConfigError, match=r"\.lock cannot be used as a lock: .*link.*delete"):
        prepare(folder)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("suffix", [".bin", ".json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "deep", "object"])
def test_what_is_not_a_token_file_is_made_again(folder, counted, suffix, kind):
    path = Path(prepare(folder).path).with_suffix(suffix)
    described = json.loads(path.with_suffix(".json").read_text())
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_text("[" * 100_000 if kind == "deep" else json.dumps(described | {"dtype": "O", "count": 1}))
    assert content(prepare(folder)) == b"first file\0second\0"
    assert len(counted) == 2


def test_a_pipe_among_the_texts_is_named(folder):
    os.mkfifo(folder / "c.txt")
    with pytest.raises(RunError, match=r"c\.txt' cannot be read: it is a named pipe"):
        prepare(folder)
