// The pair (best score, its class), how pairs are compared, and the fold of a position's pairs into
// its vote.
//
// The one source of the vote's rules: among equal computed scores the lowest class; a NaN score
// never wins; minus infinity may; class -1 where every score is NaN. Plain C++ that both nvcc and a
// host compiler take.
//
// Pairs of range s of the classes lie at partials[s * rows + row]: rows next to each other, so that
// the threads of a warp, one position each, read 256 contiguous bytes per range. The fold reads
// every pair once (8 bytes) and writes 4 bytes a position; it has no shared memory, no atomics, and
// one order of comparison, which the rules make irrelevant anyway: `better` is associative and
// commutative.
//
// A launch of its own, and not the loss's first step: its bytes are small beside the product's, and
// the loss would read those pairs once more for its label, where a row's few leading lanes wait for
// them; the loss kernels, compiled to just below their bound of registers, spill with it in; and
// "votes" would mean two things on the way through every caller. Where one tile holds all classes
// there is nothing to fold, and no such launch.
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

  ZIPFLS_HOST_DEVICE int64_t row_of(int64_t vote) const {
    return pitch == positions ? vote : vote / positions * pitch + vote % positions;
  }
  /// Index of a row's vote, -1 for a row in between.
  ZIPFLS_HOST_DEVICE int64_t vote_of(int64_t row) const {
    if (pitch == positions) return row;
    const int64_t p = row % pitch;
    return p < positions ? row / pitch * positions + p : -1;
  }
};

/// The pairs of all positions: (splits, rows) Best.
struct Partials {
  const Best* pairs;
  int64_t rows;
  int32_t splits;
  RowMap map;
};

/// The vote with a given index.
ZIPFLS_HOST_DEVICE int32_t fold_vote(const Partials& partials, int64_t vote) {
  const Best* pair = partials.pairs + partials.map.row_of(vote);
  Best best = *pair;
  for (int32_t s = 1; s < partials.splits; s++) {
    pair += partials.rows;
    best = better(best, *pair);
  }
  return best.index;
}

}  // namespace zipfls::cuda::vote
