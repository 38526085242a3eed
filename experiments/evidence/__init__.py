"""Experiments that show what the layer is worth beside others (docs/evidence.md).

`skeleton.py` makes the models that are compared, `record.py` keeps what was measured, `command.py` runs an
experiment of `catalogue.py`; `page.py`, `table.py` and `picture.py` make the page of all results, `timing.py`
times a call. Every other file is of one experiment.
"""
