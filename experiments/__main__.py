"""`python -m experiments COMMAND`: run experiments, with the command-line code of `gka`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gka.cli.commands import Command
from gka.cli.main import run

PROGRAM = "python -m experiments"
COMMANDS = {
    "mqar": Command(
        "Train two-layer models on multi-query associative recall and compare mixers.",
        f"  {PROGRAM} mqar\n  {PROGRAM} mqar --help              settings of the task",
        "experiments.tasks.mqar_options:MQAROptions",
        "experiments.tasks.mqar_run:main",
    ),
    "evidence": Command(
        "Run one experiment that compares the layer with other layers.",
        f"  {PROGRAM} evidence numerics                small size, takes a minute\n"
        f"  {PROGRAM} evidence numerics --size full    full size, as in docs/evidence.md\n"
        f"  {PROGRAM} evidence recall --size full --processes 6 --minutes 60\n"
        "  torchrun --nproc_per_node 4 -m experiments evidence large --size full --minutes 9\n"
        f"  {PROGRAM} evidence page                    page of all results so far",
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
