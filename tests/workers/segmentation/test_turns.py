"""What follows what for a case whose portions are shared, by hand: no actor is needed to know that."""

from collections import deque
from dataclasses import replace

from tests.workers.small_root import case_of
from workers.ledger import Outcome
from workers.segmentation.segment import OUT_OF_MEMORY, Job
from workers.segmentation.shares import Division, Step
from workers.segmentation.turns import ATTEMPTS, Batch, Turn

DIVISION = Division((8, 8, 8), (32, 32, 32), 2**20, 3)
DONE = Outcome("a", "segment", "computed")
OTHER = Turn(Job("liver", case_of("b"), "nifti"))


def shared_out(attempt: int = 1) -> tuple[Batch, list[Outcome], Turn]:
    """A batch in which case ``a`` was just divided and another waits."""
    told: list[Outcome] = []
    batch = Batch(deque([OTHER]), told.append, lambda job: True)
    turn = Turn(Job("liver", case_of("a"), "nifti", divide=True), attempt)
    batch.share_out("results/a", turn, DIVISION)
    return batch, told, turn


def portions(batch: Batch) -> list[int | None]:
    return [turn.job.step.portion if turn.job.step else None for turn in batch.fresh]


def test_portions_come_next_and_when_all_are_back_the_mask_is_published() -> None:
    batch, told, turn = shared_out(attempt=2)
    assert portions(batch) == [0, 1, 2, None]
    taken = [batch.fresh.popleft() for _ in range(3)]
    assert all(one.is_portion and one.attempt == 1 and not one.job.divide for one in taken)
    for one in (taken[2], taken[0]):
        batch.settle("results/a", one, DONE)
    assert list(batch.fresh) == [OTHER]
    batch.settle("results/a", taken[1], DONE)
    (last, other) = batch.fresh
    assert other is OTHER
    assert last == Turn(replace(turn.job, divide=False, step=Step(DIVISION, None)), 2), "the try of the case stays"
    assert not last.is_portion
    assert told == []
    published = replace(DONE, key="results/a")
    batch.settle("results/a", last, published)
    assert told == [published]


def test_a_portion_that_fails_takes_those_that_wait_along_and_is_told_once() -> None:
    batch, told, _ = shared_out()
    first, second = batch.fresh.popleft(), batch.fresh.popleft()
    batch.suspects.append(replace(OTHER, attempt=2))
    failed = replace(DONE, state="failed", codes=("store.full",))
    batch.settle("results/a", first, failed)
    assert list(batch.fresh) == [OTHER], "what waits of it is dropped"
    assert len(batch.suspects) == 1
    assert told == [], "somebody is still at the other"
    batch.settle("results/a", second, replace(failed, codes=("store.denied",)))
    assert told == [failed], "the first reason counts"
    assert list(batch.fresh) == [OTHER]


def test_where_memory_ends_over_a_portion_one_actor_does_the_case_alone() -> None:
    batch, told, turn = shared_out()
    taken = [batch.fresh.popleft() for _ in range(3)]
    batch.settle("results/a", taken[0], replace(DONE, state="failed", codes=(OUT_OF_MEMORY,)))
    for one in taken[1:]:
        batch.settle("results/a", one, DONE)
    assert list(batch.fresh) == [Turn(replace(turn.job, divide=False), ATTEMPTS), OTHER]
    assert told == []


def test_a_portion_that_is_tried_again_is_waited_for() -> None:
    batch, _, _ = shared_out()
    taken = [batch.fresh.popleft() for _ in range(3)]
    for one in taken[:2]:
        batch.settle("results/a", one, DONE)
    again = Turn(taken[2].job, 2)
    batch.suspects.append(again)
    assert batch.waiting
    batch.suspects.popleft()
    batch.settle("results/a", again, DONE)
    assert portions(batch)[0] is None
    assert batch.fresh[0].job.step == Step(DIVISION, None)
