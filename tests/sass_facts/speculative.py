"""What the compiled speculative kernels must look like."""

FACTS = {
    "(speculative|paged)::": {"LDL|STL": 0},
    r"PagedAttention<.*NumberPages<.*, 1>": {"HMMA": ">=64", "LDGSTS.*128": ">=16", "LDSM": ">=32"},
    r"PagedAttention<.*NumberPages<.*, 4>": {"HMMA": ">=16", "LDGSTS.*128": ">=16", "LDSM": ">=12"},
    r"PagedAttention<.*, 64,": {"registers": "<=168"},
    r"PagedAttention<.*, 128,": {"registers": "<=255"},
    r"PagedAttentionRows<": {"registers": "<=80"},
    "VerifyGreedy": {"LDG.*128": ">=1"},
    "(AppendKv|CompactKv)<uint4>": {"LDG.*128": ">=1", "STG.*128": ">=1"},
}
