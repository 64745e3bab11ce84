"""The commands of ``vnet``, in the order in which ``vnet --help`` lists them."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from flows.commands.command import Command, Result
from flows.commands.data import FETCH, INGEST, LABEL
from flows.commands.evaluation import EVALUATE
from flows.commands.nights import QUERY, SERVE
from flows.commands.segmentation import NIGHTLY, SEGMENT
from flows.commands.training import MODELS, PLAN, PREPROCESS, TRAIN


def _no_arguments(parser: ArgumentParser) -> None:
    pass


def _demo(options: Namespace) -> Result:
    from flows.demo import demo

    return demo()


DEMO = Command(
    "demo", "the whole way on a cohort made from a seed, in about two minutes on two cores", "api", _no_arguments, _demo
)

COMMANDS = {
    command.name: command
    for command in (
        DEMO,
        FETCH,
        LABEL,
        INGEST,
        PREPROCESS,
        TRAIN,
        PLAN,
        SEGMENT,
        EVALUATE,
        NIGHTLY,
        QUERY,
        MODELS,
        SERVE,
    )
}
