"""The garbage collector rests within a block, and works again after it, whatever happens there."""

import gc

import pytest

from workers.collector import collector_at_rest


def test_nothing_is_collected_within_and_all_is_as_before_after_it():
    before = gc.get_freeze_count()
    with collector_at_rest():
        assert not gc.isenabled()
    assert gc.isenabled()
    # what is frozen is left over at the end of the process, and some libraries complain of that on standard error
    assert gc.get_freeze_count() == before


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
