// Cross-entropy and the Zipf term of one row, with their gradient (MATH.md, "Why one pass is
// enough").
//
// Bytes moved: the logits row is read from memory once and its gradient written once. In between
// the row lives in the core's cache: one pass takes the maximum, one the exponentials and sums, one
// writes the gradient from the exponentials kept by the second (in the gradient row itself for
// float32 and float64, in scratch for 16-bit types). Arithmetic in A, float or double; sums and
// everything that exists once a row in double.
#pragma once

#include "../softmax.h"
#include "label_kernel.h"
#include "row.h"

namespace zipfls::ZIPFLS_ISA {

// The passes over a row
// -------------------------------------------------------------------------------

/// out = exps * scale - term(offset), C elements, term a vector by offset. out may be exps.
template <class A, class T, class Term>
ZIPFLS_INLINE void write_gradient(T* out, const A* exps, int64_t C, A scale, Term term) {
  constexpr int W = Lanes<A>::W;
  if (C < W) {  // buffers of at least W elements
    store(out, load(exps) * scale - term(int64_t{0}));
    return;
  }
  // The last vector overlaps the one before unless W divides C: taken first, because out may be
  // exps.
  const Vec<A> last = load(exps + C - W) * scale - term(C - W);
  for (int64_t c = 0; c + W <= C; c += W) store(out + c, load(exps + c) * scale - term(c));
  store(out + C - W, last);
}

/// Whether the target has the largest logit, ties to the lowest class; as reference.is_correct with
/// NaN.
template <class T>
ZIPFLS_INLINE bool is_correct_row(const T* z, int64_t C, int64_t y) {
  using A = decltype(value(T{}));
  constexpr int W = Lanes<A>::W;
  const A z_y = value(z[y]);
  int64_t c = 0;
  for (; c + W <= y; c += W)
    if (any<A>(load(z + c) >= z_y)) return false;
  for (; c < y; c++)
    if (value(z[c]) >= z_y) return false;
  for (c = y + 1; c + W <= C; c += W)
    if (any<A>(load(z + c) > z_y)) return false;
  for (; c < C; c++)
    if (value(z[c]) > z_y) return false;
  return true;
}

// Labels of every class: the general form
// ---------------------------------------------------------------

/// A logit as an unsigned key, and its class.
template <class A>
struct Keyed;
template <>
struct Keyed<float> {
  uint32_t key;
  int32_t index;
  static constexpr uint32_t kSign = 0x80000000u;
};
template <>
struct Keyed<double> {
  uint64_t key;
  int32_t index;
  static constexpr uint64_t kSign = 0x8000000000000000u;
};

/// Log masses (C,) by rank of the logits, r_c = 1 + #{m : z_m > z_c}; NaN ranks with -inf, last.
///
/// Sorts in descending order, least significant digit first, 8 bits at a time: O(C), with two
/// passes of four for 16-bit logits, whose low bits are all zero.
template <class A, class T>
void log_mass_by_logits(const T* z, int64_t C, const A* log_mass, const Scratch& scratch, A* out) {
  using Entry = Keyed<A>;
  using Key = decltype(Entry::key);
  constexpr int kDigits = sizeof(Key);
  Entry* from = static_cast<Entry*>(scratch.sort[0]);  // (C,)
  Entry* to = static_cast<Entry*>(scratch.sort[1]);    // (C,)
  int32_t starts[kDigits][256] = {};
  for (int64_t c = 0; c < C; c++) {
    A x = value(z[c]) + A(0);  // -0 + 0 = 0: the two zeros are equal
    if (x != x) x = -static_cast<A>(INFINITY);
    const Key bits = bit_cast<Key>(x);
    // Larger float, smaller key: flip what makes floats of one sign ascend, the sign last.
    const Key key = bits & Entry::kSign ? bits : static_cast<Key>(~bits & ~Entry::kSign);
    from[c] = {key, static_cast<int32_t>(c)};
    for (int d = 0; d < kDigits; d++) starts[d][key >> 8 * d & 255]++;
  }
  for (int d = 0; d < kDigits; d++) {
    if (starts[d][from[0].key >> 8 * d & 255] == C)
      continue;  // one digit for all: in order already
    int32_t start = 0;
    for (int32_t& s : starts[d]) {
      const int32_t n = s;
      s = start;
      start += n;
    }
    for (int64_t c = 0; c < C; c++) to[starts[d][from[c].key >> 8 * d & 255]++] = from[c];
    Entry* const swap = from;
    from = to;
    to = swap;
  }
  int32_t rank = 1;
  for (int64_t c = 0; c < C; c++) {
    if (c > 0 && from[c].key != from[c - 1].key) rank = rank_below(static_cast<int32_t>(c));
    out[from[c].index] = log_mass_of_rank(log_mass, rank);
  }
}

/// Log masses (C,) by rank of votes, counted before.
template <class A>
void log_mass_by_votes(const Counted& row, int64_t C, const A* log_mass, const Scratch& scratch,
                       A* out) {
  A* const by_count = static_cast<A*>(scratch.label);  // (highest count + 1,) A
  for_each_count(row, scratch, [&](int32_t n, int32_t, int32_t above) {
    by_count[n] = log_mass_of_rank(log_mass, rank_below(above));
  });
  if (row.K < C) {  // with all classes voted there is no rank K + 1, nor need the table have it
    const A unvoted = log_mass_of_rank(log_mass, rank_below(row.K));
    for (int64_t c = 0; c < C; c++) out[c] = unvoted;
  }
  for (int32_t k = 0; k < row.K; k++) out[scratch.voted[k]] = by_count[scratch.votes[k]];
}

// One row
// -------------------------------------------------------------------------------------------------

/// Row i of the operator; false if a vote is out of range.
template <class T, class A>
ZIPFLS_INLINE bool loss_row(const LossFwd& a, MassTable<A>& masses, const Scratch& scratch,
                            int64_t i) {
  using V = Vec<A>;
  constexpr int W = Lanes<A>::W;
  const int64_t C = a.C, y = static_cast<const int64_t*>(a.target)[i];
  T* const grad_row = a.grad == nullptr ? nullptr : static_cast<T*>(a.grad) + i * C;  // (C,) T
  if (y == a.ignore_index) {
    a.ce_rows[i] = a.zipf_rows[i] = 0;
    if (grad_row != nullptr) __builtin_memset(grad_row, 0, C * sizeof(T));
    return true;
  }

  // Rows shorter than a vector are worked on in padded copies.
  const T* z = static_cast<const T*>(a.logits) + i * a.logits_stride;  // (C,) T
  T* out = grad_row;                                                   // (C,) T
  if (C < W) {
    __builtin_memcpy(scratch.padded[0], z, C * sizeof(T));
    z = static_cast<const T*>(scratch.padded[0]);
    if (out != nullptr) out = static_cast<T*>(scratch.padded[1]);
  }
  const A* const weight =
      static_cast<const A*>(C < W && a.weight != nullptr ? scratch.row[3] : a.weight);

  // Which parts this row has, and its votes.
  bool zipf = a.zipf;
  if (zipf && a.only_correct) zipf = a.correct != nullptr ? a.correct[i] : is_correct_row(z, C, y);
  const bool by_votes = zipf && a.mass == Mass::kByVotes;
  const Counted votes = by_votes ? count_row(a.votes, i, C, y, scratch) : Counted{0, 0, 0};
  if (votes.K < 0 || (!by_votes && a.votes.data != nullptr && !check_row(a.votes, i, C)))
    return false;

  // Pass 1: the largest non-target logit. Where all are -inf, exponentials are taken of z - 0.
  const A largest = max_nontarget<A>(z, C, y);
  const A shift = largest == -static_cast<A>(INFINITY) ? A(0) : largest;

  // Pass 2: exponentials, their sum and the sum of z - shift.
  // They wait where the gradient will be, unless that is where the logits are.
  const bool apart = static_cast<const void*>(out) != static_cast<const void*>(z);
  A* const exps = sizeof(T) == sizeof(A) && out != nullptr && apart
                      ? reinterpret_cast<A*>(out)
                      : static_cast<A*>(scratch.row[0]);  // (C,) A
  double sum[2];
  const bool keep = out != nullptr;
  if (keep)
    sum_nontarget<A, 2>(C, y, sum, [&](int64_t c, V(&x)[2]) __attribute__((always_inline)) {
      x[1] = load(z + c) - shift;
      x[0] = exp_lanes(x[1]);
      store(exps + c, x[0]);
    });
  else
    sum_nontarget<A, 2>(C, y, sum, [&](int64_t c, V(&x)[2]) __attribute__((always_inline)) {
      x[1] = load(z + c) - shift;
      x[0] = exp_lanes(x[1]);
    });
  const double sum_exp = sum[0], sum_linear = sum[1];

  // Gradient of a non-target class: exps_c * scale - constant - smoothing * w_c - zipf_factor *
  // p~_c.
  double scale = 0, constant = 0, smoothing = 0, at_target = 0;

  double ce = 0;
  if (a.ce) {
    const double e = a.label_smoothing,
                 w_y = weight == nullptr ? 1.0 : static_cast<double>(weight[y]);
    const Joined joined = join_target(largest, shift, sum_exp, value(z[y]));
    ce = w_y * joined.loss;
    double along_p = w_y,
           along_target = w_y;  // dz_c = along_p * p_c - [c = y] * along_target - smoothing * w_c
    if (e > 0) {  // skipped, not multiplied by 0: the log probability of a masked class is -inf
      double weighted = sum_linear;  // sum_{c != y} w_c (z_c - shift)
      if (weight != nullptr) {
        double sums[1];
        sum_nontarget<A, 1>(C, y, sums, [&](int64_t c, V(&x)[1]) __attribute__((always_inline)) {
          x[0] = (load(z + c) - shift) * load(weight + c);
        });
        weighted = sums[0];
      }
      const double log_p = weighted - joined.log_total * (a.weight_sum - w_y) - w_y * joined.loss;
      ce = (1 - e) * ce - e / C * log_p;
      along_p = (1 - e) * w_y + e / C * a.weight_sum;
      along_target = (1 - e) * w_y + e / C * w_y;
      (weight == nullptr ? constant : smoothing) = a.ce_factor * (e / C);
    }
    scale = a.ce_factor * along_p * joined.per_exp;
    at_target = a.ce_factor * (along_p * joined.p_target - along_target);
  }
  a.ce_rows[i] = ce;

  double zipf_loss = 0;
  const A factor = static_cast<A>(a.zipf_factor);
  A* const dense =
      static_cast<A*>(scratch.row[1]);  // (C,) A, label of every class, in the general form
  // The label is one constant and K exceptions where votes rank and all logits are finite.
  const bool sparse = by_votes && sum_linear - sum_linear == 0 && sum_exp - sum_exp == 0;
  const A* const table = static_cast<const A*>(a.log_mass);
  A* const patch = static_cast<A*>(scratch.patch);
  if (zipf) scale += a.zipf_factor / sum_exp;

  if (zipf && sparse) {
    const MassSums<double> sums = label_counts(votes, C, masses, scratch);
    const A* const label = static_cast<const A*>(scratch.label);
    const A unvoted = label[0], row_scale = static_cast<A>(scale),
            row_constant = static_cast<A>(constant);
    // Gather what the voted classes need, then work on it by vectors; the last one's tail is of no
    // account.
    A* const excess = static_cast<A*>(scratch.excess);      // (K + W,) A: p~_c - p~_unvoted
    A* const distance = static_cast<A*>(scratch.distance);  // (K + W,) A: z_c
    const double unvoted_label = unvoted;
    for (int32_t k = 0; k < votes.K; k++) {
      const int32_t c = scratch.voted[k];
      excess[k] = label[scratch.votes[k]];
      distance[k] = c == y ? shift : value(z[c]);  // the target adds 0
      if (keep) patch[k] = exps[c];
    }
    store(excess + votes.K, splat<A>(unvoted));
    store(distance + votes.K, splat<A>(shift));
    V products = {};
    for (int32_t k = 0; k < votes.K; k += W) {
      const V p = load(excess + k);
      products += (p - unvoted) * (load(distance + k) - shift);
      if (keep) store(patch + k, load(patch + k) * row_scale - (row_constant + factor * p));
    }
    const double cross =
        reduce_add<A>(products);  // sum over the voted of (p~_c - p~_unvoted) (z_c - shift)
    if (keep && smoothing != 0)
      for (int32_t k = 0; k < votes.K; k++)
        patch[k] -= static_cast<A>(smoothing) * weight[scratch.voted[k]];
    zipf_loss = sums.entropy * sums.normaliser() - (unvoted_label * sum_linear + cross) +
                ::log(sum_exp / sums.mass);
    constant += a.zipf_factor * unvoted_label;
  } else if (zipf) {
    const A* log_mass = table + (a.mass == Mass::kPerClass ? i * C : 0);
    A* const gathered = static_cast<A*>(scratch.row[2]);  // (C,) A
    if (a.mass == Mass::kByVotes) log_mass_by_votes(votes, C, table, scratch, gathered);
    if (a.mass == Mass::kByLogits) log_mass_by_logits(z, C, table, scratch, gathered);
    if (a.mass == Mass::kPerClass && C < W) __builtin_memcpy(gathered, log_mass, C * sizeof(A));
    if (a.mass != Mass::kPerClass || C < W) log_mass = gathered;
    const DenseLabel<A> law = label_row_dense(log_mass, C, y, dense);
    const bool massless = law.largest == -static_cast<A>(INFINITY);
    double cross[1];  // sum_c p~_c (log mass_c - (z_c - shift))
    sum_nontarget<A, 1>(C, y, cross, [&](int64_t c, V(&x)[1]) __attribute__((always_inline)) {
      const V p = load(dense + c), relative = massless ? V{} : load(log_mass + c) - law.largest;
      x[0] = p > A(0) ? p * (relative - (load(z + c) - shift))
                      : V{};  // classes without mass are skipped
    });
    zipf_loss = cross[0] - law.log_sum + ::log(sum_exp);
  }
  a.zipf_rows[i] = zipf_loss;

  // Pass 3: the gradient.
  if (keep && !a.ce && !zipf) {
    __builtin_memset(grad_row, 0, C * sizeof(T));  // not 0 times an exponential that may be NaN
  } else if (keep) {
    const A row_scale = static_cast<A>(scale), row_constant = static_cast<A>(constant);
    const A row_smoothing = static_cast<A>(smoothing);
    const bool weighted = smoothing != 0;
    if (zipf && !sparse) {
      write_gradient(out, exps, C, row_scale, [&](int64_t c) __attribute__((always_inline)) {
        V term = row_constant + factor * load(dense + c);
        if (weighted) term += row_smoothing * load(weight + c);
        return term;
      });
    } else if (weighted) {
      write_gradient(out, exps, C, row_scale, [&](int64_t c) __attribute__((always_inline)) {
        return row_constant + row_smoothing * load(weight + c);
      });
    } else {
      const V term = splat<A>(row_constant);
      write_gradient(out, exps, C, row_scale,
                     [&](int64_t) __attribute__((always_inline)) { return term; });
    }
    if (zipf && sparse)
      for (int32_t k = 0; k < votes.K; k++) put(out + scratch.voted[k], patch[k]);
    put(out + y, static_cast<A>(at_target));
    if (C < W) __builtin_memcpy(grad_row, out, C * sizeof(T));
  }
  return true;
}

/// Rows [begin, end). One function for each type of logits.
template <class T>
bool loss_fwd_kernel(const LossFwd& a, const Scratch& scratch, int64_t begin, int64_t end) {
  using A = decltype(value(T{}));
  if (a.C < Lanes<A>::W && a.weight != nullptr)
    __builtin_memcpy(scratch.row[3], a.weight, a.C * sizeof(A));
  const bool by_votes = a.zipf && a.mass == Mass::kByVotes;
  MassTable<A> masses(static_cast<const A*>(a.log_mass),
                      !by_votes         ? 1
                      : a.votes.P < a.C ? a.votes.P + 1
                                        : a.C,
                      static_cast<A*>(scratch.mass));
  bool inside = true;
  for (int64_t i = begin; i < end; i++) inside &= loss_row<T, A>(a, masses, scratch, i);
  return inside;
}

template <class T>
bool is_correct(const void* row, int64_t C, int64_t y) {
  return is_correct_row(static_cast<const T*>(row), C, y);
}

/// loss_bwd: one read and one write of the gradient.
template <class T>
void scale_kernel(const void* in, void* out, int64_t n, double scale) {
  using A = decltype(value(T{}));
  constexpr int W = Lanes<A>::W;
  const T* const x = static_cast<const T*>(in);  // (n,) T
  T* const y = static_cast<T*>(out);             // (n,) T
  const A factor = static_cast<A>(scale);
  int64_t k = 0;
  for (; k + W <= n; k += W) store(y + k, load(x + k) * factor);
  for (; k < n; k++) put(y + k, value(x[k]) * factor);
}

}  // namespace zipfls::ZIPFLS_ISA
