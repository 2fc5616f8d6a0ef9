// CPU kernels of the family, compiled once per instruction set (rules: common/isa.h).
#include "attention/cpu/backward.h"
#include "attention/cpu/cache.h"
#include "attention/cpu/forward.h"
#include "attention/cpu/merge.h"
#include "attention/cpu/pack_mask.h"
#include "attention/cpu/paged.h"
#include "attention/cpu/scores.h"

extern "C" const tilewise::attention::Kernels TILEWISE_ISA_TABLE(attention) = {
    &tilewise::forward,
    &tilewise::backward,
    &tilewise::pack_mask,
    &tilewise::paged_attention,
    &tilewise::paged_attention_codes,
    &tilewise::cache_write,
    &tilewise::merge,
    &tilewise::merge_backward,
    &tilewise::rope,
    &tilewise::column_sums,
    &tilewise::block_max,
};
