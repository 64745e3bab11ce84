"""The garbage collector rests within a block, and works again after it, whatever happens there."""

import gc

import pytest

from workers.collector import collector_at_rest


@pytest.fixture(autouse=True)
def _thawed():
    yield
    gc.unfreeze()


def test_nothing_is_collected_within_and_what_was_made_is_left_alone():
    with collector_at_rest():
        assert not gc.isenabled()
        kept = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= len(kept)


def test_it_works_again_after_an_error():
    with pytest.raises(ValueError, match="within"), collector_at_rest():
        raise ValueError("within")
    assert gc.isenabled()


def test_where_it_was_off_it_stays_off():
    gc.disable()
    try:
        with collector_at_rest():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
