"""What ranks compare before anything is built."""

import sys

from mmengine.config import Config

from mmtrain.runner.start_facts import start_facts


def test_the_code_of_custom_imports_is_compared(tmp_path, monkeypatch):
    path = tmp_path / "own_module_of_this_test.py"
    path.write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    cfg = Config({"custom_imports": {"imports": ["own_module_of_this_test"]}})
    assert "code of own_module_of_this_test (hash)" not in start_facts(cfg), (
        "it could not be imported: nothing to compare"
    )
    __import__("own_module_of_this_test")
    before = start_facts(cfg)
    assert {
        "Python version",
        "torch version",
        "mmtrain version",
        "config (hash)",
        "code of mmtrain (hash)",
    } <= before.keys()
    path.write_text("x = 2\n")
    after = start_facts(cfg)
    del sys.modules["own_module_of_this_test"]
    assert {name for name in before if before[name] != after[name]} == {"code of own_module_of_this_test (hash)"}
