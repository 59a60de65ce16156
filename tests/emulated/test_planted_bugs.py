"""The emulation finds mistakes: kernels with one each (csrc/testing/planted_bugs.cpp), and their right twins."""

import numpy as np
import pytest
import torch

MESSAGES = {
    "accumulate_into_output": r"uninitialised: reads 4 bytes at byte \d+ of buffer 'y'",
    "atomic_and_plain": "race: .*buffer 'counter'",
    "barrier_in_branch": "divergent barrier 0",
    "blocks_share_an_output": "race: writes .*a thread of block number 0 wrote it",
    "box_expected_in_vain": "deadlock: .*waiting at mbarrier_wait",
    "box_misplaced": "copy_box: .* at a multiple of 1024 bytes",
    "box_nobody_waits_for": "its threads ended while the copy engine wrote to its shared memory",
    "box_not_expected": "copy_box: more bytes than the barrier was told to expect",
    "box_not_waited_for": "too early: reads 2 bytes .* shared storage",
    "box_onto_what_is_read": "race: ",
    "box_read_by_other_lanes": "race: ",
    "box_waited_for_by_one": "too early: |race: ",
    "box_waited_for_in_wrong_phase": "too early: ",
    "copy_misaligned": "cp_async: .* aligned to 16 bytes",
    "copy_not_waited_for": "too early: reads .*a copy to it is under way",
    "copy_onto_what_is_read": "race: |too early: |uninitialised: ",
    "copy_past_end": "out of bounds: reads 16 bytes .*behind the end of buffer 'x'",
    "copy_waits_for_too_few": "too early: reads .*a copy to it is under way",
    "copy_without_barrier": "race: |too early: |uninitialised: ",
    "division_by_zero": "division by zero",
    "dynamic_shared_past_end": "out of bounds: .* right behind the end of dynamic shared memory",
    "index_outside_array": "out of bounds: index 256 of an array",
    "integer_overflow": "integer overflow",
    "lanes_without_syncwarp": "race: |uninitialised: ",
    "last_block_without_fence": "race: .* a thread of block number . wrote it",
    "ldmatrix_before_barrier": "race: |uninitialised: ",
    "ldmatrix_misaligned": "ldmatrix: a row must be 16-byte aligned",
    "leaves_before_barrier": r"deadlock: .*thread \(255, 0, 0\): ended",
    "mask_without_caller": "__any_sync: the mask must name the calling lane",
    "mbarrier_of_too_few": "mbarrier_arrive: more arrivals than the barrier was made for",
    "mbarrier_used_before_it_is_ready": "race: |mbarrier: there is none",
    "misaligned_vector": "misaligned or null access",
    "mma_in_branch": r"deadlock: .*and 30 more: waiting at mma",
    "named_barrier_of_wrong_size": "deadlock: .*waiting at barrier_sync",
    "output_not_complete": "output 'y': 4 of 1024 bytes were never written",
    "overlap_without_wait": "race: .*a thread of an earlier launch wrote it",
    "overwrite_before_barrier": "race: ",
    "pointer_to_nowhere": "out of bounds: .*which is no device memory",
    "read_before_barrier": "race: |uninitialised: ",
    "read_past_end": "out of bounds: reads 4 bytes right behind the end of buffer 'x'",
    "shared_not_written": r"uninitialised: reads 4 bytes at byte 1020 of shared storage .*Tile \(1024 bytes\)",
    "shared_pointer_past_end": "out of bounds: writes 4 bytes right behind the end of shared storage",
    "shift_too_far": "shift by more than the width",
    "shuffle_as_barrier": "race: |uninitialised: ",
    "shuffle_from_absent_lane": "lane 0 reads lane 16, which takes no part",
    "shuffle_in_branch": "deadlock: .*waiting at __shfl_sync",
    "shuffle_on_two_lines": "divergent warp",
    "stack_of_another_thread": "out of bounds: .*which is no device memory",
    "syncwarp_for_two_warps": "race: |uninitialised: ",
    "too_much_shared_memory": "shared memory: 253952 bytes, a block has at most 232448",
    "two_different_barriers": "divergent barrier 0",
    "two_writers": "race: writes .*wrote it",
    "write_before_start": "out of bounds: writes 4 bytes 4 bytes before buffer 'y'",
    "write_to_input": "write to an input: .*buffer 'x'",
}
ORDER_DEPENDENT = "order_of_atomics"  # no mistake in one run: the comparison of orders shows it


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(256).astype(np.float32)


def test_every_planted_bug_has_its_message(emulated):
    assert sorted(emulated.planted_names()) == sorted([*MESSAGES, ORDER_DEPENDENT])


@pytest.mark.parametrize("order", ["forward", "reversed", "random"])
@pytest.mark.parametrize("name", MESSAGES)
def test_bug_is_caught(emulated, x, name, order):
    with pytest.raises(emulated.KernelError, match=MESSAGES[name]):
        emulated.planted(name, True, x, emulated.Options(order=order))


@pytest.mark.parametrize("name", [*MESSAGES, ORDER_DEPENDENT])
def test_right_twin_passes(emulated, run_in_every_order, x, name):
    run_in_every_order(lambda options: emulated.planted(name, False, x, options))


def test_order_of_threads_shows_in_the_bits(emulated, run_in_every_order, x):
    with pytest.raises(AssertionError, match="depends on"):
        run_in_every_order(lambda options: emulated.planted(ORDER_DEPENDENT, True, x, options))


def test_message_names_block_thread_and_line(emulated, x):
    with pytest.raises(emulated.KernelError, match=r"block \(0, 0, 0\), thread \(255, 0, 0\): .*planted_bugs.cpp:\d+"):
        emulated.planted("read_past_end", True, x, emulated.Options())


def test_a_failed_kernel_leaves_nothing_behind(emulated, x):
    right = emulated.planted("overwrite_before_barrier", False, x, emulated.Options())
    for name in MESSAGES:
        with pytest.raises(emulated.KernelError):
            emulated.planted(name, True, x, emulated.Options())
        again = emulated.planted("overwrite_before_barrier", False, x, emulated.Options())
        np.testing.assert_array_equal(again, right)


def test_unknown_order(emulated):
    with pytest.raises(ValueError, match="order must be forward, reversed or random, got 'sideways'"):
        emulated.Options(order="sideways")


LAUNCHES = {
    "default_stream": "planted: not on the current stream of the device",
    "no_blocks": "no GPU takes a grid of",
    "too_many_blocks_in_y": "no GPU takes a grid of",
    "too_many_blocks_in_z": "no GPU takes a grid of",
    "too_many_threads": "no GPU takes a grid of",
    "shared_memory_without_leave": r"planted: launch: 49153 bytes .* may have 49152 \(allow_shared_memory\)",
    "more_shared_memory_than_allowed": "planted: launch: 61441 bytes .* may have 61440",
    "static_and_dynamic_without_leave": "shared memory: 50176 bytes, a block has at most 49152",
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_launch_is_caught(emulated, name):
    with emulated.Device(emulated.Options()), pytest.raises(emulated.KernelError, match=LAUNCHES[name]):
        emulated.planted_launch(name)


def test_device_has_so_much_shared_memory(emulated):
    with emulated.Device(emulated.Options()):
        assert emulated.allow_shared_memory(227 * 1024)
        assert not emulated.allow_shared_memory(227 * 1024 + 1)
    with emulated.Device(emulated.Options(shared_memory=99 * 1024)):
        assert not emulated.allow_shared_memory(227 * 1024)


class TestTensors:
    """What a launcher's kernels may touch: the elements of its arguments, and tensors while they live."""

    def resample(self, x):
        return torch.ops.flexvar_emulated.resample2d(x, 2, 2, "area", False)

    def restrict(self, emulated, x, sizes, writable=False):
        emulated.restrict_to(x.data_ptr(), x.data_ptr(), "x", sizes, x.stride(), 4, writable)

    def test_only_elements_of_an_argument(self, emulated):
        with emulated.Device(emulated.Options()):
            x = torch.ones(1, 1, 4, 4)
            self.restrict(emulated, x, (1, 1, 4, 3))
            with pytest.raises(RuntimeError, match=r"out of bounds: reads 4 bytes at byte 12 of buffer 'x'"):
                self.resample(x)

    def test_an_argument_is_read_only(self, emulated):
        qkv, cache = torch.ones(1, 1, 3, 1, 32), torch.ones(1, 1, 1, 32)
        with emulated.Device(emulated.Options()):
            caches = [torch.ones(1, 1, 1, 32), torch.ones(1, 1, 1, 32)]
            self.restrict(emulated, caches[1], cache.shape)
            with pytest.raises(RuntimeError, match=r"write to an input: writes .*buffer 'x'"):
                torch.ops.flexvar_emulated.append_qkv(qkv.clone(), *caches, 0, None)

    def test_nobody_wrote_a_tensor(self, emulated):
        with emulated.Device(emulated.Options()):
            x = torch.empty(1, 1, 4, 4)
            with pytest.raises(RuntimeError, match="uninitialised: reads 4 bytes at byte 0 of buffer 'tensor 1'"):
                self.resample(x)
            x.fill_(3)  # by the host
            assert (self.resample(x) == 3).all()

    def test_host_memory(self, emulated):
        x = torch.ones(1, 1, 4, 4)
        with emulated.Device(emulated.Options()), pytest.raises(RuntimeError, match="which is no device memory"):
            self.resample(x)

    def test_no_device(self, emulated):
        with pytest.raises(RuntimeError, match=r"run within `with _emulated.Device"):
            self.resample(torch.ones(1, 1, 4, 4))

    def test_devices_follow_each_other(self, emulated):
        """Tensors of the first outlive it, and free nothing of the second when they go."""
        with emulated.Device(emulated.Options()):
            first = torch.ones(1, 1, 4, 4)
            with pytest.raises(emulated.KernelError, match="one is open already"), emulated.Device(emulated.Options()):
                pass
        with emulated.Device(emulated.Options()):
            second = torch.ones(1, 1, 4, 4)
            del first
            assert (self.resample(second) == 1).all()
        assert torch.ones(3).sum() == 3
