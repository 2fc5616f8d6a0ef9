// CPU kernels of the family that have a version for AMX tiles (rules: common/isa.h).
#include "attention/cpu/amx.h"
#include "attention/cpu/amx_backward.h"
#include "attention/cpu/paged.h"
#include "common/paged/cpu/amx.h"

namespace tilewise {
namespace {

const char* paged_attention_on_tiles(const PagedParams& p, const Runtime& rt) {
  return paged::attend_float_pages_on_tiles<WindowVisibility>(p, rt);
}
const char* paged_attention_codes_on_tiles(const PagedParams& p, const Runtime& rt) {
  return paged::attend_code_pages_on_tiles<WindowVisibility>(p, rt);
}

}  // namespace
}  // namespace tilewise

extern "C" const tilewise::attention::Kernels TILEWISE_ISA_TABLE(attention) = {
    &tilewise::forward_on_tiles,
    &tilewise::backward_on_tiles,
    nullptr,  // pack_mask
    &tilewise::paged_attention_on_tiles,
    &tilewise::paged_attention_codes_on_tiles,
};
