"""The simulated caching allocator: known answers by PyTorch's rules, and what it leaves when all is given back."""

from __future__ import annotations

import random

import pytest

from pipeline.forecasting.allocator import ALIGNED, MAPPED_FROM, MIB, Allocator, Heap, OutOfMemory


@pytest.mark.parametrize(("sizes", "reserved"), [
    ([1], 2 * MIB),
    ([MIB], 2 * MIB),
    ([MIB, MIB], 2 * MIB),
    ([MIB, MIB, 512], 4 * MIB),
    ([MIB + 1], 20 * MIB),
    ([9 * MIB, 9 * MIB], 20 * MIB),
    ([10 * MIB], 10 * MIB),
    ([10 * MIB + 1], 12 * MIB),
    ([9 * MIB, 9 * MIB, 3 * MIB], 40 * MIB),
])
def test_segments_are_those_of_the_rules(sizes, reserved):
    memory = Allocator()
    stored = [memory.new(size, "a") for size in sizes]
    assert memory.reserved == reserved and memory.allocated == sum(-(-s // 512) * 512 for s in sizes)
    stored.clear()
    assert memory.allocated == 0 and memory.reserved == reserved
    memory.empty_cache()
    assert memory.reserved == 0


def test_a_freed_block_serves_the_next_one_and_neighbours_join():
    memory = Allocator()
    first, second = memory.new(6 * MIB, "a"), memory.new(6 * MIB, "a")
    del first, second
    whole = memory.new(9 * MIB, "a")
    assert memory.reserved == 20 * MIB
    del whole


def test_streams_and_graphs_do_not_share():
    memory = Allocator()
    first = memory.new(16 * MIB, "a")
    del first
    with memory.side_stream():
        second = memory.new(16 * MIB, "a")
        assert memory.reserved == 32 * MIB
        del second
    pool = memory.new_pool()
    with memory.capture(pool):
        third = memory.new(16 * MIB, "a")
        del third
    memory.empty_cache()
    assert memory.reserved == 16 * MIB, "a graph keeps its pool"
    with memory.capture(pool):
        memory.new(16 * MIB, "a")
    memory.drop_pool(pool)
    memory.empty_cache()
    assert memory.reserved == 0


def test_a_full_card_gives_up_what_nobody_uses_before_it_fails():
    memory = Allocator(capacity=40 * MIB)
    first = memory.new(30 * MIB, "a")
    with pytest.raises(OutOfMemory):
        memory.new(12 * MIB, "a")
    del first
    assert memory.new(40 * MIB, "a") and memory.reserved == 40 * MIB


def test_the_peak_knows_what_was_live_then():
    memory = Allocator()
    weights = memory.new(32 * MIB, "weights")
    short = memory.new(64 * MIB, "activations")
    del short
    later = memory.new(16 * MIB, "logits")
    assert memory.peak.reserved == memory.peak.allocated == 96 * MIB and memory.peak.live == {"weights": 32 * MIB, "activations": 64 * MIB}
    del weights, later


def test_any_order_of_frees_leaves_whole_segments():
    draw, memory = random.Random(0), Allocator()
    stored = []
    for _ in range(2000):
        if stored and draw.random() < 0.45:
            stored.pop(draw.randrange(len(stored)))
        else:
            stored.append(memory.new(draw.choice([300, 5000, 700_000, 3 * MIB, 7 * MIB, 25 * MIB]) + draw.randrange(999), "a"))
        assert memory.reserved >= memory.allocated
    stored.clear()
    memory.empty_cache()
    assert memory.reserved == memory.allocated == 0


def test_on_a_heap_a_hole_of_a_forward_pass_takes_no_equal_tensor_until_the_graph_is_freed():
    memory, size = Heap(), MIB
    with memory.forward_pass():
        stored = [memory.new(size, "activations") for _ in range(4)]
        stored[1] = None
        stored[1] = memory.new(size, "activations")
    before = memory.reserved
    assert before > 5 * size and memory.allocated == 4 * size
    stored.clear()
    memory.graph_freed()
    stored.append(memory.new(before - ALIGNED, "activations"))
    assert memory.reserved == before


def test_on_a_heap_a_large_tensor_is_given_back_and_the_rest_stays():
    memory = Heap()
    small, large = memory.new(MIB, "weights"), memory.new(MAPPED_FROM, "weights")
    assert memory.reserved == MIB + ALIGNED + MAPPED_FROM
    del large, small
    assert (memory.reserved, memory.allocated) == (MIB + ALIGNED, 0) and memory.peak.reserved == MIB + ALIGNED + MAPPED_FROM
