"""What the compiled attention kernels must look like, on every architecture of the build."""

_NO_SPILLS = {"LDL|STL": 0, "stack": 0, "registers": "<=255"}
# Asynchronous loads and stores of 16 bytes, operands through ldmatrix. Each of the two loop bodies (masked or not)
# holds one mma per 16 x 8 x 16 block of the step, with the loop over D rolled up to D / 32 steps.
_TENSOR_CORES = {**_NO_SPILLS, r"LDGSTS.*\.128": ">0", r"LDGSTS(?!.*(128|E$))": 0, r"STG.*\.128": ">0", "LDSM": ">0"}

# The mask General: 16 rows per warp, one loop body.
_GENERAL = {**_TENSOR_CORES, "HMMA": ">=32", "SHFL": ">=4", "IMAD.WIDE.U32": ">=20"}

FACTS = {
    "::Forward<.* 64, .*(Dense|Causal)": {**_TENSOR_CORES, "HMMA": ">=192", "registers": "<=232", "MUFU": ">=128"},
    "::Forward<.* 128, .*(Dense|Causal)": {**_TENSOR_CORES, "HMMA": ">=384", "MUFU": ">=128"},
    "::BackwardQueries<.*(Dense|Causal)": {**_TENSOR_CORES, "HMMA": ">=128"},
    "::BackwardKeys<.*(Dense|Causal)": {**_TENSOR_CORES, "HMMA": ">=128"},
    "::Forward<.*General": {**_GENERAL, "HMMA": ">=48"},
    "::BackwardQueries<.*General": _GENERAL,
    "::BackwardKeys<.*General": {**_GENERAL, "HMMA": ">=48"},
    "::BiasGradient<.*TensorEngine": {**_TENSOR_CORES, r"STG.*\.128": 0, "HMMA": ">=16"},
    "::BiasGradient<.*AnyEngine": {**_NO_SPILLS, "FFMA": ">=64"},
    "::ForwardSm90<": {**_NO_SPILLS, "registers": 168, "HGMMA": ">=12", "UTMALDG": ">0", "USETMAXREG": 2},
    "::ForwardSm90<.*GatheredKeys": {r"LDGSTS.*\.128": ">0", r"LDGSTS(?!.*(128|E$))": 0, "UTMALDG": "<=4"},
    "::BackwardQueriesSm90<": {**_NO_SPILLS, "registers": 168, "HGMMA": ">=12", "UTMALDG": ">0", "USETMAXREG": 2},
    "::Backward(Queries|Keys)Sm90<.*(Dense|Causal)": {"HGMMA": "<=30"},
    "::BackwardKeysSm90<": {**_NO_SPILLS, "registers": 168, r"STG.*\.128": ">0", "UTMALDG": ">0", "USETMAXREG": 2},
    "PagedAttention<.*NumberPages<.* 64, 1>": {**_TENSOR_CORES, "HMMA": ">=64", "registers": "<=192"},
    "PagedAttention<.*NumberPages<.* 128, 1>": {**_TENSOR_CORES, "HMMA": ">=128"},
    "PagedAttention<.*NumberPages<.* 64, 4>": {**_TENSOR_CORES, "HMMA": ">=16", "registers": "<=144"},
    "PagedAttention<.*NumberPages<.* 128, 4>": {**_TENSOR_CORES, "HMMA": ">=32"},
    # Rows of codes are 4-byte aligned, those of bfp12 at D = 64 but 2; each mma has operands out of registers.
    "PagedAttention<.*CodePages<": {**_NO_SPILLS, r"STG.*\.128": ">0", "HMMA": ">=16", "registers": "<=255"},
    "PagedAttention<.*CodePages<.* 64, .*CodeSource": {"registers": "<=128"},
    "PagedAttention<.*CodePages<.* 128, .*CodeSource": {"LDGSTS": ">0", "HMMA": ">=32"},
    "PagedAttention<.*CodePages<.*( 128, .*CodeSource<[24]>|Bfp12)": {"registers": "<=168"},
    # Two products for each pair of operands that ldmatrix reads; three blocks of a multiprocessor at D = 64.
    "PagedAttention<.*WidenedPages<": {**_NO_SPILLS, r"STG.*\.128": ">0", r"STS.*\.128": ">0", "LDSM": ">=8"},
    "PagedAttention<.*WidenedPages<.* 64, .* 1>": {"HMMA": ">=128", "LDSM": "<=32", "registers": "<=168"},
    "PagedAttention<.*WidenedPages<.* 128, .* 1>": {"HMMA": ">=256", "LDSM": "<=64", "registers": "<=255"},
    # A warp has 16 keys of a tile: an instruction for 16 channels of keys, and one of values.
    "PagedAttention<.*WidenedPages<.* 64, .* 4>": {"HMMA": ">=32", "LDSM": "<=8"},
    "PagedAttention<.*WidenedPages<.* 128, .* 4>": {"HMMA": ">=64", "LDSM": "<=16", "registers": "<=232"},
    "PagedAttentionRows<": {**_NO_SPILLS, "registers": "<=96"},
    "PagedAttentionRows<.*FloatSource": {"registers": "<=80"},  # six blocks of a multiprocessor
    "::MergeSplits<": _NO_SPILLS,
    "::Scores<.*TensorScores<": {**_TENSOR_CORES, r"STG.*\.128": 0, "HMMA": ">=16"},
    "::Scores<.*TensorScores<.* 64>": {"registers": "<=128"},
    "::Scores<.*TensorScores<.*BlockMax": {"MUFU": "<=16"},  # one exponential per result
    "::Scores<.*FloatScores<": {**_NO_SPILLS, "FFMA": ">=32"},
    "::Any": {**_NO_SPILLS, "FFMA": ">=128"},
    "::Delta<": {**_NO_SPILLS, "registers": "<=64"},
    "::(SinkGradient|PackMask)": {**_NO_SPILLS, "registers": "<=64"},
}
