"""What the compiled optim kernels must look like."""

# Step: no spills, two blocks of 256 threads to an SM, data and codes in 16-byte accesses.
_STEP = {"LDL|STL": 0, "registers": "<=128", "LDG.*128": ">=10", "STG.*128": ">=5", "MUFU.SQRT|MUFU.RSQ": ">=1"}

FACTS = {
    "AdamWStep": {"LDL|STL": 0, "registers": "<=128"},
    "AdamWStep<float, float>": _STEP | {"LDG.*128": ">=22", "STG.*128": ">=13"},
    "AdamWStep<.*bf16, .*bf16>": _STEP,
    "AdamWStep<.*fp16, .*fp16>": _STEP,
    "Quantize": {"LDL|STL": 0, "LDG.*128": ">=8", "STG.*128": ">=1"},
    "Dequantize": {"LDL|STL": 0, "LDG.*128": ">=1", "STG.*128": ">=8"},
    # 8 bits: two 16-byte accesses to a lane's codes, one look-up per element and book.
    "Quantize<.*Codec8>": {"STG.*128": ">=2", "LDS.*128": "==64"},
    "Dequantize<.*Codec8>": {"LDG.*128": ">=2", "LDS.*64": "==64"},
}
