"""What the compiled attention kernels must look like, on every architecture of the build."""

_NO_SPILLS = {"LDL|STL": 0, "stack": 0, "registers": "<=255"}
# Asynchronous loads and stores of 16 bytes, operands through ldmatrix. Each of the two loop bodies (masked or not)
# holds one mma per 16 x 8 x 16 block of the step, with the loop over D rolled up to D / 32 steps.
_TENSOR_CORES = {**_NO_SPILLS, r"LDGSTS.*\.128": ">0", r"LDGSTS(?!.*(128|E$))": 0, r"STG.*\.128": ">0", "LDSM": ">0"}

FACTS = {
    "::Forward<.* 64,": {**_TENSOR_CORES, "HMMA": ">=192", "registers": "<=232", "MUFU": ">=128"},
    "::Forward<.* 128,": {**_TENSOR_CORES, "HMMA": ">=384", "MUFU": ">=128"},
    "::BackwardQueries<": {**_TENSOR_CORES, "HMMA": ">=128"},
    "::BackwardKeys<": {**_TENSOR_CORES, "HMMA": ">=128"},
    "::ForwardSm90<": {"LDL|STL": 0, "stack": 0, "HGMMA": ">=24", "UTMALDG": ">0", "USETMAXREG": 2},
    "::Any": {**_NO_SPILLS, "FFMA": ">=256"},
    "::Delta<": {**_NO_SPILLS, "registers": "<=64"},
}
