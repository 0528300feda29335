// The forward of a span of layers and of the head, compiled once for every instruction set.
//
// Every thread runs the whole of it: a phase is divided by outputs, rows or heads, and the threads meet before the
// next phase reads what they wrote. How work is divided never changes a value.
#include "attention.h"
#include "functions.h"
#include "plan.h"
#include "tile.h"

namespace kangaroo {
namespace KANGAROO_ISA {
namespace {

struct Strides {
  size_t hidden, normed, qkv, attended, gated;

  explicit Strides(const Pass& pass)
      : hidden(pass.shape->hidden_size), normed(round_up(hidden)),
        qkv(round_up((pass.shape->num_heads + 2 * pass.shape->num_kv_heads) * pass.shape->head_dim)),
        attended(round_up(pass.shape->num_heads * pass.shape->head_dim)), gated(0) {
    const Weight* down = (*pass.layers)[pass.start].down.get();
    if (down) gated = round_up(down->num_inputs);
  }
};

// Norm rows into a thread's own buffer, all of them: cheaper than meeting for them. Many rows share one buffer.
const float* norm_rows(const float* rows, const float* weight, float eps, std::pair<size_t, size_t> shape,
                       const std::vector<float*>& buffers, Team& team) {
  const auto [num_rows, size] = shape;
  const size_t padded = round_up(size);
  float* normed = buffers[team.thread];
  const auto [first, last] = num_rows <= kOwnRows ? std::pair<size_t, size_t>{0, num_rows} : team.share(num_rows);
  for (size_t row = first; row < last; ++row) rms_norm(rows + row * size, weight, eps, size, normed + row * padded);
  if (num_rows > kOwnRows) team.meet();
  return normed;
}

const float* norm_rows(const Pass& pass, const float* hidden, const std::vector<float>& weight, Team& team) {
  return norm_rows(hidden, weight.data(), pass.shape->norm_eps, {pass.num_rows, pass.shape->hidden_size},
                   pass.scratch.normed, team);
}

// A weight's panels, this thread's share first; nothing where it is not known.
std::pair<Stretch, Stretch> panels_of(const Weight* weight, const Team& team) {
  if (!weight) return {};
  const char *first = weight->panels->as<char>(), *own = start_of_share(*weight, team);
  return {{own, first + weight->panels->num_bytes()}, {first, own}};
}

// Wait for the other threads, and meanwhile fetch the weights that are multiplied next.
void meet_before(const Weight* next, const Weight* following, Team& team) {
  const auto [own, rest] = panels_of(next, team);
  const auto [following_own, following_rest] = panels_of(following, team);
  team.meet({own, rest, following_own, following_rest});
}

// out [rows, num_outputs] = x times weight, each thread its share of the panels.
void project(const Upcoming& upcoming, const float* x, size_t num_rows, size_t row_stride, float* out,
             size_t out_stride, const Team& team) {
  const Weight& weight = upcoming.first;
  multiply_weight(upcoming, x, num_rows, row_stride, team,
                  [&](size_t row, size_t panel, size_t taken, const float* values) {
                    for (size_t p = 0; p < taken; ++p) {
                      const size_t column = (panel + p) * 16;
                      store_first(out + row * out_stride + column, finished(weight, panel + p, values + p * 16),
                                  weight.num_outputs - column);
                    }
                  });
}

void project_and_gate(const Pass& pass, const Upcoming& upcoming, const float* x, const Strides& strides,
                      const Team& team) {
  const Weight& weight = upcoming.first;
  const bool is_silu = pass.shape->activation == Activation::silu;
  multiply_weight(upcoming, x, pass.num_rows, strides.normed, team,
                  [&](size_t row, size_t panel, size_t taken, const float* values) {
                    for (size_t p = 0; p < taken; p += 2) {
                      const Lanes gate = finished(weight, panel + p, values + p * 16);
                      const Lanes up = finished(weight, panel + p + 1, values + p * 16 + 16);
                      const Lanes gated = (is_silu ? silu(gate) : gelu_tanh(gate)) * up;
                      store(pass.scratch.gated + row * strides.gated + (panel + p) / 2 * 16, gated);
                    }
                  });
}

// out = hidden + x times weight, normed first where the layer has a norm there (Gemma 2).
void project_and_add(const Pass& pass, const Upcoming& upcoming, const float* x, size_t row_stride, const float* hidden,
                     const std::vector<float>& post_norm, Team& team) {
  const Weight& weight = upcoming.first;
  const Strides strides(pass);
  if (!post_norm.empty()) {
    project(upcoming, x, pass.num_rows, row_stride, pass.scratch.update, strides.normed, team);
    meet_before(upcoming.second, nullptr, team);
    const auto [first, last] = team.share(pass.num_rows);
    for (size_t row = first; row < last; ++row) {
      float* update = pass.scratch.update + row * strides.normed;
      rms_norm(update, post_norm.data(), pass.shape->norm_eps, strides.hidden, update);
      for (size_t i = 0; i < strides.hidden; ++i) {
        pass.out[row * strides.hidden + i] = hidden[row * strides.hidden + i] + update[i];
      }
    }
    return meet_before(upcoming.second, nullptr, team);
  }
  multiply_weight(upcoming, x, pass.num_rows, row_stride, team,
                  [&](size_t row, size_t panel, size_t taken, const float* values) {
                    for (size_t p = 0; p < taken; ++p) {
                      const size_t column = (panel + p) * 16, at = row * strides.hidden + column;
                      const size_t count = strides.hidden - column;
                      store_first(pass.out + at,
                                  load_first(hidden + at, count) + finished(weight, panel + p, values + p * 16), count);
                    }
                  });
  meet_before(upcoming.second, nullptr, team);
}

// x * cosine + roll(x, E / 2) * sine, in place.
void rotate(float* head, const float* cosine, const float* sine, size_t dim) {
  const size_t half = dim / 2;
  for (size_t i = 0; i < half; i += 16) {
    const size_t count = half - i;
    const Lanes low = load_first(head + i, count), high = load_first(head + half + i, count);
    const Lanes low_out = multiply_add(high, load_first(sine + i, count), low * load_first(cosine + i, count));
    const Lanes high_out =
        multiply_add(low, load_first(sine + half + i, count), high * load_first(cosine + half + i, count));
    store_first(head + i, low_out, count);
    store_first(head + half + i, high_out, count);
  }
}

// Norm and rotate the queries and keys of every row, and write keys and values into the cache.
void place_heads(const Pass& pass, size_t layer_id, const Strides& strides, const Team& team) {
  const Shape& shape = *pass.shape;
  const Layer& layer = (*pass.layers)[layer_id];
  const size_t dim = shape.head_dim, heads = shape.num_heads, kv_heads = shape.num_kv_heads, padded = round_up(dim);
  // Head by head: keys of neighbouring rows share cache lines, which two threads must not fight for.
  const auto [first, last] = team.share(pass.num_rows * (heads + 2 * kv_heads));
  for (size_t item = first; item < last; ++item) {
    const size_t head = item / pass.num_rows, row_id = item % pass.num_rows;
    const Row& row = pass.rows[row_id];
    const size_t sequence = pass.segment_of(row).sequence;
    float* own = pass.scratch.qkv + row_id * strides.qkv + head * dim;
    if (head >= heads + kv_heads) {
      float* value = pass.cache->values_of(layer_id, sequence, head - heads - kv_heads) + row.slot * padded;
      std::memcpy(value, own, dim * sizeof(float));
      continue;
    }
    const std::vector<float>& norm = head < heads ? layer.query_norm : layer.key_norm;
    if (!norm.empty()) rms_norm(own, norm.data(), shape.norm_eps, dim, own);
    rotate(own, pass.cosine + row.position * dim, pass.sine + row.position * dim, dim);
    if (head >= heads) {
      float* panel = pass.cache->keys_of(layer_id, sequence, head - heads) + row.slot / 16 * dim * 16 + row.slot % 16;
      for (size_t i = 0; i < dim; ++i) panel[i * 16] = own[i];
    }
  }
}

size_t num_blocks(const Segment& segment) { return (segment.num_rows + kScoreRows - 1) / kScoreRows; }

// The rows [first, last) this thread takes of a task's. Tasks are dealt out in turn, so that the long rows at the end of
// a prompt are spread out; those left over, fewer than there are threads, are divided by rows.
std::pair<size_t, size_t> rows_of_task(size_t task, size_t num_tasks, size_t num_rows, const Team& team) {
  const size_t num_left = num_tasks % team.num_threads, num_whole = num_tasks - num_left;
  const size_t num_takers = task < num_whole ? 1 : team.num_threads / num_left;
  const size_t first_taker = task < num_whole ? task % team.num_threads : (task - num_whole) * num_takers;
  if (team.thread < first_taker || team.thread >= first_taker + num_takers) return {0, 0};
  return share_out(num_rows, team.thread - first_taker, num_takers);
}

void attend_all(const Pass& pass, size_t layer_id, const Strides& strides, const Team& team) {
  // Tasks are blocks of a segment's rows under one head. Smaller ones would come out more even, but read the keys and
  // values more often.
  const size_t num_heads = pass.shape->num_heads;
  size_t num_tasks = 0, task = 0;
  for (const Segment& segment : pass.segments) num_tasks += num_blocks(segment) * num_heads;
  for (const Segment& segment : pass.segments) {
    for (size_t start = 0; start < segment.num_rows; start += kScoreRows) {
      const size_t count = std::min(kScoreRows, segment.num_rows - start);
      for (size_t head = 0; head < num_heads; ++head, ++task) {
        const auto [first, last] = rows_of_task(task, num_tasks, count, team);
        if (first == last) continue;
        attend(pass, layer_id, {head, segment.first_row + start + first, last - first}, strides.qkv, strides.attended,
               pass.scratch.scores[team.thread]);
      }
    }
  }
}

void run_attention(const Pass& pass, size_t layer_id, const float* hidden, Team& team) {
  const Layer& layer = (*pass.layers)[layer_id];
  const Strides strides(pass);
  const float* normed = norm_rows(pass, hidden, layer.input_norm, team);
  project({*layer.qkv, layer.output.get()}, normed, pass.num_rows, strides.normed, pass.scratch.qkv, strides.qkv, team);
  meet_before(layer.output.get(), layer.after_output, team);
  place_heads(pass, layer_id, strides, team);
  meet_before(layer.output.get(), layer.after_output, team);
  attend_all(pass, layer_id, strides, team);
  meet_before(layer.output.get(), layer.after_output, team);
  project_and_add(pass, {*layer.output, layer.after_output}, pass.scratch.attended, strides.attended, hidden,
                  layer.post_attention_norm, team);
}

void run_mlp(const Pass& pass, size_t layer_id, const float* hidden, Team& team) {
  const Layer& layer = (*pass.layers)[layer_id];
  const Strides strides(pass);
  const float* normed = norm_rows(pass, hidden, layer.mlp_norm, team);
  project_and_gate(pass, {*layer.gate_up, layer.down.get()}, normed, strides, team);
  meet_before(layer.down.get(), layer.after_down, team);
  project_and_add(pass, {*layer.down, layer.after_down}, pass.scratch.gated, strides.gated, hidden,
                  layer.post_mlp_norm, team);
}

// Every thread copies its share; no thread goes on before all have.
void copy_states(const Pass& pass, const float* hidden, float* to, Team& team) {
  const auto [first, last] = team.share(pass.num_rows * pass.shape->hidden_size);
  std::memcpy(to + first, hidden + first, (last - first) * sizeof(float));
  team.meet();
}

void run_span(const Pass& pass, Team& team) {
  const float* hidden = pass.hidden;
  for (size_t layer_id = pass.start; layer_id < pass.stop; ++layer_id) {
    const uint8_t skips = pass.skips.empty() ? 0 : pass.skips[layer_id];
    if ((*pass.layers)[layer_id].qkv && !(skips & kSkipAttention)) {
      run_attention(pass, layer_id, hidden, team);
      hidden = pass.out;
    }
    if ((*pass.layers)[layer_id].gate_up && !(skips & kSkipMlp)) {
      run_mlp(pass, layer_id, hidden, team);
      hidden = pass.out;
    }
    for (const auto& [tap, buffer] : pass.taps) {
      if (tap == layer_id + 1) copy_states(pass, hidden, buffer, team);
    }
  }
  if (hidden != pass.out) copy_states(pass, hidden, pass.out, team);
}

// Keep the largest logit of every lane and where it was; the earlier one wins a tie.
void keep_best(const Lanes& logits, size_t panel, size_t num_outputs, float* values, int32_t* ids) {
  IntLanes best_ids;
  std::memcpy(&best_ids, ids, sizeof(best_ids));
  const Lanes best = load(values);
  const size_t count = num_outputs - panel * 16;
  const Lanes real = count >= 16 ? logits
                                 : select(lanes_between(0, static_cast<int32_t>(count)), logits, broadcast(-INFINITY));
  const IntLanes better = real > best;
  const IntLanes here = lane_ids() + broadcast_int(static_cast<int32_t>(panel * 16));
  store(values, select(better, real, best));
  best_ids = select(better, here, best_ids);
  std::memcpy(ids, &best_ids, sizeof(best_ids));
}

void pick(const HeadPass& pass, size_t row, size_t num_threads) {
  float best = -INFINITY;
  int32_t id = INT32_MAX;
  for (size_t thread = 0; thread < num_threads; ++thread) {
    for (int lane = 0; lane < 16; ++lane) {
      const float value = pass.best_values[thread][row * 16 + lane];
      const int32_t found = pass.best_ids[thread][row * 16 + lane];
      if (value > best || (value == best && found < id)) {
        best = value;
        id = found;
      }
    }
  }
  // No logit above minus infinity, or none a number: the lowest id, as a tie.
  if (id == INT32_MAX) id = 0;
  if (pass.argmax) pass.argmax[row] = id;
  if (!pass.confidence) return;
  const size_t num_outputs = pass.head->num_outputs;
  const float* scores = pass.scores + row * round_up(num_outputs);
  Lanes total = broadcast(0.0f);
  for (size_t i = 0; i < num_outputs; i += 16) {
    const size_t count = num_outputs - i < 16 ? num_outputs - i : 16;
    const Lanes weight = exponential(load(scores + i) - broadcast(best));
    total = total + select(lanes_between(0, static_cast<int32_t>(count)), weight, broadcast(0.0f));
  }
  pass.confidence[row] = 1.0f / sum(total);
}

void run_head(const HeadPass& pass, Team& team) {
  const Weight& head = *pass.head;
  const size_t size = head.num_inputs, padded = round_up(size);
  const float* states = pass.hidden;
  size_t stride = size;
  if (pass.norm) {
    states = norm_rows(states, pass.norm, pass.norm_eps, {pass.num_rows, size}, pass.normed, team);
    stride = padded;
  }
  float* values = pass.best_values[team.thread];
  int32_t* ids = pass.best_ids[team.thread];
  for (size_t i = 0; i < pass.num_rows * 16; ++i) {
    values[i] = -INFINITY;
    ids[i] = INT32_MAX;
  }
  multiply_weight({head, nullptr}, states, pass.num_rows, stride, team,
                  [&](size_t row, size_t panel, size_t taken, const float* products) {
                    for (size_t p = 0; p < taken; ++p) {
                      Lanes logits = finished(head, panel + p, products + p * 16);
                      if (pass.softcap != 0) logits = soft_cap(logits, pass.softcap);
                      const size_t column = (panel + p) * 16;
                      if (pass.logits) {
                        store_first(pass.logits + row * head.num_outputs + column, logits, head.num_outputs - column);
                      }
                      if (pass.confidence) store(pass.scores + row * round_up(head.num_outputs) + column, logits);
                      keep_best(logits, panel + p, head.num_outputs, values + row * 16, ids + row * 16);
                    }
                  });
  team.meet();
  if (!pass.argmax && !pass.confidence) return;
  for (size_t row = team.thread; row < pass.num_rows; row += team.num_threads) pick(pass, row, team.num_threads);
}

void run_linear(const Weight& weight, const float* hidden, size_t num_rows, float* out, Team& team) {
  project({weight, nullptr}, hidden, num_rows, weight.num_inputs, out, weight.num_outputs, team);
}

float sum_values(const float* values, size_t count) {
  Lanes totals[8];
  for (Lanes& total : totals) total = broadcast(0.0f);
  for (size_t i = 0; i + 128 <= count; i += 128) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) totals[j] = totals[j] + load(values + i + j * 16);
  }
  for (int j = 1; j < 8; ++j) totals[0] = totals[0] + totals[j];
  return sum(totals[0]);
}

// 12 independent chains of multiply-adds on full vectors: what the machine can do at best. 2 * 12 * kWidth operations
// a step and part.
float multiply_registers(size_t num_steps) {
  Part totals[12];
#pragma GCC unroll 12
  for (int j = 0; j < 12; ++j) totals[j] = Part{} + static_cast<float>(j);
  Part factor = Part{} + 0.999f;
  asm volatile("" : "+m"(factor));
  for (size_t step = 0; step < num_steps; ++step) {
#pragma GCC unroll 12
    for (int j = 0; j < 12; ++j) totals[j] = multiply_add(totals[j], factor, factor);
  }
  Part all = totals[0];
  for (int j = 1; j < 12; ++j) all = all + totals[j];
  return all[0];
}

}  // namespace
}  // namespace KANGAROO_ISA

#define KANGAROO_JOIN(a, b) a##b
#define KANGAROO_NAME(isa) KANGAROO_JOIN(isa, _kernels)
#define KANGAROO_TEXT(isa) #isa
#define KANGAROO_STRING(isa) KANGAROO_TEXT(isa)

const Kernels& KANGAROO_NAME(KANGAROO_ISA)() {
  using namespace KANGAROO_ISA;
  static const Kernels kernels{KANGAROO_STRING(KANGAROO_ISA), run_span, run_head, run_linear, sum_values,
                               multiply_registers};
  return kernels;
}

}  // namespace kangaroo
