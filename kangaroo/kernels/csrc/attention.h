// Attention of packed rows over the cache. A row's result depends on its own position and path alone: scores are
// summed over a head's dimensions in order, the softmax sums lane by lane of the absolute position, and values are
// added position by position. Slots a row does not see are skipped.
#pragma once

#include "functions.h"
#include "plan.h"
#include "tile.h"

namespace kangaroo {
namespace KANGAROO_ISA {

// Rows first..first+count-1 of one segment, under one head.
struct AttentionTask {
  size_t head, first, count;
};

inline size_t slot_at(const Segment& segment, const Row& row, size_t position) {
  if (row.path.empty() || position < segment.base) return position;
  return segment.base + row.path[position - segment.base];
}

inline size_t first_visible(const Layer& layer, const Row& row) {
  const size_t seen = row.position + 1, window = static_cast<size_t>(layer.window);
  return window != 0 && seen > window ? seen - window : 0;
}

// Turn the scores at positions first..last-1 into weights; returns one over their sum.
inline float softmax(float* scores, size_t first, size_t last, const Shape& shape) {
  const Lanes scale = broadcast(shape.attention_scale);
  Lanes most = broadcast(-INFINITY);
  for (size_t block = first / 16 * 16; block < last; block += 16) {
    Lanes score = load(scores + block) * scale;
    if (shape.softcap != 0) score = soft_cap(score, shape.softcap);
    store(scores + block, score);
    const IntLanes visible = lanes_between(static_cast<int32_t>(first > block ? first - block : 0),
                                           static_cast<int32_t>(last - block < 16 ? last - block : 16));
    most = select(visible, maximum(score, most), most);
  }
  const Lanes top = broadcast(largest(most)), zero = broadcast(0.0f);
  Lanes total = zero;
  for (size_t block = first / 16 * 16; block < last; block += 16) {
    const IntLanes visible = lanes_between(static_cast<int32_t>(first > block ? first - block : 0),
                                           static_cast<int32_t>(last - block < 16 ? last - block : 16));
    const Lanes weight = select(visible, exponential(load(scores + block) - top), zero);
    store(scores + block, weight);
    total = total + weight;
  }
  return 1.0f / sum(total);
}

// Scores of the task's rows against the slots any of them sees, then moved from slots to positions.
inline void score(const Pass& pass, size_t layer_id, const AttentionTask& task, size_t query_stride, float* scores,
                  size_t score_stride) {
  const Shape& shape = *pass.shape;
  const Row* rows = &pass.rows[task.first];
  const Segment& segment = pass.segment_of(rows[0]);
  const size_t kv_head = task.head / (shape.num_heads / shape.num_kv_heads), dim = shape.head_dim;
  const float* keys = pass.cache->keys_of(layer_id, segment.sequence, kv_head);
  size_t first = SIZE_MAX, last = 0;
  for (size_t m = 0; m < task.count; ++m) {
    const size_t begin = first_visible((*pass.layers)[layer_id], rows[m]) / 16;
    first = begin < first ? begin : first;
    last = rows[m].slot / 16 + 1 > last ? rows[m].slot / 16 + 1 : last;
  }
  const float* queries = pass.scratch.qkv + task.first * query_stride + task.head * dim;
  const TileStrides strides{query_stride, dim * 16, 16, score_stride};
  for (size_t row = 0; row < task.count;) {
    const size_t count = take_rows(task.count - row, kAttentionRows);
    for (size_t panel = first; panel < last;) {
      const size_t panels = take_panels(count, last - panel);
      const float* own = keys + panel * dim * 16;
      const Ahead<float> ahead(own + panels * dim * 16, dim * 16);
      multiply<float>(count, panels, queries + row * query_stride, own, ahead, dim, strides,
                      scores + row * score_stride + panel * 16);
      panel += panels;
    }
    row += count;
  }
  for (size_t m = 0; m < task.count; ++m) {
    // Ancestors never stand before their depth, so moving them forward overwrites nothing still needed.
    float* own = scores + m * score_stride + segment.base;
    for (size_t depth = 0; depth < rows[m].path.size(); ++depth) own[depth] = own[rows[m].path[depth]];
  }
}

inline void attend(const Pass& pass, size_t layer_id, const AttentionTask& task, size_t query_stride,
                   size_t out_stride, float* scores) {
  const Shape& shape = *pass.shape;
  const Layer& layer = (*pass.layers)[layer_id];
  const Row* rows = &pass.rows[task.first];
  const Segment& segment = pass.segment_of(rows[0]);
  const size_t score_stride = pass.cache->num_slots, padded = round_up(shape.head_dim);
  score(pass, layer_id, task, query_stride, scores, score_stride);
  const size_t kv_head = task.head / (shape.num_heads / shape.num_kv_heads);
  const float* values = pass.cache->values_of(layer_id, segment.sequence, kv_head);
  // Positions that all rows see in the same slots: up to the first row for a chain, the committed ones for a tree.
  const size_t begin = first_visible(layer, rows[0]);
  bool same_begin = true;
  for (size_t m = 0; m < task.count; ++m) same_begin = same_begin && first_visible(layer, rows[m]) == begin;
  const size_t common = segment.parents.empty() ? rows[0].position + 1 : segment.base;
  float scales[kScoreRows];
  for (size_t m = 0; m < task.count; ++m) {
    scales[m] = softmax(scores + m * score_stride, first_visible(layer, rows[m]), rows[m].position + 1, shape);
  }
  alignas(64) float out[kMaxRows][64];
  const TileStrides strides{score_stride, 16, padded, 64};
  const size_t num_panels = padded / 16;
  for (size_t panel = 0; panel < num_panels;) {
    size_t taken = 1;
    for (size_t row = 0; row < task.count;) {
      const size_t count = same_begin ? take_rows(task.count - row, kAttentionRows) : 1;
      if (row == 0) taken = take_panels(count, num_panels - panel);
      const size_t from = first_visible(layer, rows[row]), to = common > from ? common : from;
      for (size_t done = 0; done < taken;) {
        const size_t now = take_panels(count, taken - done);
        const float* own = values + from * padded + (panel + done) * 16;
        const Ahead<float> ahead(own + now * 16, 16);
        multiply<float>(count, now, scores + row * score_stride + from, own, ahead, to - from, strides,
                        &out[0][done * 16]);
        done += now;
      }
      for (size_t m = 0; m < count; ++m) {
        const Row& own = rows[row + m];
        const float* weights = scores + (row + m) * score_stride;
        for (size_t p = 0; p < taken; ++p) {
          Lanes total = load(&out[m][p * 16]);
          for (size_t position = to; position <= own.position; ++position) {
            const float* value = values + slot_at(segment, own, position) * padded + (panel + p) * 16;
            total = multiply_add(load(value), broadcast(weights[position]), total);
          }
          const size_t column = (panel + p) * 16;
          store_first(pass.scratch.attended + (task.first + row + m) * out_stride + task.head * shape.head_dim + column,
                      total * broadcast(scales[row + m]), shape.head_dim - column);
        }
      }
      row += count;
    }
    panel += taken;
  }
}

}  // namespace KANGAROO_ISA
}  // namespace kangaroo
