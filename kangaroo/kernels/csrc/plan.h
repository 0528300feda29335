// What every instruction set's kernels share: packed weights, layers, cache, and the rows of one pass.
//
// Shapes: R rows of a pass, D hidden size, F MLP size, H query heads, G key-value heads, E head size, V vocabulary.
// Rows of scratch buffers and of cached values are padded to whole panels of 16 numbers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "block.h"
#include "pool.h"

namespace kangaroo {

constexpr int kLanes = 16;

inline size_t round_up(size_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

enum class Storage { float32, bfloat16, float16, int8 };

inline size_t bytes_of(Storage storage) {
  return storage == Storage::float32 ? 4 : storage == Storage::int8 ? 1 : 2;
}

// A matrix [num_outputs, num_inputs] in panels of 16 outputs, each panel input-major: [panels, num_inputs, 16].
// bfloat16 panels hold two inputs side by side, [panels, num_inputs / 2, 16, 2], so that one load serves both.
// A paired weight holds two matrices of num_outputs rows each, panel by panel in turn (gate, up, gate, up, ...).
// Scales (int8) and biases stand in panel order too; absent ones are empty.
struct Weight {
  Storage storage;
  size_t num_outputs, num_inputs;
  bool paired;
  std::shared_ptr<Block> panels;
  std::vector<float> scales, bias;

  size_t num_panels() const { return round_up(num_outputs) / kLanes * (paired ? 2 : 1); }
  bool in_pairs() const { return storage == Storage::bfloat16; }
  size_t panel_size() const { return (in_pairs() ? (num_inputs + 1) / 2 * 2 : num_inputs) * kLanes; }
  // Where input k of a lane stands in its panel.
  size_t place_in_panel(size_t k, size_t lane) const {
    return in_pairs() ? (k / 2 * kLanes + lane) * 2 + k % 2 : k * kLanes + lane;
  }
};

enum class Activation { silu, gelu_tanh };

// One decoder layer; an adapter's may have no attention (qkv is null) or no MLP (gate_up). Absent norms are empty.
// after_output and after_down: the weights that are multiplied next where nothing is skipped, null behind the last.
struct Layer {
  std::shared_ptr<const Weight> qkv, output, gate_up, down;
  const Weight *after_output, *after_down;
  std::vector<float> input_norm, query_norm, key_norm, post_attention_norm, mlp_norm, post_mlp_norm;
  int64_t window = 0;  // positions a row sees, itself included; 0 for all
};

struct Shape {
  size_t hidden_size, num_heads, num_kv_heads, head_dim;
  float norm_eps, attention_scale, softcap;  // softcap 0 for none
  Activation activation;
};

// Keys and values of every layer; keys in panels of 16 slots, so that scores are one more matrix product.
// keys: [layers, sequences, G, slots / 16, E, 16]; values: [layers, sequences, G, slots, round_up(E)].
struct Cache {
  size_t num_layers, num_sequences, num_kv_heads, num_slots, head_dim;
  Block keys, values;

  Cache(size_t layers, size_t sequences, size_t kv_heads, size_t slots, size_t dim)
      : num_layers(layers), num_sequences(sequences), num_kv_heads(kv_heads), num_slots(round_up(slots)),
        head_dim(dim), keys(layers * sequences * kv_heads * num_slots * dim * sizeof(float)),
        values(layers * sequences * kv_heads * num_slots * round_up(dim) * sizeof(float)) {}

  size_t head_index(size_t layer, size_t sequence, size_t head) const {
    return (layer * num_sequences + sequence) * num_kv_heads + head;
  }
  float* keys_of(size_t layer, size_t sequence, size_t head) const {
    return keys.as<float>() + head_index(layer, sequence, head) * num_slots * head_dim;
  }
  float* values_of(size_t layer, size_t sequence, size_t head) const {
    return values.as<float>() + head_index(layer, sequence, head) * num_slots * round_up(head_dim);
  }
};

// Consecutive packed rows of one sequence. Slots below base hold committed tokens; node n of the draft stands in
// slot base + n. Without parents the nodes are a chain.
struct Segment {
  size_t sequence, base, first_node, num_rows, first_row;
  std::vector<int32_t> parents;  // of every node up to the last row's, -1 for one that follows the committed tokens
};

// A row with its ancestors among the draft's nodes, oldest first, itself last: path[d] is its ancestor of depth d.
// A chain's path is 0, 1, 2, ... and stays empty.
struct Row {
  size_t segment, slot, position;
  std::vector<int32_t> path;
};

// Buffers of one pass, every row padded to whole panels. scores [kScoreRows, slots] belong to one thread each, and so
// does normed [R, D] up to kOwnRows rows; the others are shared.
constexpr size_t kScoreRows = 8, kOwnRows = 32;

struct Scratch {
  float *qkv, *attended, *gated, *update;
  std::vector<float*> normed, scores;
};

// What a pass leaves out of a layer: the states go on as they entered it.
constexpr uint8_t kSkipAttention = 1, kSkipMlp = 2;

// One forward over layers [start, stop). Taps are buffers [R, D] that receive the states entering their layer.
struct Pass {
  const Shape* shape;
  const std::vector<Layer>* layers;
  const Cache* cache;
  size_t start, stop, num_rows;
  std::vector<Segment> segments;
  std::vector<Row> rows;
  const float* hidden;         // [R, D]
  float* out;                  // [R, D]
  const float *cosine, *sine;  // [positions, E]; the first half of sine carries the minus sign
  std::vector<std::pair<size_t, float*>> taps;
  std::vector<uint8_t> skips;  // [layers], kSkipAttention and kSkipMlp; empty where nothing is left out
  Scratch scratch;

  const Segment& segment_of(const Row& row) const { return segments[row.segment]; }
};

// The head: logits [R, V], argmax [R] and the confidence [R] of that argmax, each where wanted (not null).
struct HeadPass {
  const Weight* head;
  const float* norm;  // [D], null where the states are normed already
  float norm_eps, softcap;
  size_t num_rows;
  const float* hidden;  // [R, D]
  float* logits;
  int64_t* argmax;
  float* confidence;
  std::vector<float*> normed;        // [R, D] of every thread
  float* scores;                     // [R, V], every row padded to whole panels
  std::vector<float*> best_values;   // [R, 16] of every thread, and where each was found
  std::vector<int32_t*> best_ids;
};

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  void (*run_span)(const Pass& pass, Team& team);
  void (*run_head)(const HeadPass& pass, Team& team);
  void (*run_linear)(const Weight& weight, const float* hidden, size_t num_rows, float* out, Team& team);
  float (*sum)(const float* values, size_t count);
  float (*multiply_registers)(size_t num_steps);
};

#if defined(__aarch64__)
const Kernels& neon_kernels();
#else
const Kernels& baseline_kernels();
#endif
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

}  // namespace kangaroo
