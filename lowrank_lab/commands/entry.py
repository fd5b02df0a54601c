"""The command ``lowrank-lab``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

COMMANDS = {"run": "one job or a grid", "report": "tables, figures, status of what has run"}


def main() -> None:
    """Run the command that the first word names, with the other words."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        if name not in ("", "-h", "--help"):
            print(f"error: {name}: no such command", file=sys.stderr)
        for command, what in COMMANDS.items():
            print(f"lowrank-lab {command} --help    {what}", file=sys.stderr)
        sys.exit(0 if name in ("-h", "--help") else 2)
    # The file of the command, which a launcher can run in other processes.
    sys.argv[:2] = [str(Path(__file__).with_name(f"{name}.py"))]
    importlib.import_module(f"lowrank_lab.commands.{name}").main()
