// The machine's own instructions for the vote kernels, each under the name of what it does. Inline
// PTX, nothing else: the kernels' logic is in vote_sm80.cuh and vote_sm90.cuh, which the tests
// compile for the CPU against an emulation of exactly these functions.
#pragma once

#include <cstdint>

#include "vote_tiles.cuh"

namespace zipfls::cuda::vote::ptx {

// Any GPU -----------------------------------------------------------------------------------------

/// Address of shared memory as PTX wants it.
ZIPFLS_VOTE_DEVICE uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

/// All threads of the block; orders their accesses to shared memory.
ZIPFLS_VOTE_DEVICE void block_sync() { __syncthreads(); }

/// 2, 4 or 16 bytes of device memory that nobody will ask for again: first to leave L1 and L2.
ZIPFLS_VOTE_DEVICE uint16_t load_once(const uint16_t* at) { return __ldcs(at); }
ZIPFLS_VOTE_DEVICE uint32_t load_once(const uint32_t* at) { return __ldcs(at); }
template <class Vector>
ZIPFLS_VOTE_DEVICE Vector load_once(const Vector* at) {
  static_assert(sizeof(Vector) == 16, "");
  const uint4 raw = __ldcs(reinterpret_cast<const uint4*>(at));
  return *reinterpret_cast<const Vector*>(&raw);
}
/// 16 aligned bytes to device memory. (A plain store of 16-bit elements falls apart into four.)
template <class Vector>
ZIPFLS_VOTE_DEVICE void store16(void* at, const Vector& x) {
  static_assert(sizeof(Vector) == 16, "");
  __stcg(static_cast<uint4*>(at), *reinterpret_cast<const uint4*>(&x));
}

template <class T>
ZIPFLS_VOTE_DEVICE T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}

template <class T>
ZIPFLS_VOTE_DEVICE T shuffle(T x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}
/// All lanes of the warp; orders their accesses to memory.
ZIPFLS_VOTE_DEVICE void warp_sync() { __syncwarp(); }

/// A pair that another block may read, or has written; past L1, which knows nothing of it.
ZIPFLS_VOTE_DEVICE void store_pair(Best* at, Best pair) {
  __stcg(reinterpret_cast<float2*>(at), make_float2(pair.score, __int_as_float(pair.index)));
}
ZIPFLS_VOTE_DEVICE Best load_pair(const Best* at) {
  const float2 pair = __ldcg(reinterpret_cast<const float2*>(at));
  return {pair.x, __float_as_int(pair.y)};
}
/// Adds 1 to a counter, or makes it 0 where it is `last`; returns what it was. What this thread
/// wrote, and what was ordered before it by a barrier, is there for whoever sees the count and then
/// calls acquire.
ZIPFLS_VOTE_DEVICE uint32_t count_release(uint32_t* counter, uint32_t last) {
  uint32_t before;
  asm volatile("atom.release.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(last)
               : "memory");
  return before;
}
/// All lanes of the warp: what others released before a count that one of them has seen may be
/// read.
ZIPFLS_VOTE_DEVICE void acquire() {
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
  __syncwarp();
}

// sm_80: asynchronous copies, ldmatrix, mma.sync --------------------------------------------------

/// 16 bytes to shared memory, past L1: `bytes` of them (0 to 16) from device memory, the rest
/// zeros.
ZIPFLS_VOTE_DEVICE void copy16(uint32_t to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}
/// Closes a group of copies.
ZIPFLS_VOTE_DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most kPending of this thread's groups are under way.
template <int kPending>
ZIPFLS_VOTE_DEVICE void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/// Four 8 x 8 matrices of 16-bit elements (or 8 x 4 of 32 bits); see a_row in vote_tiles.cuh.
ZIPFLS_VOTE_DEVICE void load_matrices(uint32_t (&x)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(from)
               : "memory");
}
ZIPFLS_VOTE_DEVICE void load_matrices_transposed(uint32_t (&x)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(from)
               : "memory");
}

/// float32 -> the nearest TensorFloat-32, ties away from zero. Other types stay as they are.
template <class Element>
ZIPFLS_VOTE_DEVICE void round_operand(uint32_t&) {}
template <>
ZIPFLS_VOTE_DEVICE void round_operand<TensorFloat32>(uint32_t& x) {
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(x) : "f"(__uint_as_float(x)));
}

/// d (16 x 8) += a (16 x 32 bytes) . b (32 bytes x 8)
template <class Element>
ZIPFLS_VOTE_DEVICE void multiply(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#define ZIPFLS_MULTIPLY(Element, shape)                                                   \
  template <>                                                                             \
  ZIPFLS_VOTE_DEVICE void multiply<Element>(float* d, const uint32_t(&a)[4], uint32_t b0, \
                                            uint32_t b1) {                                \
    asm volatile("mma.sync.aligned." shape                                                \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "                        \
                 "{%0, %1, %2, %3};"                                                      \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));         \
  }
ZIPFLS_MULTIPLY(BFloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
ZIPFLS_MULTIPLY(Float16, "m16n8k16.row.col.f32.f16.f16.f32")
ZIPFLS_MULTIPLY(TensorFloat32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef ZIPFLS_MULTIPLY

// sm_90a: clusters, mbarriers, bulk tensor copies, wgmma ------------------------------------------

ZIPFLS_VOTE_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
/// All threads of the cluster; orders their accesses to each other's shared memory.
ZIPFLS_VOTE_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

/// Warps that wait for each other at one of the block's 16 barriers.
ZIPFLS_VOTE_DEVICE void group_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

/// Gives registers back, or asks for more; the whole warpgroup.
template <int kRegisters>
ZIPFLS_VOTE_DEVICE void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
ZIPFLS_VOTE_DEVICE void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

using Barrier = uint64_t;  // mbarrier, in shared memory

ZIPFLS_VOTE_DEVICE void barrier_init(Barrier* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
/// Makes initialised barriers known to the whole cluster and to the copy engine.
ZIPFLS_VOTE_DEVICE void barriers_publish() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
/// Arrives, and announces bytes that copies will complete the phase with.
ZIPFLS_VOTE_DEVICE void barrier_expect(Barrier* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
ZIPFLS_VOTE_DEVICE void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
/// Arrives at the same barrier of the cluster's block `rank`. What it reports done, and what the
/// waiting block then starts, are accesses of wgmma and the copy engine; ordinary accesses would
/// want release and acquire at cluster scope, which empty the L1 cache at every wait.
ZIPFLS_VOTE_DEVICE void barrier_arrive_at(Barrier* barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
/// Waits until the phase of the given parity is complete. Of a fresh barrier, parity 1 counts as
/// complete.
ZIPFLS_VOTE_DEVICE void barrier_wait(Barrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

using TensorMap = void;  // CUtensorMap, a __grid_constant__ parameter

ZIPFLS_VOTE_DEVICE void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
/// A box of the tensor from element (x, y) on; its bytes are counted by the barrier.
ZIPFLS_VOTE_DEVICE void copy_box(void* to, const TensorMap* map, Barrier* barrier, int32_t x,
                                 int32_t y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
      "%4}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}
/// The same to each block of the cluster whose bit is set: same offsets of shared memory and
/// barrier there.
ZIPFLS_VOTE_DEVICE void copy_box_to(uint16_t blocks, void* to, const TensorMap* map,
                                    Barrier* barrier, int32_t x, int32_t y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::"
      "cluster [%0], "
      "[%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "h"(blocks)
      : "memory");
}

/// Registers and shared memory of the warpgroup are ready for the products that follow.
ZIPFLS_VOTE_DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
ZIPFLS_VOTE_DEVICE void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
ZIPFLS_VOTE_DEVICE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
/// Keeps the compiler from moving accesses to accumulators across: the products run beside the
/// program.
template <int kCount>
ZIPFLS_VOTE_DEVICE void hold(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i++) asm volatile("" : "+f"(x[i]));
}

/// d (64 x N) = a (64 x 32 bytes) . b (32 bytes x N), plus d where `accumulate` is not 0;
/// asynchronous.
template <class Element, int N>
ZIPFLS_VOTE_DEVICE void multiply_group(float (&d)[N / 2], uint64_t a, uint64_t b,
                                       uint32_t accumulate);

#define ZIPFLS_ACCUMULATORS_256                                                            \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "  \
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "  \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, "  \
  "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, "  \
  "%87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, "    \
  "%103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, "   \
  "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
#define ZIPFLS_ACCUMULATORS_128                                                            \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "  \
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "  \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
#define ZIPFLS_EIGHT(i)                                                                       \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define ZIPFLS_SIXTY_FOUR(i)                                                        \
  ZIPFLS_EIGHT(i), ZIPFLS_EIGHT(i + 8), ZIPFLS_EIGHT(i + 16), ZIPFLS_EIGHT(i + 24), \
      ZIPFLS_EIGHT(i + 32), ZIPFLS_EIGHT(i + 40), ZIPFLS_EIGHT(i + 48), ZIPFLS_EIGHT(i + 56)
#define ZIPFLS_OPERANDS_256 ZIPFLS_SIXTY_FOUR(0), ZIPFLS_SIXTY_FOUR(64)
#define ZIPFLS_OPERANDS_128 ZIPFLS_SIXTY_FOUR(0)
#define ZIPFLS_MULTIPLY_GROUP(Element, N, k, types, majors, a_at, b_at, accumulate_at)         \
  template <>                                                                                  \
  ZIPFLS_VOTE_DEVICE void multiply_group<Element, N>(float(&d)[N / 2], uint64_t a, uint64_t b, \
                                                     uint32_t accumulate) {                    \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate_at                             \
                 ", 0;\n"                                                                      \
                 "wgmma.mma_async.sync.aligned.m64n" #N k ".f32." types                        \
                 " " ZIPFLS_ACCUMULATORS_##N a_at ", " b_at ", p, 1, 1" majors ";\n}"          \
                 : ZIPFLS_OPERANDS_##N                                                         \
                 : "l"(a), "l"(b), "r"(accumulate)                                             \
                 : "memory");                                                                  \
  }
ZIPFLS_MULTIPLY_GROUP(BFloat16, 256, "k16", "bf16.bf16", ", 0, 0", "%128", "%129", "%130")
ZIPFLS_MULTIPLY_GROUP(BFloat16, 128, "k16", "bf16.bf16", ", 0, 0", "%64", "%65", "%66")
ZIPFLS_MULTIPLY_GROUP(Float16, 256, "k16", "f16.f16", ", 0, 0", "%128", "%129", "%130")
ZIPFLS_MULTIPLY_GROUP(Float16, 128, "k16", "f16.f16", ", 0, 0", "%64", "%65", "%66")
ZIPFLS_MULTIPLY_GROUP(TensorFloat32, 256, "k8", "tf32.tf32", "", "%128", "%129", "%130")
ZIPFLS_MULTIPLY_GROUP(TensorFloat32, 128, "k8", "tf32.tf32", "", "%64", "%65", "%66")
#undef ZIPFLS_MULTIPLY_GROUP
#undef ZIPFLS_OPERANDS_128
#undef ZIPFLS_OPERANDS_256
#undef ZIPFLS_SIXTY_FOUR
#undef ZIPFLS_EIGHT
#undef ZIPFLS_ACCUMULATORS_128
#undef ZIPFLS_ACCUMULATORS_256

}  // namespace zipfls::cuda::vote::ptx
