import pytest

from mmtrain.errors import CheckpointError
from mmtrain.printable import listed, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ünïcode and 你好 🙂\n\ttwo lines", "plain, ünïcode and 你好 🙂\n\ttwo lines"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("back\b\rspace\x07\x7f", "back\\x08\\rspace\\x07\\x7f"),
        ("\x9b31m", "\\x9b31m"),
        ("half \ud800 pair", "half \\ud800 pair"),
        ("user\u202egnp.exe", "user\\u202egnp.exe"),
        ("nul\0", "nul\\x00"),
    ],
)
def test_what_a_terminal_would_obey_is_written_out(text, shown):
    assert printable(text) == shown
    printable(text).encode()


def test_errors_are_printable():
    error = CheckpointError("iter_\x1b]0;owned\x07.pth: damaged")
    assert str(error) == "iter_\\x1b]0;owned\\x07.pth: damaged"


@pytest.mark.parametrize(
    ("names", "text"), [([], ""), (["a"], "a"), (["a", "b"], "a, b"), (["a", "b", "c", "d"], "a, b and 2 more")]
)
def test_long_lists_end_with_a_count(names, text):
    assert listed(names, 2) == text
