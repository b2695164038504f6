import ast
import hashlib

import pytest

from mmtrain.datasets import StdlibSource, TextFiles
from mmtrain.errors import ConfigError


@pytest.fixture
def folder(tmp_path):
    for name in ("b.txt", "a.txt", "deep/c.txt", "deep/d.md", "skip/e.txt", "deep/skip/f.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path


def test_files_are_found_in_one_order_by_pattern(folder):
    assert TextFiles(folder).files() == ["a.txt", "b.txt", "deep/c.txt", "deep/skip/f.txt", "skip/e.txt"]
    assert TextFiles(folder, exclude=["skip"]).files() == ["a.txt", "b.txt", "deep/c.txt"]
    assert TextFiles(folder, ["deep/*"], exclude=["deep/skip"]).files() == ["deep/c.txt", "deep/d.md"]
    assert TextFiles(folder, "*.md").files() == ["deep/d.md"]
    assert TextFiles(folder).name == folder.name


def test_the_split_is_disjoint_complete_and_determined_by_the_path():
    source = StdlibSource()
    train, val = source.files("train"), source.files("val")
    assert sorted(train + val) == source.files("all")
    assert not set(train) & set(val)
    assert 0.02 < len(val) / len(train) < 0.1
    for path in ("json/decoder.py", "ast.py", "email/header.py"):
        digest = hashlib.sha256(path.encode()).digest()
        assert (path in val) == (int.from_bytes(digest[:8], "big") < 0.05 * 2**64)


def test_a_new_file_does_not_move_others(folder):
    source = TextFiles(folder, validation_share=0.5)
    val = source.files("val")
    (folder / "new.txt").write_text("new")
    assert [path for path in source.files("val") if path != "new.txt"] == val


def test_the_standard_library_is_code_and_of_a_sensible_size():
    source = StdlibSource()
    files = source.files()
    assert {"ast.py", "json/decoder.py"} <= set(files)
    assert not [path for path in files if path.startswith(("test/", "encodings/", "site-packages/"))]
    assert 4e6 < sum((source.root / path).stat().st_size for path in files) < 4e7
    ast.parse((source.root / files[0]).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("options", "split", "sentence"),
    [
        ({"root": "no/such/folder"}, "train", "source.root: 'no/such/folder' does not exist"),
        ({"patterns": ["*.tex"]}, "train", r"source.root: no file below .* matches \*.tex"),
        ({"validation_share": 0}, "val", "dataset.split: all 5 files .* fall into the other split"),
        ({}, "test", "dataset.split: 'test' is unknown; expected one of train, val, all"),
    ],
)
def test_an_unusable_source_is_named(folder, options, split, sentence):
    with pytest.raises(ConfigError, match=sentence):
        TextFiles(**{"root": str(folder), **options}).files(split)


def test_a_share_beyond_1_is_refused(folder):
    with pytest.raises(ConfigError, match="validation_share: 5"):
        TextFiles(folder, validation_share=5)
