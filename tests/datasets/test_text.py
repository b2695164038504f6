import pickle

import pytest
import torch

from mmtrain.datasets import ByteTokenizer, TextDataset, TextFiles, TokenDataset, prepare_tokens
from mmtrain.errors import ConfigError
from mmtrain.registry import DATASETS, build


@pytest.fixture
def tokens(tmp_path):
    """One file of the bytes 0 to 99, and the separator."""
    (tmp_path / "numbers.txt").write_bytes(bytes(range(1, 101)))
    return prepare_tokens(TextFiles(tmp_path), ByteTokenizer(), split="all", cache_dir=str(tmp_path / "cache"))


def test_windows_cover_the_text_and_labels_follow_by_one(tokens):
    data = TokenDataset(tokens, 10)
    assert len(data) == 10
    item = data[0]
    assert {name: (value.dtype, value.shape) for name, value in item.items()} == {
        "input_ids": (torch.int64, (10,)),
        "labels": (torch.int64, (10,)),
    }
    assert all(torch.equal(item["labels"][:-1], item["input_ids"][1:]) for item in (data[i] for i in range(10)))
    assert torch.cat([data[i]["input_ids"] for i in range(10)]).tolist() == list(range(1, 101))
    assert torch.cat([data[i]["labels"] for i in range(10)]).tolist() == [*range(2, 101), 0]
    assert data[-1]["input_ids"].tolist() == data[9]["input_ids"].tolist()
    with pytest.raises(IndexError):
        data[10]


def test_only_complete_windows_count(tokens):
    assert len(TokenDataset(tokens, 11)) == 9
    assert len(TokenDataset(tokens, 100)) == 1
    assert len(TokenDataset(tokens, 10, stride=5)) == 19
    assert TokenDataset(tokens, 10, stride=5)[3]["input_ids"].tolist() == list(range(16, 26))


def test_a_limit_keeps_windows_evenly_spaced(tokens):
    data = TokenDataset(tokens, 10, limit=3)
    assert [int(data[i]["input_ids"][0]) for i in range(len(data))] == [1, 31, 61]
    assert len(TokenDataset(tokens, 10, limit=99)) == 10


def test_jitter_uses_the_generators_and_stays_within_the_text(tokens):
    data = TokenDataset(tokens, 10, jitter=True)

    def starts(seed):
        torch.manual_seed(seed)
        return [int(data[i]["input_ids"][0]) - 1 for i in range(10)]

    assert starts(0) == starts(0) != starts(1)
    for seed in range(30):
        assert all(10 * i <= start < 10 * i + 10 for i, start in enumerate(starts(seed)))
        assert max(starts(seed)) <= 90


def test_a_dataset_is_pickled_without_its_map(tokens):
    data = TokenDataset(tokens, 10)
    first = data[0]
    assert len(pickle.dumps(data)) < 1000
    assert torch.equal(pickle.loads(pickle.dumps(data))[0]["labels"], first["labels"])


def test_the_fingerprint_depends_on_text_and_windows(tokens):
    cuts = [{}, {"stride": 5}, {"jitter": True}, {"limit": 3}]
    prints = [TokenDataset(tokens, 10, **cut).fingerprint() for cut in cuts]
    assert len(set(prints)) == 4
    assert TokenDataset(tokens, 10).fingerprint() == prints[0]
    assert prints[0].startswith(tokens.digest)


def test_a_text_without_a_window_is_refused(tokens):
    with pytest.raises(ConfigError, match=r"dataset.context: the text has 101 tokens, .* 101 needs 102"):
        TokenDataset(tokens, 101)
    with pytest.raises(ConfigError, match="limit=0 must be positive"):
        TokenDataset(tokens, 10, limit=0)


def test_a_users_folder_in_a_config(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"text {number} " * 5)
    sets = {
        split: build(
            DATASETS,
            {
                "type": "TextDataset",
                "source": {"type": "TextFiles", "root": str(tmp_path), "validation_share": 0.25},
                "split": split,
                "context": 16,
                "tokenizer": {"type": "ByteTokenizer"},
                "cache_dir": str(tmp_path / "cache"),
            },
            path="train_dataloader.dataset",
        )
        for split in ("train", "val", "all")
    }
    assert isinstance(sets["train"], TextDataset)
    assert sets["train"].tokens.count + sets["val"].tokens.count == sets["all"].tokens.count
    assert sets["train"].fingerprint() != sets["val"].fingerprint()
