import threading

import pytest
import torch

from mmtrain.checkpoint.format.tensors import byte_view, lay_out_one
from mmtrain.checkpoint.sharding import TensorShard
from mmtrain.checkpoint.write import staging
from mmtrain.checkpoint.write.staging import Stager


@pytest.fixture
def stager():
    stager = Stager()
    yield stager
    stager.close()


def layouts(**sections):
    return [
        lay_out_one(section, section, [TensorShard.full(name, tensor) for name, tensor in tensors.items()])
        for section, tensors in sections.items()
    ]


def check(made, staged):
    """Whether the buffer holds the bytes of the files."""
    staged.wait()
    for layout, data in zip(made, staged.data, strict=True):
        assert bytes(data) == b"".join(bytes(byte_view(tensor)) for tensor in layout.tensors)


def test_the_copy_mirrors_the_files(stager):
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(5),
        "b": torch.randn(3, 4).t(),
        "c": torch.ones(3, dtype=torch.bool),
        "d": torch.ones(()),
    }
    tensors["e"] = torch.randn(2, 2).bfloat16()[:, :1]
    made = layouts(model=tensors, optimizer={"x": torch.randn(7), "none": torch.empty(0)})
    check(made, stager.stage(made, overlapped=("optimizer",)))


def test_the_buffer_is_reused_and_grows(stager):
    def addresses(size):
        staged = stager.stage(layouts(model={"a": torch.ones(size)}))
        staged.wait()
        assert bytes(staged.data[0]) == b"".join([torch.ones(size).numpy().tobytes()])
        return [torch.frombuffer(data, dtype=torch.uint8).data_ptr() for data in staged.data]

    first = addresses(1000)
    assert addresses(1000) == first, "the same memory again"
    assert stager.bytes >= 4000
    grown = addresses(5000)
    assert stager.bytes >= 20_000
    assert addresses(1000) == grown, "a smaller state is copied into the larger buffer"


def test_only_overlapped_sections_may_still_be_read_after_stage(stager, monkeypatch):
    gate = threading.Event()
    original = staging.ctypes.memmove

    def held_back(target, source, size):
        if size == 40:  # the optimizer's tensor
            assert gate.wait(120)
        original(target, source, size)

    monkeypatch.setattr(staging.ctypes, "memmove", held_back)
    model, moments = torch.ones(5), torch.ones(10)
    staged = stager.stage(layouts(model={"w": model}, optimizer={"w/m": moments}), overlapped=("optimizer",))
    model.zero_()  # a forward changes the running statistics
    gate.set()
    staged.wait()
    moments.zero_()
    assert [torch.frombuffer(bytearray(d), dtype=torch.float32).sum().item() for d in staged.data] == [5.0, 10.0]


def test_an_error_in_copying_is_raised_by_the_wait(stager, monkeypatch):
    def broken(target, source, size):
        raise MemoryError("no")

    monkeypatch.setattr(staging, "_move_small", broken)
    staged = stager.stage(layouts(optimizer={"x": torch.ones(3)}), overlapped=("optimizer",))
    with pytest.raises(MemoryError):
        staged.wait()
    with pytest.raises(MemoryError):
        stager.stage(layouts(model={"x": torch.ones(3)}))


def test_a_reserved_buffer_is_used_as_it_is(stager):
    made = layouts(model={"x": torch.randn(1000)}, optimizer={"y": torch.randn(50)})
    stager.reserve(made)
    assert stager.stage(made).data
    size, address = stager.bytes, stager.stage(made).data[0].obj.ctypes.data
    assert size >= 4200
    check(made, stager.stage(made))
    assert (stager.bytes, stager.stage(made).data[0].obj.ctypes.data) == (size, address)
    stager.reserve(layouts(model={"x": torch.randn(10)}))
    larger = layouts(model={"x": torch.randn(100_000)})
    check(larger, stager.stage(larger))


def test_a_buffer_that_cannot_be_reserved_is_an_error_of_the_save_alone(stager, monkeypatch):
    def no_memory(size):
        raise MemoryError("no")

    made = layouts(model={"x": torch.randn(1000)})
    with monkeypatch.context() as patched:
        patched.setattr(staging, "_huge_pages", no_memory)
        stager.reserve(made)
        with pytest.raises(MemoryError):
            stager.stage(made)
    check(made, stager.stage(made))
