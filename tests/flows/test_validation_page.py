"""The page of a training that is judged while it goes on."""

from dataclasses import asdict

from flows.ui.artifacts import validation_page
from tests.flows.ui.test_artifacts import png, without_pictures
from tests.workers.ball_cohort import ball_plan
from workers.storage.store import Root
from workers.training.run import Budget, Run
from workers.training.validations import load_validation


def judged(root: Root, run: Run, step: int, dice: float | None, **facts: object) -> None:
    key = f"{run.prefix}/validations/{step:09d}/scores"
    found = {"step": step, "minutes": step / 10, "case_dice": {"a": [dice]}, "worst": [], "failed": "", **facts}
    root.put_json(f"{key}/scores.json", found)
    root.seal(key, {})


def test_the_newest_weights_stand_first_and_the_worst_cases_are_shown(tmp_path) -> None:
    root = Root(tmp_path)
    plan = ball_plan().model_dump(mode="json")
    run = Run(root.url, "training/liver/v1", plan, {}, {"a": "volumes/a"}, asdict(Budget(steps=40)), [1, 1])
    judged(root, run, 10, None, case_dice={}, failed="train.label-value: it holds <9>")
    picture = "training/liver/v1/validations/000000020/scores/worst-0.png"
    root.put(picture, png())
    shown = {"case": "a", "structure": "ball", "dice": 0.75, "picture": picture}
    hidden = {"case": "b", "structure": "ball", "dice": 0.8}
    judged(root, run, 20, 0.75, worst=[shown, hidden])
    text = without_pictures(validation_page(root, "liver", run, load_validation(root, run, 20)))
    assert text.startswith("# Validation of model liver while it trains\n")
    table = text[text.index("| step") :].split("\n\n")[0].splitlines()
    assert table[2:] == ["| 20 | 2.0 | 0.750 |", "| 10 | 1.0 |  |"]
    assert "## a: Dice of ball 0.750\n\n![a](data:image/png;base64,)" in text
    assert "## b: Dice of ball 0.800\n\nNo picture: this scan may have text in its pixels." in text
    failed = validation_page(root, "liver", run, load_validation(root, run, 10))
    assert "**Step 10 could not be judged.** train.label-value: it holds &lt;9&gt;" in failed
