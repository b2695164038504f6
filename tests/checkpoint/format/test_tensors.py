import json

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from mmtrain.checkpoint.format.tensors import DTYPES, byte_view, lay_out, lay_out_one, write_layout
from mmtrain.checkpoint.sharding import TensorShard, collect
from mmtrain.errors import CheckpointError
from mmtrain.files import LocalFiles


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(byte_view(tensor))


def every_kind() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    raw = torch.randint(0, 256, (96,), dtype=torch.uint8)
    tensors = {}
    for code, dtype in DTYPES.items():
        if code == "BOOL":
            tensors[code] = torch.tensor([True, False, True])
        else:
            tensors[code] = raw.clone().view(dtype).reshape(2, -1)
    base = torch.randn(6, 4)
    tensors |= {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "transposed": base.t(),
        "strided": base[::2, 1:3],
        "expanded": torch.ones(1).expand(5),
        "conjugate": torch.tensor([1 + 2j], dtype=torch.complex64).conj(),
        "negative": torch.tensor([1 + 2j], dtype=torch.complex64).conj().imag,
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "channels_last": torch.randn(1, 2, 3, 3).to(memory_format=torch.channels_last),
        'ü/名 "quoted"': torch.ones(1),
    }
    return tensors


def test_safetensors_reads_what_we_write(tmp_path):
    tensors = every_kind()
    layout = lay_out_one("model", "a.safetensors", [TensorShard.full(name, t) for name, t in tensors.items()])
    record = write_layout(layout, tmp_path, LocalFiles())
    data = (tmp_path / "a.safetensors").read_bytes()
    assert (record.size, record.xxh3_128) == (len(data), xxhash.xxh3_128_hexdigest(data))
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        paired = name in ("C128", "C32")  # types that safetensors lacks are pairs of real numbers there
        expected = torch.view_as_real(tensor) if paired else tensor
        assert loaded[name].dtype == expected.dtype
        assert loaded[name].shape == expected.shape
        assert bits(loaded[name]) == bits(expected), name


def test_the_file_is_byte_for_byte_that_of_the_library(tmp_path):
    tensors = {"b": torch.arange(3.0), "a": torch.ones(5, dtype=torch.bool), "c": torch.arange(2)}
    write_layout(lay_out_one("m", "ours", [TensorShard.full(n, t) for n, t in tensors.items()]), tmp_path, LocalFiles())
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_golden_hash(tmp_path):
    shards = [
        TensorShard.full("w", torch.arange(6.0).reshape(2, 3)),
        TensorShard("s", torch.ones(2, dtype=torch.int8), (4,), (2,)),
    ]
    record = write_layout(lay_out_one("m", "f", shards), tmp_path, LocalFiles())
    assert (record.size, record.xxh3_128) == GOLDEN


GOLDEN = (242, "b4df22f11064ef32906832be0de19d3f")


def test_shards_describe_their_place_in_the_tensor(tmp_path):
    shard = TensorShard("w", torch.ones(2, 3), (8, 3), (4, 0))
    layout = lay_out_one("m", "f", [shard])
    header = json.loads(layout.header[8:])
    assert json.loads(header["__metadata__"]["mmtrain.shards"]) == {"w": {"shape": [8, 3], "offsets": [4, 0]}}
    assert len(layout.header) % 8 == 0


def test_a_section_is_divided_into_files_at_the_limit():
    shards = [TensorShard.full(f"t{i}", torch.zeros(100, dtype=torch.uint8)) for i in range(5)]
    layouts = lay_out("m", "m/r", [*shards, TensorShard.full("u", torch.zeros(1000, dtype=torch.uint8))], limit=250)
    assert [len(layout.tensors) for layout in layouts] == [2, 2, 1, 1]
    assert [layout.path for layout in layouts][:2] == ["m/r_part_00000.safetensors", "m/r_part_00001.safetensors"]


def test_large_and_small_tensors_mix(tmp_path):
    torch.manual_seed(0)
    sizes = [3, 70_000, 1, 1_500_000, 5, 300_000, 2]
    tensors = {f"{i}": torch.randn(size) for i, size in enumerate(sizes)}
    write_layout(lay_out_one("m", "f", [TensorShard.full(n, t) for n, t in tensors.items()]), tmp_path, LocalFiles())
    loaded = load_file(tmp_path / "f")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_contiguous_memory_is_not_copied():
    tensor = torch.zeros(4)
    view = byte_view(tensor)
    tensor[0] = 1.0
    assert bytes(view[:4]) == bits(torch.tensor(1.0))


def test_an_unsupported_tensor_is_named():
    for tensor, reason in [
        (torch.ones(8, dtype=torch.uint8).view(torch.bits8), "bits8"),
        (torch.ones(2, device="meta"), "meta"),
        (torch.eye(2).to_sparse(), "sparse"),
        (3, "int"),
    ]:
        with pytest.raises(CheckpointError, match=f"model/x.*{reason}"):
            lay_out("model", "m", collect("model", {"x": tensor}, writers={}, rank=0).shards)
    with pytest.raises(CheckpointError, match="__metadata__"):
        lay_out_one("model", "m", [TensorShard.full("__metadata__", torch.ones(1))])
