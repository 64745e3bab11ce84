"""What the Prefect server does by itself: close runs whose process died, and tell people of nights that went wrong.

Automations are ours by their tag and found by their names, so that making them again changes only what differs, and
those of others are left alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import urlsplit

from flows.nights.events import FAILURES, MISSING, cohort_resource
from flows.server.process import ORPHANED
from vnet_core.errors import ConfigError
from workers.settings.site import Nightly

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.blocks.abstract import NotificationBlock
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import BlockDocument
    from prefect.events.schemas.automations import Automation, AutomationCore

Change = Literal["created", "changed", "left alone", "removed"]

TAG = "vnet"
"""On every deployment, run and automation of ours."""
BLOCK = "vnet-notify"
"""Name of the block that holds where messages go."""
SLACK, CUSTOM = "slack-webhook", "custom-webhook"
"""Kinds that it may have."""
SILENCE_S = 100.0
"""A run is taken for dead so long after its last heartbeat. Runs send one every 30 s, the shortest that Prefect allows:
two may be lost or late on a busy machine before a live run is closed. Those of ``vnet serve`` do not wait for it, since
it sees its children end."""


def wanted(nightlies: Sequence[Nightly], block_id: UUID | None, silence_s: float = SILENCE_S) -> list[AutomationCore]:
    """All automations for these schedules; without a block, what would be told only stands in the UI's event feed."""
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
    from prefect.states import StateType

    dead = AutomationCore(
        name="vnet: close runs whose process died",
        description=f"A run that has sent no heartbeat for {silence_s:g} s is set to Crashed.",
        tags=[TAG],
        trigger=EventTrigger(
            # the start too: a run may die before its first heartbeat has arrived
            after={"prefect.flow-run.heartbeat", "prefect.flow-run.Running"},
            # any sign of life will do, the end under whatever name too
            expect={"prefect.flow-run.*"},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related={"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{TAG}"},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=silence_s),
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message=ORPHANED)],
    )
    told = []
    for entry in nightlies:
        if entry.success_by:
            told.append(
                _told(
                    f"vnet: {entry.cohort} without a night in time",
                    f"Cohort {entry.cohort} has no night that ended well by {entry.success_by}.",
                    MISSING,
                    entry.cohort,
                    block_id,
                )
            )
        if entry.most_failures is not None:
            told.append(
                _told(
                    f"vnet: {entry.cohort} with too many failures",
                    f"Cohort {entry.cohort} has a night with more failures than {entry.most_failures}.",
                    FAILURES,
                    entry.cohort,
                    block_id,
                )
            )
    return [dead, *told]


def _told(name: str, description: str, event: str, cohort: str, block_id: UUID | None) -> AutomationCore:
    """An automation that sends the sentence of an event of a cohort."""
    from prefect.events.actions import DoNothing, SendNotification
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    action = (
        DoNothing()
        if block_id is None
        else SendNotification(block_document_id=block_id, subject=description, body="{{ event.payload['text'] }}")
    )
    return AutomationCore(
        name=name,
        description=description,
        tags=[TAG],
        trigger=EventTrigger(
            expect={event},
            match={"prefect.resource.id": cohort_resource(cohort)},
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[action],
    )


def apply(client: SyncPrefectClient, automations: Sequence[AutomationCore]) -> dict[str, Change]:
    """Make the server's automations of ours these; by name, what became of each. One that somebody has paused in the UI
    stays so."""
    from prefect.events.schemas.automations import AutomationCore

    known = {one.name: one for one in all_automations(client) if TAG in one.tags}
    done: dict[str, Change] = {}
    for automation in automations:
        before = known.pop(automation.name, None)
        if before is None:
            client.create_automation(automation)
            done[automation.name] = "created"
            continue
        automation = automation.model_copy(update={"enabled": before.enabled})
        if _plain(AutomationCore.model_validate(before.model_dump())) == _plain(automation):
            done[automation.name] = "left alone"
        else:
            # the client's own update leaves out the kinds of triggers and actions
            body = automation.model_dump(mode="json", exclude={"owner_resource"})
            client.request("PUT", "/automations/{id}", path_params={"id": before.id}, json=body).raise_for_status()
            done[automation.name] = "changed"
    for name, one in known.items():
        client.delete_automation(one.id)
        done[name] = "removed"
    return done


def all_automations(client: SyncPrefectClient) -> list[Automation]:
    """Every automation of the server, by pages; the client's own list is one page."""
    from prefect.events.schemas.automations import Automation

    found: list[Automation] = []
    size = 200
    while True:
        body = {"sort": "NAME_ASC", "limit": size, "offset": len(found)}
        response = client.request("POST", "/automations/filter", json=body)
        response.raise_for_status()
        page = Automation.model_validate_list(response.json())
        found += page
        if len(page) < size:
            return found


def _plain(automation: AutomationCore) -> dict[str, Any]:
    return automation.model_dump(exclude={"owner_resource"})


# --- where messages go


def save_block(client: SyncPrefectClient, notify_url: str) -> tuple[UUID | None, Change | None]:
    """Keep the address for messages as a block in the server, which encrypts it; the block's id and what became of it.

    Without an address, a block that was there is removed. Raises ConfigError ``site.notify-url`` for what is no
    address; its message does not show it, as whoever has it can write there.
    """
    block = notification_block(notify_url) if notify_url else None
    change: Change | None = None
    before = None
    for slug in (SLACK, CUSTOM):
        found = _read_block(client, slug)
        if found is None:
            continue
        if block is not None and block.get_block_type_slug() == slug:
            before = found
        else:
            client.delete_block_document(found.id)
            change = "removed"
    if block is None:
        return None, change
    kept = block.model_dump(mode="json", context={"include_secrets": True}, exclude={"block_type_slug"})
    if before is not None and before.data == kept:
        return before.id, "left alone"
    saved = cast("UUID", block.save(BLOCK, overwrite=True))
    return saved, "created" if before is None else "changed"


def notification_block(notify_url: str) -> NotificationBlock:
    """A block for an Apprise URL, or for the plain address of a web hook, which gets JSON with ``subject`` and
    ``text``."""
    from apprise import Apprise
    from prefect.blocks.notifications import CustomWebhookNotificationBlock, SlackWebhook
    from prefect.types import SecretDict
    from pydantic import SecretStr

    log = logging.getLogger("apprise")
    # it would log the address that it cannot read
    was_silent, log.disabled = log.disabled, True
    try:
        known = Apprise.instantiate(notify_url, suppress_exceptions=True) is not None
    finally:
        log.disabled = was_silent
    if known:
        # of Prefect's own kinds, which every server knows, the one that takes every Apprise URL as it is
        return SlackWebhook(url=SecretStr(notify_url))
    scheme = urlsplit(notify_url).scheme
    if scheme not in ("http", "https"):
        raise ConfigError(
            "site.notify-url",
            f"notify_url {f'starts with {scheme}:// and' if scheme else 'has no scheme and'} is no URL that Apprise"
            " knows; write one such as mailtos://user:password@example.org, or the https:// address of a web hook",
        )
    return CustomWebhookNotificationBlock(
        name=BLOCK,
        # the address itself is not a secret field
        url="{{address}}",
        json_data={"subject": "{{subject}}", "text": "{{subject}}\n{{body}}"},
        secrets=SecretDict({"address": notify_url}),
    )


def _read_block(client: SyncPrefectClient, slug: str) -> BlockDocument | None:
    from prefect.exceptions import ObjectNotFound

    try:
        return client.read_block_document_by_name(BLOCK, slug)
    except ObjectNotFound:
        return None
