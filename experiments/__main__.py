"""`python -m experiments COMMAND`: the experiments, by the machinery of the `gka` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gka.cli.commands import Command
from gka.cli.main import run

PROGRAM = "python -m experiments"
COMMANDS = {
    "mqar": Command(
        "Train two-layer models on multi-query associative recall and compare mixers.",
        f"  {PROGRAM} mqar\n  {PROGRAM} mqar --help              the settings of the task",
        "experiments.tasks.mqar_options:MQAROptions",
        "experiments.tasks.mqar_run:main",
    ),
    "evidence": Command(
        "Compare the layer with others, one experiment at a time.",
        f"  {PROGRAM} evidence numerics                a small form, in a minute\n"
        f"  {PROGRAM} evidence numerics --size full    as on the page docs/evidence.md\n"
        f"  {PROGRAM} evidence page                    the page of all results so far",
        "experiments.evidence.command:EvidenceOptions",
        "experiments.evidence.command:main",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name; default: sys.argv) and return the exit code."""
    about = "experiments: tasks and measurements that compare the Gated KalmaNet layer with others"
    return run(sys.argv[1:] if arguments is None else arguments, PROGRAM, COMMANDS, about)


if __name__ == "__main__":
    sys.exit(main())
