"""Flows that say which version of a model is used, and the page that tells it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import BaseModel, Field

from flows.session import open_session
from flows.ui.artifacts import artifact_key
from flows.ui.fields import PersonName, Reason
from vnet_core.errors import VnetError
from workers.harmless import one_line
from workers.markdown import code, picture, table, text
from workers.registry.aliases import (
    aliases,
    challenge,
    history,
    promote,
    rollback,
    versions,
    withdraw,
)
from workers.registry.models import card_of, load_model
from workers.storage.store import Root

CHANGES = 15
"""Most changes of the aliases in a page; ``vnet models history`` has all."""
CURVES = ("loss.png", "dice.png")


ModelName = Annotated[str, Field(title="Model", description="Name of the model, such as liver", min_length=1)]


class Person(BaseModel):
    """Whose model it is and who changes it."""

    name: ModelName
    by: PersonName
    why: Reason = ""


class Promotion(BaseModel):
    """Which version becomes what, and who decides."""

    name: ModelName
    version: str = Field(
        default="challenger",
        title="Version",
        description="Such as v4; challenger: the present one; latest: the newest",
        min_length=1,
    )
    role: Literal["champion", "challenger"] = Field(
        default="champion",
        title="Becomes",
        description="champion: used from the next night on; challenger: segments a sample too, and is compared",
    )
    by: PersonName
    why: Reason = ""


@flow(name="promote-model", flow_run_name="promote {promotion.name}@{promotion.version}", validate_parameters=True)
def promote_model(promotion: Promotion) -> State[Any]:
    """Make a version of a model its champion, which nights use, or its challenger, which is compared with it.

    Args:
        promotion: which version of which model, and who decides
    """
    root = open_session().root
    change = (promote if promotion.role == "champion" else challenge)(
        root, promotion.name, promotion.version, promotion.by, promotion.why
    )
    return _told(root, promotion.name, f"{promotion.name}@{change.version} is the {change.alias}")


@flow(name="rollback-model", flow_run_name="roll {request.name} back", validate_parameters=True)
def rollback_model(request: Person) -> State[Any]:
    """Make the champion before the present one the champion again.

    Args:
        request: which model, and who decides
    """
    root = open_session().root
    version = rollback(root, request.name, request.by, request.why)
    return _told(root, request.name, f"{request.name}@{version} is the champion again")


@flow(name="withdraw-challenger", flow_run_name="withdraw {request.name}'s challenger", validate_parameters=True)
def withdraw_challenger(request: Person) -> State[Any]:
    """Compare no further version with the champion; the challenger's version and its comparisons stay.

    Args:
        request: which model, and who decides
    """
    root = open_session().root
    change = withdraw(root, request.name, request.by, request.why)
    return _told(root, request.name, f"{request.name}@{change.before} is no longer the challenger")


def _told(root: Root, name: str, what: str) -> State[Any]:
    publish_model(root, name, what)
    return Completed(message=one_line(what), data={"model": name, "aliases": aliases(root, name)})


def publish_model(root: Root, name: str, what: str) -> None:
    """Put the model's page into the UI as `model-<name>`."""
    create_markdown_artifact(
        markdown=model_page(root, name), key=artifact_key("model", name), description=one_line(what)
    )


def model_page(root: Root, name: str) -> str:
    """Aliases, the cards of champion, challenger and newest version with their curves, and the aliases' history."""
    named, changes = aliases(root, name), history(root, name)
    told = [f"{alias} {code(version)}" for alias, version in named.items()]
    parts = [f"# Model {text(name)}", f"**{', '.join(told) or 'No champion: the newest version is used.'}**"]
    for version in dict.fromkeys([*named.values(), *versions(root, name)[-1:]]):
        parts += _version(root, f"{name}@{version}")
    if changes:
        parts += ["## Changes", _changes(root, name)]
    return "\n\n".join(parts) + "\n"


def _version(root: Root, reference: str) -> list[str]:
    """Card and curves of a version, or why it cannot be used."""
    try:
        model = load_model(root, reference)
    except VnetError as error:
        return [f"**{code(reference)} cannot be used.** {text(error.message)}"]
    curves = [
        picture(f"{model.reference}: {curve.removesuffix('.png')}", root.get(f"{model.prefix}/{curve}"))
        for curve in CURVES
        if root.exists(f"{model.prefix}/{curve}")
    ]
    return [card_of(root, model).strip(), *curves]


def _changes(root: Root, name: str) -> str:
    """The newest changes of the aliases first."""
    rows = [
        (change.at, change.action, change.version, change.before, change.by, change.why)
        for change in reversed(history(root, name)[-CHANGES:])
    ]
    return table(("when", "what", "version", "before", "who", "why"), rows)
