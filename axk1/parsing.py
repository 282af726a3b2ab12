"""How does every command begin?  With its name, what it runs, a summary and examples."""

import argparse


def add_command(commands, name: str, run, summary: str, examples: str) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # A setting that begins like an option of ours must not be taken for it, nor half a name for the whole.
        allow_abbrev=False,
    )
    command.set_defaults(run=run)
    return command
