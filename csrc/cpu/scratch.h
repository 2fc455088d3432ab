// The buffers of one thread.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include "kernels.h"

namespace zipfls::cpu {

/// A thread's memory: grows, never shrinks, and is kept for the thread's next call.
class ThreadScratch {
 public:
  /// Buffers for rows of C classes and P votes with arithmetic in types of `size` bytes (4 or 8);
  /// `sort` adds those for ranking by logits. Shapes: kernels.h.
  Scratch get(int64_t C, int64_t P, int64_t size, bool sort) {
    grow_zeroed(counts_, counts_size_, C);
    const int64_t room = 64;  // bytes of the widest vector: kernels read and write whole vectors
    const int64_t voted = std::min(P, C) + 1;
    const int64_t bytes[] = {4 * voted,
                             4 * voted + room,
                             4 * (P + 2),
                             4 * (P + 2),
                             4 * (P + 2),
                             size * (P + 1),
                             size * (P + 2),
                             size * voted + room,
                             size * voted + room,
                             size * voted + room,
                             size * C + room,
                             size * C + room,
                             size * C + room,
                             size * C + room,
                             size * C + room,
                             room,
                             room,
                             sort ? 16 * C : 0,
                             sort ? 16 * C : 0};
    std::byte* part[std::size(bytes)];
    int64_t total = 0;
    for (int64_t b : bytes) total += padded(b);
    if (total > bytes_size_) {
      bytes_.reset();
      bytes_size_ = 0;
      bytes_.reset(new (std::align_val_t{kLine}) std::byte[total]);
      bytes_size_ = total;
    }
    std::byte* next = bytes_.get();
    for (size_t k = 0; k < std::size(bytes); k++) {
      part[k] = next;
      next += padded(bytes[k]);
    }
    auto integers = [&](int k) { return reinterpret_cast<int32_t*>(part[k]); };
    return {counts_.get(),
            integers(0),
            integers(1),
            integers(2),
            integers(3),
            integers(4),
            part[5],
            part[6],
            part[7],
            part[8],
            part[9],
            {part[10], part[11], part[12], part[13], part[14]},
            {part[15], part[16]},
            {part[17], part[18]}};
  }

 private:
  static constexpr int64_t kLine = 64;  // a cache line, and the widest vector
  static int64_t padded(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

  struct Free {
    void operator()(std::byte* p) const { ::operator delete[](p, std::align_val_t{kLine}); }
  };

  /// Kernels leave these at zero, so only growing has to clear.
  static void grow_zeroed(std::unique_ptr<int32_t[]>& buffer, int64_t& size, int64_t wanted) {
    if (wanted <= size) return;
    buffer = std::make_unique<int32_t[]>(wanted);
    size = wanted;
  }

  std::unique_ptr<int32_t[]> counts_;
  int64_t counts_size_ = 0;
  std::unique_ptr<std::byte[], Free> bytes_;
  int64_t bytes_size_ = 0;
};

/// The calling thread's.
inline ThreadScratch& thread_scratch() {
  thread_local ThreadScratch scratch;
  return scratch;
}

}  // namespace zipfls::cpu
