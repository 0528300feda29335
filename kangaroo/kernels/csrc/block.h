// Zeroed memory for weights and caches, in huge pages where the system grants them.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <new>

namespace kangaroo {

class Block {
 public:
  explicit Block(size_t num_bytes) : num_bytes_(num_bytes ? num_bytes : 1) {
    memory_ = mmap(nullptr, num_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(memory_, num_bytes_, MADV_HUGEPAGE);
#endif
  }
  ~Block() { munmap(memory_, num_bytes_); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  template <class T>
  T* as() const {
    return static_cast<T*>(memory_);
  }
  size_t num_bytes() const { return num_bytes_; }

 private:
  size_t num_bytes_;
  void* memory_;
};

}  // namespace kangaroo
