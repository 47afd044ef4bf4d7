from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from autoremat.demo import data


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Eleven source files in two folders, and what must be left out."""
    for i in range(10):
        (tmp_path / f"m{i}.py").write_bytes(f"{i}".encode() * 3)
    (tmp_path / "zz").mkdir()
    (tmp_path / "zz" / "last.py").write_bytes(b"LAST")
    for skipped in ("site-packages", "test"):
        (tmp_path / skipped).mkdir()
        (tmp_path / skipped / "other.py").write_bytes(b"not the library")
    return tmp_path


def test_files_are_sorted_and_third_party_code_is_left_out(library: Path) -> None:
    assert [p.name for p in data.stdlib_files(library)] == [*(f"m{i}.py" for i in range(10)), "last.py"]


def test_every_tenth_file_is_for_validation(library: Path) -> None:
    assert bytes(data.stdlib_bytes("validation", root=library).tolist()) == b"000LAST"
    assert bytes(data.stdlib_bytes("train", root=library).tolist()) == b"111222333444555666777888999"


def test_max_bytes_cuts(library: Path) -> None:
    assert bytes(data.stdlib_bytes(root=library, max_bytes=5).tolist()) == b"11122"


def test_this_python_has_source_text() -> None:
    text = bytes(data.stdlib_bytes(max_bytes=100_000).tolist())
    assert len(text) == 100_000
    assert b"import " in text


def test_no_source_text_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        data.stdlib_files(tmp_path)


@pytest.mark.parametrize("load", [data.stdlib_bytes, data.digits])
def test_unknown_split_is_an_error(load: object) -> None:
    with pytest.raises(ValueError, match="choose 'train' or 'validation'"):
        load("test")  # type: ignore[operator]


def test_text_batches_move_on_by_one_byte_and_repeat_with_the_seed() -> None:
    text = torch.arange(50, dtype=torch.uint8)
    x, y = next(data.text_batches(text, batch=4, context=7, seed=3))
    assert x.shape == y.shape == (4, 7)
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 1)
    assert torch.equal(x, next(data.text_batches(text, batch=4, context=7, seed=3))[0])
    assert not torch.equal(x, next(data.text_batches(text, batch=4, context=7, seed=4))[0])


def test_batches_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    next(data.text_batches(torch.zeros(50, dtype=torch.uint8), batch=2, context=5))
    next(data.image_batches(torch.zeros(6, 1), torch.zeros(6), batch=2))
    assert torch.equal(before, torch.get_rng_state())


def test_too_short_a_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="a context of 7 needs more than 7 bytes"):
        next(data.text_batches(torch.zeros(7, dtype=torch.uint8), batch=1, context=7))


def test_digits_have_every_class_and_splits_add_up() -> None:
    images, labels = data.digits("train", size=16)
    others, other_labels = data.digits("validation", size=16)
    assert len(images) + len(others) == len(labels) + len(other_labels) == 1797
    assert images.shape[1:] == (1, 16, 16)
    assert 0 <= images.min() < images.max() <= 1
    assert labels.unique().tolist() == other_labels.unique().tolist() == list(range(10))


def test_image_batches_see_every_image_once_in_an_epoch() -> None:
    images, labels = torch.arange(6.0).view(6, 1), torch.arange(6)
    epoch = list(itertools.islice(data.image_batches(images, labels, batch=2), 3))
    assert sorted(torch.cat([y for _, y in epoch]).tolist()) == list(range(6))
    assert all(torch.equal(x.flatten(), y.float()) for x, y in epoch)


def test_too_few_images_is_an_error() -> None:
    with pytest.raises(ValueError, match="a batch of 3 needs at least as many images, got 2"):
        next(data.image_batches(torch.zeros(2, 1), torch.zeros(2), batch=3))
