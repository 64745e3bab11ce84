"""SimpleITK's readers, one thread at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import SimpleITK as sitk

_ALONE = threading.Lock()


@contextmanager
def itk_reader(image_io: str, name: str | Path) -> Iterator[sitk.ImageFileReader]:
    """A reader of the file ``name`` by the format ``image_io``, for as long as no other thread has one.

    Two threads that read at once end the process now and then (double free, in SimpleITK 2.5): ITK makes what all of
    its readers share when it is first asked for, without a lock. ITK's warnings stay off standard error: they are
    checked for elsewhere, and they name files.
    """
    import SimpleITK as sitk  # 90 MiB, which a night that reads no scan does without

    with _ALONE:
        before = sitk.ProcessObject.GetGlobalWarningDisplay()
        sitk.ProcessObject.SetGlobalWarningDisplay(False)
        try:
            reader = sitk.ImageFileReader()
            reader.SetImageIO(image_io)
            reader.SetFileName(str(name))
            yield reader
        finally:
            sitk.ProcessObject.SetGlobalWarningDisplay(before)
