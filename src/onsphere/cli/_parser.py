"""A parser whose complaints are one line."""

import argparse
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction["Parser"]


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Stop with one line and exit code 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")
