"""Functions that run on rank 0 for all ranks."""

import pytest


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("torn", "mAP: no boxes"),
        ("local", "Local: no boxes"),
        ("holds a lock", "no boxes"),
        ("lambda", "pickle"),
        ("plain", "ConfigError: no boxes"),
    ],
)
def test_an_exception_of_rank_0_keeps_its_message_on_every_rank(pair, kind, words):
    found = pair.run("evaluation_jobs", "on_main_raises", kind=kind)
    assert all(words in said for said in found), found


def test_the_group_continues_afterwards(pair):
    pair.run("evaluation_jobs", "on_main_raises", kind="torn")
    assert pair.run("evaluation_jobs", "on_main_raises", kind="plain") == ["ConfigError: no boxes"] * 2
