"""Flows that tests run through a server."""

import base64
import io
import subprocess
import sys
import time
from typing import Literal

import numpy as np
from PIL import Image
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.states import Completed, State
from pydantic import BaseModel, Field


class Settings(BaseModel):
    """What to report."""

    preset: Literal["compact", "vnet"] = Field("compact", description="Network")
    labels: list[Literal["liver", "spleen", "aorta"]] = Field(["liver"], description="Structures to list")
    cases: int | None = Field(None, ge=1, le=50, description="None: three cases")
    pictures: bool = False


@task
def volume_ml(case: int) -> float:
    """Volume of a case."""
    return 1.5 * case


@flow(name="sample-report")
def report(cohort: str, settings: Settings = Settings()) -> State:  # noqa: B008
    """Report a cohort that does not exist.

    Args:
        cohort: Name of the cohort.
        settings: What to report.
    """
    rows = [
        {"case": f"{cohort}-{case}", "label": label, "model": settings.preset, "volume_ml": volume_ml(case)}
        for case in range(settings.cases or 3)
        for label in settings.labels
    ]
    create_table_artifact(rows, key="sample-volumes", description="Volumes")
    stored = io.BytesIO()
    Image.fromarray(np.arange(64 * 48, dtype=np.uint8).reshape(48, 64)).save(stored, "PNG")
    picture = f"![overlay](data:image/png;base64,{base64.b64encode(stored.getvalue()).decode()})"
    outside = "![outside](http://198.51.100.1/picture.png)"
    table = "| case | mL |\n| --- | --- |\n| a | 1.5 |"
    create_markdown_artifact(f"# Night of {cohort}\n\n{table}\n\n{picture}\n\n{outside}\n", key="sample-report")
    return Completed(name="CompletedWithFailures", message="1 of 3 cases failed")


@flow(name="sample-stall")
def stall(marker: str, cleaning_s: float = 0) -> None:
    """Start a child, then wait; the file ``marker`` tells how it ended."""
    with open(marker, "w", buffering=1) as told:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
        try:
            told.write(f"{child.pid}\n")
            time.sleep(300)
        finally:
            time.sleep(cleaning_s)
            told.write("cleaned\n")
