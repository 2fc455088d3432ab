// Every launch constant, with its reason.
//
// The reasons are arithmetic and compiled code (registers, shared memory, instructions per
// element); a measurement that contradicts one replaces it here.
#pragma once

#include <cstdint>

#include "args.h"

namespace zipfls::cuda {

// Rows --------------------------------------------------------------------------------------------

/// 16-byte vectors of its row that a thread of loss_fwd keeps in registers between the statistics
/// and the gradient, all copied before the first is used: 32 elements (float64: 8), so that a warp
/// has 1024 classes; where 16 lanes have a row 64, where a block has one 80 (float64: 20): what is
/// done once a warp (half of the instructions at 32 elements) then serves as many more. 384 threads
/// a multiprocessor have 60 KB in flight with that, twice what hides the memory's latency.
template <int SIZE, int LANES>  // bytes of an element; of a row, 0 for blocks
constexpr int kHeldVectors = LANES == 0    ? (SIZE == 4 ? 20 : 10)
                             : LANES == 16 ? (SIZE == 4 ? 16 : 8)
                                           : (SIZE == 4 ? 8 : 4);

/// Threads of a block whose rows take a warp or less: four warps, so that the tail of a launch is
/// fine-grained and few warps wait at its end. The blocks resident bound the registers (96 at 5,
/// 128 at 4), as low as the compiled code goes without spilling.
constexpr int kSmallBlock = 128;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kSpillsSooner = 1;  // the compiler needs a few registers more for sm_100
#else
constexpr int kSpillsSooner = 0;
#endif
template <int SIZE, int LANES>
constexpr int kSmallResident = LANES == 16 || SIZE == 8 ? 4 : 5 - kSpillsSooner;
/// Warps for each multiprocessor from which several rows share a warp: with fewer, latency counts.
constexpr int64_t kSharedWarps = 7;

/// Most threads of a block that holds one row: 192 reach C = 15360 at 168 registers a thread, with
/// a second block on the multiprocessor, since one alone cannot load while it stores. Longer rows
/// go to a cluster. The blocks resident bound the registers as above.
constexpr int kWideBlock = 192;
template <int SIZE>
constexpr int kWideResident = SIZE == 8 ? 1 : 2;

/// Threads of a row that is read twice: 16 warps with 32 elements a lane in flight. Its registers
/// leave one block a multiprocessor, so an H200 has 132 rows in flight: 35 of its 50 MB of L2 at C
/// = 131072 in bfloat16, which is what the second reading is to find there.
constexpr int kLongBlock = 512;

/// Fewest 16-byte vectors a thread should have when there are rows enough to fill the device, and
/// when there are not: then latency counts, and more threads a row shorten each phase, up to
/// kIdleBlock of them (a warp for each scheduler), since each warp more has its own part in
/// everything that is done once a warp.
constexpr int kFullDeviceVectors = 10;
constexpr int kIdleDeviceVectors = 1;
constexpr int kIdleBlock = 128;

/// Votes a thread should count at most, when there are too few rows to fill the device.
constexpr int kVotesPerThread = 4;
/// Votes that the first warp of a block counts, two a lane, without barriers of the block; more
/// are counted by all threads.
constexpr int kLeadersVotes = 64;

/// Blocks of a cluster, largest: 8 is the portable limit.
constexpr int kLargestCluster = 8;
/// Vectors of a row a block of a cluster aims at, at most: 160 threads' worth, so that two blocks
/// share a multiprocessor and one cluster's barrier is hidden behind the other's loads. More blocks
/// would count the same votes more often.
constexpr uint32_t kClusterSlice = 1536;

// Votes -------------------------------------------------------------------------------------------

/// Up to so many classes a row's histogram is indexed by the class itself: 4 bytes a class are then
/// at most twice what the row itself takes in shared memory. Above, a hash table of the voted
/// classes.
constexpr int32_t kDirectClasses = 2048;
/// Slots of the hash table for each vote: half full at worst, so a probe or two finds a class.
constexpr int32_t kSlotsPerVote = 2;
/// Most shared memory a row's tables may take; more votes are ranked by the caller, which
/// passes (N, C) masses. Some 2000 votes above kDirectClasses, 5000 below.
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
template <int SIZE>
constexpr int rows_registers(int lanes) {
  return SIZE == 8 || lanes == 0 ? 168 : lanes == 16 ? 128 : 96;
}

// A target or a label that is given class by class ------------------------------------------------

/// 16-byte vectors of logits that a thread of loss_general holds, with their target: 24 registers
/// in 16-bit types. With kGeneralBlock threads rows of up to 4088 such classes are read once.
constexpr int kGeneralVectors = 2;
constexpr int kGeneralBlock = 256;
constexpr int kGeneralResident = 2;  // bounds the registers at 128
/// Threads that a block counts for at least, where the grid is chosen: a multiprocessor holds 32
/// blocks, and as many here.
constexpr int kGeneralLeast = 64;

// A teacher's row for a label ---------------------------------------------------------------------

/// 16-byte vectors of logits that a thread of loss_distill holds, with the teacher's row: 32
/// registers where both rows have one type.
constexpr int kDistillVectors = 4;
/// kFullDeviceVectors of its rows.
constexpr int kDistillFullVectors = 8;
/// Most threads of its blocks: 640 reach C = 10240 in float32, 512 reach 16384 in 16-bit types;
/// longer rows are read twice. They bound the registers, at 96 and 128, as low as the compiled code
/// goes without spilling.
template <class T>
constexpr int kDistillBlock = sizeof(T) == 2   ? 512
                              : sizeof(T) == 4 ? 640
                                               : 256;
template <class T>
constexpr int kDistillRegisters = sizeof(T) == 4 ? 96 : 128;

// Backward, labels --------------------------------------------------------------------------------

/// Elements a warp of loss_bwd takes at a time: 32 lanes, 4 vectors of 16-bit elements.
constexpr int64_t kScaleChunk = 1024;
constexpr int kScaleBlock = 256;

/// What is kept of a row for its gradient over the logits: keep_factors.
constexpr int kFactors = 4;
/// Vectors that a lane of loss_factors_bwd takes at a time.
template <class T>
constexpr int kFactorVectors = sizeof(T) == 8 ? 2 : 8;

/// Threads of a row of rank_fwd, label_fwd and loss_correct.
constexpr int kLabelBlock = 128;
constexpr int kCorrectBlock = 128;

}  // namespace zipfls::cuda

namespace zipfls::cuda::vote {

// Votes: mma.sync kernel (vote_mma_sm80.cuh)
// ---------------------------------------------------------------------

/// Bytes of a row in one pipeline stage: 32 half-precision or 16 float32 channels, two instructions
/// deep. With twice as many, one block instead of two would fit a multiprocessor.
constexpr int kMmaRowBytes = 64;

/// Stages in flight. 128 x 128 tiles: 4 * 16 KB = 64 KB a block, so that two blocks share the 164
/// KB of an sm_80 and one fits the 100 KB of sm_86, sm_89 and sm_120. With 3 loads ahead, 24 KB per
/// block are pending: at 47 bytes a clock and multiprocessor from L2 that covers 1000 clocks
/// of latency for two blocks.
constexpr int kMmaStages = 4;

/// 128 x 128 tiles by 4 warps of 64 x 64: per 16 channels a warp reads 4 KB of fragments for 32
/// instructions (256 clocks of the tensor core), half of what shared memory delivers in that time;
/// 64 x 32 would need 75 %. 128 accumulators a thread; two blocks a multiprocessor, so that one
/// block's argmax (16 * 3.8 / D of the main loop: 12 % at D = 512, 3 % at 2048) runs beside the
/// other's product.
constexpr int kTileM = 128, kTileN = 128, kWarpsM = 2, kWarpsN = 2;
constexpr int kBlocksPerMultiprocessor = 2;

/// 64 x 128 tiles where 128 rows would leave multiprocessors idle.
constexpr int kSmallTileM = 64;

/// Upsampling: the scores of a tile pass through shared memory. Whole small maps in 64 positions x
/// 128 classes (36 KB of scores beside 48 KB of stages), patches of larger ones in 128 x 64 (36 KB
/// beside 48 KB): either fits the 99 KB a block may have anywhere. 8 warps of 32 x 32, because
/// interpolation and argmax (about 40 instructions per position and class) outweigh the product
/// there. At 64 positions and C = 100, 4 threads a position: 25 classes * 40 * 8 warps / 4
/// schedulers = 2000 clocks, 1.2 us.
constexpr int kSmallMapTileM = 64, kSmallMapTileN = 128;
constexpr int kPatchTileM = 128, kPatchTileN = 64;
constexpr int kUpsampleWarps = 8;

/// Splits of the classes at most, and so pairs of a position: 8
/// bytes each, 3.9 MB for 12544 positions. 10000 classes are 79 tiles of 128: 2 a block, 40 pairs.
constexpr int kMaxSplits = 40;

// Votes: wgmma kernel (vote_wgmma_sm90.cuh)
// ------------------------------------------------------------------------

/// 128 bytes of a row a stage: the widest swizzle of TMA, four instructions deep.
constexpr int kTmaRowBytes = 128;

/// Rows of a tile: 64 for each of two consumer warpgroups, the M of one wgmma.
constexpr int kWgmmaTileM = 128;

/// Classes of a tile: 256, the widest wgmma (128 accumulators a thread). A stage is 16 + 32 KB and
/// lasts 1024 clocks of the tensor cores; two blocks of a cluster share the classes' half by
/// multicast, so that L2 delivers 32 bytes a clock and multiprocessor instead of 48 (all that an
/// H100's L2 is reported to give: 5.5 to 7 TB/s is 26 to 32). 128 x 128 tiles in ping-pong would
/// hide the argmax completely, but ask 48 of L2 even with multicast; the stagger below hides it
/// without that.
constexpr int kWideTileN = 256, kWideCluster = 2, kWideStages = 4;  // 4 * 48 KB = 192 KB of 227

/// 128 classes and no cluster where there are few classes or few tiles: 8192 x 100 is 64 blocks.
constexpr int kNarrowTileN = 128, kNarrowCluster = 1, kNarrowStages = 6;  // 6 * 32 KB = 192 KB

/// Cost of a narrow tile relative to half a wide one (more bytes from L2 for the same product),
/// where waves of wide tiles are badly filled: 128 x 49 positions and 1000 classes are 1.5 waves.
constexpr double kNarrowPenalty = 1.35;

/// Stages by which the second consumer warpgroup follows the first: during one's argmax (128 scores
/// a thread, 3.8 instructions each, about 650 clocks with latencies) the other has 2 * 512 clocks
/// of products of its own tile left, and the tensor cores stay busy. Below the number of stages.
constexpr int kStagger = 2;

/// Registers a thread after setmaxnreg: 40 * 128 + 232 * 256 = 64512 of 65536. With 24 the
/// producer's 64-bit tile arithmetic spilled.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

/// Bytes of features that stay in L2 while the classes are read: tiles are visited in groups of
/// rows of about this size. 16 MB at D = 2048 are 16 clusters' rows; for 10000 classes the weights
/// (41 MB) are then read three times instead of once per 256 rows: 170 MB, 40 us of memory time
/// beside 650 us of product.
constexpr int64_t kGroupBytes = int64_t{16} << 20;

/// With fewer tiles of 128 x 128 than this the mma.sync kernel with 64 rows a block serves.
constexpr int64_t kMinWgmmaTiles = 33;

// Votes: layouts
// -----------------------------------------------------------------------------------------

/// NCHW maps that 16-byte copies can read (positions a multiple of 8) are read MN-major by mma.sync
/// up to this many classes. Beyond, packing (4 bytes moved per element at 4 TB/s: 1e-12 s) plus
/// wgmma (C * 2.5e-15 s) beats mma.sync at 60 % of its rate (C * 4.2e-15 s).
constexpr int64_t kMNMajorMaxClasses = 512;

/// Bytes of features that are packed at a time: bounds the scratch whatever the batch.
constexpr int64_t kPackBytes = int64_t{64} << 20;

/// A slice of longer images is computed in place where at most 1/4 of the rows are in between.
constexpr int64_t kPitchSlack = 4;

}  // namespace zipfls::cuda::vote
