// PTX instructions under their PTX names, and what a compiler must know to build the kernels.
//
// The only file that differs between nvcc and the tests, whose simulator (cuda_on_cpu.h) stands for
// exactly these names and runs every CUDA thread as a fiber on the CPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#define ZIPFLS_DEVICE __device__ __forceinline__
#define ZIPFLS_KERNEL(...) \
  __global__ void __launch_bounds__(__VA_ARGS__)  // threads, resident blocks
#define ZIPFLS_DYNAMIC_SHARED(name, alignment) \
  extern __shared__ __align__(alignment)       \
  unsigned char name[]
#define ZIPFLS_SHARED(type, name) __shared__ type name
#define ZIPFLS_RED_ZONE 0
#define ZIPFLS_GUARD(at, bytes) (void)(at)

namespace zipfls::cuda {
struct BFloat16;  // operands of the tensor cores: vote_layout.cuh
struct Float16;
struct TensorFloat32;
}  // namespace zipfls::cuda

namespace zipfls::cuda::ptx {

// Any GPU -----------------------------------------------------------------------------------------

/// Address of shared memory, as PTX instructions take it.
ZIPFLS_DEVICE uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

/// All threads of the block; orders their accesses to shared memory.
ZIPFLS_DEVICE void block_sync() { __syncthreads(); }
/// All threads of the warp; orders their accesses to memory.
ZIPFLS_DEVICE void warp_sync() { __syncwarp(); }

/// x, which the compiler then keeps in a register instead of computing it again at each use.
ZIPFLS_DEVICE uint32_t keep(uint32_t x) {
  asm("" : "+r"(x));
  return x;
}
/// x, from which nothing is computed before the loop that this stands in: each such value would
/// hold a register all through it.
ZIPFLS_DEVICE int32_t here(int32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}
ZIPFLS_DEVICE uint32_t here(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}
ZIPFLS_DEVICE double here(double x) {
  asm volatile("" : "+d"(x));
  return x;
}
template <class T>
ZIPFLS_DEVICE T* keep(T* x) {
  asm("" : "+l"(x));
  return x;
}

template <class T>
ZIPFLS_DEVICE T shfl_xor(T x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
template <class T>
ZIPFLS_DEVICE T shfl(T x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}

/// ld.global.cs: device memory that is read once, evicted first from L1 and L2.
ZIPFLS_DEVICE uint16_t ld_global_cs(const uint16_t* at) { return __ldcs(at); }
ZIPFLS_DEVICE uint32_t ld_global_cs(const uint32_t* at) { return __ldcs(at); }
/// 16 aligned bytes of it.
template <class Vector>
ZIPFLS_DEVICE Vector ld_global_cs(const Vector* at) {
  static_assert(sizeof(Vector) == 16, "");
  const uint4 raw = __ldcs(reinterpret_cast<const uint4*>(at));
  return *reinterpret_cast<const Vector*>(&raw);
}
ZIPFLS_DEVICE uint4 ld_global_cs_16(const void* at) {
  return __ldcs(static_cast<const uint4*>(at));
}
/// ld.global.cg: 16 aligned bytes of device memory that are read again later; cached in L2 alone.
ZIPFLS_DEVICE uint4 ld_global_cg_16(const void* at) {
  return __ldcg(static_cast<const uint4*>(at));
}
/// st.global.cg: 16 aligned bytes. (A plain store of 16-bit elements becomes four instructions.)
ZIPFLS_DEVICE void st_global_cg_16(void* at, uint4 raw) { __stcg(static_cast<uint4*>(at), raw); }
template <class Vector>
ZIPFLS_DEVICE void st_global_cg(void* at, const Vector& x) {
  static_assert(sizeof(Vector) == 16, "");
  __stcg(static_cast<uint4*>(at), *reinterpret_cast<const uint4*>(&x));
}

/// 8 aligned bytes that another block may read, or has written; past L1, which may hold older ones.
template <class T>
ZIPFLS_DEVICE void st_global_cg_8(T* at, T x) {
  static_assert(sizeof(T) == 8, "");
  __stcg(reinterpret_cast<float2*>(at), *reinterpret_cast<const float2*>(&x));
}
template <class T>
ZIPFLS_DEVICE T ld_global_cg_8(const T* at) {
  static_assert(sizeof(T) == 8, "");
  const float2 raw = __ldcg(reinterpret_cast<const float2*>(at));
  return *reinterpret_cast<const T*>(&raw);
}

/// Adds 1 to a counter, or sets it to 0 where it equals `last`; returns the value before. A thread
/// that sees the new value and then calls fence_acq_rel sees all that this thread wrote, or that a
/// barrier ordered before this call.
ZIPFLS_DEVICE uint32_t atom_inc_release(uint32_t* counter, uint32_t last) {
  uint32_t before;
  asm volatile("atom.release.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(last)
               : "memory");
  return before;
}
/// All threads of the warp may then read what was released before a count that one of them saw.
ZIPFLS_DEVICE void fence_acq_rel() {
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
  __syncwarp();
}

/// 2^x: relative error below 2^-22; results below 2^-126 become 0.
ZIPFLS_DEVICE float ex2_approx_ftz(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// log2 x: absolute error below 2^-22 between 1/2 and 2, relative error elsewhere.
ZIPFLS_DEVICE float lg2_approx_ftz(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// sm_80: asynchronous copies, ldmatrix, mma.sync --------------------------------------------------

/// cp.async: 16 aligned bytes from device to shared memory, past L1. Other threads see them after
/// the wait and a barrier.
ZIPFLS_DEVICE void cp_async_16(void* to, const void* from) {
  __pipeline_memcpy_async(to, from, 16);
}
/// The same: `bytes` of them (0 to 16) from device memory, the rest zeros.
ZIPFLS_DEVICE void cp_async_16(uint32_t to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}
/// Ends this thread's current group of copies.
ZIPFLS_DEVICE void cp_async_commit_group() { __pipeline_commit(); }
/// Waits until at most kPending of this thread's groups are pending.
template <int kPending>
ZIPFLS_DEVICE void cp_async_wait_group() {
  __pipeline_wait_prior(kPending);
}

/// Four 8 x 8 matrices of 16-bit elements (or 8 x 4 of 32 bits); lanes 8i .. 8i + 7 give
/// the addresses of matrix i's rows.
ZIPFLS_DEVICE void ldmatrix_x4(uint32_t (&x)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(from)
               : "memory");
}
ZIPFLS_DEVICE void ldmatrix_x4_trans(uint32_t (&x)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(from)
               : "memory");
}

/// float32 -> the nearest TensorFloat-32, ties away from zero.
ZIPFLS_DEVICE void cvt_rna_tf32(uint32_t& x) {
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(x) : "f"(__uint_as_float(x)));
}

/// mma.sync: d (16 x 8) += a (16 x 32 bytes) . b (32 bytes x 8)
template <class Element>
ZIPFLS_DEVICE void mma_sync(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#define ZIPFLS_MMA_SYNC(Element, shape)                                              \
  template <>                                                                        \
  ZIPFLS_DEVICE void mma_sync<Element>(float* d, const uint32_t(&a)[4], uint32_t b0, \
                                       uint32_t b1) {                                \
    asm volatile("mma.sync.aligned." shape                                           \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "                   \
                 "{%0, %1, %2, %3};"                                                 \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));    \
  }
ZIPFLS_MMA_SYNC(BFloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
ZIPFLS_MMA_SYNC(Float16, "m16n8k16.row.col.f32.f16.f16.f32")
ZIPFLS_MMA_SYNC(TensorFloat32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef ZIPFLS_MMA_SYNC

// sm_90a: clusters, mbarriers, TMA, wgmma -------------------------------------------------------

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
/// Blocks of this block's cluster.
ZIPFLS_DEVICE uint32_t cluster_size() { return __clusterSizeInBlocks(); }
/// This block's index among them.
ZIPFLS_DEVICE uint32_t cluster_rank() { return __clusterRelativeBlockRank(); }
/// All threads of the cluster; orders their accesses to one another's shared memory.
ZIPFLS_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}
/// mapa: the address, in the block of that rank, of what this block has at `mine` in shared memory.
template <class T>
ZIPFLS_DEVICE T* mapa(T* mine, uint32_t rank) {
  return static_cast<T*>(__cluster_map_shared_rank(mine, rank));
}
#else  // never called: the kernels that use clusters are empty
ZIPFLS_DEVICE uint32_t cluster_size() { return 1; }
ZIPFLS_DEVICE uint32_t cluster_rank() { return 0; }
ZIPFLS_DEVICE void cluster_sync() {}
template <class T>
ZIPFLS_DEVICE T* mapa(T* mine, uint32_t) {
  return mine;
}
#endif

/// bar.sync: `threads` threads of the block wait for one another at one of its 16 barriers.
ZIPFLS_DEVICE void named_barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

/// Releases registers, or requests more; all warps of the warpgroup.
template <int kRegisters>
ZIPFLS_DEVICE void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
ZIPFLS_DEVICE void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

using mbarrier_t = uint64_t;  // in shared memory

ZIPFLS_DEVICE void mbarrier_init(mbarrier_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
/// Makes initialised mbarriers visible to the whole cluster and to TMA.
ZIPFLS_DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
/// Arrives, and adds the bytes of copies that this phase waits for.
ZIPFLS_DEVICE void mbarrier_arrive_expect_tx(mbarrier_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
ZIPFLS_DEVICE void mbarrier_arrive(mbarrier_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
/// Arrives at the same mbarrier of the cluster's block `rank`. It orders accesses of wgmma and TMA
/// alone; ordinary accesses would need release and acquire at cluster scope, which invalidate the
/// L1 cache at every wait.
ZIPFLS_DEVICE void mbarrier_arrive_cluster(mbarrier_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
/// Waits until the phase of the given parity is complete. Right after mbarrier_init, parity 1
/// counts as complete.
ZIPFLS_DEVICE void mbarrier_wait_parity(mbarrier_t* barrier, uint32_t parity) {
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

ZIPFLS_DEVICE void prefetch_tensormap(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
/// cp.async.bulk.tensor.2d: the box of the tensor whose first element is (x, y). The mbarrier
/// counts its bytes.
ZIPFLS_DEVICE void tma_load_2d(void* to, const TensorMap* map, mbarrier_t* barrier, int32_t x,
                               int32_t y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
      "%4}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}
/// The same to each block of the cluster whose bit is set, at the same offsets of its shared
/// memory.
ZIPFLS_DEVICE void tma_load_2d_multicast(uint16_t blocks, void* to, const TensorMap* map,
                                         mbarrier_t* barrier, int32_t x, int32_t y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::"
      "cluster [%0], "
      "[%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "h"(blocks)
      : "memory");
}

/// Orders accesses of registers and shared memory before the wgmma that follow.
ZIPFLS_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
ZIPFLS_DEVICE void wgmma_commit_group() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
ZIPFLS_DEVICE void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
/// Keeps the compiler from moving accesses to accumulators across: wgmma is asynchronous.
template <int kCount>
ZIPFLS_DEVICE void fence_operand(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i++) asm volatile("" : "+f"(x[i]));
}

/// d (64 x N) = a (64 x 32 bytes) . b (32 bytes x N), plus d where `accumulate` is not 0;
/// asynchronous.
template <class Element, int N>
ZIPFLS_DEVICE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, uint32_t accumulate);

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
#define ZIPFLS_WGMMA(Element, N, k, types, majors, a_at, b_at, accumulate_at)         \
  template <>                                                                         \
  ZIPFLS_DEVICE void wgmma<Element, N>(float(&d)[N / 2], uint64_t a, uint64_t b,      \
                                       uint32_t accumulate) {                         \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate_at                    \
                 ", 0;\n"                                                             \
                 "wgmma.mma_async.sync.aligned.m64n" #N k ".f32." types               \
                 " " ZIPFLS_ACCUMULATORS_##N a_at ", " b_at ", p, 1, 1" majors ";\n}" \
                 : ZIPFLS_OPERANDS_##N                                                \
                 : "l"(a), "l"(b), "r"(accumulate)                                    \
                 : "memory");                                                         \
  }
ZIPFLS_WGMMA(BFloat16, 256, "k16", "bf16.bf16", ", 0, 0", "%128", "%129", "%130")
ZIPFLS_WGMMA(BFloat16, 128, "k16", "bf16.bf16", ", 0, 0", "%64", "%65", "%66")
ZIPFLS_WGMMA(Float16, 256, "k16", "f16.f16", ", 0, 0", "%128", "%129", "%130")
ZIPFLS_WGMMA(Float16, 128, "k16", "f16.f16", ", 0, 0", "%64", "%65", "%66")
ZIPFLS_WGMMA(TensorFloat32, 256, "k8", "tf32.tf32", "", "%128", "%129", "%130")
ZIPFLS_WGMMA(TensorFloat32, 128, "k8", "tf32.tf32", "", "%64", "%65", "%66")
#undef ZIPFLS_WGMMA
#undef ZIPFLS_OPERANDS_128
#undef ZIPFLS_OPERANDS_256
#undef ZIPFLS_SIXTY_FOUR
#undef ZIPFLS_EIGHT
#undef ZIPFLS_ACCUMULATORS_128
#undef ZIPFLS_ACCUMULATORS_256

}  // namespace zipfls::cuda::ptx
#else
#include "cuda_on_cpu.h"
#endif
