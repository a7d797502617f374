"""Slabs are lent, come back when the last tensor that looks at them is gone, and never twice at a time."""

import threading

import torch

from projector.files.slabs import empty
from tests.projector.cards import MIB, arena


def test_a_tensor_lies_in_neighbouring_slabs_until_its_last_view_is_gone() -> None:
    slabs = arena(4)
    data = slabs.take(2 * MIB + 1)
    assert data is not None and data.shape == (2 * MIB + 1,)
    view = data[: 2 * MIB].view(torch.float32).reshape(1024, 512)
    del data
    assert slabs.free_bytes == MIB
    assert slabs.take(2 * MIB) is None, "only one is left"
    del view
    assert slabs.free_bytes == 4 * MIB
    assert slabs.take(4 * MIB) is not None


def test_a_hole_is_used_again_and_no_two_tensors_overlap() -> None:
    slabs = arena(4)
    lent = [slabs.take(MIB) for _ in range(4)]
    lent[1] = None
    again = slabs.take(MIB)
    assert again is not None
    for index, one in enumerate([lent[0], again, lent[2], lent[3]]):
        assert one is not None
        one.fill_(index)
    assert [int(one[0]) for one in (lent[0], again, lent[2], lent[3]) if one is not None] == [0, 1, 2, 3]
    assert slabs.take(1) is None


def test_only_this_thread_and_only_in_the_block() -> None:
    slabs = arena(4)
    with slabs.lent():
        mine = empty(MIB)
        assert slabs.free_bytes == 3 * MIB
        small, large = empty(100), empty(9 * MIB)
        assert (len(small), len(large)) == (100, 9 * MIB)
        other = threading.Thread(target=lambda: empty(MIB))
        other.start()
        other.join()
        assert slabs.free_bytes == 3 * MIB, "too small, too large, another thread's"
    outside = empty(MIB)
    assert slabs.free_bytes == 3 * MIB and len(outside) == len(mine)


def test_many_threads_get_what_is_theirs() -> None:
    slabs, wrong = arena(16, 1 << 16), []

    def work(mark: int) -> None:
        for turn in range(200):
            lent = slabs.take((1 << 16) * (1 + turn % 3))
            if lent is not None:
                lent.fill_(mark)
                if not bool((lent == mark).all()):
                    wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert slabs.free_bytes == slabs.nbytes
