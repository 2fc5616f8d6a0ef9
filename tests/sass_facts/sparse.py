"""Facts of the compiled sparse kernels (tests/simt/sass.py says how to read them)."""

FACTS = {
    "sparse::": {"LDL|STL": 0, "stack": 0},
    # Per 64 inputs, a warp of the wide kernel issues 2 x 4 x 8 sparse products on 8 + 16 fragment loads.
    r"NmForward<.*true, 2, 2, 4, 8>": {"HMMA.SP": 64, "LDSM": 24, "LDGSTS.*128": ">0", "STG.*128": ">0"},
    r"NmForward<.*true, 4, 1, 1, 2>": {"HMMA.SP": 4, "LDSM": 6, "LDGSTS.*128": ">0", "registers": "<=96"},
    r"NmGradInput<.*true>": {"HMMA": 64, "LDSM": 16, "LDGSTS.*128": ">0", "LDG.*128": ">0"},
    r"NmGradValues<.*true>": {"HMMA": 64, "LDSM": 16, "LDGSTS.*128": ">0"},
}
