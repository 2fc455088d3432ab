// The table of kernels of one instruction set, from the sources that kernels_<set>.cpp compile for
// it.
#pragma once

#include "distill_kernel.h"
#include "label_kernel.h"
#include "loss_kernel.h"
#include "soft_loss_kernel.h"
#include "vote_kernel.h"

namespace zipfls::ZIPFLS_ISA {

#define ZIPFLS_EVERY_TYPE(f) {f<float>, f<double>, f<bfloat16>, f<float16>}
#define ZIPFLS_BOTH_SUMS(f) {f<float>, f<double>}

/// A constant expression, so that nothing of a wide set runs before the machine was asked for it.
constexpr Kernels table(const char* name) {
  return {
      name,
      ZIPFLS_EVERY_TYPE(loss_fwd_kernel),
      ZIPFLS_EVERY_TYPE(soft_loss_fwd_kernel),
      {distill_fwd_kernel<float, float>, distill_fwd_kernel<double, double>,
       distill_fwd_kernel<bfloat16, bfloat16>, distill_fwd_kernel<float16, float16>},
      {distill_fwd_kernel<float, float>, distill_fwd_kernel<double, double>,
       distill_fwd_kernel<bfloat16, float>, distill_fwd_kernel<float16, float>},
      ZIPFLS_EVERY_TYPE(is_correct),
      ZIPFLS_EVERY_TYPE(scale_kernel),
      rank_row,
      ZIPFLS_BOTH_SUMS(label_row),
      ZIPFLS_BOTH_SUMS(label_row_given),
      {pack_kernel<float, float>, pack_kernel<double, double>, pack_kernel<bfloat16, bfloat16>,
       pack_kernel<float16, float16>},
      {pack_kernel<float, float>, pack_kernel<double, double>, pack_kernel<bfloat16, float>,
       pack_kernel<float16, float>},
      ZIPFLS_BOTH_SUMS(argmax_kernel),
      ZIPFLS_BOTH_SUMS(argmax_upsampled_kernel),
      argmax_rounded_kernel,
  };
}

}  // namespace zipfls::ZIPFLS_ISA
