// Launch constants, each with its reason, and the choice of kernel and launch from a call's shape.
//
// None of them has been measured yet: they come from the arithmetic beside them and from the
// compiled code (registers, shared memory, instructions per element). A measurement that overrules
// one belongs here.
#pragma once

#include <cstdint>

#include "args.h"

namespace zipfls::cuda {

// Rows --------------------------------------------------------------------------------------------

/// 16-byte vectors of its row that a thread of loss_fwd keeps in registers between the statistics
/// and the gradient: 64 bytes, all sent for before the first is used. 1024 threads a multiprocessor
/// have 64 KB in flight with that, twice what hides the memory's latency.
constexpr int kHeldVectors = 4;

/// Threads of a block whose rows take a warp or less: four warps, so that the tail of a launch is
/// fine-grained and few warps wait for the slowest at the end. The blocks resident bound the
/// registers (96 at 5, 80 at 6, 128 at 4), as low as the compiled code goes without spilling.
constexpr int kSmallBlock = 128;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kSpillsSooner = 1;  // the compiler needs a few registers more for sm_100
#else
constexpr int kSpillsSooner = 0;
#endif
template <class T>
constexpr int kSmallResident = (sizeof(T) == 2   ? 5
                                : sizeof(T) == 4 ? 6
                                                 : 4) -
                               kSpillsSooner;

/// Most threads of a block that holds one row: 320 reach C = 10240 in 16-bit types at 96 registers
/// a thread, with a second block on the multiprocessor, since one alone cannot load while it
/// stores. Longer rows go to a cluster. The blocks resident bound the registers as above.
constexpr int kWideBlock = 320;
template <class T>
constexpr int kWideResident = sizeof(T) == 2   ? 2
                              : sizeof(T) == 4 ? 3 - kSpillsSooner
                                               : 1;

/// Threads of a row that is read twice: 16 warps with 4 vectors in flight each. Its registers leave
/// one block a multiprocessor, so an H200 has 132 rows in flight: 35 of its 50 MB of L2 at C =
/// 131072 in bfloat16, which is what the second reading is to find there.
constexpr int kLongBlock = 512;

/// Fewest 16-byte vectors a thread should have when there are rows enough to fill the device, and
/// when there are not (then latency counts, and more threads a row shorten each phase).
constexpr int kFullDeviceVectors = 4;
constexpr int kIdleDeviceVectors = 1;

/// Votes a thread should count at most, when there are too few rows to fill the device.
constexpr int kVotesPerThread = 4;

/// Blocks of a cluster, largest: 8 is the portable limit.
constexpr int kLargestCluster = 8;
/// Vectors of a row a block of a cluster aims at, at most: 192 threads' worth, so that three blocks
/// share a multiprocessor and one cluster's barrier is hidden behind the others' loads.
constexpr uint32_t kClusterSlice = 768;

// Votes -------------------------------------------------------------------------------------------

/// Up to so many classes a row's histogram is indexed by the class itself: 4 bytes a class are then
/// at most twice what the row itself takes in shared memory. Above, a hash table of the voted
/// classes.
constexpr int32_t kDirectClasses = 2048;
/// Slots of the hash table for each vote: half full at worst, so a probe or two finds a class.
constexpr int32_t kSlotsPerVote = 2;
/// Most shared memory a row's tables may take; more votes than that are ranked by the caller, who
/// hands over (N, C) masses. Some 2000 votes above kDirectClasses, 5000 below.
constexpr uint32_t kMostTableBytes = 64 * 1024;

// Denominators and sums ---------------------------------------------------------------------------

/// Rows whose targets every block adds up itself before loss_totals is worth its launch: 8 KB from
/// L2 for each of 256 blocks of four rows, half of what the rows themselves are at C = 1000 in
/// 16-bit types.
constexpr int64_t kScanRows = 1024;
/// Blocks of loss_totals, and threads of one: 64 partial sums, which every block of loss_fwd reads.
constexpr int kTotalsBlocks = 64;
constexpr int kTotalsBlock = 256;

/// What a multiprocessor holds (compute capability 8.0, 9.0 and 10.0), and what each block takes of
/// its shared memory unasked.
constexpr int kThreadsPerMultiprocessor = 2048;
constexpr int kRegistersPerMultiprocessor = 65536;
constexpr int kReservedShared = 1024;
/// Registers of a thread of loss_fwd, as compiled (make kernel-report).
template <class T>
constexpr int kRegisters = sizeof(T) == 2   ? 96
                           : sizeof(T) == 4 ? 80
                                            : 128;

// Targets of probabilities ------------------------------------------------------------------------

/// 16-byte vectors of logits that a thread of soft_loss_fwd holds, with their target: 24 registers
/// in 16-bit types. With kSoftBlock threads rows of up to 4088 such classes are read once.
constexpr int kSoftVectors = 2;
constexpr int kSoftBlock = 256;
constexpr int kSoftResident = 2;  // bounds the registers at 128, which nothing needs
/// Threads that a block counts for at least, where the grid is chosen: a multiprocessor holds 32
/// blocks, and as many here.
constexpr int kSoftLeast = 64;

// Backward, labels --------------------------------------------------------------------------------

/// Elements a warp of loss_bwd takes at a time: 32 lanes, 4 vectors of 16-bit elements.
constexpr int64_t kScaleChunk = 1024;
constexpr int kScaleBlock = 256;

/// Threads of a row of rank_fwd, label_fwd, loss_correct and loss_dense.
constexpr int kLabelBlock = 128;
constexpr int kCorrectBlock = 128;
constexpr int kDenseBlock = 256;
constexpr int kDenseResident = 2;  // bounds the registers at 128, which nothing needs

// The choice --------------------------------------------------------------------------------------

/// What the launchers need to know of a device.
struct Device {
  int multiprocessors;
  int shared_per_block;  // bytes a block may ask for
  bool clusters;         // compute capability 9.0 and up
};

/// Which kernel serves a loss, and its launch.
struct LossPlan {
  enum Kernel { kLanes8, kLanes32, kBlock, kCluster, kLong } kernel;
  int threads;       // of a block
  int cluster;       // blocks a row
  uint32_t vectors;  // 16-byte vectors of shared memory for each row (or slice of a row) of a block
  int64_t groups;    // of rows, one for each pass of a block (or cluster) through its loop
};

inline uint32_t vectors_of(int64_t elements, int vector) {
  // A row that starts in the middle of a vector touches one more.
  return static_cast<uint32_t>((elements + vector - 1 + vector - 1) / vector);
}

inline int round_up(int64_t x, int unit) { return static_cast<int>((x + unit - 1) / unit * unit); }

/// The kernel for N rows of C classes of `vector` elements per 16 bytes, P votes each; table_bytes:
/// shared memory of one row's tables.
inline LossPlan plan_loss(int64_t N, int32_t C, int32_t P, int vector, uint32_t table_bytes,
                          const Device& device) {
  const uint32_t vectors = vectors_of(C, vector);
  const int per_thread = kHeldVectors;
  const int64_t resident = int64_t{device.multiprocessors} * (kThreadsPerMultiprocessor / kWarp);
  const bool full = N * 2 >= resident;  // a warp a row fills at least half of the device
  auto rows_fit = [&](int rows) {
    return rows * (vectors * 16 + table_bytes + 1024) <=
           static_cast<uint32_t>(device.shared_per_block) / 2;
  };
  const bool narrow = vector > 2;  // float64 is for checks: a block a row will do
  if (narrow && full && vectors <= 8u * per_thread && rows_fit(kSmallBlock / 8))
    return {LossPlan::kLanes8, kSmallBlock, 1, vectors,
            (N + kSmallBlock / 8 - 1) / (kSmallBlock / 8)};
  if (narrow && full && vectors <= static_cast<uint32_t>(kWarp * per_thread) &&
      rows_fit(kSmallBlock / 32))
    return {LossPlan::kLanes32, kSmallBlock, 1, vectors,
            (N + kSmallBlock / 32 - 1) / (kSmallBlock / 32)};

  auto threads_for = [&](uint32_t slice_vectors, int most) {
    const int wanted = full ? kFullDeviceVectors : kIdleDeviceVectors;
    const int least = round_up((slice_vectors + per_thread - 1) / per_thread, kWarp);
    int threads = round_up((slice_vectors + wanted - 1) / wanted, kWarp);
    if (!full)
      threads = threads > P / kVotesPerThread ? threads : round_up(P / kVotesPerThread, kWarp);
    threads = threads > most ? most : threads;
    return threads > least ? threads : least;
  };
  auto block_fits = [&](uint32_t slice_vectors, int most) {
    return slice_vectors <= static_cast<uint32_t>(most * per_thread) &&
           slice_vectors * 16 + table_bytes + 4096 <=
               static_cast<uint32_t>(device.shared_per_block);
  };
  if (block_fits(vectors, kWideBlock))
    return {LossPlan::kBlock, threads_for(vectors, kWideBlock), 1, vectors, N};
  if (narrow && device.clusters) {
    for (int size = 2; size <= kLargestCluster; size *= 2) {
      const uint32_t slice = (vectors + size - 1) / size;
      const bool last = size == kLargestCluster;
      if ((slice <= kClusterSlice || last) && block_fits(slice, kWideBlock))
        return {LossPlan::kCluster, threads_for(slice, kWideBlock), size, slice, N};
    }
  }
  return {LossPlan::kLong, kLongBlock, 1, 0, N};
}

}  // namespace zipfls::cuda
