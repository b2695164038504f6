"""Files are replaced completely or not at all, and hashed as xxhash does."""

import pytest
import xxhash

from mmtrain.files import LocalFiles, hash_bytes, hash_file, replacing, write_new


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


def test_hashes_are_equal_to_those_of_xxhash(tmp_path):
    data = bytes(range(256)) * 20_000  # more than one block
    write_new(tmp_path / "f", data)
    assert hash_file(tmp_path / "f") == hash_bytes(data) == xxhash.xxh3_128_hexdigest(data)
