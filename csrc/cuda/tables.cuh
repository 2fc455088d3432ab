// Votes to ranks to labels: the tables of one row of votes in shared memory, for the label and the
// loss kernels. ../label.h has the maths between counts and masses.
#pragma once

#include "device.cuh"
#include "tuning.h"

namespace zipfls::cuda {

// The tables of a row -----------------------------------------------------------------------------

constexpr int32_t kEmpty = -1;  // key of a free slot

/// A row's votes, counted. All is integer but the label, so that the result does not depend on the
/// order of the threads; the order of `voted` does, and no sum uses it.
template <class A>
struct VoteTables {
  int32_t* counts;  // (slots,) int32: votes of the class in a slot; all 0 between rows
  int32_t* keys;  // (slots,) int32: the class in a slot, or kEmpty between rows; null: slot = class
  int32_t*
      at_least;  // (P + 2,) int32: [n] classes with n votes or more, n >= 1; all 0 between rows
  int32_t*
      voted;  // (min(P, C),) int32: slots of the K = at_least[1] classes with a vote, in any order
  A* label;   // (P + 1,) A: label of a non-target class with n votes
  A* patch;   // (min(P, C),) A: gradient at voted[k]; null where no gradient is wanted
  int32_t slots, hash_shift;

  /// The tables of P votes over C classes; on the host, without memory, their bytes.
  ZIPFLS_HOST_DEVICE static VoteTables allocate(SmemAllocator& smem, int32_t P, int32_t C,
                                                bool patches) {
    VoteTables t;
    t.hash_shift = 32;
    if (C <= kDirectClasses) {
      t.slots = C;
    } else {
      t.slots = 1;
      while (t.slots < kSlotsPerVote * P) {
        t.slots *= 2;
        t.hash_shift--;
      }
    }
    const uint32_t distinct = static_cast<uint32_t>(P < C ? P : C);
    t.counts = smem.allocate<int32_t>(P > 0 ? t.slots : 0);
    t.keys = smem.allocate<int32_t>(C <= kDirectClasses || P == 0 ? 0 : t.slots);
    t.at_least = smem.allocate<int32_t>(P + 2);
    t.voted = smem.allocate<int32_t>(distinct);
    t.label = smem.allocate<A>(P + 1);
    t.patch = smem.allocate<A>(patches ? distinct : 0);
    if (C <= kDirectClasses) t.keys = nullptr;
    if (!patches) t.patch = nullptr;
    return t;
  }

  ZIPFLS_DEVICE int32_t first_slot(int32_t c) const {
    // Fibonacci hashing: the high bits of c times 2^32 / golden ratio. A shift by 32 would be
    // undefined.
    return hash_shift == 32
               ? 0
               : static_cast<int32_t>((static_cast<uint32_t>(c) * 0x9e3779b9u) >> hash_shift);
  }
  ZIPFLS_DEVICE int32_t next_slot(int32_t slot) const { return (slot + 1) & (slots - 1); }

  /// The slot of class c, which becomes c's if it was free. Linear probing; at most half of the
  /// slots fill.
  ZIPFLS_DEVICE int32_t claim(int32_t c) const {
    if (keys == nullptr) return c;
    for (int32_t slot = first_slot(c);; slot = next_slot(slot)) {
      const int32_t before = atomicCAS(&keys[slot], kEmpty, c);
      if (before == kEmpty || before == c) return slot;
    }
  }
  /// The class in a slot.
  ZIPFLS_DEVICE int32_t class_of(int32_t slot) const { return keys == nullptr ? slot : keys[slot]; }
  /// Votes of class c.
  ZIPFLS_DEVICE int32_t votes_for(int32_t c) const {
    if (keys == nullptr) return counts[c];
    for (int32_t slot = first_slot(c);; slot = next_slot(slot)) {
      const int32_t key = keys[slot];
      if (key == c) return counts[slot];
      if (key == kEmpty) return 0;
    }
  }
};

/// Empties the tables once, before the first row; the caller's barrier publishes it.
template <class Group, class A>
ZIPFLS_DEVICE void clear_tables(const VoteTables<A>& t, int32_t P) {
  if (P == 0) {
#pragma unroll 1
    for (int32_t n = Group::lane(); n < 2; n += Group::size()) t.at_least[n] = 0;
    return;
  }
#pragma unroll 1
  for (int32_t s = Group::lane(); s < t.slots; s += Group::size()) {
    t.counts[s] = 0;
    if (t.keys != nullptr) t.keys[s] = kEmpty;
  }
#pragma unroll 1
  for (int32_t n = Group::lane(); n < P + 2; n += Group::size()) t.at_least[n] = 0;
}

constexpr int32_t kNoVote = -1, kBadVote = -2;

/// Vote p of row i: a class, kNoVote if it is negative, kBadVote if it is C or more.
ZIPFLS_DEVICE int32_t load_vote(const Votes& votes, int64_t i, int32_t p, int32_t C) {
  const int64_t at = i * votes.stride + p;
  const int64_t c = votes.wide ? static_cast<const int64_t*>(votes.data)[at]
                               : static_cast<const int32_t*>(votes.data)[at];
  return c < 0 ? kNoVote : c >= C ? kBadVote : static_cast<int32_t>(c);
}

/// Counts row i's votes into empty tables. Returns whether this thread read a vote outside the
/// classes.
///
/// at_least grows while counting: the n-th vote of a class adds one to at_least[n], so that ranks
/// need no scan over the counts. A class's first vote takes its index in `voted` from at_least[1].
template <class Group, class A>
ZIPFLS_DEVICE bool count_votes(const Votes& votes, int64_t i, int32_t C, const VoteTables<A>& t) {
  bool bad = false;
#pragma unroll 1
  for (int32_t p = Group::lane(); p < votes.P; p += Group::size()) {
    const int32_t c = load_vote(votes, i, p, C);
    bad |= c == kBadVote;
    if (c < 0) continue;
    const int32_t slot = t.claim(c);
    const int32_t n = atomicAdd(&t.counts[slot], 1) + 1;
    const int32_t before = atomicAdd(&t.at_least[n], 1);
    if (n == 1) t.voted[before] = slot;
  }
  return bad;
}

/// Whether this thread's votes of row i include one outside the classes.
template <class Group>
ZIPFLS_DEVICE bool check_votes(const Votes& votes, int64_t i, int32_t C) {
  bool bad = false;
#pragma unroll 1
  for (int32_t p = Group::lane(); p < votes.P; p += Group::size())
    bad |= load_vote(votes, i, p, C) == kBadVote;
  return bad;
}

/// Empties the tables again, in O(K + highest count), for threads that a barrier by the caller
/// orders. K: at_least[1], read before the last barrier. A loop over voted[k] with this stride may
/// precede without a barrier: the same thread then reads and clears each entry.
template <class Group, class A>
ZIPFLS_DEVICE void forget_votes(const VoteTables<A>& t, int32_t P, int32_t K) {
#pragma unroll 1
  for (int32_t k = Group::lane(); k < K; k += Group::size()) {
    const int32_t slot = t.voted[k];
    t.counts[slot] = 0;
    if (t.keys != nullptr) t.keys[slot] = kEmpty;
  }
  // at_least does not grow with n: a thread's first zero ends its share.
#pragma unroll 1
  for (int32_t n = 1 + Group::lane(); n <= P && t.at_least[n] != 0; n += Group::size())
    t.at_least[n] = 0;
}

/// Labels by number of votes: t.label[n] = p~ of a labelled class with n votes, 0 where there is
/// none. Returns sum_c p~_c log p~_c. By the row's leading lanes, after a barrier; readers need
/// another.
///
/// log_mass: (R,) A by rank. members_of(n): number of labelled classes with n votes.
template <class Group, class A, class MembersOf>
ZIPFLS_DEVICE A label_members(const VoteTables<A>& t, int32_t P, const A* log_mass,
                              MembersOf members_of) {
  constexpr int kLanes = Group::kLeaders;
  const int32_t lane = Group::lane();
  // The loops stop at the first count that no class reached: from there on at_least is zero. Each
  // lane reads back its own entries of label alone, without a barrier.
  auto occurs = [&](int32_t n) { return n <= P && (n == 0 || t.at_least[n] != 0); };

  A largest = -infinity<A>();
#pragma unroll 1
  for (int32_t n = lane; occurs(n); n += kLanes) {
    if (members_of(n) == 0) continue;  // a rank without a class may be past the end of the table
    const A mass = log_mass_of_rank(log_mass, rank_below(t.at_least[n + 1]));
    t.label[n] = mass;
    largest = larger(largest, mass);
  }
  largest = warp_reduce_max<kLanes>(largest);

  MassSums<A> sums;
#pragma unroll 1
  for (int32_t n = lane; occurs(n); n += kLanes) {
    const int32_t members = members_of(n);
    if (members == 0) {
      t.label[n] = 0;
      continue;
    }
    const A relative = relative_log_mass(t.label[n], largest), mass = exp_of(relative);
    sums.add(members, mass, relative);
    t.label[n] = mass;
  }
  sums.mass = warp_reduce_sum<kLanes>(sums.mass);
  sums.entropy = warp_reduce_sum<kLanes>(sums.entropy);
  const A normaliser = sums.normaliser();
#pragma unroll 1
  for (int32_t n = lane; occurs(n); n += kLanes) t.label[n] *= normaliser;
  return sums.entropy * normaliser - log_of(sums.mass);
}

/// label_members of all classes but the target y.
template <class Group, class A>
ZIPFLS_DEVICE A label_counts(const VoteTables<A>& t, int32_t P, int32_t C, int32_t y,
                             const A* log_mass) {
  const int32_t K = t.at_least[1], n_target = P == 0 ? 0 : t.votes_for(y);
  return label_members<Group>(t, P, log_mass, [&](int32_t n) {
    return n == 0 ? members_unvoted(C, K, n_target)
                  : members_of_count(n, t.at_least[n] - t.at_least[n + 1], n_target);
  });
}

}  // namespace zipfls::cuda
