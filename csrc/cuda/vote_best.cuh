// The pair (best score, its class), how pairs are compared, and which row of the product a position
// is.
//
// The one source of the vote's rules: among equal computed scores the lowest class; a NaN score
// never wins; minus infinity may; class -1 where every score is NaN. `better` is associative and
// commutative, so pairs may be folded in any order. Plain C++ that both nvcc and a host compiler
// take.
#pragma once

#include <cmath>
#include <cstdint>

#ifndef ZIPFLS_HOST_DEVICE
#ifdef __CUDACC__
#define ZIPFLS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ZIPFLS_HOST_DEVICE inline __attribute__((always_inline))
#endif
#endif

namespace zipfls::cuda::vote {

/// A score and its class; class -1: nothing but NaN so far, and the score means nothing.
struct alignas(8) Best {
  float score;
  int32_t index;
};

ZIPFLS_HOST_DEVICE Best nothing() { return {-INFINITY, -1}; }

ZIPFLS_HOST_DEVICE bool beats(Best challenger, Best holder) {
  if (challenger.index < 0) return false;
  if (holder.index < 0) return true;
  return challenger.score > holder.score ||
         (challenger.score == holder.score && challenger.index < holder.index);
}

ZIPFLS_HOST_DEVICE Best better(Best a, Best b) {
  const bool second = beats(b, a);  // field by field, to stay in registers
  return {second ? b.score : a.score, second ? b.index : a.index};
}

/// How rows of the matrix product and positions correspond: image n's P positions are rows n *
/// pitch .. + P. pitch > P where the tensor is a slice of longer images (tokens without their class
/// token): the rows in between are computed and never looked at.
struct RowMap {
  int64_t positions;  // P
  int64_t pitch;

  /// Index of a row's vote, -1 for a row in between.
  ZIPFLS_HOST_DEVICE int64_t vote_of(int64_t row) const {
    if (pitch == positions) return row;
    const int64_t p = row % pitch;
    return p < positions ? row / pitch * positions + p : -1;
  }
};

}  // namespace zipfls::cuda::vote
