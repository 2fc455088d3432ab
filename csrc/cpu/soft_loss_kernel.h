// Cross-entropy and the Zipf term of one row whose target is probabilities, with their gradient
// (MATH.md, "Soft targets").
//
// Bytes moved: the rows of logits and of target are read from memory once and the gradient is
// written once. In between they live in five rows of scratch, in the core's cache: any class may be
// a target, so unlike loss_kernel.h nothing is a constant and its exceptions. Arithmetic in A,
// float or double; sums in double.
#pragma once

#include "label_kernel.h"
#include "loss_kernel.h"
#include "row.h"

namespace zipfls::ZIPFLS_ISA {

/// Calls block(offset) for every vector of a row, the last one overlapping the one before unless W
/// divides C: a block may be seen twice. A row shorter than a vector is one block at 0.
template <class A, class Block>
ZIPFLS_INLINE void for_blocks(int64_t C, Block block) {
  constexpr int W = Lanes<A>::W;
  for (int64_t c = 0; c + W <= C; c += W) block(c);
  if (C % W != 0) block(C < W ? 0 : C - W);
}

/// A row of C < W elements in room for W, its last element repeated; other rows as they are.
template <class A, class T>
ZIPFLS_INLINE const T* padded_row(const T* x, int64_t C, void* room) {
  constexpr int W = Lanes<A>::W;
  if (C >= W) return x;
  T* const padded = static_cast<T*>(room);  // (W,) T
  for (int64_t w = 0; w < W; w++) padded[w] = x[w < C ? w : C - 1];
  return padded;
}

/// Row i of the operator; false if a vote is out of range.
template <class T, class A>
ZIPFLS_INLINE bool soft_loss_row(const LossFwd& a, const Scratch& scratch, int64_t i) {
  using V = Vec<A>;
  constexpr int W = Lanes<A>::W;
  constexpr A kLowest = -static_cast<A>(INFINITY);
  const int64_t C = a.C, none = C;  // the functions of row.h leave out a class: none here
  A* const z = static_cast<A*>(scratch.row[0]);      // (C + W,) A, logits
  A* const label = static_cast<A*>(scratch.row[1]);  // (C + W,) A, p~, then the Zipf gradient
  A* const mass = static_cast<A*>(scratch.row[2]);   // (C + W,) A, log masses, then w t'
  A* const t = static_cast<A*>(scratch.row[3]);      // (C + W,) A, target
  A* const rest = static_cast<A*>(scratch.row[4]);   // (C + W,) A, z in S, then exponentials
  const T* const logits = static_cast<const T*>(a.logits) + i * a.logits_stride;  // (C,) T
  const A* const target = static_cast<const A*>(a.target) + i * a.target_stride;  // (C,) A

  // The rows, once from memory; the largest logit, the smallest probability.
  const T* const from_z = padded_row<A>(logits, C, scratch.padded[0]);
  const A* const from_t = padded_row<A>(target, C, scratch.padded[1]);
  V top = splat<A>(kLowest), low = -top;
  Mask<A> nan_target = {};
  for_blocks<A>(C, [&](int64_t c) __attribute__((always_inline)) {
    const V x = load(from_z + c), y = load(from_t + c);
    store(z + c, x);
    store(t + c, y);
    top = max_ignoring_nan(top, x);
    low = y < low ? y : low;
    nan_target |= y != y;
  });
  const A largest = reduce_max<A>(top), least = -reduce_max<A>(-low);
  const bool invalid = any<A>(nan_target);  // a NaN in the target

  const bool by_votes = a.zipf && a.mass == Mass::kByVotes;
  const Counted votes = by_votes ? count_row(a.votes, i, C, 0, scratch) : Counted{0, 0, 0};
  if (votes.K < 0 || (!by_votes && a.votes.data != nullptr && !check_row(a.votes, i, C)))
    return false;

  // The Zipf part: of S, the classes whose probability is the least.
  auto in_s = [&](int64_t c) __attribute__((always_inline)) { return load(t + c) == least; };
  bool zipf = a.zipf && (a.correct == nullptr || a.correct[i]);
  if (zipf) {
    double members[1];
    sum_nontarget<A, 1>(C, none, members, [&](int64_t c, V(&x)[1]) __attribute__((always_inline)) {
      x[0] = in_s(c) ? splat<A>(1) : V{};
    });
    zipf = members[0] >= 2;
  }
  double zipf_loss = 0;
  if (zipf) {
    const A* const table = static_cast<const A*>(a.log_mass);
    if (a.mass == Mass::kByVotes) log_mass_by_votes(votes, C, table, scratch, mass);
    if (a.mass == Mass::kByLogits) log_mass_by_logits(z, C, table, scratch, mass);
    if (a.mass == Mass::kPerClass) __builtin_memcpy(mass, table + i * C, C * sizeof(A));
    for_blocks<A>(C, [&](int64_t c) __attribute__((always_inline)) {
      store(mass + c, in_s(c) ? load(mass + c) : splat<A>(kLowest));
      store(rest + c, in_s(c) ? load(z + c) : splat<A>(kLowest));
    });
    if (max_nontarget<A>(mass, C, none) == kLowest)  // no mass in S: uniform there
      for_blocks<A>(C, [&](int64_t c) __attribute__((always_inline)) {
        store(mass + c, in_s(c) ? V{} : splat<A>(kLowest));
      });
    const DenseLabel<A> law = label_row_dense(mass, C, none, label);
    const A most = max_nontarget<A>(rest, C, none), shift = most == kLowest ? A(0) : most;
    double sum[1];  // of p~_c (log mass_c - (z_c - shift)); classes without mass are skipped
    sum_nontarget<A, 1>(C, none, sum, [&](int64_t c, V(&x)[1]) __attribute__((always_inline)) {
      const V p = load(label + c), relative = load(mass + c) - law.largest;
      x[0] = p > A(0) ? p * (relative - (load(rest + c) - shift)) : V{};
    });
    const double cross = sum[0];
    sum_nontarget<A, 1>(C, none, sum, [&](int64_t c, V(&x)[1]) __attribute__((always_inline)) {
      x[0] = exp_lanes(load(rest + c) - shift);
      store(mass + c, x[0]);
    });
    zipf_loss = cross - law.log_sum + ::log(sum[0]);
    const A factor = static_cast<A>(a.zipf_factor), per_exp = static_cast<A>(1 / sum[0]);
    for (int64_t c = 0; c < C; c += W) {
      const V step = factor * (load(mass + c) * per_exp - load(label + c));
      store(label + c, in_s(c) ? step : V{});  // not 0 times an infinity
    }
  }

  // The cross-entropy: sum_c w_c t'_c (log sum exp - z_c).
  double ce = 0, along_exp = 0;
  if (a.ce) {
    const A kept = static_cast<A>(1 - a.label_smoothing);
    const A spread = static_cast<A>(a.label_smoothing / static_cast<double>(C));
    const A* const weight =  // (C,) A
        a.weight == nullptr ? nullptr
                            : padded_row<A>(static_cast<const A*>(a.weight), C, scratch.padded[0]);
    double sum[3];
    sum_nontarget<A, 3, 8>(C, none, sum, [&](int64_t c, V(&x)[3]) __attribute__((always_inline)) {
      const V distance = load(z + c) - largest;
      x[0] = exp_lanes(distance);
      x[1] = load(t + c);
      if (a.label_smoothing > 0) x[1] = x[1] * kept + spread;
      if (weight != nullptr) x[1] *= load(weight + c);
      // 0 times -inf is NaN, as in F.cross_entropy; an infinity times 0 is none: log(sum) follows.
      x[2] = distance == A(0) ? V{} : x[1] * distance;
      store(rest + c, x[0]);
      store(mass + c, x[1]);
    });
    double log_sum = ::log(sum[0]);
    const bool infinite = sum[1] == INFINITY || sum[1] == -INFINITY;
    if (infinite) {  // then a p that rounds to 0 or 1 stands for one between: no infinity times 0
      if (log_sum == 0) log_sum = 1;
      for_blocks<A>(C, [&](int64_t c) __attribute__((always_inline)) {
        store(rest + c, load(z + c) > kLowest ? splat<A>(1) : load(rest + c));
      });
    }
    ce = sum[1] * log_sum - sum[2];
    along_exp = a.ce_factor * sum[1] / sum[0];
  }
  a.ce_rows[i] = invalid ? NAN : ce;
  a.zipf_rows[i] = invalid ? NAN : zipf_loss;
  if (a.grad == nullptr) return true;

  // The gradient, once to memory.
  T* const grad_row = static_cast<T*>(a.grad) + i * C;                   // (C,) T
  T* const out = C < W ? static_cast<T*>(scratch.padded[0]) : grad_row;  // (C,) T
  const V nan_or_zero = splat<A>(invalid ? static_cast<A>(NAN) : A(0));
  const A scale = static_cast<A>(along_exp), factor = static_cast<A>(a.ce_factor);
  for_blocks<A>(C, [&](int64_t c) __attribute__((always_inline)) {
    V g = nan_or_zero;
    if (zipf) g += load(label + c);
    if (a.ce) g += load(rest + c) * scale - factor * load(mass + c);
    store(out + c, g);
  });
  if (C < W) __builtin_memcpy(grad_row, out, C * sizeof(T));
  return true;
}

/// Rows [begin, end). One function for each type of logits.
template <class T>
bool soft_loss_fwd_kernel(const LossFwd& a, const Scratch& scratch, int64_t begin, int64_t end) {
  bool inside = true;
  for (int64_t i = begin; i < end; i++)
    inside &= soft_loss_row<T, decltype(value(T{}))>(a, scratch, i);
  return inside;
}

}  // namespace zipfls::ZIPFLS_ISA
