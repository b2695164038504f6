"""The options of the train command that decide where a run starts."""

import pytest

from mmtrain.cli.train import config_from, make_parser
from mmtrain.errors import ConfigError


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text("train_cfg = dict(max_iters=3)\n")
    return str(path)


@pytest.mark.parametrize(
    ("options", "resume", "load_from"),
    [
        ([], None, None),
        (["--resume"], True, None),
        (["--resume", "auto"], "auto", None),
        (["--resume", "auto", "--load-from", "w.pth"], "auto", "w.pth"),
        (["--resume", "--load-from", "w"], True, "w"),
        (["--resume", "iter_5.pth"], True, "iter_5.pth"),
        (["--load-from", "w.pth"], None, "w.pth"),
    ],
)
def test_where_a_run_starts(config, options, resume, load_from):
    cfg = config_from(make_parser().parse_args([config, *options]))
    assert (cfg.get("resume"), cfg.get("load_from")) == (resume, load_from)


def test_contradicting_starts_are_refused(config):
    with pytest.raises(
        ConfigError, match=r"--resume iter_5.pth and --load-from w.pth contradict .*Give only one of them"
    ):
        config_from(make_parser().parse_args([config, "--resume", "iter_5.pth", "--load-from", "w.pth"]))
