"""The demo's plan is one; the demo itself is the README's first command."""

import tomllib

from flows.commands.demo import PLAN
from vnet_core.plan import Plan


def test_the_plan_of_the_demo_is_one() -> None:
    labels = [{"value": 1, "name": "organ"}, {"value": 2, "name": "lesion"}]
    Plan.from_mapping({"labels": labels, **tomllib.loads(PLAN)})
