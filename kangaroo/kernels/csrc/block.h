// Zeroed memory for weights and caches. Blocks share large chunks, so that the system can back them with huge pages
// and a model's weights lie one behind the other.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>

namespace kangaroo {

constexpr size_t kHugePage = size_t{1} << 21;

class Chunk {
 public:
  explicit Chunk(size_t num_bytes) : mapped_(num_bytes + kHugePage) {
    memory_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory_);
    free_ = reinterpret_cast<char*>((address + kHugePage - 1) / kHugePage * kHugePage);
    left_ = num_bytes;
#ifdef MADV_HUGEPAGE
    madvise(free_, left_, MADV_HUGEPAGE);
#endif
  }
  ~Chunk() { munmap(memory_, mapped_); }
  Chunk(const Chunk&) = delete;
  Chunk& operator=(const Chunk&) = delete;

  size_t left() const { return left_; }
  char* take(size_t num_bytes) {
    free_ += num_bytes;
    left_ -= num_bytes;
    return free_ - num_bytes;
  }

 private:
  size_t mapped_, left_;
  void* memory_;
  char* free_;
};

class Block {
 public:
#ifdef __SANITIZE_ADDRESS__
  // Each on its own, so that AddressSanitizer watches its edges.
  explicit Block(size_t num_bytes) : num_bytes_(num_bytes) {
    void* made = nullptr;
    if (posix_memalign(&made, 64, std::max<size_t>(1, num_bytes)) != 0) throw std::bad_alloc();
    memory_ = static_cast<char*>(std::memset(made, 0, num_bytes));
  }
  ~Block() { std::free(memory_); }
#else
  explicit Block(size_t num_bytes) : num_bytes_(num_bytes) {
    constexpr size_t kChunk = 16 * kHugePage, kLine = 64;
    static std::mutex mutex;
    static std::weak_ptr<Chunk> current;
    const size_t size = std::max(kLine, (num_bytes + kLine - 1) / kLine * kLine);
    std::lock_guard<std::mutex> lock(mutex);
    chunk_ = current.lock();
    if (!chunk_ || chunk_->left() < size) {
      chunk_ = std::make_shared<Chunk>((std::max(size, kChunk) + kHugePage - 1) / kHugePage * kHugePage);
      current = chunk_;
    }
    memory_ = chunk_->take(size);
  }
#endif
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(memory_);
  }
  size_t num_bytes() const { return num_bytes_; }

 private:
  size_t num_bytes_;
  std::shared_ptr<Chunk> chunk_;
  char* memory_;
};

}  // namespace kangaroo
