"""The place in a user's code where an error was raised."""

from __future__ import annotations

import traceback
from pathlib import Path


def where(error: BaseException, folder: Path | None = None) -> str:
    """Return ` (FILE, line N)` of the last line of code in `folder`, else outside installed packages.

    That is most often the user's code; empty where there is no such line.
    """
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    own = [frame for frame in frames if folder is not None and Path(frame.filename).is_relative_to(folder)] or frames
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
