import pytest

from server.scheduler.kv_pages import PageTable


@pytest.mark.parametrize(("tokens", "count"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (31, 2), (32, 2), (33, 3)])
def test_pages_cover_the_tokens(tokens: int, count: int) -> None:
    table = PageTable(num_pages=8, page_size=16)
    pages = table.allocate(tokens)
    assert pages is not None
    assert len(pages) == table.pages_for(tokens) == count
    assert (table.used, table.free) == (count, 8 - count)


def test_allocation_is_all_or_nothing() -> None:
    table = PageTable(num_pages=4, page_size=16)
    assert table.allocate(3 * 16) is not None
    assert table.allocate(2 * 16) is None
    assert (table.used, table.free) == (3, 1)
    assert table.allocate(16) is not None
    assert table.usage == 1.0


def test_two_owners_never_share_a_page() -> None:
    table = PageTable(num_pages=10, page_size=16)
    first, second = table.allocate(5 * 16), table.allocate(5 * 16)
    assert first is not None
    assert second is not None
    assert sorted(first + second) == list(range(10))


def test_pages_come_back_and_idle_is_checked() -> None:
    table = PageTable(num_pages=4, page_size=16)
    pages: tuple[int, ...] | None = None
    for _ in range(3):
        pages = table.allocate(4 * 16)
        assert pages is not None
        with pytest.raises(AssertionError, match="leaked"):
            table.check_idle()
        table.release(pages)
        table.check_idle()
    assert pages is not None
    with pytest.raises(AssertionError, match="twice"):
        table.release(pages)
