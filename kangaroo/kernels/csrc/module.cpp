// The Python module: every argument is checked here or, where an address comes without its tensor, by kernels/cpu.py.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <mutex>
#include <stdexcept>

#include "pack.h"
#include "plan.h"
#include "workspace.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kangaroo {
namespace {

using Matrix = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
// (sequence, base, first node, number of rows, parents of the nodes or None for a chain)
using SegmentArgument = std::tuple<size_t, size_t, size_t, size_t, std::optional<std::vector<int32_t>>>;

// Addresses of cosine and sine [num_positions, E], and num_positions.
using Tables = std::tuple<uintptr_t, uintptr_t, size_t>;

#if defined(__aarch64__)
const Kernels* const simplest_kernels = &neon_kernels();
#else
const Kernels* const simplest_kernels = &baseline_kernels();
#endif
const Kernels* active_kernels = simplest_kernels;
std::mutex pass_mutex;

Workspace& workspace() {
  static Workspace* made = new Workspace;
  return *made;
}

void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

std::vector<const Kernels*> supported_kernels() {
  std::vector<const Kernels*> found{simplest_kernels};
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2) found.push_back(&avx2_kernels());
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    found.push_back(&avx512_kernels());
  }
#endif
  return found;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* kernels : supported_kernels()) names.push_back(kernels->name);
  return names;
}

void select_instruction_set(const std::string& name) {
  std::lock_guard<std::mutex> lock(pass_mutex);
  for (const Kernels* kernels : supported_kernels()) {
    if (name != kernels->name) continue;
    active_kernels = kernels;
    return;
  }
  throw std::invalid_argument("this processor cannot run the kernels for " + name);
}

Storage storage_of(const Matrix& rows) {
  const nb::dlpack::dtype type = rows.dtype();
  require(type.lanes == 1, "weights must be plain numbers");
  if (type == nb::dtype<float>()) return Storage::float32;
  if (type == nb::dtype<int8_t>()) return Storage::int8;
  if (type.bits == 16 && type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat)) return Storage::bfloat16;
  if (type.bits == 16 && type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float)) return Storage::float16;
  throw std::invalid_argument("weights must be float32, bfloat16, float16 or int8");
}

std::shared_ptr<Weight> make_weight(const Matrix& rows, bool paired, std::optional<Vector> scales,
                                    std::optional<Vector> bias) {
  const Storage storage = storage_of(rows);
  require(rows.shape(0) > 0 && rows.shape(1) > 0, "a weight must not be empty");
  require(!paired || rows.shape(0) % 2 == 0, "a paired weight must have an even number of rows");
  require((storage == Storage::int8) == scales.has_value(), "int8 weights, and no others, must come with scales");
  require(!scales || scales->shape(0) == rows.shape(0), "there must be one scale a row");
  require(!bias || bias->shape(0) == rows.shape(0), "there must be one bias a row");
  auto weight = std::make_shared<Weight>();
  weight->storage = storage;
  weight->num_outputs = rows.shape(0) / (paired ? 2 : 1);
  weight->num_inputs = rows.shape(1);
  weight->paired = paired;
  {
    nb::gil_scoped_release released;
    pack(*weight, rows.data());
    if (scales) weight->scales = pack_column(*weight, scales->data());
    if (bias) weight->bias = pack_column(*weight, bias->data());
  }
  return weight;
}

std::shared_ptr<Cache> make_cache(size_t layers, size_t sequences, size_t kv_heads, size_t slots, size_t dim) {
  size_t numbers = 1;
  for (size_t factor : {layers, sequences, kv_heads, slots + kLanes, dim + kLanes}) {
    require(factor > 0 && !__builtin_mul_overflow(numbers, factor, &numbers) && numbers < SIZE_MAX / 8,
            "a cache must hold something, and fit the address space");
  }
  return std::make_shared<Cache>(layers, sequences, kv_heads, slots, dim);
}

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void gather(const Weight& weight, const std::vector<size_t>& rows, uintptr_t out) {
  for (size_t row : rows) require(row < num_rows_of(weight), "row ids must be below the number of rows");
  for (size_t i = 0; i < rows.size(); ++i) unpack_row(weight, rows[i], at<float>(out) + i * weight.num_inputs);
}

std::vector<float> copy(const std::optional<Vector>& values, size_t size, const char* name) {
  if (!values) return {};
  require(values->shape(0) == size, std::string(name) + " must have " + std::to_string(size) + " numbers");
  return std::vector<float>(values->data(), values->data() + size);
}

void check_weight(const Weight& weight, size_t num_outputs, size_t num_inputs, bool paired) {
  require(weight.num_outputs == num_outputs && weight.num_inputs == num_inputs && weight.paired == paired,
          "a layer's weights must fit its shape");
}

struct Stack {
  Shape shape;
  std::vector<Layer> layers;

  Stack(std::tuple<size_t, size_t, size_t, size_t> sizes, float norm_eps, float attention_scale, float softcap,
        bool gelu)
      : shape{std::get<0>(sizes), std::get<1>(sizes), std::get<2>(sizes), std::get<3>(sizes), norm_eps,
              attention_scale, softcap, gelu ? Activation::gelu_tanh : Activation::silu} {
    require(shape.hidden_size > 0 && shape.num_kv_heads > 0 && shape.head_dim > 0 && shape.head_dim % 2 == 0 &&
                shape.num_heads > 0 && shape.num_heads % shape.num_kv_heads == 0,
            "heads must be a multiple of key-value heads, and their size even");
  }

  void add_layer(std::vector<std::shared_ptr<Weight>> weights, std::vector<std::optional<Vector>> norms,
                 int64_t window) {
    require(weights.size() == 4 && norms.size() == 6 && window >= 0, "a layer has 4 weights, 6 norms and a window");
    const size_t size = shape.hidden_size, inner = shape.num_heads * shape.head_dim;
    require(weights[0] && weights[1], "a layer needs its attention weights");
    check_weight(*weights[0], inner + 2 * shape.num_kv_heads * shape.head_dim, size, false);
    check_weight(*weights[1], size, inner, false);
    require(!weights[2] == !weights[3], "a layer has both weights of the MLP or none");
    if (weights[2]) {
      check_weight(*weights[2], weights[3]->num_inputs, size, true);
      check_weight(*weights[3], size, weights[2]->num_outputs, false);
    }
    require(layers.empty() || !layers[0].down == !weights[3], "layers must all have an MLP or none");
    require(layers.empty() || !weights[3] || layers[0].down->num_inputs == weights[3]->num_inputs,
            "layers must have MLPs of one size");
    Layer layer{weights[0], weights[1], weights[2], weights[3], {}, {}, {}, {}, {}, {}, window};
    layer.input_norm = copy(norms[0], size, "input_norm");
    layer.query_norm = copy(norms[1], shape.head_dim, "query_norm");
    layer.key_norm = copy(norms[2], shape.head_dim, "key_norm");
    layer.post_attention_norm = copy(norms[3], size, "post_attention_norm");
    layer.mlp_norm = copy(norms[4], size, "mlp_norm");
    layer.post_mlp_norm = copy(norms[5], size, "post_mlp_norm");
    require(!layer.input_norm.empty() && layer.mlp_norm.empty() == !weights[2], "a norm is missing");
    layers.push_back(std::move(layer));
  }
};

void add_rows(Pass& pass, const SegmentArgument& argument, size_t num_positions) {
  const auto& [sequence, base, first_node, num_rows, parents] = argument;
  const size_t slots = pass.cache->num_slots, last = first_node + num_rows;
  require(sequence < pass.cache->num_sequences, "the cache has no such sequence");
  // No sum that could overflow.
  require(num_rows > 0 && base <= slots && first_node <= slots - base && num_rows <= slots - base - first_node,
          "the rows must fit the cache");
  require(!parents || parents->size() == last, "there must be one parent a node");
  Segment segment{sequence, base, first_node, num_rows, pass.rows.size(), {}};
  if (parents) segment.parents = *parents;
  for (size_t node = 0; parents && node < last; ++node) {
    require(segment.parents[node] >= -1 && segment.parents[node] < static_cast<int32_t>(node),
            "a node's parent must stand before it");
  }
  for (size_t node = first_node; node < last; ++node) {
    Row row{pass.segments.size(), base + node, base + node, {}};
    if (parents) {
      for (int32_t one = static_cast<int32_t>(node); one >= 0; one = segment.parents[one]) row.path.push_back(one);
      row.path = std::vector<int32_t>(row.path.rbegin(), row.path.rend());
      row.position = base + row.path.size() - 1;
    }
    require(row.position < num_positions, "the rotary tables must cover every position");
    pass.rows.push_back(std::move(row));
  }
  pass.segments.push_back(std::move(segment));
}

// A pass over a span of a stack's layers, still without rows.
Pass make_pass(const Stack& stack, const Cache& cache, std::pair<size_t, size_t> span, const Tables& tables) {
  Pass pass{};
  pass.shape = &stack.shape;
  pass.layers = &stack.layers;
  pass.cache = &cache;
  pass.start = span.first;
  pass.stop = span.second;
  require(pass.start < pass.stop && pass.stop <= stack.layers.size(), "the span must name layers there are");
  require(cache.num_layers == stack.layers.size() && cache.num_kv_heads == stack.shape.num_kv_heads &&
              cache.head_dim == stack.shape.head_dim,
          "the cache must be made for these layers");
  pass.cosine = at<const float>(std::get<0>(tables));
  pass.sine = at<const float>(std::get<1>(tables));
  return pass;
}

// hidden and out: [R, D]; tables: cosine and sine [num_positions, E]; taps: (layer, [R, D]).
void run(const Stack& stack, const Cache& cache, std::pair<size_t, size_t> span,
         const std::vector<SegmentArgument>& segments, std::pair<uintptr_t, uintptr_t> hidden_out,
         const Tables& tables, const std::vector<std::pair<size_t, uintptr_t>>& taps) {
  Pass pass = make_pass(stack, cache, span, tables);
  for (const SegmentArgument& segment : segments) add_rows(pass, segment, std::get<2>(tables));
  pass.num_rows = pass.rows.size();
  require(pass.num_rows > 0, "a pass needs at least one row");
  pass.hidden = at<const float>(hidden_out.first);
  pass.out = at<float>(hidden_out.second);
  for (const auto& [layer, address] : taps) pass.taps.emplace_back(layer, at<float>(address));
  nb::gil_scoped_release released;
  std::lock_guard<std::mutex> lock(pass_mutex);
  workspace().reset();
  workspace().prepare(pass, Pool::instance().num_threads());
  Pool::instance().run([&pass](Team& team) { active_kernels->run_span(pass, team); });
}

// states: address of [R, D], and R; norm: address of [D] or 0, and its epsilon; out: addresses of logits [R, V],
// argmax [R] int64 and confidence [R], 0 where not wanted.
void run_head(const Weight& weight, std::pair<uintptr_t, size_t> states, std::pair<uintptr_t, float> norm,
              float softcap, std::tuple<uintptr_t, uintptr_t, uintptr_t> out) {
  require(states.second > 0, "a pass needs at least one row");
  require(!weight.paired, "a head is no paired weight");
  HeadPass pass{};
  pass.head = &weight;
  pass.norm = at<const float>(norm.first);
  pass.norm_eps = norm.second;
  pass.softcap = softcap;
  pass.num_rows = states.second;
  pass.hidden = at<const float>(states.first);
  pass.logits = at<float>(std::get<0>(out));
  pass.argmax = at<int64_t>(std::get<1>(out));
  pass.confidence = at<float>(std::get<2>(out));
  nb::gil_scoped_release released;
  std::lock_guard<std::mutex> lock(pass_mutex);
  workspace().reset();
  workspace().prepare(pass, Pool::instance().num_threads());
  Pool::instance().run([&pass](Team& team) { active_kernels->run_head(pass, team); });
}

// Where a chain is drafted: the stack, its cache, the sequence there, its committed slots, and the rotary tables.
using Place = std::tuple<const Stack&, const Cache&, size_t, size_t, Tables>;

// A chain drafted token by token in one call: embed, layers [0, exit_layer) of the target, the adapter's one layer,
// norm, head, argmax, until num_tokens are drafted or a confidence is below threshold.
struct Chain {
  const Weight* embedding;
  float embedding_scale, threshold;
  // The adapter's first pass catches up with what is pending; each later one runs a single row.
  Pass shallow, catch_up, adapter;
  HeadPass head;
  float* states;  // [num_tokens + 1, D], those of the nodes that leave the shallow layers
  std::vector<float> entering, predicting;
  std::vector<int64_t> tokens;  // of the nodes; the root's is given
  std::vector<float> confidences;
  size_t num_drafted = 0;

  // Point the passes at a node; every pass reads what this wrote behind a barrier.
  void prepare(size_t node) {
    const size_t size = embedding->num_inputs;
    unpack_row(*embedding, static_cast<size_t>(tokens[node]), entering.data());
    for (float& value : entering) value *= embedding_scale;
    move(shallow, node);
    shallow.out = states + node * size;
    if (node == confidences.size()) return;
    if (node > 0) move(adapter, node);
    adapter.hidden = shallow.out;
    head.hidden = node == 0 ? predicting.data() + (catch_up.num_rows - 1) * size : predicting.data();
    head.argmax = &tokens[node + 1];
    head.confidence = &confidences[node];
  }

  void run(Team& team) {
    for (size_t node = 0; node <= confidences.size(); ++node) {
      if (team.thread == 0) prepare(node);
      team.meet();
      active_kernels->run_span(shallow, team);
      // Every thread reads the same confidence, behind the barrier that ended the head's pass.
      if (node == confidences.size() || (node > 0 && confidences[node - 1] < threshold)) return;
      active_kernels->run_span(node == 0 ? catch_up : adapter, team);
      active_kernels->run_head(head, team);
      if (team.thread == 0) num_drafted = node + 1;
      team.meet();
    }
  }

 private:
  static void move(Pass& pass, size_t node) {
    pass.segments[0].base = pass.rows[0].slot = pass.rows[0].position = pass.first_slot + node;
  }
};

// states: [num_pending + num_tokens + 1, D]: the adapter's unseen states, then one row a node, filled here with those
// that enter layer exit_layer. Returns the drafted tokens and their confidences.
std::pair<std::vector<int64_t>, std::vector<float>> draft_chain(
    const Place& target, const Place& drafter, std::tuple<size_t, int64_t, size_t, float> plan,
    std::pair<uintptr_t, size_t> states_pending, std::tuple<const Weight&, float> embedding,
    std::tuple<const Weight&, uintptr_t, float, float> head) {
  const auto& [stack, cache, sequence, base, tables] = target;
  const auto& [adapter, adapter_cache, adapter_sequence, adapter_base, adapter_tables] = drafter;
  const auto [exit_layer, root, num_tokens, threshold] = plan;
  const auto [states, num_pending] = states_pending;
  const size_t size = stack.shape.hidden_size;
  Chain chain{};
  chain.embedding = &std::get<0>(embedding);
  chain.embedding_scale = std::get<1>(embedding);
  chain.threshold = threshold;
  const Weight& output = std::get<0>(head);
  require(adapter.shape.hidden_size == size && chain.embedding->num_inputs == size && output.num_inputs == size,
          "target, adapter and head must have one hidden size");
  require(!output.paired && !chain.embedding->paired, "a head is no paired weight");
  require(root >= 0 && static_cast<size_t>(root) < num_rows_of(*chain.embedding) &&
              num_rows_of(output) <= num_rows_of(*chain.embedding),
          "every token must have an embedding");
  require(adapter.layers.size() == 1 && num_tokens > 0, "a chain needs an adapter of one layer and tokens to draft");
  chain.tokens.assign(num_tokens + 1, root);
  chain.confidences.resize(num_tokens);
  chain.entering.resize(size);
  chain.predicting.resize((num_pending + 1) * size);
  chain.states = at<float>(states) + num_pending * size;

  // Made for the last node, which has the largest slot and position, so that all are checked; then moved about.
  chain.shallow = make_pass(stack, cache, {0, exit_layer}, tables);
  add_rows(chain.shallow, {sequence, base + num_tokens, 0, 1, std::nullopt}, std::get<2>(tables));
  chain.shallow.first_slot = base;
  chain.shallow.hidden = chain.entering.data();
  chain.catch_up = make_pass(adapter, adapter_cache, {0, 1}, adapter_tables);
  chain.adapter = chain.catch_up;
  add_rows(chain.catch_up, {adapter_sequence, adapter_base, 0, num_pending + 1, std::nullopt},
           std::get<2>(adapter_tables));
  chain.catch_up.hidden = at<const float>(states);
  add_rows(chain.adapter, {adapter_sequence, adapter_base + num_pending + num_tokens - 1, 0, 1, std::nullopt},
           std::get<2>(adapter_tables));
  chain.adapter.first_slot = adapter_base + num_pending;
  for (Pass* pass : {&chain.shallow, &chain.catch_up, &chain.adapter}) pass->num_rows = pass->rows.size();
  chain.catch_up.out = chain.adapter.out = chain.predicting.data();
  chain.head.head = &output;
  chain.head.norm = at<const float>(std::get<1>(head));
  chain.head.norm_eps = std::get<2>(head);
  chain.head.softcap = std::get<3>(head);
  chain.head.num_rows = 1;
  chain.head.confidence = chain.confidences.data();
  {
    nb::gil_scoped_release released;
    std::lock_guard<std::mutex> lock(pass_mutex);
    const size_t num_threads = Pool::instance().num_threads();
    workspace().reset();
    for (Pass* pass : {&chain.shallow, &chain.catch_up, &chain.adapter}) workspace().prepare(*pass, num_threads);
    workspace().prepare(chain.head, num_threads);
    Pool::instance().run([&chain](Team& team) { chain.run(team); });
  }
  chain.tokens.erase(chain.tokens.begin());
  chain.tokens.resize(chain.num_drafted);
  chain.confidences.resize(chain.num_drafted);
  return {chain.tokens, chain.confidences};
}

void run_linear(const Weight& weight, uintptr_t hidden, size_t num_rows, uintptr_t out) {
  require(!weight.paired && num_rows > 0, "linear() takes an unpaired weight and at least one row");
  nb::gil_scoped_release released;
  std::lock_guard<std::mutex> lock(pass_mutex);
  Pool::instance().run([&](Team& team) {
    active_kernels->run_linear(weight, at<const float>(hidden), num_rows, at<float>(out), team);
  });
}

void keep(const Cache& cache, size_t sequence, size_t start, const std::vector<size_t>& path) {
  require(sequence < cache.num_sequences, "the cache has no such sequence");
  for (size_t depth = 0; depth < path.size(); ++depth) {
    require(path[depth] >= depth && start < cache.num_slots && path[depth] < cache.num_slots - start,
            "the path must lie in the cache");
    require(depth == 0 || path[depth] > path[depth - 1], "the path must go forward");
  }
  const size_t dim = cache.head_dim, padded = round_up(dim);
  for (size_t layer = 0; layer < cache.num_layers; ++layer) {
    for (size_t head = 0; head < cache.num_kv_heads; ++head) {
      float *keys = cache.keys_of(layer, sequence, head), *values = cache.values_of(layer, sequence, head);
      for (size_t depth = 0; depth < path.size(); ++depth) {
        const size_t from = start + path[depth], to = start + depth;
        if (from == to) continue;
        const float* source = keys + from / kLanes * dim * kLanes + from % kLanes;
        float* target = keys + to / kLanes * dim * kLanes + to % kLanes;
        for (size_t i = 0; i < dim; ++i) target[i * kLanes] = source[i * kLanes];
        std::memcpy(values + to * padded, values + from * padded, dim * sizeof(float));
      }
    }
  }
}

// Take over a sequence's first slots from a cache of the same layers with other room.
void copy_slots(const Cache& cache, const Cache& other, size_t sequence, size_t num_slots) {
  require(cache.num_layers == other.num_layers && cache.num_kv_heads == other.num_kv_heads &&
              cache.head_dim == other.head_dim,
          "the caches must be made for the same layers");
  require(sequence < cache.num_sequences && sequence < other.num_sequences, "the cache has no such sequence");
  require(num_slots <= cache.num_slots && num_slots <= other.num_slots, "the slots must lie in both caches");
  const size_t key_numbers = round_up(num_slots) * cache.head_dim, value_numbers = num_slots * round_up(cache.head_dim);
  for (size_t layer = 0; layer < cache.num_layers; ++layer) {
    for (size_t head = 0; head < cache.num_kv_heads; ++head) {
      std::memcpy(cache.keys_of(layer, sequence, head), other.keys_of(layer, sequence, head),
                  key_numbers * sizeof(float));
      std::memcpy(cache.values_of(layer, sequence, head), other.values_of(layer, sequence, head),
                  value_numbers * sizeof(float));
    }
  }
}

// Bytes a second that all threads together read from memory, the best of several tries.
double measure_bandwidth(size_t num_bytes, size_t num_tries) {
  nb::gil_scoped_release released;
  std::lock_guard<std::mutex> lock(pass_mutex);
  const Block block(num_bytes);
  float* values = block.as<float>();
  const size_t count = num_bytes / sizeof(float);
  for (size_t i = 0; i < count; ++i) values[i] = 1.0f;
  double best = 0;
  std::vector<float> sums(Pool::instance().num_threads());
  for (size_t attempt = 0; attempt < num_tries; ++attempt) {
    const auto started = std::chrono::steady_clock::now();
    Pool::instance().run([&](Team& team) {
      const auto [first, last] = team.share(count);
      sums[team.thread] = active_kernels->sum(values + first, last - first);
    });
    const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - started;
    best = std::max(best, static_cast<double>(num_bytes) / passed.count());
  }
  return best;
}

// Floating-point operations a second of all threads together on full vectors, the best of several tries.
double measure_peak(size_t num_steps, size_t num_tries) {
  nb::gil_scoped_release released;
  std::lock_guard<std::mutex> lock(pass_mutex);
  double best = 0;
  std::vector<float> sums(Pool::instance().num_threads());
  const std::string name = active_kernels->name;
  const size_t width = name == "avx512" ? 16 : name == "avx2" ? 8 : 4;
  for (size_t attempt = 0; attempt < num_tries; ++attempt) {
    const auto started = std::chrono::steady_clock::now();
    Pool::instance().run(
        [&](Team& team) { sums[team.thread] = active_kernels->multiply_registers(num_steps); });
    const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - started;
    const double operations = 2.0 * 12 * static_cast<double>(width * num_steps * sums.size());
    best = std::max(best, operations / passed.count());
  }
  return best;
}

}  // namespace
}  // namespace kangaroo

NB_MODULE(_native, module) {
  using namespace kangaroo;
  // A model that lives until the interpreter ends is no leak worth a message.
  nb::set_leak_warnings(false);
  nb::class_<Weight>(module, "Weight")
      .def(nb::new_(&make_weight), "rows"_a, "paired"_a = false, "scales"_a = nb::none(), "bias"_a = nb::none())
      .def_prop_ro("num_rows", &num_rows_of)
      .def_ro("num_inputs", &Weight::num_inputs)
      .def_prop_ro("num_bytes", [](const Weight& weight) { return weight.panels->num_bytes(); })
      .def("gather", &gather, "rows"_a, "out"_a);
  nb::class_<Cache>(module, "Cache")
      .def(nb::new_(&make_cache), "num_layers"_a, "num_sequences"_a, "num_kv_heads"_a,
           "num_slots"_a, "head_dim"_a)
      .def_ro("num_slots", &Cache::num_slots)
      .def("keep", &keep, "sequence"_a, "start"_a, "path"_a)
      .def("copy", &copy_slots, "other"_a, "sequence"_a, "num_slots"_a);
  nb::class_<Stack>(module, "Stack")
      .def(nb::init<std::tuple<size_t, size_t, size_t, size_t>, float, float, float, bool>(), "sizes"_a, "norm_eps"_a,
           "attention_scale"_a, "softcap"_a, "gelu"_a)
      .def("add_layer", &Stack::add_layer, "weights"_a, "norms"_a, "window"_a)
      .def("run", &run, "cache"_a, "span"_a, "segments"_a, "hidden_out"_a, "tables"_a, "taps"_a);
  module.def("run_head", &run_head, "weight"_a, "states"_a, "norm"_a, "softcap"_a, "out"_a);
  module.def("draft_chain", &draft_chain, "target"_a, "drafter"_a, "plan"_a, "states_pending"_a, "embedding"_a,
             "head"_a);
  module.def("linear", &run_linear, "weight"_a, "hidden"_a, "num_rows"_a, "out"_a);
  module.def("instruction_sets", &instruction_sets);
  module.def("select", &select_instruction_set, "name"_a);
  module.def("selected", [] { return active_kernels->name; });
  module.def("num_threads", [] { return Pool::instance().num_threads(); });
  module.def("set_num_threads", [](size_t count) {
    require(count >= 1 && count <= 1024, "num_threads must be in 1..1024");
    nb::gil_scoped_release released;
    std::lock_guard<std::mutex> lock(pass_mutex);
    Pool::instance().resize(count);
  }, "num_threads"_a);
  module.def("measure_bandwidth", &measure_bandwidth, "num_bytes"_a, "num_tries"_a);
  module.def("measure_peak", &measure_peak, "num_steps"_a, "num_tries"_a);
}
