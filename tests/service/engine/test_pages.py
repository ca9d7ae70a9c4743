"""The pool of pages against a brute-force model: reference counts, contents, and who goes first."""

from __future__ import annotations

import random

import pytest

from service.engine.pages import Content, PagePool


def content(key):
    return Content(key.to_bytes(4, "big"), 1.0, 1.0)


class Model:
    """The same pool, as a list of facts about each page and no index."""

    def __init__(self, pages):
        self.users = [0] * pages
        self.keys = [None] * pages
        self.let_go = [0] * pages  # when: the larger, the later
        self.clock = 0

    def free(self):
        return [page for page, users in enumerate(self.users) if users == 0]

    def take(self, count):
        blank = sorted(page for page in self.free() if self.keys[page] is None)
        kept = sorted(set(self.free()) - set(blank), key=lambda page: self.let_go[page])
        taken = (blank + kept)[:count]
        for page in taken:
            self.users[page], self.keys[page] = 1, None
        return sorted(taken)

    def share(self, pages):
        for page in pages:
            self.users[page] += 1

    def release(self, pages):
        for page in reversed(pages):
            self.users[page] -= 1
            self.clock += 1
            self.let_go[page] = self.clock

    def keep(self, page, key):
        self.keys = [None if other == key else other for other in self.keys]
        self.keys[page] = key


def compare(pool, model, keys):
    assert pool.free == len(model.free())
    assert pool.usage == pytest.approx(1 - pool.free / pool.pages)
    for key in range(keys):
        expected = model.keys.index(key) if key in model.keys else None
        assert pool.find(content(key).key) == expected
        if expected is not None:
            assert pool.content(expected) == content(key)
    everyone = list(range(pool.pages))
    assert pool.idle(everyone) == pool.free


@pytest.mark.parametrize("seed", range(20))
def test_a_random_walk_agrees_with_the_model(seed):
    rng = random.Random(seed)
    pages, keys = rng.randint(1, 24), 30
    pool, model, held = PagePool(pages), Model(pages), []
    for _ in range(600):
        act = rng.random()
        if act < 0.35 and pool.free:
            count = rng.randint(1, pool.free)
            taken = pool.take(count)
            assert taken == model.take(count)
            held.append(taken)
        elif act < 0.55 and held:
            page = rng.choice(rng.choice(held))
            # As the engine does: a page gets a key once.
            if model.keys[page] is None:
                key = rng.randrange(keys)
                pool.keep(page, content(key))
                model.keep(page, key)
        elif act < 0.75:
            found = [pool.find(content(key).key) for key in rng.sample(range(keys), 4)]
            found = [page for page in found if page is not None]
            pool.share(found)
            model.share(found)
            held.append(found)
        elif held:
            gone = held.pop(rng.randrange(len(held)))
            pool.release(gone)
            model.release(gone)
        held = [each for each in held if each]
        compare(pool, model, keys)
    for each in held:
        pool.release(each)
    assert pool.usage == 0
    assert sorted(pool.take(pages)) == list(range(pages))
    assert all(pool.find(content(key).key) is None for key in range(keys))


def filled(pool, count, first):
    pages = pool.take(count)
    for number, page in enumerate(pages):
        pool.keep(page, content(first + number))
    return pages


def test_pages_without_a_content_go_before_those_that_may_be_found():
    pool = PagePool(6)
    kept = filled(pool, 3, 0)
    pool.release(kept)
    blank = pool.take(3)
    assert not set(blank) & set(kept)
    assert [pool.find(content(key).key) for key in range(3)] == kept


def test_the_least_recently_used_goes_first_and_of_one_prompt_its_end():
    pool = PagePool(6)
    old, new = filled(pool, 3, 0), filled(pool, 3, 10)
    pool.release(old)
    pool.release(new)
    pool.share(old[:1])  # used again, so it is the newest of all
    pool.release(old[:1])
    order = []
    for _ in range(6):
        [page] = pool.take(1)
        order.append(page)
    assert order == [old[2], old[1], new[2], new[1], new[0], old[0]]


def test_a_page_handed_out_again_is_not_found():
    pool = PagePool(1)
    pool.release(filled(pool, 1, 7))
    assert pool.find(content(7).key) == 0
    pool.take(1)
    assert pool.find(content(7).key) is None


def test_what_somebody_holds_stays():
    pool = PagePool(4)
    mine = filled(pool, 2, 0)
    pool.share(mine)
    pool.release(mine)
    pool.take(2)
    assert pool.free == 0
    assert [pool.find(content(key).key) for key in range(2)] == mine


def test_a_second_page_of_one_content_takes_the_place_of_the_first():
    pool = PagePool(3)
    [first] = filled(pool, 1, 5)
    pool.release([first])
    [second] = pool.take(1)
    pool.keep(second, content(5))
    assert pool.find(content(5).key) == second != first
    assert pool.free == 2
    pool.release([second])
    assert second not in pool.take(2)
    assert pool.find(content(5).key) == second
