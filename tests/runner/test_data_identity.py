"""Which data a run reads, and whether a checkpoint's run read the same."""

import pytest
import torch
from mmengine.dataset import BaseDataset, RepeatDataset
from torch.utils.data import ConcatDataset, Subset

from mmtrain.errors import CheckpointError
from mmtrain.runner.data_identity import check_same_data_as_checkpoint, data_fingerprint


def test_a_fingerprint_is_the_datasets_or_its_class_and_length():
    class Own(list):
        def fingerprint(self):
            return "abc"

    assert data_fingerprint(Own()) == "abc"
    assert data_fingerprint([1, 2]) == "list:2"
    assert data_fingerprint(iter([])) == "list_iterator:unknown"


class Files(list):
    """Data with a fingerprint."""

    def __init__(self, name, size=4):
        super().__init__(range(size))
        self.name = name

    def fingerprint(self):
        return self.name


class Annotated(BaseDataset):
    """The same with what MMEngine's wrappers need."""

    def __init__(self, files):
        self.files = files
        super().__init__()

    def load_data_list(self):
        return [{"item": item} for item in self.files]

    def fingerprint(self):
        return self.files.fingerprint()


WRAPPERS = {
    "ConcatDataset": lambda data: ConcatDataset([data, Files("other")]),
    "Subset": lambda data: Subset(data, [0, 1]),
    "RepeatDataset": lambda data: RepeatDataset(Annotated(data), times=2),
    "Subset of ConcatDataset": lambda data: Subset(ConcatDataset([data, [1, 2]]), [0, 1]),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_datasets_count(wrap):
    a, again, b = (data_fingerprint(wrap(Files(name))) for name in "aab")
    assert a == again != b
    check_same_data_as_checkpoint(a, again)
    with pytest.raises(CheckpointError, match="training dataset changed"):
        check_same_data_as_checkpoint(a, b)


def test_a_checkpoint_with_only_a_wrappers_class_and_length_is_accepted():
    own = data_fingerprint(ConcatDataset([Files("a"), Files("b")]))
    assert own.startswith("ConcatDataset:8/")
    check_same_data_as_checkpoint("ConcatDataset:8", own)
    with pytest.raises(CheckpointError, match="training dataset changed"):
        check_same_data_as_checkpoint("ConcatDataset:9", own)
    with pytest.raises(CheckpointError, match="training dataset changed"):
        check_same_data_as_checkpoint("a", "a/b")


def test_parts_without_an_identity_add_nothing():
    assert data_fingerprint(ConcatDataset([[1, 2], Subset([1, 2], [0])])) == "ConcatDataset:3"
    odd = Subset(torch.tensor(1), [0])  # has a __len__ that raises
    assert data_fingerprint(odd) == "Subset:1"
