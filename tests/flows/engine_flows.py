"""Flows that start engines, for tests of how their runs end."""

import subprocess
import sys
import time
from pathlib import Path

from prefect import flow

from workers.engines.clusters import ray_session
from workers.engines.dask_engine import dask_executor


@flow(name="engines")
def engines(marker: str, stubborn: bool = False) -> None:
    """Start Ray, Dask and a child that nobody asks to end, do nothing, and hold on when ``stubborn``."""
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
    with ray_session(None, 1), dask_executor(None, 1) as executor:
        executor.submit(abs, -1).result()
        try:
            Path(marker).write_text("ready")
            time.sleep(300)
        finally:
            if stubborn:
                time.sleep(300)


@flow(name="nightly")
def night(cohort: str, model: str = "", folder: str = ".", seconds: float = 0) -> None:
    """Stand in for a night: leave a mark with its start and end."""
    began = time.time()
    time.sleep(seconds)
    with Path(folder, "runs").open("a") as told:
        told.write(f"{cohort} {began} {time.time()}\n")
