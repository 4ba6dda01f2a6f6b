"""The command line: ``python -m genloss_kernels info | doctor | bench | meters``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# Modules with add_arguments(parser) and main(args) -> exit status, each imported only when it is called for.
COMMANDS = {
    "info": "versions, device, and which path each loss takes here",
    "doctor": "run every kernel on this machine's device and compare it with float64",
    "bench": "time the losses against torch's built-ins on this machine",
    "meters": "bytes, machine code, launches and synchronisations of every loss, without a GPU",
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="python -m genloss_kernels", description="Tools around genloss_kernels.")
    commands = parser.add_subparsers(dest="command", metavar="command")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if arguments[:1] == [name]:
            module = importlib.import_module(f".{name}", __package__)
            module.add_arguments(command)
            command.set_defaults(main=module.main)
    args = parser.parse_args(arguments)
    if args.command is None:
        parser.print_help()
        return 0
    return args.main(args)


if __name__ == "__main__":
    sys.exit(main())
