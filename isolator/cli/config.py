"""`config show`, `config check`: every setting, what it is, and where its value comes from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from unittest.mock import patch

import click

from isolator.cli.session import Failure, Session, json_option, pass_session
from isolator.cli.text import escape

if TYPE_CHECKING:
    from pydantic import ValidationError

    from isolator.settings import Settings

_PREFIX: Final = "ISOLATOR_"
