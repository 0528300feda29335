// Scratch memory of one call at a time, kept between calls and grown when a larger one comes.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "plan.h"

namespace kangaroo {

class Workspace {
 public:
  // Forget what earlier calls took; of the memory, keep the largest block.
  void reset() {
    if (blocks_.size() > 1) blocks_.erase(blocks_.begin(), blocks_.end() - 1);
    left_ = blocks_.empty() ? 0 : blocks_.back()->num_bytes() / sizeof(float);
    taken_ = 0;
  }

  // Memory for states [R, D].
  float* take_states(size_t num_rows, size_t size) { return take(round_up(num_rows * size)); }

  // Point the scratch buffers of a pass into this memory.
  void prepare(Pass& pass, size_t num_threads) {
    const Shape& shape = *pass.shape;
    const size_t rows = pass.num_rows, normed = rows * round_up(shape.hidden_size);
    const size_t qkv = rows * round_up((shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim);
    const size_t attended = rows * round_up(shape.num_heads * shape.head_dim);
    const Weight* down = (*pass.layers)[pass.start].down.get();
    const size_t gated = down ? rows * round_up(down->num_inputs) : 0;
    const size_t scores = kScoreRows * pass.cache->num_slots;
    pass.scratch = {take(qkv), take(attended), take(gated), take(normed), {}, {}};
    for (size_t thread = 0; thread < num_threads; ++thread) {
      pass.scratch.normed.push_back(thread == 0 || rows <= kOwnRows ? take(normed) : pass.scratch.normed[0]);
      pass.scratch.scores.push_back(take(scores));
    }
  }

  void prepare(HeadPass& pass, size_t num_threads) {
    const size_t rows = pass.num_rows, normed = pass.norm ? rows * round_up(pass.head->num_inputs) : 0;
    const size_t scores = pass.confidence ? rows * round_up(pass.head->num_outputs) : 0;
    pass.scores = take(scores);
    for (size_t thread = 0; thread < num_threads; ++thread) {
      pass.normed.push_back(thread == 0 || rows <= kOwnRows ? take(normed) : pass.normed[0]);
      pass.best_values.push_back(take(rows * kLanes));
      pass.best_ids.push_back(reinterpret_cast<int32_t*>(take(rows * kLanes)));
    }
  }

 private:
  // Sizes in floats, all of them whole panels, so that every buffer is aligned to its cache line.
  float* take(size_t size) {
#ifdef __SANITIZE_ADDRESS__
    constexpr size_t kLeast = 0;  // a block for every buffer, so that AddressSanitizer watches the edges of each
#else
    constexpr size_t kLeast = size_t{1} << 16;
#endif
    if (kLeast == 0 || blocks_.empty() || size > left_) {
      const size_t room = std::max({size, kLeast, 2 * taken_});
      blocks_.push_back(std::make_unique<Block>((kLeast ? room : size) * sizeof(float)));
      left_ = kLeast ? room : size;
    }
    float* taken = blocks_.back()->as<float>() + blocks_.back()->num_bytes() / sizeof(float) - left_;
    left_ -= size;
    taken_ += size;
    return taken;
  }

  std::vector<std::unique_ptr<Block>> blocks_;  // only the last one has room left
  size_t left_ = 0, taken_ = 0;
};

}  // namespace kangaroo
