// CPU kernels of the family that have a version for AMX tiles (rules: common/isa.h).
#include "common/paged/cpu/amx.h"
#include "speculative/cpu/attention.h"

namespace tilewise {
namespace {

const char* tree_attention_on_tiles(const TreeAttentionParams& p, const Runtime& rt) {
  return paged::attend_float_pages_on_tiles<TreeVisibility>(p, rt);
}

}  // namespace
}  // namespace tilewise

extern "C" const tilewise::speculative::Kernels TILEWISE_ISA_TABLE(speculative) = {
    nullptr, nullptr, nullptr, nullptr, &tilewise::tree_attention_on_tiles, nullptr, nullptr, nullptr,
};
