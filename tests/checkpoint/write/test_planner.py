"""The plan of a save is kept while nothing that it depends on changes; whatever changes, the checkpoint holds it."""

import pytest
import torch

from mmtrain.checkpoint import CheckpointStore
from mmtrain.checkpoint.write import planner
from mmtrain.errors import CheckpointError


@pytest.fixture
def store(tmp_path):
    with_store = CheckpointStore(tmp_path, step_sections=("optimizer",))
    yield with_store
    with_store.close()


@pytest.fixture
def plans(monkeypatch):
    """The sections that were planned again."""
    made = []
    real = planner.plan_section

    def plan_section(section, *arguments, **options):
        made.append(section)
        return real(section, *arguments, **options)

    monkeypatch.setattr(planner, "plan_section", plan_section)
    return made


def check(store, name, sections):
    store.save(name, sections, blocking=False).wait()
    checkpoint = store.open(name)
    assert checkpoint.manifest.sections == sorted(sections)
    for section, named in sections.items():
        assert sorted(checkpoint.tensor_names(section)) == sorted(named)
        for key, value in named.items():
            found = checkpoint.read(section, key)
            assert found.dtype == value.dtype
            assert torch.equal(found, value), f"{section}/{key}"


def start():
    torch.manual_seed(0)
    model = {"b": torch.randn(4, 3), "a": torch.randn(40_000), "n": torch.tensor(1), "none": torch.empty(0, 2)}
    model["tied"] = model["a"]
    return {"model": model, "optimizer": {"a/exp_avg": torch.randn(40_000), "a/step": torch.tensor(2.0)}}


def test_new_values_and_new_tensors_of_the_same_kinds_need_no_new_plan(store, plans):
    check(store, "first.pth", start())
    assert sorted(plans) == ["model", "optimizer"]
    for number in range(3):
        sections = start()
        for named in sections.values():
            for value in named.values():
                value.add_(number)
        check(store, f"iter_{number}.pth", sections)
    assert len(plans) == 2


CHANGES = {
    "a new name": lambda s: s["model"].update(c=torch.randn(3)),
    "a name less": lambda s: s["model"].pop("b"),
    "another name": lambda s: s["model"].update(bb=s["model"].pop("b")),
    "another order": lambda s: s.update(model=dict(reversed(list(s["model"].items())))),
    "another shape of the same size": lambda s: s["model"].update(b=s["model"]["b"].reshape(3, 4)),
    "another type": lambda s: s["model"].update(b=s["model"]["b"].double()),
    "another layout": lambda s: s["model"].update(b=s["model"]["b"].t().contiguous().t()),
    "not tied": lambda s: s["model"].update(tied=s["model"]["a"].clone()),
    "tied to another": lambda s: s["model"].update(b2=s["model"]["b"], b3=s["model"]["b"][:2]),
    "conjugate": lambda s: s["model"].update(z=torch.randn(3, dtype=torch.complex64).conj()),
    "a new section": lambda s: s.update(ema={"b": torch.randn(2)}),
    "a section less": lambda s: s.pop("optimizer"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_changes_is_saved_as_it_is(store, plans, what):
    check(store, "first.pth", start())
    changed = start()
    CHANGES[what](changed)
    check(store, "changed.pth", changed)
    check(store, "again.pth", changed)
    check(store, "back.pth", start())
    assert len(plans) > 2 or what == "a section less"


def test_a_kind_that_changes_without_its_name_or_size_is_written_in_row_major_order(store):
    """The same values with other strides: a copy of the bytes as they are would be wrong."""
    square = torch.arange(9.0).reshape(3, 3)
    check(store, "rows.pth", {"model": {"w": square}})
    check(store, "columns.pth", {"model": {"w": square.t().contiguous().t()}})
    check(store, "transposed.pth", {"model": {"w": square.t()}})


@pytest.mark.parametrize("value", [torch.randn(2, device="meta"), torch.eye(2).to_sparse(), "text"])
def test_what_cannot_be_saved_is_refused_each_time_and_the_next_save_is_whole(store, value):
    sections = start()
    check(store, "first.pth", sections)
    for number in range(2):
        broken = start()
        broken["model"]["b"] = value
        with pytest.raises(CheckpointError, match="model/b: "):
            store.save(f"broken_{number}.pth", broken, blocking=False).wait()
    check(store, "last.pth", sections)


def test_the_first_save_finds_its_plan_and_its_buffer(store, plans):
    sections = start()
    store.prepare(sections)
    assert sorted(plans) == ["model", "optimizer"]
    check(store, "first.pth", sections)
    size = store.buffer_bytes
    assert size > 320_000
    check(store, "second.pth", sections)
    assert (len(plans), store.buffer_bytes) == (2, size)


def test_what_is_prepared_may_be_wrong_or_change(store):
    store.prepare({"model": {"x": torch.randn(2, device="meta")}})
    store.prepare({"model": {"x": torch.randn(2)}})
    check(store, "first.pth", start())
