"""A night that is killed with -9 as soon as two of its masks are published.

python -m tests.flows.killed_night ROOT STARTED
"""

from __future__ import annotations

import os
import signal
import sys
from datetime import datetime
from pathlib import Path


def main(folder: Path, started: datetime) -> None:
    from prefect import flow

    import flows.nights.shift
    from flows.nights.night import Order, checked_model, run_night
    from flows.session import Session
    from flows.tasks import refresh_cohort
    from tests.flows.nights_of_a_month import COHORT
    from tests.workers.tiny_cohort import MODEL
    from workers.ledger import Outcome
    from workers.settings.rules import NightRules
    from workers.settings.site import Site
    from workers.storage.store import Root

    published: list[str] = []

    class Mortal(flows.nights.shift.Shift):
        def settle(self, outcome: Outcome) -> None:
            super().settle(outcome)
            if outcome.state == "computed":
                published.append(outcome.case)
            if len(published) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    session = Session(Root(folder), Site(preprocess_workers=1), lambda: started)
    order = Order(COHORT, MODEL, "nifti", NightRules(retries=0))

    @flow(name="killed")
    def killed() -> None:
        import flows.nights.night

        flows.nights.night.Shift = Mortal
        refresh_cohort(session.root, COHORT)
        run_night(session, order, checked_model(session, order), started)

    killed()


if __name__ == "__main__":
    main(Path(sys.argv[1]), datetime.fromisoformat(sys.argv[2]))
