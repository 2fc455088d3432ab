// The softmax of a row whose target was left out, and how the target joins it (MATH.md, "Numerics
// that bite").
#pragma once

#include <cmath>

#include "label.h"

namespace zipfls::ZIPFLS_ISA {

/// Softmax statistics over all classes, from those of the non-target classes and the target's
/// logit.
struct Joined {
  double loss;       // -log p_y
  double p_target;   // p_y
  double per_exp;    // p_c = ::exp(z_c - shift) * per_exp for the other classes
  double log_total;  // log sum_c exp(z_c - shift), the target included
};

/// The target joins, never by subtraction: exact where it dominates, and NaN just where
/// F.cross_entropy's is.
///
/// Args:
///   largest: max_{c != y} z_c; shift: the same, but 0 where it is -inf.
///   sum_exp: sum_{c != y} exp(z_c - shift).
///   z_target: z_y.
ZIPFLS_HOST_DEVICE Joined join_target(double largest, double shift, double sum_exp,
                                      double z_target) {
  if (z_target > largest || largest == -INFINITY) {
    const double factor = largest == -INFINITY ? 0.0 : ::exp(largest - z_target);
    // z_y - z_y: 0, and NaN at an infinite z_y, as the softmax of an infinity is.
    const double rest = (largest == -INFINITY ? sum_exp : sum_exp * factor) + (z_target - z_target);
    const double log_sum = ::log1p(rest);
    return {log_sum, 1 / (1 + rest), factor / (1 + rest), (z_target - shift) + log_sum};
  }
  const double exp_target = ::exp(z_target - shift), total = sum_exp + exp_target,
               log_total = ::log(total);
  return {(shift - z_target) + log_total, exp_target / total, 1 / total, log_total};
}

}  // namespace zipfls::ZIPFLS_ISA
