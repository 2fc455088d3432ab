// Runs kernels on the CPU: every CUDA thread is a fiber. What the drivers and the emulation of
// single instructions (cuda_on_cpu.h, ptx_on_cpu.h) see of sim.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace sim {

/// How the threads of a block take turns, what fresh shared memory holds, and whether asynchronous
/// operations (cp.async, TMA, wgmma, stores that other blocks read) happen as late or as early as
/// their waits and barriers allow.
struct Schedule {
  enum Order {
    kAscending,
    kDescending,
    kRandom,        // of threads
    kRandomByWarp,  // of warps, whose threads stay in order
    kLazyWarps,     // the same, and some warps fall far behind the others
  } order = kAscending;
  enum Fill { kZeros, kOnes, kNoise } fill = kZeros;
  uint64_t seed = 1;
  bool late = false;
};
extern Schedule schedule;                  // of the launches to come
extern uint32_t most_blocks;               // of them, clusters kept whole; 0: as launched
extern std::vector<const void*> launched;  // kernels

/// Runs kernel() once for every thread of every block.
void launch(const std::function<void()>& kernel, uint32_t blocks, uint32_t threads,
            uint32_t cluster, uint32_t shared_bytes);

/// Device memory that the race check watches. `written`: holds values already.
void watch(const void* at, size_t bytes, bool written, const char* name);
void forget_watched();

/// What went wrong since the last call, a line each; empty: nothing.
std::string faults();
/// The run goes on.
void fault(const std::string& text);
/// The run ends here.
[[noreturn]] void fail(const std::string& text);

// For the emulation of instructions ---------------------------------------------------------------

/// Waits until all threads of the scope have called: the last one gets their arguments by index,
/// and calls release; the others get null once it has. Threads that call from different lines or
/// with different `what` are a fault.
enum Scope { kOfWarp, kOfWarpgroup, kOfBlock, kOfCluster };
void** arrive(Scope scope, const char* what, int line, void* argument = nullptr);
void release(Scope scope);
/// act(arguments) by the last thread.
template <class F>
void meet(Scope scope, const char* what, int line, void* argument, F act) {
  if (void** const arguments = arrive(scope, what, line, argument)) {
    act(arguments);
    release(scope);
  }
}
/// bar.sync of `threads` threads.
void named_barrier(int barrier, int threads, int line);
void wait_until(const char* what, const std::function<bool()>& ready);

/// cp.async: `bytes` of 16, the rest zeros.
struct Copy {
  void* to;
  const void* from;
  uint32_t bytes;
};
struct Thread {
  uint32_t index = 0;                         // in its block
  std::vector<Copy> open;                     // of the current group
  std::deque<std::vector<Copy>> groups;       // pending
  std::vector<std::function<void()>> stores;  // that no other thread sees yet
};
struct Mbarrier {
  uint32_t expected, pending;  // arrivals
  int64_t bytes;               // still to come
  uint32_t phase;
};
/// wgmma of a warpgroup: each warp issues the same sequence at its own pace; one is multiplied once
/// all four have issued it.
struct Warpgroup {
  struct Product {
    int warps = 0;  // that have issued it
    bool done = false;
    std::vector<void*> calls;  // of the threads so far
    std::function<void()> multiply;
  };
  std::deque<Product> products;
  struct Warp {
    size_t issued = 0;
    std::vector<size_t> groups = {0};  // products issued when each group was committed
  } warps[4];
};
struct BlockState {
  uint32_t rank = 0, index = 0, live = 0;  // live: threads still running
  unsigned char* shared = nullptr;         // dynamic
  uint32_t shared_bytes = 0;
  unsigned char* static_shared = nullptr;
  uint32_t static_bytes = 0;
  std::vector<std::pair<void*, Mbarrier>> mbarriers;
  std::vector<Warpgroup> warpgroups;
  std::vector<std::vector<std::function<void()>>> stores;  // by warp: before its next release
};
Thread& thread();
BlockState& block();
BlockState& block_of_cluster(uint32_t rank);
uint32_t cluster_blocks();
/// TMA: completes when the schedule says.
void complete_later(std::function<void()> complete);
/// Lives until the launch ends.
void keep(std::shared_ptr<void> object);

unsigned char* shared_memory();
void* static_shared(uint32_t bytes);
void guard(void* at, uint32_t bytes);
int32_t atomic_add(int32_t* at, int32_t x);
int32_t atomic_cas(int32_t* at, int32_t expected, int32_t x);
double read_published(const double* at);

}  // namespace sim
