// Every launch constant of the vote kernels, with its reason and what it should bring.
//
// None of it has been measured: no kernel here has run on a GPU yet. Predictions are arithmetic, so
// that the first measurement can contradict them.
#pragma once

#include <cstdint>

namespace zipfls::cuda::vote {

// mma.sync kernel (vote_sm80) ---------------------------------------------------------------------

/// Bytes of a row that one pipeline stage holds: 32 half-precision or 16 float32 channels, two
/// instructions deep. Twice that would leave room for one block on a multiprocessor where now there
/// are two.
constexpr int kStageBytes = 64;

/// Stages in flight. 128 x 128 tiles: 4 * 16 KB = 64 KB a block, so that two blocks share the 164
/// KB of an sm_80 and one fits the 100 KB of sm_86, sm_89 and sm_120. With 3 loads ahead, 24 KB per
/// block are on their way: at 47 bytes a clock and multiprocessor from L2 that covers 1000 clocks
/// of latency for two blocks.
constexpr int kStages = 4;

/// 128 x 128 tiles by 4 warps of 64 x 64: per 16 channels a warp reads 4 KB of fragments for 32
/// instructions (256 clocks of the tensor core), half of what shared memory delivers in that time;
/// 64 x 32 would need 75 %. 128 accumulators a thread; two blocks a multiprocessor, so that one
/// block's argmax (16 * 3.8 / D of the main loop: 12 % at D = 512, 3 % at 2048) runs beside the
/// other's product.
constexpr int kRows = 128, kClasses = 128, kWarpsDown = 2, kWarpsAcross = 2;
constexpr int kBlocksPerMultiprocessor = 2;

/// 64 x 128 tiles where 128 rows would leave multiprocessors without work.
constexpr int kFewRows = 64;

/// Upsampling: the scores of a tile pass through shared memory. Whole small maps in 64 positions x
/// 128 classes (36 KB of scores beside 48 KB of stages), patches of larger ones in 128 x 64 (36 KB
/// beside 48 KB): either fits the 99 KB a block may have anywhere. 8 warps of 32 x 32, because
/// interpolation and argmax (about 40 instructions per position and class) outweigh the product
/// there. At 64 positions and C = 100, 4 threads a position: 25 classes * 40 * 8 warps / 4
/// schedulers = 2000 clocks, 1.2 us.
constexpr int kSmallMapRows = 64, kSmallMapClasses = 128;
constexpr int kPatchRows = 128, kPatchClasses = 64;
constexpr int kUpsampleWarps = 8;

/// Class tiles that one block walks through, so that a position has at most this many pairs: 8
/// bytes each, 3.9 MB for 12544 positions. 10000 classes are 79 tiles of 128: 2 a block, 40 pairs.
constexpr int kMaxSplits = 40;

// wgmma kernel (vote_sm90) ------------------------------------------------------------------------

/// 128 bytes of a row a stage: the widest swizzle of the bulk tensor copy, four instructions deep.
constexpr int kBulkBytes = 128;

/// Rows of a block's tile: 64 for each of two consumer warpgroups, the height of one wgmma.
constexpr int kBulkRows = 128;

/// Classes of a tile: 256, the widest wgmma (128 accumulators a thread). A stage is 16 + 32 KB and
/// lasts 1024 clocks of the tensor cores; two blocks of a cluster share the classes' half by
/// multicast, so that L2 delivers 32 bytes a clock and multiprocessor instead of 48 (all that an
/// H100's L2 is reported to give: 5.5 to 7 TB/s is 26 to 32). 128 x 128 tiles in ping-pong would
/// hide the argmax completely, but ask 48 of L2 even with multicast; the stagger below hides it
/// without that.
constexpr int kWideClasses = 256, kWideCluster = 2, kWideStages = 4;  // 4 * 48 KB = 192 KB of 227

/// 128 classes and no cluster where there are few classes or few tiles: 8192 x 100 is 64 blocks.
constexpr int kNarrowClasses = 128, kNarrowCluster = 1, kNarrowStages = 6;  // 6 * 32 KB = 192 KB

/// What a narrow tile costs, of half a wide one (more bytes from L2 for the same product). Decides
/// between the two where waves of wide tiles are badly filled: 128 x 49 positions and 1000 classes
/// are 1.5 waves.
constexpr double kNarrowPenalty = 1.35;

/// The second consumer warpgroup starts this many stages after the first and stays behind: while
/// one takes its argmax (128 scores a thread, 3.8 instructions each, about 650 clocks with
/// latencies), the other has 2 * 512 clocks of products of its own tile left, and the tensor cores
/// stay busy. Must be below the number of stages.
constexpr int kStagger = 2;

/// Registers a thread after setmaxnreg: 40 * 128 + 232 * 256 = 64512 of 65536. With 24 for the
/// producer its 64-bit tile arithmetic spilled.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

/// Bytes of features that stay in L2 while the classes stream past: tiles are walked in groups of
/// rows of about this size. 16 MB at D = 2048 are 16 clusters' rows; for 10000 classes the weights
/// (41 MB) are then read three times instead of once per 256 rows: 170 MB, 40 us of memory time
/// beside 650 us of product.
constexpr int64_t kGroupBytes = int64_t{16} << 20;

/// Fewer tiles of 128 x 128 than this: the mma.sync kernel with 64 rows a block spreads them wider.
constexpr int64_t kMinBulkTiles = 33;

// Layouts -----------------------------------------------------------------------------------------

/// NCHW maps that 16-byte copies can read (positions a multiple of 8): read as they are by mma.sync
/// up to this many classes. Beyond, packing (4 bytes moved per element at 4 TB/s: 1e-12 s) plus
/// wgmma (C * 2.5e-15 s) beats mma.sync at 60 % of its rate (C * 4.2e-15 s).
constexpr int64_t kPositionMinorClasses = 512;

/// Packed features at a time: the scratch stays bounded whatever the batch.
constexpr int64_t kPackBytes = int64_t{64} << 20;

/// A slice of longer images is computed in place where at most 1/4 of the rows are in between.
constexpr int64_t kPitchSlack = 4;

}  // namespace zipfls::cuda::vote
