// One row's votes: counted, ranked, turned into labels. The maths is label.h's; this is the loop
// around it.
//
// O(P) work and O(P) clean-up: only the voted classes' counters are touched, whatever C is. Reads 4
// or 8 bytes a vote; counters, lists and tables live in the thread's scratch.
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

/// Votes of one row, counted. What is in Scratch: the voted classes, voted (K,), and how many votes
/// each has, votes (K,), followed by a vector of zeros.
struct Counted {
  int32_t K;          // classes with a vote; -1: a vote was out of range and nothing was counted
  int32_t n_target;   // votes for the target
  uint64_t occupied;  // bit n: some class has n votes; bit 63: some have 63 or more
};

/// Counts votes (P,), which are below C. y: the target, or any class.
template <class V>
ZIPFLS_INLINE Counted count_votes(const V* votes, int64_t P, bool negative, int64_t y,
                                  const Scratch& scratch) {
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
  uint64_t occupied = 0;
  for (int64_t k = 0; k < K; k++) {
    int32_t& n = counts[voted[k]];
    scratch.votes[k] = n;
    occupied |= uint64_t{1} << (n < 63 ? n : 63);
    n = 0;
  }
  store_integers<float>(scratch.votes + K, Mask<float>{});
  return {static_cast<int32_t>(K), n_target, occupied};
}

/// Counts one row of votes, unless one is not below C.
ZIPFLS_INLINE Counted count_row(const Votes& votes, int64_t i, int64_t C, int64_t y,
                                const Scratch& scratch) {
  bool negative;
  if (votes.wide) {
    const int64_t* data = static_cast<const int64_t*>(votes.data) + i * votes.stride;  // (P,)
    if (votes_inside(data, votes.P, C, negative))
      return count_votes(data, votes.P, negative, y, scratch);
  } else {
    const int32_t* data = static_cast<const int32_t*>(votes.data) + i * votes.stride;  // (P,)
    if (votes_inside(data, votes.P, C, negative))
      return count_votes(data, votes.P, negative, y, scratch);
  }
  return {-1, 0, 0};
}

/// Whether all votes of a row are below C.
ZIPFLS_INLINE bool check_row(const Votes& votes, int64_t i, int64_t C) {
  bool negative;
  if (votes.wide)
    return votes_inside(static_cast<const int64_t*>(votes.data) + i * votes.stride, votes.P, C,
                        negative);
  return votes_inside(static_cast<const int32_t*>(votes.data) + i * votes.stride, votes.P, C,
                      negative);
}

/// Calls visit(n, classes, above) for each number of votes n that some class has, ascending: how
/// many classes have n votes, and how many have more.
template <class Visit>
ZIPFLS_INLINE void for_each_count(const Counted& row, const Scratch& scratch, Visit visit) {
  constexpr int W = Lanes<float>::W;
  constexpr uint64_t kMany = uint64_t{1} << 63;
  const int32_t* const votes = scratch.votes;  // (K + W,) int32
  uint64_t left = row.occupied;
  for (int32_t n = 0, above = row.K; above > 0;) {
    if (left & ~kMany) {
      n = __builtin_ctzll(left);
      left &= left - 1;
    } else {  // 63 votes or more, for which there is no bit: the next larger number in the list
      int32_t next = INT32_MAX;
      for (int32_t k = 0; k < row.K; k++)
        next = votes[k] > n && votes[k] >= 63 && votes[k] < next ? votes[k] : next;
      n = next;
    }
    int32_t classes = 0;
    for (int32_t k = 0; k < row.K; k += W)
      classes += count_equal(load_integers<float>(votes + k), n);
    above -= classes;
    visit(n, classes, above);
  }
}

/// Masses by rank relative to a common shift, kept from row to row.
///
/// Masses of a row must be taken relative to its own largest, or they may all underflow (alpha =
/// 150). But a shift within reach of it serves as well, and the table's largest entry is within
/// reach of most rows.
template <class A>
class MassTable {
 public:
  /// log_mass (R,) by rank from 1; mass: room for (R + W,) A.
  MassTable(const A* log_mass, int64_t R, A* mass) : log_mass_(log_mass), mass_(mass), R_(R) {
    A largest = log_mass[0];
    for (int64_t r = 1; r < R; r++) largest = log_mass[r] > largest ? log_mass[r] : largest;
    if (largest > -static_cast<A>(INFINITY)) rebuild(usual_ = largest);
  }

  /// Makes `largest`, which is finite, a mass that the shift suits: 1 when exact, else within
  /// [e^-40, 1].
  ZIPFLS_INLINE void reach(A largest, bool exact) {
    // By this row alone, never by those before it: where a thread's rows begin must not show.
    const A suited = !exact && largest <= usual_ && largest >= usual_ - 40 ? usual_ : largest;
    if (suited != shift_) rebuild(suited);
  }

  ZIPFLS_INLINE A mass(int32_t rank) const { return mass_[rank - 1]; }
  ZIPFLS_INLINE A relative(int32_t rank) const {
    return log_mass_of_rank(log_mass_, rank) - shift_;
  }
  ZIPFLS_INLINE A log_mass(int32_t rank) const { return log_mass_of_rank(log_mass_, rank); }

 private:
  void rebuild(A shift) {
    constexpr int W = Lanes<A>::W;
    shift_ = shift;
    int64_t r = 0;
    for (; r + W <= R_; r += W) store(mass_ + r, exp_lanes<true>(load(log_mass_ + r) - shift));
    for (; r < R_; r++) mass_[r] = exp_lanes<true>(splat<A>(log_mass_[r] - shift))[0];
  }

  const A* log_mass_;
  A* mass_;
  int64_t R_;
  A usual_ = 0, shift_ = 0;
};

/// Labels by number of votes, label[n] = p~ of a non-target class with n votes, for the n that
/// occur; label[0] is 0 if every non-target class has a vote.
template <class A>
ZIPFLS_INLINE MassSums<double> label_counts(const Counted& row, int64_t C, MassTable<A>& table,
                                            const Scratch& scratch) {
  A* const label = static_cast<A*>(scratch.label);  // (P + 1,) A, by number of votes
  // The groups of non-target classes with the same number of votes. Made without a branch, whose
  // outcome would be as random as the votes: a group that no class is in is overwritten by the
  // next.
  int32_t* const members = scratch.members;    // (groups,) int32, how many they are
  int32_t* const count = scratch.group_count;  // (groups,) int32, their number of votes
  int32_t* const rank = scratch.group_rank;    // (groups,) int32
  int32_t groups = 0;
  A largest = -static_cast<A>(INFINITY);
  if (const int32_t unvoted = members_unvoted(static_cast<int32_t>(C), row.K, row.n_target);
      unvoted > 0) {
    members[0] = unvoted;
    count[0] = 0;
    rank[0] = rank_below(row.K);
    largest = table.log_mass(rank[0]);
    groups = 1;
  }
  for_each_count(row, scratch,
                 [&](int32_t n, int32_t classes, int32_t above) __attribute__((always_inline)) {
                   const int32_t size = members_of_count(n, classes, row.n_target);
                   members[groups] = size;
                   count[groups] = n;
                   rank[groups] = rank_below(above);
                   const A entry = table.log_mass(rank[groups]);
                   largest = size > 0 && entry > largest ? entry : largest;
                   groups += size > 0;
                 });
  label[0] = label[row.n_target] = 0;  // in case no other class is in these groups
  MassSums<double> sums;
  if (largest == -static_cast<A>(INFINITY)) {  // no mass anywhere: uniform
    for (int32_t g = 0; g < groups; g++) sums.add(members[g], A(1), A(0));
    for (int32_t g = 0; g < groups; g++) label[count[g]] = static_cast<A>(sums.normaliser());
  } else {
    table.reach(largest,
                C == 2);  // of two classes one is the target: the other's label is 1, exactly
    for (int32_t g = 0; g < groups; g++)
      sums.add(members[g], table.mass(rank[g]), table.relative(rank[g]));
    const double normaliser = sums.normaliser();
    for (int32_t g = 0; g < groups; g++)
      label[count[g]] = static_cast<A>(table.mass(rank[g]) * normaliser);
  }
  return sums;
}

/// A row's label from its log masses.
template <class A>
struct DenseLabel {
  A largest;       // largest log mass of a non-target class
  double log_sum;  // log of the sum of masses in units of the largest: log p~ = log mass - largest
                   // - log_sum
};

/// label = p~ (C,) from log_mass (C,), room for W each; the target's entry is 0.
template <class A>
ZIPFLS_INLINE DenseLabel<A> label_row_dense(const A* log_mass, int64_t C, int64_t y, A* label) {
  constexpr int W = Lanes<A>::W;
  const A largest = max_nontarget<A>(log_mass, C, y);
  const bool massless = largest == -static_cast<A>(INFINITY);
  double sum[1];
  sum_nontarget<A, 1>(C, y, sum, [&](int64_t c, Vec<A>(&x)[1]) __attribute__((always_inline)) {
    x[0] = exp_lanes<true>(massless ? Vec<A>{} : load(log_mass + c) - largest);
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
  for_each_count(row, scratch,
                 [&](int32_t n, int32_t, int32_t above) { rank_of_count[n] = rank_below(above); });
  for (int64_t c = 0; c < C; c++) rank[c] = rank_below(row.K);
  for (int32_t k = 0; k < row.K; k++) rank[scratch.voted[k]] = rank_of_count[scratch.votes[k]];
  return true;
}

/// Label (C,) A of one row of votes, from a table by rank; false if a vote is out of range.
template <class A>
bool label_row(const Votes& votes, int64_t i, int64_t C, int64_t y, const void* log_mass,
               const Scratch& scratch, void* out) {
  const Counted row = count_row(votes, i, C, y, scratch);
  if (row.K < 0) return false;
  MassTable<A> table(static_cast<const A*>(log_mass), votes.P < C ? votes.P + 1 : C,
                     static_cast<A*>(scratch.mass));
  label_counts(row, C, table, scratch);
  const A* const by_count = static_cast<const A*>(scratch.label);
  A* const label = static_cast<A*>(out);
  for (int64_t c = 0; c < C; c++) label[c] = by_count[0];
  for (int32_t k = 0; k < row.K; k++) label[scratch.voted[k]] = by_count[scratch.votes[k]];
  label[y] = 0;
  return true;
}

/// Label (C,) A of one row from its own log masses (C,); the votes are only checked.
template <class A>
bool label_row_given(const Votes& votes, int64_t i, int64_t C, int64_t y, const void* log_mass,
                     const Scratch& scratch, void* out) {
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
