"""The `gka` command: one file a command, each with its own options."""
