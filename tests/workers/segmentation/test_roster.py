"""Who gets the next case."""

import random

from workers.segmentation.roster import Roster


def roster(*workers: str) -> Roster[str]:
    found = Roster[str](places=2)
    for worker in workers:
        found.add(worker)
    return found


def test_each_gets_a_first_case_before_anyone_gets_a_second():
    found = roster("a", "b", "c")
    assert [found.take() for _ in range(7)] == ["a", "b", "c", "a", "b", "c", None]


def test_who_gets_free_takes_the_next():
    found = roster("a", "b")
    for _ in range(4):
        found.take()
    found.free("b")
    assert found.take() == "b"
    assert found.take() is None
    found.free("a")
    found.free("b")
    found.free("b")
    assert found.take() == "b", "it holds nothing, a holds one"
    assert [found.take() for _ in range(3)] == ["a", "b", None]


def test_one_that_is_gone_gets_nothing_and_another_takes_its_place():
    found = roster("a", "b")
    assert [found.take(), found.take(), found.take()] == ["a", "b", "a"]
    found.remove("a")
    assert len(found) == 1
    assert "a" not in found
    assert [found.take(), found.take()] == ["b", None]
    found.add("c")
    assert [found.take(), found.take(), found.take()] == ["c", "c", None]
    found.remove("b")
    found.remove("c")
    assert found.take() is None


def test_a_case_that_wants_to_be_alone_gets_a_worker_that_holds_nothing():
    found = roster("a", "b")
    assert found.take() == "a"
    assert found.take(places=2) == "b"
    assert found.take(places=2) is None
    assert [found.take(), found.take()] == ["a", None]
    found.free("b", places=2)
    assert found.take() == "b"


def test_any_order_of_events_keeps_the_books():
    draw = random.Random(5)
    found, held = Roster[int](places=2), dict[int, int]()
    for number in range(5000):
        match draw.choice(["add", "remove", "take", "take", "free"]):
            case "add":
                found.add(number)
                held[number] = 0
            case "remove" if held:
                worker = draw.choice(list(held))
                found.remove(worker)
                del held[worker]
            case "take":
                least = min(held.values(), default=2)
                worker = found.take()
                if least == 2:
                    assert worker is None
                else:
                    assert held[worker] == least
                    held[worker] += 1
            case "free" if any(held.values()):
                worker = draw.choice([w for w, n in held.items() if n])
                found.free(worker)
                held[worker] -= 1
    assert len(found) == len(held)
