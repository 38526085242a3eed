"""The layer and its parts."""
