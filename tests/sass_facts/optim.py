"""What the compiled optim kernels must look like."""

# A step: no spills, two blocks of 256 threads to an SM, data and codes in 16-byte accesses.
_SMALL = {"LDL|STL": 0, "stack": 0, "registers": "<=128"}
_STEP = {**_SMALL, "LDG.*128": ">=18", "STG.*128": ">=10", "MUFU.SQRT|MUFU.RSQ": ">=1", "BAR": 1}

FACTS = {
    "BlockStep<float": _STEP,
    "BlockStep<.*bf16": {**_STEP, "LDG.*128": ">=24", "STG.*128": ">=14"},  # and residuals
    "BlockStep<.*fp16": {**_STEP, "LDG.*128": ">=20"},
    "FullStep<": {**_SMALL, "registers": "<=64", "LDG.*128": ">=4", "STG.*128": ">=3"},
    "TileStatistics": {**_SMALL, "registers": "<=64", "LDG.*128": ">=1"},
    "CombineStatistics|InvertMean|PublishScales": {**_SMALL, "registers": "<=64", "ATOM|RED": 0},
    "CountSteps": {**_SMALL, "registers": "<=32"},
    "Quantize": {**_SMALL, "LDG.*128": ">=8", "STG.*128": ">=1"},
    "Dequantize": {**_SMALL, "LDG.*128": ">=1", "STG.*128": ">=8"},
    # 8 bits: two 16-byte accesses to a lane's codes, one look-up per element and book.
    "Quantize<.*Codec8>": {"STG.*128": ">=2", "LDS.*128": "==64"},
    "Dequantize<.*Codec8>": {"LDG.*128": ">=2", "LDS.*64": "==64"},
}

# Shampoo's codes, and its products: 8 x 8 sums per thread, eight deep and unrolled, operands in 16-byte accesses.
_PRODUCT = {"LDL|STL": 0, "registers": "<=168", "FFMA": ">=512", "LDS.128": ">=32"}
_PRODUCT |= {"LDG.*128": ">=4", "STG.*128": ">=16"}
FACTS |= {
    "EncodeMatrix": {"LDL|STL": 0, "registers": "<=64", "LDG.*128": ">=4", "STG.*64": ">=1"},
    "DecodeMatrix": {"LDL|STL": 0, "registers": "<=64", "LDG.*64": ">=1", "STG.*128": ">=4"},
    "SquareProduct": _PRODUCT,
}
