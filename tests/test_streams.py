"""Rows one after another in a stream: every row in one, within its budget; attention within a row, and when a stream is worth it."""

from __future__ import annotations

import random

import pytest
import torch

from pipeline.data.rows import Encoded
from pipeline.engine.attention import Heads, Rows, Stream
from pipeline.engine.layout import Shapes, tokens
from pipeline.engine.steps import Static
from pipeline.engine.streams import Streams, worth_it


def example(rng: random.Random, low: int, high: int) -> Encoded:
    size = rng.randint(low, high)
    return Encoded(tuple(rng.randrange(2, 99) for _ in range(size)), rng.randint(1, size - 1))


def steps(count: int = 30, rows: int = 6, low: int = 4, high: int = 50) -> list[list[list[Encoded]]]:
    rng = random.Random(7)
    return [[[example(rng, low, high) for _ in range(rows)]] for _ in range(count)]


@pytest.mark.parametrize("most_tokens", [60, 100000])
def test_every_row_stands_once_in_a_stream_and_all_that_is_left_is_cut_into_rows_of_its_own(most_tokens):
    batches = steps()
    streams = Streams(batches, most_tokens, 3)
    assert len(streams.all()) <= 3 and streams.accumulates == (most_tokens == 60)
    inputs = {shape.width: Static(shape, 1, 0, 1, "cpu") for shape in streams.all()}
    for step in batches:
        seen, weights = [], 0.0
        for micro in streams.micro_batches(step):
            static, (examples, _) = inputs[micro.shape.width], micro.parts[0]
            static.fill(micro)
            ends, ids = static.stream.ends.tolist(), static.ids[0]
            assert ends[0] == 0 and ends[-1] == micro.shape.width and max(b - a for a, b in zip(ends, ends[1:], strict=False)) <= static.stream.longest
            assert len(ends) == len(static.stream.ends)
            for number, (one, begin) in enumerate(zip(examples, ends, strict=False)):
                end = begin + len(one.ids) - 1
                assert ends[number + 1] == end and ids[begin:end].tolist() == list(one.ids[:-1])
                assert static.stream.position[begin:end].tolist() == list(range(end - begin)) and set(static.stream.row[begin:end].tolist()) == {number}
            assert (ids[ends[len(examples)] :] == 1).all()
            live = static.weights > 0
            expected = [(begin + at - 1, one.ids[at]) for one, begin in zip(examples, ends, strict=False) for at in range(one.start, len(one.ids))]
            assert list(zip(static.at[live].tolist(), static.targets[live].tolist(), strict=True)) == expected
            real, padding = tokens(micro)
            assert real + padding == micro.shape.width and (real <= most_tokens or len(examples) == 1)
            seen += examples
            weights += float(static.weights.sum())
        assert sorted(map(str, seen)) == sorted(map(str, step[0])) and weights == pytest.approx(1.0)


def test_a_token_attends_within_its_row_forward_and_backward():
    torch.manual_seed(0)
    heads, lengths = Heads(4, 2, 8), [5, 1, 9, 0, 3]
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    stream = Stream(ends, torch.zeros(18), torch.zeros(18), 9)
    qkv, dmerged = torch.randn(18, 64), torch.randn(18, 32)
    merged, saved = stream.forward(heads, qkv, True)
    assert torch.equal(stream.output(heads, saved), merged)
    back = stream.backward(heads, saved, dmerged)
    for begin, end in zip(ends.tolist(), ends.tolist()[1:], strict=False):
        if begin == end:
            continue
        alone, its = Rows(end - begin).forward(heads, qkv[begin:end], True)
        assert torch.allclose(merged[begin:end], alone, atol=1e-6)
        for part, whole in zip(Rows(end - begin).backward(heads, its, dmerged[begin:end]), back, strict=True):
            assert torch.allclose(whole[:, :, begin:end], part, atol=1e-6)


@pytest.mark.parametrize(("low", "least", "worth"), [(4, 0, True), (4, 100_000, False), (50, 0, False)])
def test_streams_are_worth_it_where_lengths_differ_and_the_device_is_busy(low, least, worth):
    batches = steps(low=low)
    assert worth_it(Streams(batches, 4096, 3), Shapes(batches, 4096, 3), least) is worth
