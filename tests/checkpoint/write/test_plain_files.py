import json

import pytest

from mmtrain.checkpoint.write.plain_files import write_json


@pytest.mark.parametrize("kind", ["link to a folder", "link to a file", "file", "hard link"])
def test_leftovers_under_the_temporary_name_are_deleted_and_not_followed(tmp_path, kind):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "best.json").write_text("precious")
    left = tmp_path / ".best.json.tmp"
    if kind == "link to a folder":
        left.symlink_to(elsewhere)
    elif kind == "link to a file":
        left.symlink_to(elsewhere / "best.json")
    elif kind == "hard link":
        left.hardlink_to(elsewhere / "best.json")
    else:
        left.write_text("old")
    write_json(tmp_path / "best.json", {"value": 1})
    assert json.loads((tmp_path / "best.json").read_text()) == {"value": 1}
    assert (elsewhere / "best.json").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.json", "elsewhere"]
