"""Files are replaced completely or not at all, and hashed as xxhash does."""

import os

import pytest
import xxhash

from mmtrain.files import (
    LocalFiles,
    hash_bytes,
    hash_file,
    open_private,
    open_regular,
    read_bounded,
    replacing,
    write_new,
)


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_replaced(tmp_path, durable):
    path = tmp_path / "best.json"
    path.write_text("old")
    with replacing(path, durable=durable) as aside:
        aside.write_text("new")
        assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["best.json"]
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_when_writing_fails_the_old_file_is_kept(tmp_path, error):
    path = tmp_path / "best.json"
    path.write_text("old")

    def fail():
        with replacing(path) as aside:
            aside.write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert [file.name for file in tmp_path.iterdir()] == ["best.json"]
    assert path.read_text() == "old"


def test_durable_means_file_before_rename_before_directory(tmp_path):
    calls = []

    class Recorded(LocalFiles):
        def fsync_path(self, path):
            calls.append(("fsync", path.name))

        def rename(self, old, new):
            calls.append(("rename", new.name))
            super().rename(old, new)

    with replacing(tmp_path / "f", files=Recorded()) as aside:
        aside.write_text("x")
    assert calls == [("fsync", ".f.tmp"), ("rename", "f"), ("fsync", tmp_path.name)]

    calls.clear()
    with replacing(tmp_path / "model", files=Recorded()) as aside:
        (aside / "part").mkdir(parents=True)
        (aside / "part" / "weights").write_text("x")
        (aside / "config").write_text("x")
        (aside / "link").symlink_to("config")
    order = ["weights", "part", "config", ".model.tmp"]
    assert calls == [*(("fsync", name) for name in order), ("rename", "model"), ("fsync", tmp_path.name)]


def test_hashes_are_equal_to_those_of_xxhash(tmp_path):
    data = bytes(range(256)) * 20_000  # more than one block
    write_new(tmp_path / "f", data)
    assert hash_file(tmp_path / "f") == hash_bytes(data) == xxhash.xxh3_128_hexdigest(data)


@pytest.mark.parametrize("left", ["link", "hard link", "pipe", "file"])
def test_leftovers_under_the_temporary_name_are_not_written_through(tmp_path, left):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    aside = tmp_path / ".f.tmp"
    make = {"link": aside.symlink_to, "hard link": aside.hardlink_to, "pipe": lambda _: os.mkfifo(aside)}
    make.get(left, lambda _: aside.write_text("old"))(victim)
    with replacing(tmp_path / "f") as path:
        path.write_text("new")
    assert (tmp_path / "f").read_text() == "new"
    assert not (tmp_path / "f").is_symlink()
    assert victim.read_text() == "precious"


@pytest.fixture
def special_file(tmp_path):
    """Paths that are not regular files, by what a message calls them."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "to pipe").symlink_to(tmp_path / "pipe")
    return {
        "a named pipe": [tmp_path / "pipe", tmp_path / "to pipe"],
        "a directory": [tmp_path / "folder"],
        "a device": [tmp_path / "zero"],
    }


def test_only_regular_files_are_read(tmp_path, special_file):
    for what, paths in special_file.items():
        for path in paths:
            for read in (open_regular, hash_file, lambda p: read_bounded(p, 10)):
                with pytest.raises(OSError, match=f"it is {what}, expected a file"):
                    read(path)
    (tmp_path / "f").write_text("text")
    (tmp_path / "link").symlink_to("f")  # as in the cache of the Hugging Face hub
    assert read_bounded(tmp_path / "link", 4) == b"text"


def test_reading_is_bounded(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="it has 1099511627776 bytes, expected at most 100"):
        read_bounded(tmp_path / "sparse", 100)
    with pytest.raises(FileNotFoundError):
        read_bounded(tmp_path / "absent", 100)


def test_a_private_file_is_made_and_never_truncated(tmp_path):
    handle = open_private(tmp_path / "lock")
    os.write(handle, b"held")
    os.close(handle)
    os.close(open_private(tmp_path / "lock"))
    assert (tmp_path / "lock").read_text() == "held"


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "pipe", "folder"])
def test_a_private_file_is_not_another_one(tmp_path, kind):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path = tmp_path / "lock"
    {
        "link": lambda: path.symlink_to(victim),
        "dangling link": lambda: path.symlink_to(tmp_path / "absent"),
        "hard link": lambda: path.hardlink_to(victim),
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
    }[kind]()
    with pytest.raises(OSError, match="it is a link|second name|named pipe|directory"):
        open_private(path)
    assert victim.read_text() == "precious"
    assert not (tmp_path / "absent").exists()
