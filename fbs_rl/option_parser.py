"""OptionParser: argparse for commands that answer a mistake with one sentence."""

from __future__ import annotations

import argparse
from typing import NoReturn


class OptionParser(argparse.ArgumentParser):
    """Raises ValueError, in one sentence, where argparse prints the usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists all options")
