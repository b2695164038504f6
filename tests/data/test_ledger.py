"""The ledger and its audit: what ranks really read, over saves, restarts, other numbers of ranks, and with faults."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from ledger_jobs import by_ledger

from mmtrain import dist
from mmtrain.data import build_ledger, build_train_stream
from mmtrain.data.ledger import digest, order_of
from mmtrain.data.ledger_audit import audit_ledger
from mmtrain.data.sampler import PositionSampler
from mmtrain.data.stream import TrainStream
from mmtrain.errors import CheckpointError, ConfigError
from mmtrain.progress import Progress

SEED = 5


class Numbers(torch.utils.data.Dataset):
    """Sample i is i."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return torch.tensor(index)


class Ranks:
    """``world`` ranks in this process, each with a stream and a ledger, in lockstep; ``read`` is what they really got."""

    def __init__(self, monkeypatch, world=1, batch=12, size=100, *, accumulation=1, seed=SEED, **options):
        monkeypatch.setattr(dist, "world_size", lambda: world)
        monkeypatch.setattr(dist, "gather_objects", self.gather)
        cfg = {"dataset": Numbers(size), "batch_size": batch // world, **options}
        self.streams = [build_train_stream(cfg, seed=seed, rank=rank, world_size=world) for rank in range(world)]
        self.ledgers = [build_ledger(stream, accumulative_counts=accumulation) for stream in self.streams]
        self.progress, self.accumulation, self.read = Progress(), accumulation, []

    def gather(self, value):
        """In place of `dist.gather_objects`: what `exchange` makes of one rank's value."""
        return self.exchange(value)

    def begin(self, state=None, *, at=None, moved_by=None):
        """Start, or continue from a state at its position or at another one."""
        if state is not None:
            for ledger in self.ledgers:
                ledger.load_state_dict(copy.deepcopy(state["ledger"]))
            self.progress.load_state_dict(state["progress"])
        epoch, offset = at or (self.progress.epoch, self.progress.offset)
        places = {stream.seek(epoch, offset) for stream in self.streams}
        assert len(places) == 1
        self.progress.epoch, self.progress.offset = places.pop()
        for ledger in self.ledgers:
            ledger.begin(self.progress, moved_by=moved_by)
        return self

    def step(self, count=1, *, change=None):
        """Do iterations; ``change`` puts a fault into the batches of all ranks."""
        for _ in range(count):
            batches = [next(stream) for stream in self.streams]
            micro = self.progress.iteration % self.accumulation
            seen = []
            for ledger, batch in zip(self.ledgers, batches, strict=True):
                ledger.observe(
                    change(batch) if change else batch,
                    iteration=self.progress.iteration,
                    update=self.progress.update,
                    micro=micro,
                )
                seen += batch.data.tolist() if batch.weight else []
            self.read.append((self.progress.update, sorted(seen)))
            self.progress.advance(batches[0].samples, epoch_end=batches[0].epoch_end)
            if micro == self.accumulation - 1:
                self.progress.count_update(iterations=self.accumulation, applied=True)
        return self

    def save(self):
        records = []
        self.exchange = lambda value: records.append(value) or [value]
        for ledger in copy.deepcopy(self.ledgers):  # what each rank will contribute
            ledger.state_dict()
        self.exchange = lambda value: records
        states = [ledger.state_dict() for ledger in self.ledgers]
        assert all(state == states[0] for state in states), "the ranks hold different histories"
        for stream in self.streams:
            stream.close()
        return {"ledger": states[0], "progress": self.progress.state_dict()}


@pytest.fixture
def ranks(monkeypatch):
    return lambda *args, **kwargs: Ranks(monkeypatch, *args, **kwargs)


def totals(state):
    found = audit_ledger(state["ledger"])
    return tuple(sum(getattr(one, kind) for one in found) for kind in ("lost", "repeated", "unproven"))


def audit_text(state):
    return "\n".join(text for one in audit_ledger(state["ledger"]) for text in [*one.faults, *one.notices])


def merged(read):
    found = {}
    for update, samples in read:
        found.setdefault(update, []).extend(samples)
    return {update: sorted(samples) for update, samples in found.items()}


# ---- what it records ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [96, 97, 98, 100, 107])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_record_is_what_the_ranks_read(ranks, world, size, accumulation):
    run = ranks(world, size=size, accumulation=accumulation).begin().step(21)
    state = run.save()
    assert by_ledger(state["ledger"]) == merged(run.read)
    assert totals(state) == (0, 0, 0)
    passes = audit_ledger(state["ledger"])
    assert [one.samples for one in passes[:2]] == [size, size]
    assert [one.finished for one in passes] == [True, True, *[False] * (len(passes) - 2)]
    assert len(state["ledger"]["runs"]) <= 2 * len(passes), "the record grows with the iterations"


def test_the_number_of_processes_changes_only_the_segment(ranks):
    records = [ranks(world, size=97).begin().step(20).save()["ledger"] for world in (1, 2, 3, 4)]
    assert len({str(record["runs"]) for record in records}) == 1


@pytest.mark.parametrize("world", [1, 3])
def test_the_record_does_not_depend_on_when_it_was_saved(ranks, world):
    saved_once = ranks(world).begin().step(21).save()
    state = None
    for steps in (1, 7, 2, 11):
        state = ranks(world).begin(state).step(steps).save()
    assert state == saved_once


def test_workers_report_what_they_read(ranks):
    run = ranks(2, size=50, num_workers=1).begin().step(6)
    state = run.save()
    assert by_ledger(state["ledger"]) == merged(run.read)
    assert totals(state) == (0, 0, 0)


def test_a_rank_without_a_sample_counts_nothing(ranks):
    state = ranks(4, size=49).begin().step(5).save()  # the fifth batch has one sample for four ranks
    assert totals(state) == (0, 0, 0)
    assert audit_ledger(state["ledger"])[0].samples == 49


@pytest.mark.parametrize("size", [97, 1 << 25])
def test_work_lost_after_a_checkpoint_does_not_count(ranks, size):
    state = ranks(2, size=size).begin().step(3).save()
    ranks(2, size=size).begin(copy.deepcopy(state)).step(2)  # and killed
    state = ranks(2, size=size).begin(state).step(4).save()
    assert totals(state) == (0, 0, 0)
    assert audit_ledger(state["ledger"])[0].samples == 7 * 12


def test_processes_and_batches_that_change_in_the_middle_of_an_epoch(ranks):
    state = None
    for world, batch, steps in ((2, 12, 3), (3, 12, 4), (1, 20, 1), (4, 8, 9), (2, 12, 3)):
        state = ranks(world, batch).begin(state).step(steps).save()
    assert totals(state) == (0, 0, 0)
    record = state["ledger"]
    assert [(s["world_size"], s["batch_size"]) for s in record["segments"]] == [(2, 6), (3, 4), (1, 20), (4, 2), (2, 6)]
    assert sum(one.samples for one in audit_ledger(record)) == state["progress"]["samples"]


def test_the_digest_of_parts_adds_up():
    indices = np.random.default_rng(0).permutation(1000)
    parts = sum(digest(at, indices[at : at + 7]) for at in range(0, 1000, 7)) % (1 << 64)
    assert parts == digest(0, indices)
    swapped = indices.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    assert digest(0, swapped) != parts


# ---- by design ------------------------------------------------------------------------------------------------------
def test_drop_last_is_reported_and_not_lost(ranks):
    state = ranks(2, size=100, drop_last=True).begin().step(20).save()
    assert totals(state) == (0, 0, 0)
    assert audit_text(state).count("4 samples at the end were dropped by drop_last") == 2


def test_a_batch_that_no_longer_fits_the_end_of_an_epoch_is_dropped(ranks):
    state = ranks(1, 10, size=100, drop_last=True).begin().step(9).save()  # 10 samples are left
    state = ranks(1, 12, size=100, drop_last=True).begin(state).step(2).save()
    assert totals(state) == (0, 0, 0)
    assert "10 samples at the end were dropped" in audit_text(state)


@pytest.mark.parametrize("choice", ["restart", {"skip_iters": 2}])
def test_data_moved_on_purpose_are_not_lost(ranks, choice):
    state = ranks().begin().step(12).save()  # 44 samples into the second epoch
    at = (1, 0) if choice == "restart" else (0, 24)
    state = ranks().begin(state, at=at, moved_by=choice).step(10).save()
    assert totals(state) == (0, 0, 0)
    assert f"left at sample 36 by resume_data={choice!r}" in audit_text(state)
    assert f"entered at sample {at[1]} by resume_data={choice!r}" in audit_text(state)
    state = ranks().begin(state).step(3).save()  # and continues as usual
    assert totals(state) == (0, 0, 0)
    assert len(state["ledger"]["segments"]) == 2


def test_a_record_that_begins_in_the_middle_is_reported(ranks):
    run = ranks()
    run.progress.iteration = run.progress.update = 3
    state = run.begin(at=(0, 36)).step(9).save()
    assert totals(state) == (0, 0, 0)
    assert "the record begins at sample 36" in audit_text(state)


def test_a_sampler_that_repeats_by_design(ranks):
    sampler = torch.utils.data.WeightedRandomSampler([1.0, 9.0] * 30, 60)
    state = ranks(1, 12, size=60, sampler=sampler).begin().step(12).save()
    assert totals(state) == (0, 0, 0)
    assert "WeightedRandomSampler decides what is read and may repeat a sample" in audit_text(state)
    state["ledger"]["runs"][0][2] += 12
    assert totals(state) != (0, 0, 0)


@pytest.mark.parametrize("kind", ["iterable", "loader"])
def test_data_without_sample_indices_are_refused(kind):
    source = torch.utils.data.DataLoader(Numbers(10), batch_size=2)
    cfg = {"dataset": iter_only(), "batch_size": 2} if kind == "iterable" else source
    with pytest.raises(ConfigError, match="train_cfg.ledger: .* is iterable-style"):
        build_ledger(build_train_stream(cfg, seed=1), accumulative_counts=1)


def iter_only():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from range(100)

    return Endless()


def test_without_a_ledger_a_batch_has_no_indices():
    stream = build_train_stream({"dataset": Numbers(10), "batch_size": 2}, seed=1)
    assert next(stream).indices is None


# ---- faults ----------------------------------------------------------------------------------------------------------
def test_a_sampler_that_jumps_over_a_sample(ranks, monkeypatch):
    sound = PositionSampler.batch_indices

    def faulty(self, epoch, offset):
        for draw in sound(self, epoch, offset):
            if (draw.epoch, draw.offset) == (0, 36):
                yield from sound(self, 0, 37)
            yield draw

    monkeypatch.setattr(PositionSampler, "batch_indices", faulty)
    state = ranks(2).begin().step(8).save()
    state["ledger"]["position"] = [0, 97]  # the position of such a stream
    missing = order_of(state["ledger"]["segments"][0]["order"], 0).take(36, 37)[0]
    assert totals(state) == (1, 0, 0)
    assert f"sample {missing} was lost: position 36, between updates 3 and 4" in audit_text(state)


def test_a_stream_that_gives_a_batch_twice(ranks, monkeypatch):
    sound, held = TrainStream.__next__, {}

    def faulty(self):
        count, last = held.get(id(self), (0, None))
        batch = last if count == 3 else sound(self)
        held[id(self)] = (count + 1, batch)
        return batch

    monkeypatch.setattr(TrainStream, "__next__", faulty)
    run = ranks(2).begin().step(6)
    state = run.save()
    lost, repeated, _ = totals(state)
    assert (lost, repeated) == (12, 12)  # the position counts six batches, five were read
    named = [
        int(line.split()[1]) for line in audit_text(state).splitlines() if "repeated: read in updates 3 and 4" in line
    ]
    assert len(named) == 10
    assert set(named) <= set(run.read[2][1])
    assert "and 4 more" in audit_text(state)


def test_a_stream_that_drops_a_batch(ranks, monkeypatch):
    sound, held = TrainStream.__next__, {}

    def faulty(self):
        held[id(self)] = held.get(id(self), 0) + 1
        if held[id(self)] == 3:
            sound(self)
        return sound(self)

    monkeypatch.setattr(TrainStream, "__next__", faulty)
    state = ranks(3).begin().step(10).save()
    assert totals(state)[0] == 12
    assert audit_text(state).count("was lost: position") == 10


def test_a_worker_that_reads_another_sample(ranks):
    def other(batch):
        indices = np.frombuffer(batch.indices.values, dtype=np.int64).copy()
        indices[0] = order[5]
        return replace(batch, indices=replace(batch.indices, values=indices.tobytes()))

    run = ranks(1).begin()
    order = order_of(run.streams[0].sampler.order, 0).take(0, 100)
    state = run.step(2).step(1, change=other).step(8).save()
    assert totals(state) == (1, 1, 0)
    assert f"sample {order[24]} was lost: position 24, which update 3 was to read" in audit_text(state)
    assert f"sample {order[5]} was repeated: read in updates 1 and 3" in audit_text(state)


def test_a_seed_changed_in_the_middle_of_an_epoch(ranks):
    state = ranks().begin().step(4).save()
    run = ranks(seed=SEED + 1).begin(state)
    state = run.step(8).save()
    both = [order_of(segment["order"], 0).take(0, 100) for segment in state["ledger"]["segments"]]
    read = both[0][:48] + both[1][48:]
    expected = (100 - len(set(read)), sum(read.count(index) > 1 for index in range(100)))
    assert totals(state)[:2] == expected
    assert expected[0] > 0


# ---- a record that was changed ---------------------------------------------------------------------------------------
def change_digest(record):
    record["runs"][0][9] = "0123456789abcdef"


def leave_out_a_span(record):
    del record["runs"][2]


def repeat_a_span(record):
    record["runs"].append(list(record["runs"][0]))


def shorten(record):
    record["runs"][0][5] -= 1


def move_position_back(record):
    record["position"] = [1, 12]


def move_position_far_back(record):
    record["position"] = [0, 12]


def move_position_forward(record):
    record["position"] = [1, 90]


def forget_an_epoch(record):
    record["runs"] = [run for run in record["runs"] if run[1] != 0]


@pytest.mark.parametrize(
    ("change", "kinds", "words"),
    [
        (change_digest, {"unproven"}, "not what the seed's order has there"),
        (leave_out_a_span, {"lost"}, "was lost: position"),
        (repeat_a_span, {"repeated"}, "was repeated: read in update 1, 2 times"),
        (shorten, {"lost", "unproven"}, "between updates 7 and 9"),
        (
            move_position_back,
            {"unproven"},
            "the checkpoint is at sample 12 of the epoch, but samples up to 36 were read",
        ),
        (
            move_position_far_back,
            {"unproven"},
            "the checkpoint is at sample 0 of the epoch, but samples up to 36 were read",
        ),
        (move_position_forward, {"lost"}, "after update 12"),
        (forget_an_epoch, {"lost"}, "never reached"),
    ],
)
def test_a_record_that_was_changed_does_not_pass(ranks, change, kinds, words):
    state = ranks(2).begin().step(12).save()
    assert totals(state) == (0, 0, 0)
    change(state["ledger"])
    counts = dict(zip(("lost", "repeated", "unproven"), totals(state), strict=True))
    assert {kind for kind, count in counts.items() if count} == kinds
    assert words in audit_text(state)


@pytest.mark.parametrize("change", [lambda r: r.update(format=2), lambda r: r["runs"].append([1, 2])])
def test_a_record_that_cannot_be_read(ranks, change):
    state = ranks().begin().step(2).save()
    change(state["ledger"])
    with pytest.raises(CheckpointError, match="ledger"):
        audit_ledger(state["ledger"])
