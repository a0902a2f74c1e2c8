"""Reading single rows and slices of stored tensors."""

import os

import pytest
import torch
from safetensors.torch import save_file

from llama32.checkpoint import tensor_files
from llama32.checkpoint.tensor_files import MappedFiles, StoredTensor

FIRST, SECOND = torch.arange(6.0).view(3, 2), torch.arange(40, dtype=torch.int8).view(10, 4)


@pytest.fixture
def file(tmp_path):
    tensors = {"first": FIRST, "second": SECOND, "third": SECOND.flatten().bfloat16()}
    save_file(tensors, tmp_path / "three.safetensors")
    return tmp_path / "three.safetensors"


def open_rows(file, name, tensor):
    reader = StoredTensor(name, (file,), tensor.shape, tensor.dtype).open_rows()
    assert reader is not None
    return reader


@pytest.mark.parametrize("ids", [[0], [9, 0, 9, 3], []])
def test_rows_equal_the_rows_of_the_tensor(file, ids):
    ids = torch.tensor(ids, dtype=torch.long)
    rows = open_rows(file, "second", SECOND)(ids)
    assert rows.dtype == torch.int8
    assert torch.equal(rows, SECOND[ids])
    assert torch.equal(open_rows(file, "first", FIRST)(ids % 3), FIRST[ids % 3])
    vector = SECOND.flatten().bfloat16()
    assert torch.equal(open_rows(file, "third", vector)(ids), vector[ids])


def test_a_file_may_be_replaced_while_its_rows_are_read(file):
    reader = open_rows(file, "first", FIRST)
    save_file({"first": FIRST + 1}, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)
    assert torch.equal(reader(torch.tensor([1])), FIRST[1:2])
    file.unlink()
    assert torch.equal(reader(torch.tensor([2])), FIRST[2:])


def test_a_truncated_file_raises_an_error(file):
    reader = open_rows(file, "second", SECOND)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(OSError, match=r"three.safetensors: was cut short while"):
        reader(torch.tensor([9]))


def test_the_file_is_closed_with_the_reader(file):
    reader = open_rows(file, "first", FIRST)
    number = reader._file
    os.fstat(number)
    del reader
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_rows_need_one_safetensors_file_and_pread(file, tmp_path, monkeypatch):
    whole = StoredTensor("first", (file,), FIRST.shape, FIRST.dtype)
    assert whole.open_rows()
    assert StoredTensor("first", (file, file), FIRST.shape, FIRST.dtype).open_rows() is None
    assert (
        StoredTensor("first", (tmp_path / "a.pth",), FIRST.shape, FIRST.dtype).open_rows() is None
    )
    monkeypatch.delattr(tensor_files.os, "pread")  # as on Windows
    assert whole.open_rows() is None


@pytest.mark.parametrize("axis", [0, 1])
def test_a_slice_is_copied_from_all_shards(axis, file, tmp_path):
    later = tmp_path / "later.safetensors"
    save_file({"second": SECOND + 40}, later)
    for shard_axis in (0, 1):
        whole = torch.cat((SECOND, SECOND + 40), shard_axis)
        tensor = StoredTensor("second", (file, later), whole.shape, whole.dtype, shard_axis)
        size = whole.shape[axis] // 2
        for start in range(size + 1):  # from the first file, from both, from the second
            out = torch.empty_like(whole.narrow(axis, start, size))
            tensor.copy_to(out, MappedFiles(budget=10), axis, start)
            assert torch.equal(out, whole.narrow(axis, start, size))
