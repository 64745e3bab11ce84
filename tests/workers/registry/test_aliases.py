"""Which version is used: aliases, their history, and what many writers at once make of them."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest

from vnet_core.errors import ConfigError, StorageError
from workers.registry import aliases as registry
from workers.registry.aliases import aliases, challenge, history, promote, resolve, rollback, versions, withdraw
from workers.storage.store import Root

NIGHT = datetime(2026, 11, 22, 1, 0, tzinfo=UTC)


@pytest.fixture
def root(tmp_path) -> Root:
    root = Root(tmp_path)
    finish(root, "v1", "v2", "v3")
    return root


def finish(root: Root, *added: str) -> None:
    for version in added:
        root.put(f"models/liver/{version}/weights", version.encode())
        root.seal(f"models/liver/{version}", {})


def refused(change, *arguments, kind=ConfigError):
    with pytest.raises(kind) as caught:
        change(*arguments)
    return caught.value.code, str(caught.value)


def used(root: Root) -> str:
    return resolve(root, "liver")[1]


# --- what a reference means


def test_without_a_champion_the_name_is_the_newest_version(root):
    assert resolve(root, "liver") == ("liver", "v3")
    assert aliases(root, "liver") == {}
    assert history(root, "liver") == []
    finish(root, "v10")
    assert used(root) == "v10"


def test_the_name_is_the_champion_and_every_other_way_is_still_open(root):
    promote(root, "liver", "v1", "Ada", "best")
    challenge(root, "liver", "v2", "Ada")
    found = {wanted: resolve(root, f"liver{wanted}")[1] for wanted in ("", "@", "@champion", "@challenger", "@latest")}
    assert found == {"": "v1", "@": "v1", "@champion": "v1", "@challenger": "v2", "@latest": "v3"}
    assert resolve(root, "liver@v3") == ("liver", "v3")
    finish(root, "v4")
    assert used(root) == "v1"


def test_what_is_not_there_is_named_with_what_is(root):
    for reference in ("liver@champion", "liver@challenger"):
        code, message = refused(resolve, root, reference)
        assert code == "model.alias"
        assert "v1, v2, v3" in message
    promote(root, "liver", "v1", "Ada", "")
    code, message = refused(resolve, root, "liver@v9")
    assert (code, "v1, v2, v3, champion v1" in message) == ("model.version", True)
    assert refused(resolve, root, "spleen")[0] == "model.unknown"
    assert refused(resolve, root, "../liver")[0] == "model.name"


def test_an_alias_whose_version_is_gone_is_no_other_version(root):
    promote(root, "liver", "v2", "Ada", "")
    root.delete("models/liver/v2")
    code, message = refused(resolve, root, "liver")
    assert code == "model.alias"
    assert "champion of model liver is v2, which is not there; it has v1, v3" in message
    assert rollback(root, "liver", "Ada") == "v3"
    assert used(root) == "v3"


def test_a_model_all_of_whose_versions_are_gone_is_unknown(root):
    promote(root, "liver", "v2", "Ada", "")
    for version in versions(root, "liver"):
        root.delete(f"models/liver/{version}")
    assert refused(resolve, root, "liver")[0] == "model.unknown"


# --- changes


def test_a_promotion_says_who_when_why_and_what_was_before(root, monkeypatch):
    monkeypatch.setattr(registry, "_now", lambda: NIGHT)
    promote(root, "liver", "v1", "Ada", "the first")
    change = promote(root, "liver", "v2", " Grace\n", "Dice 0.93 on new cases")
    assert change == history(root, "liver")[-1]
    assert (change.action, change.alias, change.version, change.before) == ("promote", "champion", "v2", "v1")
    assert (change.by, change.why, change.at) == ("Grace", "Dice 0.93 on new cases", "2026-11-22T01:00:00+00:00")
    assert change.aliases == {"champion": "v2"}
    assert [one.version for one in history(root, "liver")] == ["v1", "v2"]


def test_a_challenger_that_wins_is_no_challenger_any_more(root):
    promote(root, "liver", "v1", "Ada", "")
    challenge(root, "liver", "v2", "Ada", "trained on 40 more")
    promote(root, "liver", "challenger", "Ada", "won")
    assert aliases(root, "liver") == {"champion": "v2"}
    challenge(root, "liver", "v3", "Ada")
    promote(root, "liver", "v1", "Ada", "")
    assert aliases(root, "liver") == {"champion": "v1", "challenger": "v3"}


def test_a_challenger_needs_a_champion_that_it_is_not(root):
    code, message = refused(challenge, root, "liver", "v2", "Ada")
    assert (code, "no champion" in message) == ("model.alias", True)
    promote(root, "liver", "v2", "Ada", "")
    code, message = refused(challenge, root, "liver", "v2", "Ada")
    assert (code, "v2 is its champion" in message) == ("model.alias", True)


def test_a_challenger_is_withdrawn_and_its_version_stays(root):
    promote(root, "liver", "v1", "Ada", "")
    assert refused(withdraw, root, "liver", "Ada")[0] == "model.alias"
    challenge(root, "liver", "v2", "Ada")
    change = withdraw(root, "liver", "Ada", "too slow")
    assert (change.version, change.before, change.aliases) == ("", "v2", {"champion": "v1"})
    assert "v2" in versions(root, "liver")


@pytest.mark.parametrize(("by", "why"), [("", ""), (" \n", ""), ("x" * 101, ""), ("Ada", "x" * 2001)])
def test_a_change_without_a_person_is_refused(root, by, why):
    assert refused(promote, root, "liver", "v1", by, why)[0] == "model.who"
    assert history(root, "liver") == []


def test_an_unknown_or_damaged_version_is_not_promoted(root):
    assert refused(promote, root, "liver", "v7", "Ada", "")[0] == "model.version"
    assert refused(promote, root, "spleen", "v1", "Ada", "")[0] == "model.unknown"
    root.put("models/liver/v2/weights", b"other")
    code, message = refused(promote, root, "liver", "v2", "Ada", "", kind=StorageError)
    assert (code, "weights of model liver@v2" in message) == ("model.damaged", True)
    assert aliases(root, "liver") == {}


# --- rollback


def test_rollbacks_take_promotions_back_one_by_one(root):
    for version in ("v1", "v3", "v2", "v3"):
        promote(root, "liver", version, "Ada", "")
    # the first one took the place of the newest
    assert [rollback(root, "liver", "Ada") for _ in range(4)] == ["v2", "v3", "v1", "v3"]
    code, message = refused(rollback, root, "liver", "Ada")
    assert (code, "v3 is its first champion" in message) == ("model.rollback", True)
    assert [one.action for one in history(root, "liver")] == ["promote"] * 4 + ["rollback"] * 4
    promote(root, "liver", "v2", "Ada", "again")
    assert rollback(root, "liver", "Ada") == "v3"


def test_promoting_the_champion_again_is_noted_and_leaves_one_way_back(root):
    for version in ("v1", "v2", "v2"):
        promote(root, "liver", version, "Ada", "")
    assert len(history(root, "liver")) == 3
    assert rollback(root, "liver", "Ada") == "v1"


def test_before_the_first_champion_was_the_newest_other_version(root):
    promote(root, "liver", "v3", "Ada", "")
    assert rollback(root, "liver", "Ada") == "v2"
    other = Root(root.home / "other")
    finish(other, "v1")
    assert promote(other, "liver", "v1", "Ada", "").before == ""
    assert refused(rollback, other, "liver", "Ada")[0] == "model.rollback"


def test_without_any_champion_there_is_no_way_back(root):
    code, message = refused(rollback, root, "liver", "Ada")
    assert (code, "never had a champion" in message) == ("model.rollback", True)


def test_a_champion_that_is_gone_or_damaged_is_passed_over_or_named(root):
    for version in ("v1", "v2", "v3"):
        promote(root, "liver", version, "Ada", "")
    root.delete("models/liver/v2")
    assert rollback(root, "liver", "Ada") == "v1"
    promote(root, "liver", "v3", "Ada", "")
    root.put("models/liver/v1/weights", b"other")
    assert refused(rollback, root, "liver", "Ada", kind=StorageError)[0] == "model.damaged"
    assert used(root) == "v3"


def test_a_champion_of_old_comes_back_as_champion_alone(root):
    promote(root, "liver", "v1", "Ada", "")
    promote(root, "liver", "v2", "Ada", "")
    challenge(root, "liver", "v1", "Ada")
    rollback(root, "liver", "Ada")
    assert aliases(root, "liver") == {"champion": "v1"}


# --- many at once, and damage


def test_many_writers_at_once_lose_nothing(root):
    start = threading.Barrier(8)

    def change(number: int) -> None:
        start.wait()
        for step in range(5):
            promote(root, "liver", f"v{1 + (number + step) % 3}", f"person {number}", f"step {step}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(change, range(8)))
    changes = history(root, "liver")
    assert sorted((one.by, one.why) for one in changes) == [
        (f"person {n}", f"step {s}") for n in range(8) for s in range(5)
    ]
    # every one was decided on what the one before it had left
    assert [one.before for one in changes[1:]] == [one.version for one in changes[:-1]]
    assert aliases(root, "liver") == {"champion": changes[-1].version}


def test_who_is_overtaken_decides_again(root, monkeypatch):
    """Between its reading and its writing another promotion comes in: the history has both, in their true order."""
    promote(root, "liver", "v1", "Ada", "")
    overtaken = []

    def while_ada_reads(held, name, version):
        if not overtaken:
            overtaken.append(True)
            promote(held, name, "v3", "Grace", "")

    monkeypatch.setattr(registry, "check_files", while_ada_reads)
    assert promote(root, "liver", "v2", "Ada", "").before == "v3"
    assert [(one.by, one.version) for one in history(root, "liver")] == [("Ada", "v1"), ("Grace", "v3"), ("Ada", "v2")]


def test_a_change_that_cannot_be_read_is_named(root):
    promote(root, "liver", "v1", "Ada", "")
    root.put("models/liver/history/000001.json", b'{"alias": "champion"}')
    code, message = refused(resolve, root, "liver", kind=StorageError)
    assert (code, "models/liver/history/000001.json" in message) == ("store.corrupt", True)
    root.put("models/liver/history/000001.json", b"{")
    assert refused(aliases, root, "liver", kind=StorageError)[0] == "store.corrupt"


def test_the_history_is_no_version(root):
    promote(root, "liver", "v1", "Ada", "")
    assert versions(root, "liver") == ["v1", "v2", "v3"]
    assert registry.next_version(root, "liver") == "v4"
