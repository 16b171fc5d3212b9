"""The books of KV that outlives its sequence: what is found, what may be rewritten, what goes first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConservationError
from engine.memory.blocks import Match, TokenChain
from engine.memory.prefix import PrefixCache

T = 4
NO_DRAFT = -1
TOKENS = st.lists(st.integers(0, 3), max_size=22)


def chain(tokens: Sequence[int], salt: str = "", per_block: int = T) -> TokenChain:
    made = TokenChain(salt, per_block)
    made.extend(reader(tokens), len(tokens))
    return made


def reader(tokens: Sequence[int]) -> Callable[[int, int], Sequence[int]]:
    return lambda start, end: tokens[start:end]


def span(first: int, count: int) -> tuple[int, ...]:
    return tuple(range(first, first + count))


class Books(PrefixCache):
    """A cache, used as the pool uses it, checked after each change."""

    def __init__(self, per_block: int = T) -> None:
        super().__init__(per_block, is_enabled=True)

    def live(self, slot: int, tokens: Sequence[int], salt: str = "") -> TokenChain:
        """A sequence that has computed these tokens in an empty slot."""
        made = chain(tokens, salt, self._per_block)
        self.open(slot)
        self.plan(slot, made, len(made.digests))
        self.computed(slot, len(tokens))
        self.check()
        return made

    def keep(self, slot: int, tokens: Sequence[int], salt: str = "") -> None:
        """A sequence that has computed these tokens and ended."""
        self.close(slot, self.live(slot, tokens, salt), tuple(tokens))
        self.check()

    def find(self, tokens: Sequence[int], salt: str = "", draft: int = NO_DRAFT) -> Match | None:
        return self.match(chain(tokens, salt, self._per_block), reader(tokens), len(tokens), draft)

    def read(self, slot: int, tokens: Sequence[int], num_aliased: int = 0) -> Match:
        """A sequence that begins in an empty slot, on what is found."""
        match = self.find(tokens)
        assert match is not None
        self.open(slot)
        self.share(slot, match, num_aliased)
        self.check()
        return match


def found(match: Match | None) -> tuple[int, int, bool] | None:
    """Slot, tokens, and whether it goes on in place."""
    return None if match is None else (match.slot, match.num_tokens, match.is_in_place)


@given(TOKENS, TOKENS, st.sampled_from(["", "a"]), st.sampled_from(["", "a"]))
def test_hashes_agree_exactly_as_far_as_salts_and_tokens_do(
    one: list[int], other: list[int], salt: str, other_salt: str
) -> None:
    mine, theirs = chain(one, salt), chain(other, other_salt)
    assert len(mine.digests) == len(one) // T
    assert (mine.root == theirs.root) == (salt == other_salt)
    for at in range(min(len(mine.digests), len(theirs.digests))):
        end = (at + 1) * T
        is_same = salt == other_salt and one[:end] == other[:end]
        assert (mine.digests[at] == theirs.digests[at]) == is_same
        assert mine.after(at + 1) == mine.digests[at] != mine.after(at)


def test_a_token_moved_to_the_next_block_makes_another_hash() -> None:
    assert chain([1, 2, 3], per_block=1).digests[-1] != chain([1, 2, 3], per_block=3).digests[-1]


def test_a_chain_goes_on_where_it_was() -> None:
    grown, tokens = TokenChain("", T), span(0, 11)
    for length in range(12):
        grown.extend(reader(tokens), length)
        assert grown.digests == chain(tokens[:length]).digests


@given(st.lists(TOKENS.filter(bool), min_size=1, max_size=4), TOKENS.filter(bool))
def test_what_is_found_is_there_and_leaves_a_token_to_compute(
    kept: list[list[int]], asked: list[int]
) -> None:
    books = Books()
    for slot, tokens in enumerate(kept):
        books.keep(slot, tokens)
    match = books.find(asked)
    agreeing = [_common(tokens, asked[:-1]) for tokens in kept]
    num_found = match.num_tokens if match else 0
    assert max(agreeing) // T * T <= num_found <= max(agreeing), "every full block, and never all of it"
    ending = [
        count for count, tokens in zip(agreeing, kept, strict=True) if len(tokens) // T == num_found // T
    ]
    assert num_found >= max(ending, default=0), "and of those that end after them, the longest"
    if match is not None:
        held = kept[match.slot]
        assert held[: match.num_tokens] == asked[: match.num_tokens]
        assert match.num_blocks == match.num_tokens // T
        assert not match.is_in_place or len(held) == match.num_tokens
    assert books.find(asked, "other salt") is None


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count


def test_of_a_live_sequence_full_blocks_are_found_once_computed() -> None:
    books, tokens = Books(), span(0, 11)
    books.open(0)
    books.plan(0, chain(tokens), 2)
    assert books.find(tokens) is None
    assert books.must_wait(chain(tokens), None, 11, NO_DRAFT), "it will be there: not to be computed twice"
    assert not books.must_wait(chain(tokens), None, 4, NO_DRAFT), (
        "all of a prompt's blocks but its last token's"
    )
    books.drafted(0, 4, draft=7)
    assert found(books.find(tokens, draft=7)) == (0, 4, False), "this draft computes it"
    assert books.find(tokens, draft=8) is None
    assert books.must_wait(chain(tokens), None, 11, 8)
    assert not books.must_wait(chain(tokens), None, 11, 7)
    books.computed(0, 11)
    match = books.find(tokens)
    assert found(match) == (0, 8, False)
    assert not books.must_wait(chain(tokens), match, 11, NO_DRAFT)


def test_who_reads_what_a_draft_computes_waits_until_it_is() -> None:
    books, tokens = Books(), span(0, 9)
    books.open(0)
    books.plan(0, chain(tokens), 2)
    books.drafted(0, 8, draft=7)
    match = books.find(tokens, draft=7)
    assert match is not None
    books.open(1)
    books.share(1, match, 0)
    assert (books.is_readable(1, 7), books.is_readable(1, 8)) == (True, False)
    assert books.orphans(0, 7) == [1], "of two blocks, one would never be computed"
    assert books.orphans(0, 8) == []
    books.computed(0, 8)
    assert books.is_readable(1, 8)
    books.check()


def test_a_closed_slot_goes_on_in_place_if_nobody_reads_what_would_be_rewritten() -> None:
    tokens = span(0, 10)
    longer = (*tokens, 90, 91)
    books = Books()
    books.keep(0, tokens)
    assert found(books.find(longer)) == (0, 10, True)
    books.read(1, (*span(0, 8), 77))  # in use: the first two blocks, which stay as they are
    assert found(books.find(longer)) == (0, 10, True)
    match = books.find((*tokens[:9], 80))
    assert match is not None
    books.copy_from(1, match)
    assert found(books.find(longer)) == (0, 10, False), "its last block is about to be copied"
    books.copied(1)
    assert found(books.find(longer)) == (0, 10, True)
    books.close(1, chain(span(0, 8)), span(0, 8))
    assert found(books.find((*span(0, 4), 60, 61))) == (0, 4, False), "too much would be lost"


@pytest.mark.parametrize("is_closed", [False, True])
def test_a_block_that_another_slot_reads_is_not_rewritten(is_closed: bool) -> None:
    """Nor if that slot is closed: it has no rows of its own for these blocks."""
    books = Books(per_block=8)
    books.keep(0, span(0, 16))
    books.read(1, (*span(0, 16), 50))
    if is_closed:
        books.close(1, chain(span(0, 16), per_block=8), span(0, 16))
    again = books.find(span(0, 16))  # block 1 would be rewritten
    assert again is not None
    assert again.num_tokens == 15
    assert not (again.slot == 0 and again.is_in_place)


def test_a_block_that_two_slots_have_mapped_is_not_rewritten() -> None:
    books, base = Books(per_block=8), (*span(0, 8), *span(20, 16))
    books.keep(0, span(0, 8))
    for slot, num_aliased in ((1, 0), (2, 2)):
        books.read(slot, (*base, 5), num_aliased)
        books.plan(slot, chain(base, per_block=8), 3)
        books.close(slot, chain(base, per_block=8), base)
        books.check()
    assert books[1].blocks[2] is books[2].blocks[2]
    match = books.find(base)
    assert match is not None
    assert (match.num_tokens, match.is_in_place) == (23, False)


def test_continuing_in_place_forgets_what_is_rewritten() -> None:
    books = Books(per_block=8)
    books.keep(0, span(0, 16))
    match = books.find(span(0, 16))  # all but its last token, which has to be computed
    assert found(match) == (0, 15, True)
    assert match is not None
    books.continue_in(match)
    books.check()
    assert (books.num_closed, books.num_evictable) == (0, 0)
    assert found(books.find(span(0, 17))) == (0, 8, False), "block 1 is not what it was"
    books.computed(0, 16)
    books.known(0, chain(span(0, 16), per_block=8))
    assert found(books.find(span(0, 17))) == (0, 16, False), "now it is again"
    books.check()


def test_a_fork_of_a_fork_reads_through_the_first_slot() -> None:
    books = Books()
    books.keep(0, span(0, 8))
    books.read(1, (*span(0, 8), 50))
    books.plan(1, chain((*span(0, 8), *span(50, 8))), 4)
    books.computed(1, 16)
    both = (*span(0, 8), *span(50, 8), 9)
    match = books.find(both)
    assert match is not None
    assert (match.slot, match.num_blocks, books.source_of(match)) == (1, 4, (0, 2))
    books.read(2, both, num_aliased=1)
    assert (books[2].source, books[2].shared, len(books[2].blocks)) == (0, 2, 3)
    assert books[2].blocks[2].holders == {1, 2}
    assert books[0].readers == {1: 2, 2: 2}
    assert books.num_evictable == 0


def test_what_is_given_up_first() -> None:
    """What nobody wants, the least recently used first; then what the latest arrivals want."""
    books = Books()
    for slot in range(5):
        books.keep(slot, span(100 * slot, 9))
    books.want(0, "early", (1.0, "early"))
    books.want(3, "late", (9.0, "late"))
    books.want(4, "late", (9.0, "late"))
    books.want(4, "earlier", (5.0, "earlier"))
    assert books.closed() == [1, 2, 3, 4, 0]
    books.read(5, (*span(100, 8), 7))  # slot 1 is used once more
    assert books.closed() == [2, 1, 3, 4, 0]
    books.unwant(0, "early")
    books.unwant(8, "a slot that is gone")
    assert books.closed() == [0, 2, 1, 3, 4]


def test_only_what_nobody_reads_is_given_up_and_from_the_end() -> None:
    books = Books()
    books.keep(0, span(0, 18))
    assert books.num_evictable == 5
    books.newest_step = 6
    books.read(1, (*span(0, 8), 50))
    assert books.num_evictable == 3
    assert books.shrink(0, 1) == (4, 0)
    assert found(books.find(span(0, 18))) == (0, 16, True), "its tokens end with its blocks"
    assert books.shrink(0, 99) == (2, 0), "two are read"
    assert books.num_evictable == 0
    books.check()
    assert not books.try_remove(0)
    books.newest_step = 8
    books.close(1, chain(()), ())
    assert books.num_evictable == 2
    assert books.shrink(0, 99) == (2, 0), "slot 1 still reads through it"
    assert books.try_remove(1)
    assert books.shrink(0, 99) == (0, 8), "and steps up to 8 may read them"
    assert books.try_remove(0)
    assert books.find(span(0, 18)) is None
    assert (books.num_closed, books.num_evictable) == (0, 0)
    books.check()


def test_a_held_match_is_not_given_up() -> None:
    books = Books()
    books.keep(0, span(0, 18))
    match = books.find((*span(0, 10), 70))
    assert found(match) == (0, 10, False)
    assert match is not None
    held = books.hold(match.slot, match.num_blocks + 1)
    assert books.shrink(0, 99)[0] == 3, "its two blocks, and that whose beginning is to be copied"
    books.release(held)
    assert books.shrink(0, 99)[0] == 0
    books.check()


def test_what_a_failed_sequence_computed_is_found_no_more() -> None:
    books, tokens = Books(), (*span(0, 8), *span(50, 8))
    books.keep(0, span(0, 8))
    books.read(1, tokens)
    books.plan(1, chain(tokens), 4)
    books.computed(1, 16)
    assert found(books.find((*tokens, 1))) == (1, 16, False)
    assert books.distrust(1) == 0, "nobody has read of it"
    assert found(books.find((*tokens, 1))) == (0, 8, True), "what it read of others is as good as before"
    books.close(1, chain(tokens), ())
    books.check()
    assert 1 not in {match.slot for match in [books.find((*tokens, 1))] if match}


def test_what_others_have_begun_to_read_of_a_failed_sequence_stays_for_them() -> None:
    books, tokens = Books(), span(0, 14)
    mine = books.live(0, tokens)
    books.read(1, (*span(0, 8), 50))
    assert books.distrust(0) == 8
    books.close(0, mine, tokens[:8])
    books.check()
    assert books.shrink(0, 99)[0] == 2
    assert books.find(tokens) is None or books.find(tokens) == Match(0, 0, 4, False, 0, 0)


def test_nothing_is_kept_or_found_where_caching_is_off() -> None:
    books = PrefixCache(T, is_enabled=False)
    books.open(0)
    books.plan(0, chain(span(0, 9)), 2)
    books.computed(0, 9)
    assert books.match(chain(span(0, 9)), reader(span(0, 9)), 9, NO_DRAFT) is None
    assert books.close(0, chain(span(0, 9)), span(0, 9)) == 0
    assert books.try_remove(0)
    books.check()


def test_a_slot_is_opened_once() -> None:
    books = Books()
    books.keep(0, span(0, 9))
    with pytest.raises(ConservationError, match="slot 0 is not free"):
        books.open(0)


def _forget_a_user(books: Books) -> None:
    books[1].blocks[0].users -= 1


def _lose_a_holder(books: Books) -> None:
    books[1].blocks[2].holders.clear()


def _lose_a_reader(books: Books) -> None:
    books[0].readers[1] = 1


def _lose_a_hash(books: Books) -> None:
    books[0].blocks[0].digest = chain(span(200, 4)).digests[0]
    books._index[books[0].blocks[0].digest] = books[0].blocks[1]


def _keep_a_block_of_nobody(books: Books) -> None:
    books[1].blocks.pop()


def _count_wrong(books: Books) -> None:
    books.num_evictable += 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_forget_a_user, "blocks are idle"),
        (_count_wrong, "blocks are idle"),
        (_lose_a_holder, "does not know it"),
        (_lose_a_reader, "disagree"),
        (_lose_a_hash, "not found by its hash"),
        (_keep_a_block_of_nobody, "that no slot holds"),
    ],
)
def test_broken_books_are_noticed(damage: Callable[[Books], None], message: str) -> None:
    books = Books()
    books.keep(0, span(0, 8))
    books.read(1, (*span(0, 8), 50))
    books.plan(1, chain((*span(0, 8), *span(50, 4))), 3)
    books.check()
    damage(books)
    with pytest.raises(ConservationError, match=message):
        books.check()
