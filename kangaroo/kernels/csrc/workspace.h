// Scratch memory of one pass at a time, kept between passes and grown when a larger one comes.
#pragma once

#include <memory>

#include "plan.h"

namespace kangaroo {

class Workspace {
 public:
  // Point the scratch buffers of a pass into this memory.
  void prepare(Pass& pass, size_t num_threads) {
    const Shape& shape = *pass.shape;
    const size_t rows = pass.num_rows, normed = rows * round_up(shape.hidden_size);
    const size_t qkv = rows * round_up((shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim);
    const size_t attended = rows * round_up(shape.num_heads * shape.head_dim);
    const Weight* down = (*pass.layers)[pass.start].down.get();
    const size_t gated = down ? rows * round_up(down->num_inputs) : 0;
    const size_t scores = kScoreRows * pass.cache->num_slots;
    reserve(qkv + attended + gated + normed + num_threads * (normed + scores));
    pass.scratch = {take(qkv), take(attended), take(gated), take(normed), {}, {}};
    for (size_t thread = 0; thread < num_threads; ++thread) {
      pass.scratch.normed.push_back(take(normed));
      pass.scratch.scores.push_back(take(scores));
    }
  }

  void prepare(HeadPass& pass, size_t num_threads) {
    const size_t rows = pass.num_rows, normed = pass.norm ? rows * round_up(pass.head->num_inputs) : 0;
    const size_t scores = pass.confidence ? rows * round_up(pass.head->num_outputs) : 0;
    reserve(scores + num_threads * (normed + 2 * rows * kLanes));
    pass.scores = take(scores);
    for (size_t thread = 0; thread < num_threads; ++thread) {
      pass.normed.push_back(take(normed));
      pass.best_values.push_back(take(rows * kLanes));
      pass.best_ids.push_back(reinterpret_cast<int32_t*>(take(rows * kLanes)));
    }
  }

 private:
  // Sizes in floats, all of them whole panels, so that every buffer is aligned to its cache line.
#ifdef __SANITIZE_ADDRESS__
  // A block for every buffer, so that AddressSanitizer watches the edges of each.
  void reserve(size_t) { blocks_.clear(); }
  float* take(size_t size) {
    blocks_.push_back(std::make_unique<Block>(size * sizeof(float)));
    return blocks_.back()->as<float>();
  }

  std::vector<std::unique_ptr<Block>> blocks_;
#else
  void reserve(size_t size) {
    used_ = 0;
    if (size <= size_) return;
    memory_ = nullptr;
    size_ = 0;  // nothing is held should the allocation fail
    memory_ = std::make_unique<Block>(size * sizeof(float));
    size_ = size;
  }
  float* take(size_t size) {
    used_ += size;
    return memory_->as<float>() + used_ - size;
  }

  std::unique_ptr<Block> memory_;
  size_t size_ = 0, used_ = 0;
#endif
};

}  // namespace kangaroo
