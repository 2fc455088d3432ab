// Votes to ranks to labels: the tables of one row of votes in shared memory, for the label and the
// loss kernels. ../label.h has the maths between counts and masses.
#pragma once

#include "device.cuh"
#include "tuning.h"

namespace zipfls::cuda {

// The tables of a row -----------------------------------------------------------------------------

constexpr int32_t kEmpty = -1;          // key of a free slot
constexpr int32_t kNotFirst = 1 << 30;  // bit of VoteTables::slot_of_vote; slots are fewer

/// A row's votes, counted. All is integer but the label, so that the result does not depend on the
/// order of the threads; which of a class's votes is its first does, and no sum uses that.
template <class A>
struct VoteTables {
  int32_t* counts;    // (slots,) int32: votes of the class in a slot; all 0 between rows
  int32_t* at_least;  // (P + 2,) int32 behind it: [n] classes with n votes or more, n >= 1; all 0
                      // between rows
  int32_t* keys;      // (slots,) int32 where hashed: the class in a slot, or kEmpty between rows
  int32_t* slot_of_vote;  // (P,) int32: of its class, with kNotFirst for all votes of a class but
                          // one; negative for a vote that is none
  A* label;               // (P + 1,) A: label of a non-target class with n votes
  A* patch;               // (P,) A where a gradient is wanted: that at the class of a first vote
  int32_t slots, hash_shift;
  bool hashed;  // otherwise slot = class

  /// The tables of P votes over C classes; on the host, without memory, their bytes.
  ZIPFLS_HOST_DEVICE static VoteTables allocate(SmemAllocator& smem, int32_t P, int32_t C,
                                                bool patches) {
    VoteTables t;
    t.hash_shift = 32;
    t.hashed = C > kDirectClasses;
    if (!t.hashed) {
      t.slots = C;
    } else {
      t.slots = 1;
      while (t.slots < kSlotsPerVote * P) {
        t.slots *= 2;
        t.hash_shift--;
      }
    }
    if (P == 0) t.slots = 0;
    smem.keep();
    t.counts = smem.allocate<int32_t>(t.zeros(P));
    t.at_least = t.counts + t.slots;
    t.keys = smem.allocate<int32_t>(t.hashed ? t.slots : 0);
    smem.keep();
    t.slot_of_vote = smem.allocate<int32_t>(P);
    smem.keep();
    t.label = smem.allocate<A>(P + 1);
    smem.keep();
    t.patch = smem.allocate<A>(patches ? P : 0);
    return t;
  }
  /// Elements of counts and at_least, to whole 16 bytes.
  ZIPFLS_HOST_DEVICE uint32_t zeros(int32_t P) const {
    return static_cast<uint32_t>(slots + P + 2 + 3) / 4 * 4;
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
    if (!hashed) return c;
    for (int32_t slot = first_slot(c);; slot = next_slot(slot)) {
      const int32_t before = atomicCAS(&keys[slot], kEmpty, c);
      if (before == kEmpty || before == c) return slot;
    }
  }
  /// The class in a slot.
  ZIPFLS_DEVICE int32_t class_of(int32_t slot) const { return hashed ? keys[slot] : slot; }
  /// Votes of class c.
  ZIPFLS_DEVICE int32_t votes_for(int32_t c) const {
    if (!hashed) return counts[c];
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
#pragma unroll 4
  for (uint32_t q = Group::lane(); q < t.zeros(P) / 4; q += Group::size())
    reinterpret_cast<uint4*>(t.counts)[q] = {0, 0, 0, 0};
  if (!t.hashed) return;
#pragma unroll 1
  for (int32_t s = Group::lane(); s < t.slots; s += Group::size()) t.keys[s] = kEmpty;
}

/// Vote p of row i: a class, negative where there is no vote, C or more where it is none of C
/// classes.
ZIPFLS_DEVICE int32_t load_vote(const Votes& votes, int64_t i, int32_t p, int32_t C) {
  const int64_t at = i * votes.stride + p;
  if (!votes.wide) return static_cast<const int32_t*>(votes.data)[at];
  const int64_t c = static_cast<const int64_t*>(votes.data)[at];
  return static_cast<int32_t>(c < 0 ? -1 : c < C ? c : C);
}

/// Counts row i's votes into empty tables. Returns whether this thread read a vote outside the
/// classes.
///
/// at_least grows while counting: the n-th vote of a class adds one to at_least[n], so that ranks
/// need no scan over the counts.
template <class Group, class A>
ZIPFLS_DEVICE bool count_votes(const Votes& votes, int64_t i, int32_t C, const VoteTables<A>& t) {
  int32_t most = -1;  // class
  const int32_t* const narrow =
      ptx::keep(static_cast<const int32_t*>(votes.data) + i * votes.stride);
#pragma unroll 1
  for (int32_t p = Group::lane(); p < votes.P; p += Group::size()) {
    const int32_t c = votes.wide ? load_vote(votes, i, p, C) : narrow[p];
    most = c > most ? c : most;
    int32_t entry = -1;
    if (static_cast<uint32_t>(c) < static_cast<uint32_t>(C)) {
      const int32_t slot = t.claim(c), n = atomicAdd(&t.counts[slot], 1) + 1;
      atomicAdd(&t.at_least[n], 1);
      entry = n == 1 ? slot : slot | kNotFirst;
    }
    t.slot_of_vote[p] = entry;
  }
  return most >= C;
}

/// Calls visit(p, class, its number of votes, whether p is the class's first vote) for the counted
/// votes p of this lane, after a barrier. P: 0 where none were counted.
template <class Group, class A, class Visit>
ZIPFLS_DEVICE void for_votes(const VoteTables<A>& t, int32_t P, Visit visit) {
#pragma unroll 1
  for (int32_t p = Group::lane(); p < P; p += Group::size()) {
    const int32_t entry = t.slot_of_vote[p], slot = entry & ~kNotFirst;
    if (entry >= 0) visit(p, t.class_of(slot), t.counts[slot], entry < kNotFirst);
  }
}

/// Whether this thread's votes of row i include one outside the classes.
template <class Group>
ZIPFLS_DEVICE bool check_votes(const Votes& votes, int64_t i, int32_t C) {
  bool bad = false;
#pragma unroll 1
  for (int32_t p = Group::lane(); p < votes.P; p += Group::size())
    bad |= load_vote(votes, i, p, C) >= C;
  return bad;
}

/// Empties the tables again, in O(P), after visit(p, class) for each class with a vote, p its first
/// one. By threads that the caller's barriers order.
template <class Group, class A, class Visit>
ZIPFLS_DEVICE void forget_votes(const VoteTables<A>& t, int32_t P, Visit visit) {
#pragma unroll 1
  for (int32_t p = Group::lane(); p < P; p += Group::size()) {
    t.at_least[p + 1] = 0;
    const int32_t slot = t.slot_of_vote[p];
    if (static_cast<uint32_t>(slot) >= static_cast<uint32_t>(kNotFirst)) continue;
    visit(p, t.class_of(slot));
    t.counts[slot] = 0;
    if (t.hashed) t.keys[slot] = kEmpty;
  }
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
  A largest = -infinity<A>();
  int32_t end = lane;
#pragma unroll 1
  for (int32_t n = lane; n <= P && (n == 0 || t.at_least[n] != 0); n += kLanes) {
    end = n + kLanes;
    if (members_of(n) == 0) continue;  // a rank without a class may be past the end of the table
    const A mass = log_mass_of_rank(log_mass, rank_below(t.at_least[n + 1]));
    t.label[n] = mass;
    largest = larger(largest, mass);
  }
  largest = warp_reduce_max<kLanes>(largest);

  MassSums<A> sums;
#pragma unroll 1
  for (int32_t n = lane; n < end; n += kLanes) {
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
  for (int32_t n = lane; n < end; n += kLanes) t.label[n] *= normaliser;
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
