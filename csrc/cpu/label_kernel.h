// One row's votes: counted, ranked, turned into labels. The maths is label.h's; this is the loop around it.
//
// O(P) work and O(P) clean-up: only the voted classes' counters are touched, whatever C is. Reads 4 or 8
// bytes a vote; counters, lists and tables live in the thread's scratch.
#pragma once

#include "../label.h"
#include "row.h"

namespace zipfls::ZIPFLS_ISA {

/// Whether all of votes (P,) are below C, and whether some are negative.
template <class V>
ZIPFLS_INLINE bool votes_inside(const V* votes, int64_t P, int64_t C, bool& negative) {
  using A = FloatOf<V>;
  constexpr int W = Lanes<A>::W;
  const Mask<A> limit = Mask<A>{} + static_cast<V>(C);
  Mask<A> below = {}, above = {};
  int64_t p = 0;
  for (; p + W <= P; p += W) {
    const Mask<A> v = load_integers<A>(votes + p);
    below |= v < 0;
    above |= v >= limit;
  }
  negative = any<A>(below);
  bool inside = !any<A>(above);
  for (; p < P; p++) {
    negative |= votes[p] < 0;
    inside &= votes[p] < C;
  }
  return inside;
}

/// Votes of one row, counted. What is in Scratch: the voted classes and how many votes each has, voted and
/// votes (K,); how many of them have n votes, classes_with(n).
struct Counted {
  int32_t K;         // classes with a vote; -1: a vote was out of range and nothing was counted
  int32_t n_target;  // votes for the target
};

/// Classes with n >= 1 votes: the sum of four columns, each of which counts every fourth class.
///
/// Four, because most classes have few votes, and incrementing one counter again and again would wait each time
/// for the increment before.
ZIPFLS_INLINE int32_t classes_with(int32_t n, const Scratch& scratch) {
  const int32_t* column = scratch.classes + 4 * int64_t{n};
  return (column[0] + column[1]) + (column[2] + column[3]);
}

/// Counts votes (P,), which are below C. y: the target, or any class.
template <class V>
ZIPFLS_INLINE Counted count_votes(const V* votes, int64_t P, bool negative, int64_t y, const Scratch& scratch) {
  int32_t* const counts = scratch.counts;
  int32_t* const voted = scratch.voted;
  int64_t K = 0;
  auto count = [&](int64_t c) __attribute__((always_inline)) {
    const int32_t n = counts[c];
    counts[c] = n + 1;
    voted[K] = static_cast<int32_t>(c);  // overwritten unless it is this class's first vote
    K += n == 0;
  };
  if (negative) {
    for (int64_t p = 0; p < P; p++)
      if (votes[p] >= 0) count(votes[p]);
  } else {
    for (int64_t p = 0; p < P; p++) count(votes[p]);
  }
  const int32_t n_target = counts[y];
  for (int64_t k = 0; k < K; k++) {
    int32_t& n = counts[voted[k]];
    scratch.votes[k] = n;
    scratch.classes[4 * int64_t{n} + (k & 3)]++;
    n = 0;
  }
  return {static_cast<int32_t>(K), n_target};
}

/// Counts one row of votes, unless one is not below C.
ZIPFLS_INLINE Counted count_row(const Votes& votes, int64_t i, int64_t C, int64_t y, const Scratch& scratch) {
  bool negative;
  if (votes.wide) {
    const int64_t* data = static_cast<const int64_t*>(votes.data) + i * votes.stride;  // (P,)
    if (votes_inside(data, votes.P, C, negative)) return count_votes(data, votes.P, negative, y, scratch);
  } else {
    const int32_t* data = static_cast<const int32_t*>(votes.data) + i * votes.stride;  // (P,)
    if (votes_inside(data, votes.P, C, negative)) return count_votes(data, votes.P, negative, y, scratch);
  }
  return {-1, 0};
}

/// Whether all votes of a row are below C.
ZIPFLS_INLINE bool check_row(const Votes& votes, int64_t i, int64_t C) {
  bool negative;
  if (votes.wide) return votes_inside(static_cast<const int64_t*>(votes.data) + i * votes.stride, votes.P, C, negative);
  return votes_inside(static_cast<const int32_t*>(votes.data) + i * votes.stride, votes.P, C, negative);
}

/// Calls visit(n, classes, above) for n = 1, 2, ... up to the largest number of votes of a class: how many
/// classes have n votes, and how many have more. Zeroes those counters as it goes.
template <class Visit>
ZIPFLS_INLINE void drain_counts(int32_t K, const Scratch& scratch, Visit visit) {
  for (int32_t n = 1, above = K; above > 0; n++) {
    const int32_t classes = classes_with(n, scratch);
    __builtin_memset(scratch.classes + 4 * int64_t{n}, 0, 4 * sizeof(int32_t));
    above -= classes;
    visit(n, classes, above);
  }
}

/// Labels by number of votes, label[n] = p~ of a non-target class with n votes, for the n that occur; label[0]
/// is 0 if every non-target class has a vote. Drains the counts of counts.
template <class A>
ZIPFLS_INLINE MassSums<double> label_counts(const Counted& row, int64_t C, const A* log_mass, const Scratch& scratch) {
  constexpr int W = Lanes<A>::W;
  A* const label = static_cast<A*>(scratch.label);        // (P + 1,) A, by number of votes
  A* const relative = static_cast<A*>(scratch.relative);  // (groups + W,) A: log mass, relative to the largest
  A* const mass = static_cast<A*>(scratch.mass);          // (groups + W,) A
  int32_t* const members = scratch.members;               // (groups,) int32
  int32_t* const count = scratch.group_count;             // (groups,) int32

  // Groups of non-target classes with the same number of votes. Written without a branch, whose outcome would be
  // as random as the votes: a group of nobody is overwritten by the next.
  label[0] = label[row.n_target] = 0;  // in case nobody else is in these groups
  int32_t groups = 0;
  A largest = -static_cast<A>(INFINITY);
  if (const int32_t unvoted = members_unvoted(static_cast<int32_t>(C), row.K, row.n_target); unvoted > 0) {
    members[0] = unvoted;
    count[0] = 0;
    relative[0] = largest = log_mass_of_rank(log_mass, rank_below(row.K));
    groups = 1;
  }
  drain_counts(row.K, scratch, [&](int32_t n, int32_t classes, int32_t above) __attribute__((always_inline)) {
    members[groups] = members_of_count(n, classes, row.n_target);
    count[groups] = n;
    const A entry = log_mass_of_rank(log_mass, rank_below(above));
    relative[groups] = entry;
    largest = members[groups] > 0 && entry > largest ? entry : largest;
    groups += members[groups] > 0;
  });
  MassSums<double> sums;
  for (int32_t g = 0; g < groups; g++) relative[g] = relative_log_mass(relative[g], largest);
  for (int32_t g = 0; g < groups; g += W) store(mass + g, exp_lanes(load(relative + g)));
  for (int32_t g = 0; g < groups; g++) sums.add(members[g], mass[g], relative[g]);
  const A normaliser = static_cast<A>(sums.normaliser());
  for (int32_t g = 0; g < groups; g++) label[count[g]] = mass[g] * normaliser;
  return sums;
}

/// A row's label from its log masses.
template <class A>
struct DenseLabel {
  A largest;       // largest log mass of a non-target class
  double log_sum;  // log of the sum of masses in units of the largest: log p~ = log mass - largest - log_sum
};

/// label = p~ (C,) from log_mass (C,), room for W each; the target's entry is 0.
template <class A>
ZIPFLS_INLINE DenseLabel<A> label_row_dense(const A* log_mass, int64_t C, int64_t y, A* label) {
  constexpr int W = Lanes<A>::W;
  const A largest = max_nontarget<A>(log_mass, C, y);
  const bool massless = largest == -static_cast<A>(INFINITY);
  double sum[1];
  sum_nontarget<A, 1>(C, y, sum, [&](int64_t c, Vec<A>(&x)[1]) __attribute__((always_inline)) {
    x[0] = exp_lanes(massless ? Vec<A>{} : load(log_mass + c) - largest);
    store(label + c, x[0]);
  });
  const A normaliser = static_cast<A>(1 / sum[0]);
  for (int64_t c = 0; c < C; c += W) store(label + c, load(label + c) * normaliser);
  label[y] = 0;
  return {largest, ::log(sum[0])};
}

/// Ranks (C,) int32 of one row of votes; false if a vote is out of range.
bool rank_row(const Votes& votes, int64_t i, int64_t C, const Scratch& scratch, int32_t* rank) {
  const Counted row = count_row(votes, i, C, 0, scratch);
  if (row.K < 0) return false;
  int32_t* const rank_of_count = scratch.members;  // (highest count + 1,) int32
  drain_counts(row.K, scratch, [&](int32_t n, int32_t, int32_t above) { rank_of_count[n] = rank_below(above); });
  for (int64_t c = 0; c < C; c++) rank[c] = rank_below(row.K);
  for (int32_t k = 0; k < row.K; k++) rank[scratch.voted[k]] = rank_of_count[scratch.votes[k]];
  return true;
}

/// Label (C,) A of one row of votes, from a table by rank; false if a vote is out of range.
template <class A>
bool label_row(const Votes& votes, int64_t i, int64_t C, int64_t y, const void* log_mass, const Scratch& scratch,
               void* out) {
  const Counted row = count_row(votes, i, C, y, scratch);
  if (row.K < 0) return false;
  label_counts(row, C, static_cast<const A*>(log_mass), scratch);
  const A* const by_count = static_cast<const A*>(scratch.label);
  A* const label = static_cast<A*>(out);
  for (int64_t c = 0; c < C; c++) label[c] = by_count[0];
  for (int32_t k = 0; k < row.K; k++) label[scratch.voted[k]] = by_count[scratch.votes[k]];
  label[y] = 0;
  return true;
}

/// Label (C,) A of one row from its own log masses (C,); the votes are only checked.
template <class A>
bool label_row_given(const Votes& votes, int64_t i, int64_t C, int64_t y, const void* log_mass, const Scratch& scratch,
                     void* out) {
  if (!check_row(votes, i, C)) return false;
  const A* mass = static_cast<const A*>(log_mass);
  A* const row = static_cast<A*>(scratch.row[2]);    // (C + W,) A
  A* const label = static_cast<A*>(scratch.row[1]);  // (C + W,) A
  __builtin_memcpy(row, mass, C * sizeof(A));        // with room behind it
  label_row_dense(row, C, y, label);
  __builtin_memcpy(out, label, C * sizeof(A));
  return true;
}

}  // namespace zipfls::ZIPFLS_ISA
