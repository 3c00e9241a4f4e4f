"""What choice scoring feeds once: known arrangements of rows."""

from __future__ import annotations

from pipeline.data.choices import LEAD, Reads, arrange, joined


def test_the_choices_of_a_row_become_a_tree():
    (row,) = joined([([5, 6], [[7], [7, 8], [7, 8, 9], [7, 10, 11], [12]])])
    assert row.ids == [5, 6, 7, 8, 10] and row.parents == (1, 2, 2) and row.branches
    assert row.reads == [(1, 7, 0), (1, 7, 1), (2, 8, 1), (1, 7, 2), (2, 8, 2), (3, 9, 2), (1, 7, 3), (2, 10, 3), (4, 11, 3), (1, 12, 4)]


def test_nested_choices_need_no_mask_and_empty_ones_are_not_fed():
    first, second = joined([([5], [[7, 8], [7, 8, 9]]), ([5], [[]]), ([6], [[], [7]])])
    assert not first.branches and first.ids == [5, 7, 8] and second.item == 2 and second.reads == [(0, 7, 4)]


def test_what_all_rows_begin_with_is_taken_out_up_to_the_first_read():
    shots = list(range(2, 2 + 4 * LEAD))
    items = [([*shots, *rest], [[3], [4]]) for rest in ([5], [5, 6], [5, 6, 7])]
    (group,) = arrange(Reads.of(items), items)
    assert group.prefix == shots and group.shares
    assert [row.ids for row in group.rows] == [[5], [5, 6], [5, 6, 7]] and group.rows[2].reads == [(2, 3, 4), (2, 4, 5)]


def test_rows_that_begin_otherwise_stay_whole():
    shots = list(range(2, 26))
    items = [*(([*shots, i], [[3]]) for i in range(5)), ([9, 8, 7], [[3]])]
    shared, other = arrange(Reads.of(items), items)
    assert len(shared.rows) == 5 and [row.item for row in other.rows] == [5] and not other.shares


def test_single_token_choices_without_a_common_beginning_stay_as_they_were():
    items = [([7 + i % 20, *[5] * 40], [[3], [4]]) for i in range(30)]
    (group,) = arrange(Reads.of(items), items)
    assert not group.shares and [row.ids for row in group.rows] == Reads.of(items).sequences


def test_little_saving_is_left():
    items = [([*range(50), 60 + i], [[3, 4], [3]]) for i in range(2)]
    items[0] = ([9, *items[0][0]], [[3, 4], [3]])
    assert not any(group.shares for group in arrange(Reads.of(items), items))
    assert any(group.shares for group in arrange(Reads.of(items), items, least=0))
