"""Who is tried again and who is blamed, on an executor whose workers die by hand."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future
from pathlib import Path
from typing import Any

import pytest

from vnet_core.errors import EngineError
from workers.engines.tries import TRIES, Supervised, Tries, Work, Worker, attempt
from workers.ledger import Outcome
from workers.storage.store import Root

NOBODY = Worker("host 1", 512 << 20)
LOST = EngineError("dask.lost", "its scheduler is gone")


class Death(BaseException):
    """What a process that is killed does not survive."""


class Gave(Exception):
    """What the engine says of a case whose worker died."""


class Mortal(Executor):
    """Does its work on submit. Where a worker dies, another is given the same work, as Dask does, ``again`` times."""

    this_worker: Callable[[], Worker] = staticmethod(lambda: NOBODY)

    def __init__(self, again: int, held_bytes: int | None = None, lost: EngineError | None = None) -> None:
        self.again, self.held_bytes, self.lost, self.order = again, held_bytes, lost, list[str]()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        work: Work = args[2]
        self.order.append(work.case)
        for _ in range(self.again + 1):
            try:
                future.set_result(fn(*args))
                return future
            except Death:
                continue
        future.set_exception(Gave())
        return future

    def loss(self) -> EngineError | None:
        return self.lost

    def check(self) -> None:
        pass

    def is_gone(self, worker: Worker) -> bool:
        return False

    def is_death(self, error: BaseException) -> bool:
        return isinstance(error, Gave)

    def memory_at_end(self, worker: Worker) -> int | None:
        return self.held_bytes


class Diary:
    """Work that happens to cases, and what of it happened."""

    def __init__(self, root: Root) -> None:
        self.root, self.begun = root, list[str]()

    def work(self, case: str, fate: Callable[[str], None] = lambda case: None) -> Work:
        return Work("preprocess", case, f"volumes/{case}", self._do, (case, fate))

    def _do(self, case: str, fate: Callable[[str], None]) -> Outcome:
        if self.root.receipt(f"volumes/{case}"):
            return Outcome(case, "preprocess", "cached", key=f"volumes/{case}")
        self.begun.append(case)
        fate(case)
        self.root.put(f"volumes/{case}/image", case.encode())
        self.root.seal(f"volumes/{case}", {"seconds": 2.5, "peak_bytes": 7})
        return Outcome(case, "preprocess", "computed", key=f"volumes/{case}")


def dies(case: str) -> None:
    raise Death


@pytest.fixture
def diary(tmp_path: Path) -> Diary:
    return Diary(Root(tmp_path / "root"))


def work_off(diary: Diary, executor: Executor, work: list[Work]) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}

    def told(outcome: Outcome) -> None:
        assert outcome.case not in outcomes, "one outcome per case"
        outcomes[outcome.case] = outcome

    Tries(diary.root, executor, told, lambda: True).work_off(work)
    return outcomes


@pytest.mark.parametrize("again", [0, 1, 3])
def test_a_case_that_kills_costs_as_many_workers_whatever_the_engine_does_again(diary: Diary, again: int) -> None:
    executor = Mortal(again)
    assert isinstance(executor, Supervised)
    outcomes = work_off(diary, executor, [diary.work("a"), diary.work("poison", dies), diary.work("b")])
    assert diary.begun.count("poison") == TRIES
    # the first time among others, then alone at the end
    assert executor.order == ["a", "poison", "b", "poison", "poison"]
    assert {case: outcome.state for case, outcome in outcomes.items()} == {
        "a": "computed",
        "b": "computed",
        "poison": "failed",
    }
    assert outcomes["poison"].codes == ("case.kills-worker",)
    assert "died 3 times" in outcomes["poison"].message
    assert diary.root.names("volumes") == ["a", "b"], "no mark stays"


def test_a_worker_that_was_ended_for_its_memory_is_told_as_such(diary: Diary) -> None:
    outcome = work_off(diary, Mortal(3, held_bytes=500 << 20), [diary.work("hog", dies)])["hog"]
    assert (outcome.state, outcome.codes) == ("failed", ("case.out-of-memory",))
    assert "500 MiB" in outcome.message
    assert "512 MiB" in outcome.message


def test_a_case_whose_worker_died_once_is_done_the_second_time(diary: Diary) -> None:
    def once(case: str) -> None:
        if diary.begun.count(case) == 1:
            raise Death

    outcomes = work_off(diary, Mortal(0), [diary.work("a", once), diary.work("b")])
    assert diary.begun == ["a", "b", "a"]
    assert {outcome.state for outcome in outcomes.values()} == {"computed"}


class Remembering(Mortal):
    """With each worker that dies answers are lost, and all that was ever submitted is done again, as Dask does it."""

    def __init__(self) -> None:
        super().__init__(1)
        self.past: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = super().submit(fn, *args, **kwargs)
        for again, arguments in self.past:
            again(*arguments)
        self.past.append((fn, args))
        return future


def test_what_an_engine_does_again_later_is_not_begun_again(diary: Diary) -> None:
    work_off(diary, Remembering(), [diary.work("a"), diary.work("poison", dies)])
    assert diary.begun.count("poison") == TRIES
    assert diary.root.names("volumes") == ["a"]


@pytest.mark.parametrize("again", [0, 3])
def test_a_case_that_was_published_before_its_worker_died_is_not_begun_again(diary: Diary, again: int) -> None:
    def sealed(case: str) -> Outcome:
        diary._do(case, lambda case: None)
        raise Death

    work = Work("preprocess", "a", "volumes/a", sealed, ("a",))
    outcome = work_off(diary, Mortal(again), [work])["a"]
    assert diary.begun == ["a"]
    assert (outcome.state, outcome.key, outcome.seconds, outcome.peak_bytes) == ("computed", "volumes/a", 2.5, 7)


class Unborn(Mortal):
    """Workers that die before they begin, so many times."""

    def __init__(self, deaths: int) -> None:
        super().__init__(0)
        self.deaths = deaths

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if self.deaths == 0:
            return super().submit(fn, *args, **kwargs)
        self.deaths -= 1
        future: Future[Any] = Future()
        future.set_exception(Gave())
        return future


def test_a_case_that_only_waited_for_a_dead_worker_is_not_blamed(diary: Diary) -> None:
    assert work_off(diary, Unborn(TRIES + 1), [diary.work("a")])["a"].state == "computed"
    assert diary.begun == ["a"]


def test_workers_that_die_before_they_begin_end_the_trying(diary: Diary) -> None:
    outcome = work_off(diary, Unborn(1000), [diary.work("a")])["a"]
    assert (outcome.state, outcome.codes) == ("failed", ("engine.worker-died",))
    assert "before it was begun" in outcome.message


def test_a_worker_that_cannot_load_the_case_is_told(diary: Diary) -> None:
    class Foreign(Mortal):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_exception(ModuleNotFoundError("No module named 'workers'"))
            return future

    outcome = work_off(diary, Foreign(0), [diary.work("a")])["a"]
    assert (outcome.state, outcome.codes) == ("failed", ("engine.worker-failed",))
    assert "ModuleNotFoundError" in outcome.message


def test_a_case_whose_answer_cannot_be_read_is_told_by_its_receipt(diary: Diary) -> None:
    class Illegible(Mortal):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            fn(*args)
            future: Future[Any] = Future()
            future.set_exception(OSError("its answer was cut off"))
            return future

    outcome = work_off(diary, Illegible(0), [diary.work("a")])["a"]
    assert (outcome.state, outcome.seconds) == ("computed", 2.5)


def test_a_worker_that_may_not_work_ends_the_stage(diary: Diary) -> None:
    class Other(Mortal):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_exception(EngineError("dask.versions", "numpy is 1 there"))
            return future

    with pytest.raises(EngineError, match="numpy is 1 there"):
        work_off(diary, Other(0), [diary.work("a")])


def test_a_pool_that_broke_is_a_row_for_each_case(diary: Diary) -> None:
    class Broken(Executor):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            raise BrokenExecutor

    outcomes = work_off(diary, Broken(), [diary.work("a"), diary.work("b")])
    assert [outcome.codes for outcome in outcomes.values()] == [("engine.worker-died",)] * 2


class Dropping(Mortal):
    """Cancels everything."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.cancel()
        future.set_running_or_notify_cancel()
        return future


def test_work_that_is_dropped_by_a_lost_engine_is_an_error_and_by_its_owner_is_left(diary: Diary) -> None:
    with pytest.raises(EngineError, match="its scheduler is gone"):
        work_off(diary, Dropping(0, lost=LOST), [diary.work("a")])
    assert work_off(diary, Dropping(0), [diary.work("a")]) == {}


def test_a_storage_root_that_fails_on_the_worker_is_a_row(diary: Diary, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    outcome = attempt((tmp_path / "file").as_uri(), "volumes/a.try-1", diary.work("a"), lambda: NOBODY)
    assert outcome is not None
    assert outcome.state == "failed"
    assert diary.begun == []


def test_the_second_under_one_mark_does_nothing(diary: Diary) -> None:
    with pytest.raises(Death):
        attempt(diary.root.url, "volumes/a.try-1", diary.work("a", dies), lambda: NOBODY)
    assert attempt(diary.root.url, "volumes/a.try-1", diary.work("a"), lambda: NOBODY) is None
    assert diary.begun == ["a"]
