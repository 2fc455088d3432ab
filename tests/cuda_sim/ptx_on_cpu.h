// PTX instructions on the CPU, under the names of csrc/cuda/ptx.cuh: written out from the PTX ISA's
// description of each, independently of the kernels' own index arithmetic.
//
// What is asynchronous on a GPU happens as late, or as early, as the rules allow (Schedule::late):
//   cp.async   the destination is poisoned when the copy starts; the bytes come when the thread
//              waits for its group, or at once;
//   TMA        the same, and late ones come when nothing else can run, or at random;
//   wgmma      operands are read, and accumulators written, when the group is waited for, or at
//   once; st.global.cg of 8 bytes   other threads see them when they are released, or at once.
// Collectives in which the threads disagree, misaligned or outside addresses, and mbarriers that
// overflow are errors.
#pragma once

#include <algorithm>
#include <cmath>

#include "sim.h"

namespace zipfls::cuda {
struct BFloat16;
struct Float16;
struct TensorFloat32;
}  // namespace zipfls::cuda

/// A tensor map: a matrix of rows, boxes of 128 rows by 128 bytes in the 128-byte swizzle.
struct CUtensorMap {
  const char* at;
  int64_t rows, stride, row_bytes;
  int element;  // bytes
};

namespace sim {

template <class Element>
constexpr int kBytes = 2;  // of an operand
template <>
inline constexpr int kBytes<zipfls::cuda::TensorFloat32> = 4;

// Elements as the tensor cores read them ----------------------------------------------------------

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

template <class Element>
float tensor_core_value(const char* at);
template <>
inline float tensor_core_value<zipfls::cuda::BFloat16>(const char* at) {
  uint16_t x;
  std::memcpy(&x, at, 2);
  return bits_to_float(static_cast<uint32_t>(x) << 16);
}
template <>
inline float tensor_core_value<zipfls::cuda::Float16>(const char* at) {
  uint16_t x;
  std::memcpy(&x, at, 2);
  const int exponent = x >> 10 & 31, fraction = x & 1023;
  const float magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                          : exponent == 0
                              ? std::ldexp(static_cast<float>(fraction), -24)
                              : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return x & 0x8000 ? -magnitude : magnitude;
}
template <>
inline float tensor_core_value<zipfls::cuda::TensorFloat32>(const char* at) {
  uint32_t x;
  std::memcpy(&x, at, 4);
  return bits_to_float(x & 0xffffe000u);  // the low 13 bits are not looked at
}

}  // namespace sim

namespace zipfls::cuda::ptx {

using sim::block;
using sim::fail;
using sim::thread;

constexpr uint32_t kSharedBase = 1040;  // of dynamic shared memory; a multiple of 16, as it may be

inline uint32_t shared_address(const void* at) {
  const auto* const p = static_cast<const unsigned char*>(at);
  const sim::BlockState& here = block();
  if (p >= here.shared && p < here.shared + here.shared_bytes)
    return static_cast<uint32_t>(p - here.shared) + kSharedBase;
  if (p >= here.static_shared && p < here.static_shared + here.static_bytes)
    return static_cast<uint32_t>(p - here.static_shared) + kSharedBase + here.shared_bytes;
  fail("not an address of shared memory");
}
inline unsigned char* shared_pointer(sim::BlockState& where, uint32_t address, size_t bytes,
                                     uint32_t alignment) {
  if (address < kSharedBase || address - kSharedBase + bytes > where.shared_bytes)
    fail("outside shared memory");
  if (address % alignment != 0) fail("misaligned shared memory");
  return where.shared + (address - kSharedBase);
}

inline void block_sync(int line = __builtin_LINE()) { __syncthreads(line); }
inline void warp_sync(int line = __builtin_LINE()) { __syncwarp(0xffffffffu, line); }
template <class T>
T shfl(T x, int from, int line = __builtin_LINE()) {
  return __shfl_sync(0xffffffffu, x, from, line);
}
template <class T>
T shfl_xor(T x, int mask, int line = __builtin_LINE()) {
  return __shfl_xor_sync(0xffffffffu, x, mask, line);
}
inline uint32_t cluster_size() { return sim::cluster_blocks(); }
inline uint32_t cluster_rank() { return block().rank; }
inline void cluster_sync(int line = __builtin_LINE()) {
  sim::meet(sim::kOfCluster, "barrier.cluster", line, nullptr, [](void**) {});
}
/// The same place of shared memory in another block of the cluster.
template <class T>
T* mapa(T* mine, uint32_t rank) {
  const sim::BlockState& here = block();
  const sim::BlockState& there = sim::block_of_cluster(rank);
  const auto p = reinterpret_cast<uintptr_t>(mine),
             first = reinterpret_cast<uintptr_t>(here.shared);
  const auto place =
      p >= first && p < first + here.shared_bytes
          ? there.shared + (p - first)
          : there.static_shared + (p - reinterpret_cast<uintptr_t>(here.static_shared));
  return reinterpret_cast<T*>(place);
}
inline void named_barrier_sync(int barrier, int threads, int line = __builtin_LINE()) {
  sim::named_barrier(barrier, threads, line);
}

template <class T>
T keep(T x) {
  return x;
}

template <class T>
T here(T x) {
  return x;
}

inline float ex2_approx_ftz(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}
inline float lg2_approx_ftz(float x) {
  return static_cast<float>(std::log2(static_cast<double>(x)));
}

// Device memory -----------------------------------------------------------------------------------

template <class T>
T ld_global_cs(const T* at) {
  if (reinterpret_cast<uintptr_t>(at) % sizeof(T) != 0) fail("misaligned device memory");
  return *at;
}
inline uint4 ld_global_cs_16(const void* at) { return *static_cast<const uint4*>(at); }
inline uint4 ld_global_cg_16(const void* at) { return *static_cast<const uint4*>(at); }
inline void st_global_cg_16(void* at, uint4 x) { *static_cast<uint4*>(at) = x; }
template <class Vector>
void st_global_cg(void* at, const Vector& x) {
  if (reinterpret_cast<uintptr_t>(at) % 16 != 0) fail("misaligned device memory");
  std::memcpy(at, &x, 16);
}

/// Late, 8 bytes are stored when their thread releases, or one that it has met at a barrier before,
/// and else when the kernel ends.
template <class T>
void st_global_cg_8(T* at, T x) {
  if (reinterpret_cast<uintptr_t>(at) % 8 != 0) fail("misaligned device memory");
  const auto store = [=] { *at = x; };
  if (sim::schedule.late) {
    thread().stores.push_back(store);
  } else {
    store();
  }
}
template <class T>
T ld_global_cg_8(const T* at) {
  if (reinterpret_cast<uintptr_t>(at) % 8 != 0) fail("misaligned device memory");
  return *at;
}
inline uint32_t atom_inc_release(uint32_t* counter, uint32_t last) {
  auto& ordered = block().stores[thread().index / 32];
  for (const auto& store : ordered) store();
  ordered.clear();
  for (const auto& store : thread().stores) store();
  thread().stores.clear();
  const uint32_t before = *counter;
  *counter = before >= last ? 0 : before + 1;
  return before;
}
inline void fence_acq_rel(int line = __builtin_LINE()) { __syncwarp(0xffffffffu, line); }

// cp.async ----------------------------------------------------------------------------------------
//
// Memory is written here, not in sim.cpp, so that the race check sees which thread writes it.

inline void finish(const sim::Copy& copy) {
  if (copy.bytes == 16) {
    *static_cast<uint4*>(copy.to) = *static_cast<const uint4*>(copy.from);
    return;
  }
  std::memset(copy.to, 0, 16);
  if (copy.bytes > 0) std::memcpy(copy.to, copy.from, copy.bytes);
}
inline void start_copy(const sim::Copy& copy) {
  if (copy.bytes > 16) fail("cp.async of more than 16 bytes");
  if (reinterpret_cast<uintptr_t>(copy.from) % 16 != 0 && copy.bytes > 0)
    fail("cp.async from a misaligned address");
  if (!sim::schedule.late) return finish(copy);
  *static_cast<uint4*>(copy.to) = {~0u, ~0u, ~0u, ~0u};  // NaN
  thread().open.push_back(copy);
}
inline void cp_async_16(void* to, const void* from) { start_copy({to, from, 16}); }
inline void cp_async_16(uint32_t to, const void* from, uint32_t bytes) {
  start_copy({shared_pointer(block(), to, 16, 16), from, bytes});
}
inline void cp_async_commit_group() {
  thread().groups.push_back(std::move(thread().open));
  thread().open.clear();
}
template <int kPending>
void cp_async_wait_group() {
  while (thread().groups.size() > kPending) {
    for (const auto& copy : thread().groups.front()) finish(copy);
    thread().groups.pop_front();
  }
}

// ldmatrix, mma.sync ------------------------------------------------------------------------------

struct MatrixCall {
  uint32_t from;
  uint32_t* x;
};
inline void ldmatrix_x4_any(uint32_t (&x)[4], uint32_t from, bool transposed, int line) {
  MatrixCall call = {from, x};
  sim::meet(sim::kOfWarp, "ldmatrix", line, &call, [transposed](void** lanes) {
    for (size_t matrix = 0; matrix < 4; matrix++) {
      const unsigned char* rows[8];
      unsigned banks = 0;  // 16-byte groups of the 128 bytes served at once
      for (size_t r = 0; r < 8; r++) {
        const uint32_t address = static_cast<MatrixCall*>(lanes[matrix * 8 + r])->from;
        rows[r] = shared_pointer(block(), address, 16, 16);
        banks |= 1u << (address / 16 % 8);
      }
      if (banks != 0xff) fail("ldmatrix with bank conflicts");
      for (size_t lane = 0; lane < 32; lane++) {
        uint16_t two[2];
        for (size_t e = 0; e < 2; e++) {
          const size_t row = transposed ? 2 * (lane % 4) + e : lane / 4;
          const size_t column = transposed ? lane / 4 : 2 * (lane % 4) + e;
          std::memcpy(&two[e], rows[row] + 2 * column, 2);
        }
        std::memcpy(static_cast<MatrixCall*>(lanes[lane])->x + matrix, two, 4);
      }
    }
  });
}
inline void ldmatrix_x4(uint32_t (&x)[4], uint32_t from, int line = __builtin_LINE()) {
  ldmatrix_x4_any(x, from, false, line);
}
inline void ldmatrix_x4_trans(uint32_t (&x)[4], uint32_t from, int line = __builtin_LINE()) {
  ldmatrix_x4_any(x, from, true, line);
}

inline void cvt_rna_tf32(uint32_t& x) {
  if ((x & 0x7f800000u) != 0x7f800000u) x += 0x1000;
  x &= (x & 0x7f800000u) != 0x7f800000u ? 0xffffe000u : 0xffffffffu;
}

struct MmaCall {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};
/// mma.m16n8k16 (16-bit) and m16n8k8 (32-bit), fragments as the PTX ISA tabulates them.
template <class Element>
void mma_sync(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
              int line = __builtin_LINE()) {
  MmaCall call = {d, a, {b0, b1}};
  sim::meet(sim::kOfWarp, "mma.sync", line, &call, [](void** lanes) {
    constexpr size_t kBytes = sim::kBytes<Element>;
    constexpr size_t kDepth = 32 / kBytes, kEach = 4 / kBytes;  // elements in a register
    float A[16][kDepth], B[kDepth][8];
    for (size_t lane = 0; lane < 32; lane++) {
      const MmaCall& call = *static_cast<MmaCall*>(lanes[lane]);
      const size_t group = lane >> 2, in_group = lane % 4;
      for (size_t i = 0; i < 4 * kEach; i++) {  // a0 ..
        const size_t row = i / kEach % 2 == 0 ? group : group + 8;
        const size_t column = in_group * kEach + i % kEach + (i / kEach >= 2 ? kDepth / 2 : 0);
        A[row][column] =
            sim::tensor_core_value<Element>(reinterpret_cast<const char*>(call.a) + i * kBytes);
      }
      for (size_t i = 0; i < 2 * kEach; i++) {  // b0 ..
        const size_t row = in_group * kEach + i % kEach + (i / kEach >= 1 ? kDepth / 2 : 0);
        B[row][group] =
            sim::tensor_core_value<Element>(reinterpret_cast<const char*>(call.b) + i * kBytes);
      }
    }
    for (size_t lane = 0; lane < 32; lane++) {
      float* const d = static_cast<MmaCall*>(lanes[lane])->d;
      for (size_t i = 0; i < 4; i++) {  // c0 ..
        const size_t row = i < 2 ? lane >> 2 : (lane >> 2) + 8, column = lane % 4 * 2 + (i & 1);
        double sum = d[i];
        for (size_t k = 0; k < kDepth; k++) sum += static_cast<double>(A[row][k]) * B[k][column];
        d[i] = static_cast<float>(sum);
      }
    }
  });
}

// mbarriers and TMA -------------------------------------------------------------------------------

struct alignas(8) mbarrier_t {
  char bytes[8];
};

/// A block's shared memory exists as long as a thread of it runs.
inline sim::Mbarrier& mbarrier(sim::BlockState& where, void* at) {
  if (where.live == 0) fail("shared memory of a block that has ended");
  for (auto& [place, barrier] : where.mbarriers)
    if (place == at) return barrier;
  fail("an mbarrier that was never initialised");
}
inline void complete_phase(sim::Mbarrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.phase++;
    barrier.pending = barrier.expected;
  }
}
inline void arrive(sim::Mbarrier& barrier, int64_t bytes) {
  if (barrier.pending == 0) fail("one arrival too many at an mbarrier");
  barrier.bytes += bytes;
  if (barrier.bytes >= 1 << 20) fail("too many bytes for an mbarrier");
  barrier.pending--;
  complete_phase(barrier);
}
inline void mbarrier_init(mbarrier_t* barrier, uint32_t arrivals) {
  shared_address(barrier);
  block().mbarriers.push_back({barrier, {arrivals, arrivals, 0, 0}});
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive_expect_tx(mbarrier_t* barrier, uint32_t bytes) {
  arrive(mbarrier(block(), barrier), bytes);
}
inline void mbarrier_arrive(mbarrier_t* barrier) { arrive(mbarrier(block(), barrier), 0); }
inline void mbarrier_arrive_cluster(mbarrier_t* barrier, uint32_t rank) {
  sim::BlockState& there = sim::block_of_cluster(rank);
  if (there.live == 0) fail("shared memory of a block that has ended");
  arrive(mbarrier(there, mapa(barrier, rank)), 0);
}
inline void mbarrier_wait_parity(mbarrier_t* barrier, uint32_t parity) {
  sim::BlockState* const where = &block();
  mbarrier(*where, barrier);
  // The phase of that parity is complete where the current, incomplete one has the other parity.
  sim::wait_until("mbarrier.try_wait",
                  [=] { return mbarrier(*where, barrier).phase % 2 != parity % 2; });
}

using TensorMap = CUtensorMap;
inline void prefetch_tensormap(const TensorMap*) {}

inline void tma_load_2d_multicast(uint16_t blocks, void* to, const TensorMap* map,
                                  mbarrier_t* barrier, int32_t x, int32_t y) {
  constexpr uint32_t kBox = 128 * 128;
  const uint32_t address = shared_address(to);
  for (uint32_t rank = 0; rank < sim::cluster_blocks(); rank++) {
    if ((blocks >> rank & 1) == 0) continue;
    sim::BlockState* const where = &sim::block_of_cluster(rank);
    unsigned char* const first = shared_pointer(*where, address, kBox, 1024);
    mbarrier_t* const signal = mapa(barrier, rank);
    const auto complete = [=, map = *map] {
      for (uint32_t i = 0; i < kBox; i += static_cast<uint32_t>(map.element)) {
        const int64_t row = y + static_cast<int64_t>(i / 128);
        const int64_t byte = static_cast<int64_t>(x) * map.element + i % 128;
        // 128-byte swizzle: address bits 4 to 6 are exclusive-ored with bits 7 to 9.
        const uint32_t linear = address + i, swizzled = linear ^ ((linear >> 7 & 7) << 4);
        unsigned char* const element = first + (swizzled - address);
        const auto bytes = static_cast<size_t>(map.element);
        if (row >= 0 && row < map.rows && byte >= 0 && byte < map.row_bytes) {
          std::memcpy(element, map.at + row * map.stride + byte, bytes);
        } else {
          std::memset(element, 0, bytes);
        }
      }
      sim::Mbarrier& b = mbarrier(*where, signal);
      b.bytes -= kBox;  // may come before the bytes are announced
      complete_phase(b);
    };
    if (sim::schedule.late) {
      std::memset(first, 0xff, kBox);
      sim::complete_later(complete);
    } else {
      complete();
    }
  }
}
inline void tma_load_2d(void* to, const TensorMap* map, mbarrier_t* barrier, int32_t x, int32_t y) {
  tma_load_2d_multicast(static_cast<uint16_t>(1u << block().rank), to, map, barrier, x, y);
}

// wgmma -------------------------------------------------------------------------------------------

template <int kRegisters>
void setmaxnreg_dec() {
  sim::meet(sim::kOfWarpgroup, "setmaxnreg", 0, nullptr, [](void**) {});
}
template <int kRegisters>
void setmaxnreg_inc() {
  sim::meet(sim::kOfWarpgroup, "setmaxnreg", 0, nullptr, [](void**) {});
}
inline sim::Warpgroup& warpgroup() { return block().warpgroups[thread().index / 128]; }
inline sim::Warpgroup::Warp& products_of_warp() {
  return warpgroup().warps[thread().index % 128 / 32];
}
inline void wgmma_fence(int line = __builtin_LINE()) {
  sim::meet(sim::kOfWarp, "wgmma.fence", line, nullptr, [](void**) {});
}
inline void wgmma_commit_group(int line = __builtin_LINE()) {
  sim::meet(sim::kOfWarp, "wgmma.commit_group", line, nullptr,
            [](void**) { products_of_warp().groups.push_back(products_of_warp().issued); });
}
inline void multiply_until(sim::Warpgroup& group, size_t count) {
  for (size_t i = 0; i < count; i++) {
    if (group.products[i].done) continue;
    group.products[i].multiply();
    group.products[i].done = true;
    group.products[i].multiply = nullptr;
  }
}
template <int kPending>
void wgmma_wait_group(int line = __builtin_LINE()) {
  sim::meet(sim::kOfWarp, "wgmma.wait_group", line, nullptr, [](void**) {});
  sim::Warpgroup& group = warpgroup();
  const auto& groups = products_of_warp().groups;
  const size_t count = groups.size() > kPending ? groups[groups.size() - 1 - kPending] : 0;
  sim::wait_until("wgmma.wait_group",
                  [&group, count] { return count == 0 || group.products[count - 1].warps == 4; });
  multiply_until(group, count);
}
template <int kCount>
void fence_operand(float (&)[kCount]) {}

/// Byte `byte` of row `row` of a K-major operand of 32-byte rows, through its descriptor.
inline const char* operand(sim::BlockState& where, uint64_t descriptor, uint32_t row,
                           uint32_t byte) {
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const uint32_t eight_rows = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) fail("not the 128-byte swizzle");
  const uint32_t linear = start + row / 8 * eight_rows + row % 8 * 128 + byte;
  const uint32_t address = linear ^ ((linear >> 7 & 7) << 4);
  return reinterpret_cast<const char*>(shared_pointer(where, address, 1, 1));
}

struct WgmmaCall {
  float* d;
  uint64_t a, b;
  uint32_t accumulate;
};
template <class Element, int N>
void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, uint32_t accumulate,
           int line = __builtin_LINE()) {
  const auto call = std::make_shared<WgmmaCall>(WgmmaCall{d, a, b, accumulate});
  sim::keep(call);  // other warps may come much later
  sim::meet(sim::kOfWarp, "wgmma", line, call.get(), [](void** lanes) {
    sim::Warpgroup& group = warpgroup();
    sim::BlockState* const where = &block();
    const size_t index = products_of_warp().issued++;
    if (index == group.products.size()) group.products.emplace_back();
    sim::Warpgroup::Product& product = group.products[index];
    product.calls.resize(128);
    std::copy(lanes, lanes + 32, product.calls.begin() + thread().index % 128 / 32 * 32);
    if (++product.warps < 4) return;
    std::vector<WgmmaCall> calls;
    for (void* each : product.calls) {
      calls.push_back(*static_cast<WgmmaCall*>(each));
      if (calls.back().a != calls[0].a || calls.back().b != calls[0].b ||
          calls.back().accumulate != calls[0].accumulate)
        fail("threads of a warpgroup disagree about a wgmma");
    }
    product.multiply = [calls, where] {
      constexpr uint32_t kBytes = sim::kBytes<Element>, kDepth = 32 / kBytes;
      static float A[64][kDepth], B[kDepth][N], D[64][N];
      for (uint32_t k = 0; k < kDepth; k++) {
        for (uint32_t r = 0; r < 64; r++)
          A[r][k] = sim::tensor_core_value<Element>(operand(*where, calls[0].a, r, k * kBytes));
        for (uint32_t c = 0; c < N; c++)
          B[k][c] = sim::tensor_core_value<Element>(operand(*where, calls[0].b, c, k * kBytes));
      }
      // D fragment of wgmma.m64nN: thread t has rows 16 (t / 32) + t % 32 / 4 (+ 8), columns 8 j +
      // 2 (t % 4) (+ 1).
      const auto place = [](uint32_t t, uint32_t i, uint32_t& row, uint32_t& column) {
        row = t / 32 * 16 + t % 32 / 4 + (i / 2 % 2) * 8;
        column = i / 4 * 8 + t % 4 * 2 + i % 2;
      };
      for (uint32_t t = 0; t < 128; t++)
        for (uint32_t i = 0; i < N / 2; i++) {
          uint32_t row, column;
          place(t, i, row, column);
          D[row][column] = calls[0].accumulate ? calls[t].d[i] : 0.0f;
        }
      for (uint32_t r = 0; r < 64; r++)
        for (uint32_t k = 0; k < kDepth; k++)
          for (uint32_t c = 0; c < N; c++) D[r][c] += A[r][k] * B[k][c];
      for (uint32_t t = 0; t < 128; t++)
        for (uint32_t i = 0; i < N / 2; i++) {
          uint32_t row, column;
          place(t, i, row, column);
          calls[t].d[i] = D[row][column];
        }
    };
    if (!sim::schedule.late) multiply_until(group, index + 1);
  });
}

}  // namespace zipfls::cuda::ptx
