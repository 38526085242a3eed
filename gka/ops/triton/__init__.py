"""The op in Triton: launches, configurations, chunk tables."""
