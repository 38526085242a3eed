"""Experiments that show what the layer is worth beside others: `gka evidence NAME` (docs/evidence.md).

`skeleton.py` makes the models that are compared, `record.py` keeps what was measured, `command.py` runs an
experiment, `page.py` and `table.py` make the page of all results. Every other file is of one experiment.
"""
