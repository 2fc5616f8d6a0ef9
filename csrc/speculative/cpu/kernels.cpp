// CPU kernels of the family, compiled once per instruction set (rules: common/isa.h).
#include "common/isa.h"
#include "speculative/cpu/attention.h"
#include "speculative/cpu/build.h"
#include "speculative/cpu/pages.h"
#include "speculative/cpu/tree.h"
#include "speculative/cpu/verify.h"
#include "speculative/params.h"

extern "C" const tilewise::speculative::Kernels TILEWISE_ISA_TABLE(speculative) = {
    &tilewise::tree_finalize,  &tilewise::tree_from_template, &tilewise::tree_from_sequences, &tilewise::table_update,
    &tilewise::tree_attention, &tilewise::append_kv,          &tilewise::compact_kv,          &tilewise::verify_greedy,
};
