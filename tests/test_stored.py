"""Rows of a stored tensor, read when they are asked for."""

import os

import pytest
import torch
from safetensors.torch import save_file

from llama32 import stored
from llama32.stored import MappedFiles, StoredTensor

FIRST, SECOND = torch.arange(6.0).view(3, 2), torch.arange(40, dtype=torch.int8).view(10, 4)


@pytest.fixture
def file(tmp_path):
    tensors = {"first": FIRST, "second": SECOND, "third": SECOND.flatten().bfloat16()}
    save_file(tensors, tmp_path / "two.safetensors")
    return tmp_path / "two.safetensors"


def rows(file, name, tensor):
    found = StoredTensor(name, (file,), tensor.shape, tensor.dtype).rows()
    assert found is not None
    return found


@pytest.mark.parametrize("ids", [[0], [9, 0, 9, 3], []])
def test_rows_are_those_of_the_tensor(file, ids):
    ids = torch.tensor(ids, dtype=torch.long)
    found = rows(file, "second", SECOND)(ids)
    assert found.dtype == torch.int8
    assert torch.equal(found, SECOND[ids])
    assert torch.equal(rows(file, "first", FIRST)(ids % 3), FIRST[ids % 3])
    vector = SECOND.flatten().bfloat16()
    assert torch.equal(rows(file, "third", vector)(ids), vector[ids])


def test_a_file_may_be_replaced_while_its_rows_are_read(file):
    read = rows(file, "first", FIRST)
    save_file({"first": FIRST + 1}, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)
    assert torch.equal(read(torch.tensor([1])), FIRST[1:2])
    file.unlink()
    assert torch.equal(read(torch.tensor([2])), FIRST[2:])


def test_a_file_that_is_cut_is_an_error_and_no_crash(file):
    read = rows(file, "second", SECOND)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(OSError, match=r"two.safetensors: was cut short while"):
        read(torch.tensor([9]))


def test_the_file_is_closed_with_the_last_of_its_rows(file):
    read = rows(file, "first", FIRST)
    number = read._file
    os.fstat(number)
    del read
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_rows_that_lie_in_no_file_as_they_are_cannot_be_read(file, tmp_path, monkeypatch):
    whole = StoredTensor("first", (file,), FIRST.shape, FIRST.dtype)
    assert whole.rows()
    assert StoredTensor("first", (file, file), FIRST.shape, FIRST.dtype).rows() is None
    assert StoredTensor("first", (tmp_path / "a.pth",), FIRST.shape, FIRST.dtype).rows() is None
    monkeypatch.delattr(stored.os, "pread")  # as on Windows
    assert whole.rows() is None


@pytest.mark.parametrize("axis", [0, 1])
def test_a_part_is_copied_from_wherever_it_lies(axis, file, tmp_path):
    later = tmp_path / "later.safetensors"
    save_file({"second": SECOND + 40}, later)
    for along in (0, 1):  # how the two files make up the whole
        whole = torch.cat((SECOND, SECOND + 40), along)
        tensor = StoredTensor("second", (file, later), whole.shape, whole.dtype, axis=along)
        size = whole.shape[axis] // 2
        for start in range(size + 1):  # from one, from both, from the other
            out = torch.empty_like(whole.narrow(axis, start, size))
            tensor.copy_to(out, MappedFiles(budget=10), axis, start)
            assert torch.equal(out, whole.narrow(axis, start, size))
