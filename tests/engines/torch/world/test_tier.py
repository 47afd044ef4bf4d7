"""The file of the CPU's tier: what it copies, what fails, and that nothing is left behind."""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
from pathlib import Path

import pytest
import torch

from autoremat.engines.torch.world import tier as tiers
from autoremat.engines.torch.world.tier import Disk, OffloadFailed, Store
from autoremat.engines.torch.world.tiers import TierOf


def memory(n: int, byte: int) -> torch.UntypedStorage:
    return torch.full((n,), byte, dtype=torch.uint8).untyped_storage()


def numbers(storage: torch.UntypedStorage) -> list[int]:
    return list(storage)


def there_and_back(store: Store, sizes: tuple[int, ...]) -> None:
    """Send some memory, overwrite it, and fetch it in another order."""
    sources = [memory(n, k + 1) for k, n in enumerate(sizes)]
    copies = [store.send(s) for s in sources]
    for copy, source in zip(copies, sources, strict=True):
        assert store.wait(copy) is None
        source.fill_(0)
    for k in reversed(range(len(sizes))):
        target = memory(sizes[k], 0xFB)
        assert store.wait(store.fetch(copies[k], target)) is None
        assert set(numbers(target)) == {k + 1}


def test_what_is_sent_comes_back(tmp_path: Path) -> None:
    disk = Disk(str(tmp_path))
    for _ in range(2):
        store = disk.open(4096)
        there_and_back(store, (1, 1000, 4096))
        assert list(tmp_path.iterdir()) == []
        store.close()


def test_steps_that_overlap_have_files_of_their_own(tmp_path: Path) -> None:
    disk = Disk(str(tmp_path))
    first, second = disk.open(8), disk.open(8)
    a, b = first.send(memory(8, 1)), second.send(memory(8, 2))
    assert first.wait(a) is None
    assert second.wait(b) is None
    one, two = memory(8, 0), memory(8, 0)
    assert first.wait(first.fetch(a, one)) is None
    assert second.wait(second.fetch(b, two)) is None
    assert (numbers(one), numbers(two)) == ([1] * 8, [2] * 8)


def test_a_copy_holds_its_memory_until_it_has_ended_and_no_longer(tmp_path: Path) -> None:
    store = Disk(str(tmp_path)).open(8)
    source = memory(1 << 20, 1)
    count = torch._C._storage_Use_Count(source._cdata)
    copy = store.send(source)
    assert store.wait(copy) is None
    assert torch._C._storage_Use_Count(source._cdata) == count


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "autoremat tier"]


def test_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "_IDLE_SECONDS", 0.01)
    files = set(os.listdir("/proc/self/fd"))
    disk = Disk(str(tmp_path))
    store = disk.open(8)
    there_and_back(store, (8,))
    store.close()
    del store, disk
    gc.collect()
    for _ in range(200):
        if not threads():
            break
        time.sleep(0.01)
    assert threads() == []
    assert set(os.listdir("/proc/self/fd")) <= files


def broken(monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException | int) -> None:
    def fails(file: int, *rest: object) -> int:
        if isinstance(error, int):
            return error
        raise error

    monkeypatch.setattr(tiers.os, name, fails)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), 0, SystemExit()])
def test_whoever_waits_for_a_failed_write_learns_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException | int
) -> None:
    store = Disk(str(tmp_path)).open(8)
    broken(monkeypatch, "pwrite", error)
    failure = store.wait(store.send(memory(8, 1)))
    assert failure is error or "short write" in str(failure)
    monkeypatch.undo()
    there_and_back(store, (8,))  # the thread goes on


def test_a_short_read_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Disk(str(tmp_path)).open(8)
    copy = store.send(memory(8, 1))
    assert store.wait(copy) is None
    broken(monkeypatch, "preadv", 0)
    assert "short read" in str(store.wait(store.fetch(copy, memory(8, 0))))


def test_a_thread_that_dies_leaves_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)

    def dies(copy: tiers.Copy) -> None:
        raise SystemExit

    monkeypatch.setattr(tiers.Copy, "carry_out", dies)
    store = Disk(str(tmp_path)).open(8)
    copy = store.send(memory(8, 1))
    assert "thread that copies has died" in str(store.wait(copy))
    monkeypatch.undo()
    there_and_back(store, (8,))  # the next copy begins another one


def test_a_forked_process_does_not_share_the_file(tmp_path: Path) -> None:
    disk = Disk(str(tmp_path))
    store = disk.open(8)
    copy = store.send(memory(8, 1))
    assert store.wait(copy) is None
    pid = os.fork()
    if pid == 0:
        try:
            assert "forked" in str(store.wait(copy))
            store.close()
            there_and_back(disk.open(8), (8,))
        except BaseException:  # noqa: BLE001 - the exit code tells
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    back = memory(8, 0)
    assert store.wait(store.fetch(copy, back)) is None
    assert numbers(back) == [1] * 8


def test_a_full_disk_is_said_before_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(str(tmp_path))
    with pytest.raises(OffloadFailed, match=r"which has .* left: make room there"):
        disk.open(1 << 60)


def test_the_budget_of_the_tier_counts_all_steps(tmp_path: Path) -> None:
    disk = Disk(str(tmp_path), most_bytes=12)
    first, second = disk.open(8), disk.open(8)
    first.send(memory(8, 1))
    assert not second.has_room(8)
    assert second.has_room(4)
    first.close()
    assert second.has_room(8)
    assert not Disk(str(tmp_path), most_bytes=0).open(0).has_room(1)


def test_bandwidth_is_measured_once_for_each_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "_SAMPLE_BYTES", 4096)
    link = Disk(str(tmp_path), 7).link()
    assert link.out_bytes_per_second > 0
    assert (link.name, link.tier_bytes) == (f"disk:{tmp_path}", 7)
    assert Disk(str(tmp_path), 7).link() == link


@pytest.mark.parametrize(
    ("name", "budget", "says"),
    [
        ("floppy", None, "offload is None"),
        ("disk:/no/such/folder", None, "no file can be made"),
        (None, "1GiB", "which is not given"),
        ("auto", "50%", "a number of bytes"),
    ],
)
def test_what_is_no_tier_is_refused(name: str | None, budget: str | None, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TierOf(name, budget).link()


def test_host_memory_is_for_cuda() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises(OffloadFailed, match="for tensors of a CUDA device"):
        TierOf("host", None).link()
