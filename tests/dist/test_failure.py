import pytest

from mmtrain.errors import CheckpointError
from mmtrain.launch.failure import describe


@pytest.mark.parametrize("kind", [CheckpointError, KeyError, RuntimeError, OSError])
def test_what_an_error_quotes_cannot_control_the_terminal(kind):
    try:
        raise kind("weight w\x1b[2J\x07 is gone")
    except kind as error:
        failure = describe(error)
    for text in (failure.sentence, failure.trace):
        assert "\x1b" not in text
        assert "\x07" not in text
        assert "is gone" in text
