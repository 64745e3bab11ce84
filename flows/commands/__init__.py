"""The commands of ``vnet``, in the order in which ``vnet --help`` lists them."""

from __future__ import annotations

from argparse import Namespace

from flows.commands.care import DOCTOR, FSCK, GC, METRICS
from flows.commands.command import Command, Result, no_arguments
from flows.commands.data import FETCH, INGEST, LABEL
from flows.commands.evaluation import EVALUATE
from flows.commands.models import MODELS
from flows.commands.nights import DEPLOY, SERVE
from flows.commands.query import QUERY
from flows.commands.radiomics import RADIOMICS
from flows.commands.report import REPORT
from flows.commands.retraining import RETRAIN
from flows.commands.review import REVIEW
from flows.commands.segmentation import NIGHTLY, SEGMENT
from flows.commands.standing import PAUSE, QUARANTINE, RESUME
from flows.commands.training import PLAN, PREPROCESS, TRAIN


def _demo(options: Namespace) -> Result:
    from flows.commands.demo import demo

    return demo()


DEMO = Command("demo", "the whole way on a cohort made from a seed, in two to four minutes", "api", no_arguments, _demo)

COMMANDS = {
    command.name: command
    for command in (
        DEMO,
        FETCH,
        LABEL,
        INGEST,
        PREPROCESS,
        TRAIN,
        RETRAIN,
        PLAN,
        SEGMENT,
        EVALUATE,
        NIGHTLY,
        PAUSE,
        RESUME,
        QUARANTINE,
        QUERY,
        RADIOMICS,
        REPORT,
        REVIEW,
        MODELS,
        SERVE,
        DEPLOY,
        FSCK,
        GC,
        DOCTOR,
        METRICS,
    )
}
