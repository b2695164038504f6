"""One rank's failure, as the others see it; a dict replaces the store."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest

from mmtrain.errors import ConfigError
from mmtrain.launch.alarm import ACKNOWLEDGED_KEY, FAILURE_KEY, REPORTED_KEY, SEEN_KEY, Alarm
from mmtrain.launch.failure import RankFailure, describe


class FakeStore:
    """The few methods of a torch store that an alarm uses."""

    def __init__(self):
        self.values = {}
        self.gone = False

    def _there(self):
        if self.gone:
            raise RuntimeError("connection closed")
        return self.values

    def set(self, key, value):
        self._there()[key] = value

    def compare_set(self, key, expected, value):
        return self._there().setdefault(key, value).encode()

    def check(self, keys):
        return all(key in self._there() for key in keys)

    def get(self, key):
        return self._there()[key].encode()

    def add(self, key, amount):
        self._there()[key] = self.values.get(key, 0) + amount
        return self.values[key]


@pytest.fixture
def fake_store():
    return FakeStore()


@pytest.fixture
def alarms(fake_store):
    """Makes alarms, records the status with which each would have ended its process, and closes them."""
    made, left, someone_left = [], {}, threading.Event()

    def make(rank, **options):
        def leave(status):
            left[rank] = status
            someone_left.set()

        alarm = Alarm(fake_store, rank, 2, leave=leave, **{"grace": 0.3} | options)
        made.append(alarm)
        return alarm

    def left_with():
        assert someone_left.wait(120)
        return left

    make.left, make.left_with = left, left_with
    yield make
    for alarm in made:
        alarm.close()


def failure(rank, sentence="the disk is full", status=1, trace="Traceback ..."):
    return RankFailure(rank, sentence, status, trace)


def test_rank_0_reports_why_another_rank_failed(alarms, fake_store, tmp_path, capfd):
    alarms(0).errors = tmp_path / "errors"
    other = alarms(1)
    other.errors = tmp_path / "errors"
    assert other.report(failure(1, status=2)) == 2
    assert REPORTED_KEY in fake_store.values, "torchrun would end rank 0 before it has reported"
    assert alarms.left_with() == {0: 2}
    lines = capfd.readouterr().err.strip().splitlines()
    assert lines[0] == "error: rank 1: the disk is full"
    assert "rank_1.txt" in lines[1]
    assert (tmp_path / "errors" / "rank_1.txt").read_text() == "Traceback ..."


def test_an_error_on_all_ranks_is_reported_once(alarms, capfd):
    ranks = [alarms(rank) for rank in range(2)]
    with ThreadPoolExecutor() as together:
        assert [*together.map(lambda rank: ranks[rank].report(failure(rank, trace="")), (1, 0))] == [1, 1]
    assert capfd.readouterr().err.strip() == "error: the disk is full"


def test_a_broken_connection_is_not_the_cause(alarms, fake_store, capfd):
    """Rank 1 fails and exits; rank 0 then sees its collective fail, and reports rank 1's error instead."""
    fake_store.values[FAILURE_KEY] = json.dumps(asdict(failure(1)))
    assert alarms(0).report(failure(0, "the run failed with RuntimeError: Connection closed by peer")) == 1
    assert capfd.readouterr().err.splitlines()[1] == "error: rank 1: the disk is full"


def test_the_others_end_silently_when_rank_0_fails(alarms, fake_store, capfd):
    alarms(1)
    fake_store.values[f"{SEEN_KEY}/0"] = ""
    fake_store.values[FAILURE_KEY] = json.dumps(asdict(failure(0, status=2)))
    assert alarms.left_with() == {1: 2}
    assert fake_store.values[ACKNOWLEDGED_KEY] == 1
    assert capfd.readouterr().err == ""


def test_a_lost_store_means_that_rank_0_is_gone(alarms, fake_store, capfd):
    alarms(1)
    fake_store.gone = True
    assert alarms.left_with() == {1: 1}
    assert "lost the connection to rank 0" in capfd.readouterr().err


def test_a_rank_that_fails_because_rank_0_is_gone_reports_it(alarms, fake_store, capfd):
    alarm = alarms(1, grace=5)
    fake_store.gone = True
    assert alarm.report(failure(1, "RuntimeError: peer")) == 1
    assert "rank 1: lost the connection to rank 0" in capfd.readouterr().err


@pytest.mark.parametrize("rank", [0, 1])
def test_a_store_in_another_process_than_rank_0_is_called_by_its_name(alarms, fake_store, rank, capfd):
    alarms(rank, host="torchrun's agent")
    fake_store.gone = True
    assert alarms.left_with() == {rank: 1}
    assert f"rank {rank}: lost the connection to torchrun's agent: it was killed" in capfd.readouterr().err


LOST = describe(RuntimeError("[.../gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"))


def test_the_first_rank_that_answers_reports_for_a_rank_0_that_does_not(alarms, capfd):
    alarm = alarms(1)
    assert alarm.report(replace(LOST, rank=1)) == 1
    said = capfd.readouterr().err.strip()
    assert said.startswith("error: rank 0 ended without a report: killed"), said


def test_ranks_that_do_not_answer_are_named_not_the_one_that_noticed(alarms, fake_store, capfd):
    alarm = alarms(0)
    alarm.size = 4
    fake_store.values[f"{SEEN_KEY}/2"] = ""
    assert alarm.report(LOST) == 1
    said = capfd.readouterr().err.strip()
    assert said.startswith("error: ranks 1, 3 ended without a report"), said
    assert "Its traceback" not in said


def test_a_connection_that_broke_otherwise_is_said_to_be_broken(alarms, fake_store, capfd):
    alarm = alarms(0)
    fake_store.values[f"{SEEN_KEY}/1"] = ""
    alarm.report(LOST)
    assert capfd.readouterr().err.strip().startswith("error: lost the connection to another process ([.../gloo")


def test_a_note_comes_before_what_follows_from_it(alarms, fake_store, tmp_path, capfd):
    """Rank 1 notes, and closes its groups; what rank 0 then sees is no longer the cause."""
    zero, one = alarms(0), alarms(1)
    zero.errors = one.errors = tmp_path
    one.note(failure(1, "the run failed with ValueError: no state"))
    with ThreadPoolExecutor() as together:
        reports = [together.submit(zero.report, LOST), together.submit(one.report, failure(1))]
        assert [report.result() for report in reports] == [1, 1]
    said = capfd.readouterr().err.strip().splitlines()
    assert said[0] == "error: rank 1: the run failed with ValueError: no state"
    assert "rank_1.txt" in said[1]


@pytest.mark.parametrize(
    ("error", "sentence", "status"),
    [
        (SystemExit(3), "sys.exit(3) was called before the end of the run", 3),
        (SystemExit(), "sys.exit() was called before the end of the run", 0),
        (SystemExit("no boxes"), "sys.exit('no boxes') was called before the end of the run", 1),
        (KeyboardInterrupt(), "interrupted by Ctrl-C (KeyboardInterrupt)", 130),
        (ConfigError("no lr"), "no lr", 2),
        (ValueError("no boxes"), "the run failed with ValueError: no boxes", 1),
    ],
)
def test_what_ended_a_rank_in_one_sentence(error, sentence, status):
    found = describe(error, 5)
    assert (found.rank, found.sentence, found.status, found.is_lost) == (5, sentence, status, False)


def test_a_rank_that_leaves_with_success_fails_the_others_alone(alarms, fake_store):
    leaving = describe(SystemExit(0), 1)
    zero, one = alarms(0), alarms(1)
    one.note(leaving)
    with ThreadPoolExecutor() as together:
        reports = [together.submit(zero.report, LOST), together.submit(one.report, leaving)]
        assert [report.result() for report in reports] == [1, 0]


def test_after_closing_nothing_happens(alarms, fake_store):
    alarm = alarms(1)
    alarm.close()
    fake_store.gone = True
    assert "mmtrain-alarm" not in [thread.name for thread in threading.enumerate()]
    assert alarms.left == {}
