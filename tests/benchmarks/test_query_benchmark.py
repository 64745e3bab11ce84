"""The benchmark of questions still runs, and its arms give the same rows."""

from pathlib import Path

import pytest

pytest.importorskip("pandas", reason="pandas is a dependency of the benchmark only")

from benchmarks.query import ARMS, ASKED, COHORT, main, make_root, measure_here
from workers.reports.query import query
from workers.storage.store import Root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Days of two months, so that the questions have something to tell."""
    folder = tmp_path_factory.mktemp("nights")
    make_root(folder, 40, 300)
    return folder


@pytest.mark.parametrize("name", ASKED)
def test_all_arms_give_the_same_rows(root: Path, name: str) -> None:
    asked = ASKED[name]
    files = sorted(map(str, (root / "reports" / COHORT).glob("*.parquet")), reverse=True)
    ours = query(Root(root), asked.ours).rows
    assert ours
    keys = ("month", "name", "n") if asked.ours.sql else ("night", "case", "name", "volume_ml", "flags")
    wanted = sorted(tuple(row[key] for key in keys) for row in ours)
    for rows in (asked.pandas(files), asked.arrow(files)):
        assert sorted(tuple(row[key] for key in keys) for row in rows) == wanted
        if asked.ours.sql:
            middles = {(row["month"], row["name"]): row["middle"] for row in rows}
            assert middles == pytest.approx({(row["month"], row["name"]): row["middle"] for row in ours}, rel=0.05)
    assert [measure_here(arm, name, root)["rows"] for arm in ARMS[1:]] == [len(ours)] * 3


def test_the_nights_are_the_same_each_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_root(tmp_path / name, 2, 3)
    a, b = ([path.read_bytes() for path in sorted((tmp_path / name).rglob("*.parquet"))] for name in ("a", "b"))
    assert len(a) == 2
    assert a == b


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.md"
    small = ["--nights", "2", "--cases", "40", "--runs", "1", "--questions", "newest", "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["benchmarks/query.py", *small])
    main()
    text = output.read_text("utf-8")
    assert capsys.readouterr().out.strip() == text.strip()
    rows = [row.split("|") for row in text.splitlines() if row.startswith("| flagged")]
    assert [row[2].strip() for row in rows] == list(ARMS)
    assert len({row[-2] for row in rows}) == 1
    assert "- command: `python -m benchmarks.query" in text
