// From vote counts to soft label: counts -> ranks -> label masses (MATH.md steps 2 and 3).
//
// The one source of this maths for the CPU and the CUDA kernels. Scalar functions without memory of
// their own: each backend brings its own histogram, its own loop over the counts and its own exp.
//
// The label of a class depends on its number of votes n only, so a row needs no more of its votes
// than the counts of counts: for every n that occurs, how many classes have n votes.
//   above    number of classes, the target included, with more than n votes: all K voted classes
//   for n = 0,
//            and from there on as many fewer as have exactly the next n;
//   members  number of non-target classes with exactly n votes.
// A class with n votes ranks 1 + above, its log mass is the table's entry for that rank, and its
// label is that mass over the sum of the masses of all non-target classes.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define ZIPFLS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ZIPFLS_HOST_DEVICE inline __attribute__((always_inline))
#endif

// The namespace. Each instruction set of the CPU backend compiles its own copy under its own name
// (why: cpu/simd.h); CUDA code defines it as cuda.
#ifndef ZIPFLS_ISA
#define ZIPFLS_ISA portable
#endif

namespace zipfls::ZIPFLS_ISA {

/// Competition rank, from 1, of a class that `above` classes have more votes than.
ZIPFLS_HOST_DEVICE int32_t rank_below(int32_t above) { return 1 + above; }

/// Log mass of a rank; log_mass: (R,) by rank from 1.
template <class A>
ZIPFLS_HOST_DEVICE A log_mass_of_rank(const A* log_mass, int32_t rank) {
  return log_mass[rank - 1];
}

/// Number of non-target classes with exactly n >= 1 votes, of `classes` such classes in all.
ZIPFLS_HOST_DEVICE int32_t members_of_count(int32_t n, int32_t classes, int32_t n_target) {
  return classes - (n == n_target ? 1 : 0);
}

/// Number of non-target classes without a vote, of C classes with `voted` voted ones.
ZIPFLS_HOST_DEVICE int32_t members_unvoted(int32_t C, int32_t voted, int32_t n_target) {
  return C - voted - (n_target == 0 ? 1 : 0);
}

/// Log mass relative to the largest one among the non-target classes: 0 at most. Masses that
/// underflow by themselves (alpha = 150) stay apart this way. A row without any mass is uniform: 0
/// for all.
template <class A>
ZIPFLS_HOST_DEVICE A relative_log_mass(A log_mass, A largest) {
  return largest == -static_cast<A>(INFINITY) ? A(0) : log_mass - largest;
}

/// What normalises a row's label: sums over the non-target classes, in units of the largest mass.
template <class Sum>
struct MassSums {
  Sum mass = 0;     // sum of mass
  Sum entropy = 0;  // sum of mass * log mass

  /// `members` classes with mass = exp(relative) each. No class or no mass: skipped, not
  /// multiplied, since 0 * log 0 is NaN.
  template <class A>
  ZIPFLS_HOST_DEVICE void add(int32_t members, A mass_, A relative) {
    if (members == 0 || mass_ == A(0)) return;
    const Sum together = Sum(members) * Sum(mass_);
    mass += together;
    entropy += together * Sum(relative);
  }

  /// p~ = mass * normaliser().
  ZIPFLS_HOST_DEVICE Sum normaliser() const { return Sum(1) / mass; }
};

}  // namespace zipfls::ZIPFLS_ISA
