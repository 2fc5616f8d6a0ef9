"""Machine code of the long convolution: no spills, and the registers that the intended blocks per SM leave."""

# Conv3's 4K and 8K sizes: 4 blocks of 128 threads, 2 of 256. Tables and spectra arrive by 16-byte asynchronous copies.
FACTS = {
    r"Conv2<": {"LDL|STL": 0, "HMMA": ">0", "LDSM": ">0", "LDGSTS.*128": ">0"},
    r"Conv3<": {"LDL|STL": 0, "HMMA": ">0", "LDSM": ">0", "LDGSTS.*128": ">0"},
    r"Conv3<.*16, 4, ": {"registers": "<=128"},
    r"Conv3<.*32, 8, ": {"registers": "<=128"},
    r"FilterGrad2<": {"LDL|STL": 0, "HMMA": ">0", "LDGSTS.*128": ">0"},
    r"FilterGrad3<": {"LDL|STL": 0, "HMMA": ">0", "LDGSTS.*128": ">0"},
    r"Conv32<|FilterGrad32<|Prepare<|ReduceGradients": {"LDL|STL": 0, "HMMA": 0},
}
