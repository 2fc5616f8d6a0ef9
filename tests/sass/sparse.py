"""Facts of the compiled 2:4 kernels; instruction counts per kernel, or a lower bound as ``(minimum, None)``."""

SPILLS = {"LDL|STL": 0}

FACTS = {}
