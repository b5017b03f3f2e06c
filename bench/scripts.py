"""How the scripts of this folder end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn


def end_with(main: Callable[[], int | None]) -> NoReturn:
    """Calls a script's main and ends with its status; with 130 and without a traceback where Ctrl-C was pressed."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
