import shutil

import pytest
from saved_state import save

from mmtrain.checkpoint import CheckpointStore
from mmtrain.errors import CheckpointError


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    root = tmp_path_factory.mktemp("verify")
    store = CheckpointStore(root)
    save(store, 1), save(store, 2)
    store.close()
    return root


def flip(path):
    data = bytearray(path.read_bytes())
    for place in sorted({0, len(data) // 2, len(data) - 1}):
        damaged = bytearray(data)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        yield f"byte {place}"


def truncate(path):
    data = path.read_bytes()
    for length in (0, len(data) - 1):
        path.write_bytes(data[:length])
        yield f"{length} bytes left"


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")
    yield "one byte more"


def delete(path):
    path.unlink()
    yield "deleted"


def replace_by_directory(path):
    path.unlink()
    path.mkdir()
    yield "a directory"


@pytest.mark.parametrize("damage", [flip, truncate, lengthen, delete, replace_by_directory])
def test_every_damage_to_every_file_is_found_and_named(template, tmp_path, damage):
    files = sorted(p.relative_to(template).as_posix() for p in (template / "iter_2.pth").rglob("*") if p.is_file())
    assert len(files) == 8
    for file in files:
        root = tmp_path / "copy"
        shutil.copytree(template, root)
        store = CheckpointStore(root)
        for what in damage(root / file):
            checkpoint, problems = store.newest_good()
            assert checkpoint.name == "iter_1.pth", (file, what)
            assert len(problems) == 1
            assert str(problems[0]).startswith(f"{file}: "), (file, what)
            assert "\n" not in str(problems[0])
            with pytest.raises(CheckpointError, match=file.split("/", 1)[1]):
                store.open("iter_2.pth")
        store.close()
        shutil.rmtree(root)
