// From a warp's best pairs to votes. Where the classes of a position are split, each part leaves
// its pair in device memory, and whichever warp comes last with one for a group of positions folds
// them.
//
// Bytes moved: 8 written and 8 read per position and part, through L2; 4 written per position; one
// atomic per part and group of positions (the 16 or 32 that a warp has). Rows lie next to each
// other, so that a warp reads whole lines: part s of row r is at pairs[s * rows + r].
//
// Why the product's kernel does this, and neither one of its own nor the loss's: a launch costs
// more than the fold, which here runs beside other tiles' products; the loss would read every pair
// twice (for its label too), where few lanes of a row wait for them, and spills with it in; and
// votes are votes for every caller. The dense path is two launches in all, votes and loss. (In a
// captured graph each also clears its counters: arrivals.h.)
//
// Hazards
//   Pairs stored by one warp -> read by another, of any block: all lanes store, warp_sync, then
//     lane 0 counts the warp in with release; the last one to come has seen every count, fences,
//     and reads from L2. Nobody waits for anybody.
//   Counters are 0 before a launch, and again after: the last arrival wraps them.
//   Which warp folds is not determined; what it finds is, by `better`.
#pragma once

#include "vote_tiles.cuh"
#ifdef __CUDACC__
#include "vote_ptx.cuh"
#endif  // elsewhere the includer has its own ptx::

namespace zipfls::cuda::vote {

/// Where the votes go, and the pairs on their way to them.
struct Results {
  int32_t* votes;
  RowMap map;
  int64_t rows;        // of the product; upsampling: votes
  int32_t splits;      // parts of the classes; 1: nothing is folded, what follows is unused
  Best* pairs;         // (splits, rows)
  uint32_t* arrivals;  // a counter for each group of rows
};

ZIPFLS_VOTE_DEVICE void put_vote(const Results& results, int64_t row, int32_t vote) {
  const int64_t at = results.map.vote_of(row);
  if (at >= 0) results.votes[at] = vote;
}

/// The best pair of a row among the classes of one part.
ZIPFLS_VOTE_DEVICE void put_best(const Results& results, int32_t split, int64_t row, Best best) {
  if (results.splits == 1) {
    put_vote(results, row, best.index);
  } else {
    ptx::store_pair(results.pairs + split * results.rows + row, best);
  }
}

/// The warp has put what it has for a group of rows: counts it in. For came_last, of all its lanes.
ZIPFLS_VOTE_DEVICE uint32_t count_in(const Results& results, int64_t group, int lane) {
  ptx::warp_sync();
  return lane == 0 ? ptx::count_release(results.arrivals + group,
                                        static_cast<uint32_t>(results.splits) - 1)
                   : 0;
}

/// Whether all other parts' pairs of the group are there to be read. All lanes.
ZIPFLS_VOTE_DEVICE bool came_last(const Results& results, uint32_t arrived) {
  const bool last = ptx::shuffle(arrived, 0) == static_cast<uint32_t>(results.splits) - 1;
  if (last) ptx::acquire();
  return last;
}

/// Best pair of a row among parts first, first + step, ...
ZIPFLS_VOTE_DEVICE Best fold(const Results& results, int64_t row, int32_t first, int32_t step) {
  Best best = nothing();
#pragma unroll 4
  for (int32_t s = first; s < results.splits; s += step)
    best = better(best, ptx::load_pair(results.pairs + s * results.rows + row));
  return best;
}

/// Votes of 16 rows, by a warp: two lanes a row.
ZIPFLS_VOTE_DEVICE void fold_sixteen(const Results& results, int64_t first_row, int lane) {
  const int64_t row = first_row + lane % 16;
  Best best = row < results.rows ? fold(results, row, lane / 16, 2) : nothing();
  best = better(best, {ptx::shuffle_xor(best.score, 16), ptx::shuffle_xor(best.index, 16)});
  if (lane < 16 && row < results.rows) put_vote(results, row, best.index);
}

}  // namespace zipfls::cuda::vote
