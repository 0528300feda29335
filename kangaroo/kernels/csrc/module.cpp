// The Python module: every argument is checked here or, where an address comes without its tensor, by kernels/cpu.py.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <cmath>
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
// (sequence, base, number of rows, parents of the nodes or None for a chain, first node)
using SegmentArgument = std::tuple<size_t, size_t, size_t, std::optional<std::vector<int32_t>>, size_t>;

// Addresses of cosine and sine [num_positions, E], num_positions, and E.
using Tables = std::tuple<uintptr_t, uintptr_t, size_t, size_t>;

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

void require(bool holds, const char* message) {
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

void check_rows(const Weight& weight, const std::vector<size_t>& rows) {
  for (size_t row : rows) require(row < num_rows_of(weight), "row ids must be below the number of rows");
}

// Rows of a packed embedding, times its scale, [R, D].
void embed(const Weight& weight, float scale, const std::vector<size_t>& rows, float* out) {
  for (size_t i = 0; i < rows.size(); ++i) unpack_row(weight, rows[i], out + i * weight.num_inputs);
  if (scale == 1.0f) return;
  for (size_t i = 0; i < rows.size() * weight.num_inputs; ++i) out[i] *= scale;
}

void gather(const Weight& weight, const std::vector<size_t>& rows, uintptr_t out) {
  check_rows(weight, rows);
  embed(weight, 1.0f, rows, at<float>(out));
}

std::vector<float> copy(const std::optional<Vector>& values, size_t size, const char* name) {
  if (!values) return {};
  require(values->shape(0) == size, (std::string(name) + " must have " + std::to_string(size) + " numbers").c_str());
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
    require(!weights[0] == !weights[1] && !weights[2] == !weights[3] && (weights[0] || weights[2]),
            "a layer has both weights of attention or none, both of the MLP or none, and at least one of them");
    if (weights[0]) {
      check_weight(*weights[0], inner + 2 * shape.num_kv_heads * shape.head_dim, size, false);
      check_weight(*weights[1], size, inner, false);
    }
    if (weights[2]) {
      check_weight(*weights[2], weights[3]->num_inputs, size, true);
      check_weight(*weights[3], size, weights[2]->num_outputs, false);
    }
    require(layers.empty() || !layers[0].down == !weights[3], "layers must all have an MLP or none");
    require(layers.empty() || !weights[3] || layers[0].down->num_inputs == weights[3]->num_inputs,
            "layers must have MLPs of one size");
    Layer layer{weights[0], weights[1], weights[2], weights[3], weights[2].get(), nullptr,
                {},         {},         {},         {},         {},               {},      window};
    layer.input_norm = copy(norms[0], size, "input_norm");
    layer.query_norm = copy(norms[1], shape.head_dim, "query_norm");
    layer.key_norm = copy(norms[2], shape.head_dim, "key_norm");
    layer.post_attention_norm = copy(norms[3], size, "post_attention_norm");
    layer.mlp_norm = copy(norms[4], size, "mlp_norm");
    layer.post_mlp_norm = copy(norms[5], size, "post_mlp_norm");
    require(layer.input_norm.empty() == !weights[0] && layer.mlp_norm.empty() == !weights[2], "a norm is missing");
    layers.push_back(std::move(layer));
    if (layers.size() == 1) return;
    Layer& before = layers[layers.size() - 2];
    (before.down ? before.after_down : before.after_output) = weights[weights[0] ? 0 : 2].get();
  }
};

void add_rows(Pass& pass, const SegmentArgument& argument, size_t num_positions) {
  const auto& [sequence, base, num_rows, parents, first_node] = argument;
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

const char* const kOneStateEach = "every row needs a state";
const char* const kOneHiddenSize = "layers, embedding and heads must have one hidden size";

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
  require(std::get<3>(tables) == stack.shape.head_dim, "the rotary tables must be for heads of this size");
  pass.cosine = at<const float>(std::get<0>(tables));
  pass.sine = at<const float>(std::get<1>(tables));
  return pass;
}

// A head, the address of its norm [D], 0 for none, the norm's epsilon, a soft cap, and the addresses of logits [R, V],
// argmax [R] int64 and confidence [R], 0 where not wanted.
using HeadArgument =
    std::tuple<std::shared_ptr<Weight>, uintptr_t, float, float, std::tuple<uintptr_t, uintptr_t, uintptr_t>>;

HeadPass make_head_pass(const HeadArgument& argument, size_t num_rows, const float* hidden) {
  const auto& [weight, norm, norm_eps, softcap, out] = argument;
  require(weight && !weight->paired, "a head is no paired weight");
  HeadPass pass{};
  pass.head = weight.get();
  pass.norm = at<const float>(norm);
  pass.norm_eps = norm_eps;
  pass.softcap = softcap;
  pass.num_rows = num_rows;
  pass.hidden = hidden;
  pass.logits = at<float>(std::get<0>(out));
  pass.argmax = at<int64_t>(std::get<1>(out));
  pass.confidence = at<float>(std::get<2>(out));
  return pass;
}

// A pass over these segments, still without states; tables: cosine and sine [num_positions, E]; taps: (layer, [R, D]).
Pass make_pass(const Stack& stack, const Cache& cache, std::pair<size_t, size_t> span,
               const std::vector<SegmentArgument>& segments, const std::vector<std::pair<size_t, uintptr_t>>& taps,
               const Tables& tables) {
  Pass pass = make_pass(stack, cache, span, tables);
  for (const SegmentArgument& segment : segments) add_rows(pass, segment, std::get<2>(tables));
  pass.num_rows = pass.rows.size();
  require(pass.num_rows > 0, "a pass needs at least one row");
  for (const auto& [layer, address] : taps) pass.taps.emplace_back(layer, at<float>(address));
  return pass;
}

// hidden_out: addresses of both [R, D], and R; skips: of every layer of the stack, or empty.
void run(const Stack& stack, const Cache& cache, std::pair<size_t, size_t> span,
         const std::vector<SegmentArgument>& segments, std::tuple<uintptr_t, uintptr_t, size_t> hidden_out,
         const std::vector<std::pair<size_t, uintptr_t>>& taps, const Tables& tables,
         const std::vector<uint8_t>& skips) {
  require(skips.empty() || skips.size() == stack.layers.size(), "skips must be given for every layer or none");
  Pass pass = make_pass(stack, cache, span, segments, taps, tables);
  require(pass.num_rows == std::get<2>(hidden_out), kOneStateEach);
  pass.skips = skips;
  pass.hidden = at<const float>(std::get<0>(hidden_out));
  pass.out = at<float>(std::get<1>(hidden_out));
  nb::gil_scoped_release released;
  std::lock_guard<std::mutex> lock(pass_mutex);
  workspace().reset();
  workspace().prepare(pass, Pool::instance().num_threads());
  Pool::instance().run([&](Team& team) { active_kernels->run_span(pass, team); });
}

// Prepare a pass and a head that chooses behind all its rows, into ids; leaving: room for the states between them, null
// for scratch memory.
void prepare_choosing(Pass& pass, HeadPass& head, float* leaving, std::vector<int64_t>& ids) {
  pass.out = leaving ? leaving : workspace().take_states(pass.num_rows, pass.shape->hidden_size);
  head.hidden = pass.out;
  head.num_rows = pass.num_rows;
  ids.resize(pass.num_rows);
  head.argmax = ids.data();
  const size_t num_threads = Pool::instance().num_threads();
  workspace().prepare(pass, num_threads);
  workspace().prepare(head, num_threads);
}

// What enters a pass: the address of states [R, D] or 0, R, and then the rows of an embedding, times its scale.
using Entering = std::tuple<uintptr_t, size_t, const Weight&, float, std::vector<size_t>>;

// The head's argmax behind every row.
std::vector<int64_t> decide(const Stack& stack, const Cache& cache, std::pair<size_t, size_t> span,
                            const std::vector<SegmentArgument>& segments, const Entering& entering,
                            const std::vector<std::pair<size_t, uintptr_t>>& taps, const Tables& tables,
                            const HeadArgument& head) {
  const auto& [address, num_states, embedding, scale, tokens] = entering;
  const size_t size = stack.shape.hidden_size;
  Pass pass = make_pass(stack, cache, span, segments, taps, tables);
  require(pass.num_rows == num_states, kOneStateEach);
  if (!address) {
    require(tokens.size() == pass.num_rows && embedding.num_inputs == size, "every row needs a token to embed");
    check_rows(embedding, tokens);
  }
  std::vector<int64_t> ids;
  HeadPass head_pass = make_head_pass(head, pass.num_rows, nullptr);
  require(head_pass.head->num_inputs == size, kOneHiddenSize);
  nb::gil_scoped_release released;
  std::lock_guard<std::mutex> lock(pass_mutex);
  workspace().reset();
  float* embedded = address ? nullptr : workspace().take_states(pass.num_rows, size);
  pass.hidden = address ? at<const float>(address) : embedded;
  prepare_choosing(pass, head_pass, nullptr, ids);
  Pool::instance().run([&](Team& team) {
    if (embedded) {
      if (team.thread == 0) embed(embedding, scale, tokens, embedded);
      team.meet();
    }
    active_kernels->run_span(pass, team);
    active_kernels->run_head(head_pass, team);
  });
  return ids;
}

// states: address of [R, D], and R.
void run_head(const HeadArgument& head, std::pair<uintptr_t, size_t> states) {
  require(states.second > 0, "a pass needs at least one row");
  HeadPass pass = make_head_pass(head, states.second, at<const float>(states.first));
  nb::gil_scoped_release released;
  std::lock_guard<std::mutex> lock(pass_mutex);
  workspace().reset();
  workspace().prepare(pass, Pool::instance().num_threads());
  Pool::instance().run([&pass](Team& team) { active_kernels->run_head(pass, team); });
}

// Where drafting happens: the stack, its cache and the rotary tables.
using Place = std::tuple<const Stack&, const Cache&, Tables>;
// How guesses are drawn: seed, temperature (0 is greedy), top_k (0 is off), top_p and min_p.
using Draw = std::tuple<uint64_t, float, size_t, double, double>;
// A sequence to draft for: its slot and committed tokens in the target's cache and in the drafter's, the root token,
// how many of its states are pending, how deep to draft, and how to draw.
using Start = std::tuple<size_t, size_t, size_t, size_t, int64_t, size_t, size_t, Draw>;
// Tokens, parents and confidences of the nodes of every sequence's draft.
using Nodes = std::tuple<std::vector<std::vector<int64_t>>, std::vector<std::vector<int32_t>>,
                         std::vector<std::vector<float>>>;

// A draft as it grows, level by level; drafters/tree.py says by which rule.
struct Tree {
  size_t slot, base, adapter_slot, adapter_base, num_pending, max_depth;
  Draw draw;
  std::vector<int64_t> tokens;
  std::vector<int32_t> parents{-1};
  std::vector<float> confidences{1.0f};
  std::vector<double> chances{1.0};
  std::vector<float> states;  // [nodes, D], those that leave the shallow layers
  size_t spine = 0, depth = 0;
  double spine_chance = 1.0;  // the product of the confidences on the spine
  size_t level = 0, frontier_end = 1;  // the newest level starts at level, its frontier ends at frontier_end
  bool is_chain = true;

  size_t num_nodes() const { return tokens.size(); }
  size_t num_growing() const { return depth < max_depth ? frontier_end - level : 0; }
  // The parents of the first nodes, none where they are a chain.
  std::optional<std::vector<int32_t>> parents_of(size_t count) const {
    if (is_chain) return std::nullopt;
    return std::vector<int32_t>(parents.begin(), parents.begin() + static_cast<ptrdiff_t>(count));
  }
};

// What a tree may grow to.
struct Growth {
  size_t num_siblings, max_nodes;
  float threshold;
  double branch_price, chain_price;
};

// A guess for the token behind a node.
struct Guess {
  bool on_spine;
  double chance;
  size_t node;
  int64_t token;
  float confidence;
};

// The splitmix64 output function (Steele, Lea, Flood 2014), as in kangaroo/noise.py.
inline uint64_t mix(uint64_t state) {
  state = state * 0x9E3779B97F4A7C15u + 0x94D049BB133111EBu;
  state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9u;
  state = (state ^ state >> 27) * 0x94D049BB133111EBu;
  return state ^ state >> 31;
}

// The best guesses by perturbed logits, best first: noise is that of kangaroo/noise.py, so that guesses agree with what
// the target will choose. Only an aid to acceptance: unlike the target's choice it need not be exact to the bit.
class Lottery {
 public:
  Lottery(const Draw& draw, size_t position, const float* logits, size_t num_logits, int64_t best)
      : draw_(draw), logits_(logits), num_logits_(num_logits), largest_(logits[best]),
        key_(mix(mix(std::get<0>(draw)) + position)), weights_(num_logits) {
    const float temperature = std::get<1>(draw);
    for (size_t id = 0; id < num_logits; ++id) weights_[id] = std::exp((logits[id] - largest_) / temperature);
    const size_t top_k = std::get<2>(draw);
    highest_out_ = std::nextafter(static_cast<float>(std::get<4>(draw)), -1.0f);
    float least = 0;
    if (top_k > 0 && top_k < num_logits) {
      std::vector<float> ordered = weights_;
      std::nth_element(ordered.begin(), ordered.begin() + (top_k - 1), ordered.end(), std::greater<float>());
      least = ordered[top_k - 1];
      highest_out_ = std::max(highest_out_, std::nextafter(least, -1.0f));
    }
    for (const float weight : weights_) total_ += weight >= least ? weight : 0;
  }

  std::vector<int64_t> draw(size_t count) {
    std::vector<std::pair<double, int64_t>> found;
    // Noise is at most as likely to exceed t as exp(-t), which tells almost all tokens without a logarithm.
    double reach = 0;
    const double temperature = std::get<1>(draw_);
    for (size_t id = 0; id < num_logits_; ++id) {
      const double uniform = (static_cast<double>(mix(key_ + id) >> 12) + 0.5) * 0x1p-52;
      if ((1 - uniform) * reach > weights_[id]) continue;
      const double score = (logits_[id] - largest_) / temperature - std::log(-std::log(uniform));
      if (found.size() == count && score <= found.back().first) continue;
      if (!survives(weights_[id])) continue;
      if (found.size() == count) found.pop_back();
      const auto place = std::find_if(found.begin(), found.end(), [&](const auto& one) { return score > one.first; });
      found.insert(place, {score, static_cast<int64_t>(id)});
      if (found.size() == count) reach = std::exp(found.back().first);
    }
    std::vector<int64_t> kept;
    for (const auto& [score, id] : found) kept.push_back(id);
    return kept;
  }

 private:
  // Whether top_k, top_p and min_p let a token of this weight stay; what stays at one weight stays at a greater one.
  bool survives(float own) {
    if (own <= highest_out_) return false;
    const double top_p = std::get<3>(draw_);
    if (top_p >= 1 || own >= lowest_in_) return true;
    double above = 0;
    for (const float weight : weights_) above += weight > own ? weight : 0;
    const bool stays = above < top_p * total_;
    (stays ? lowest_in_ : highest_out_) = own;
    return stays;
  }

  const Draw& draw_;
  const float* logits_;
  size_t num_logits_;
  float largest_;
  uint64_t key_;
  std::vector<float> weights_;
  double total_ = 0;
  float lowest_in_ = 1, highest_out_ = 0;
};

// Trees drafted in one call: embed, layers [0, exit_layer) of the target, the adapter's one layer, norm, head,
// best guesses, level by level for all sequences at once; and verified there, by the target's other layers and head.
class Drafting {
 public:
  Drafting(const Place& target, const Place& adapter, size_t exit_layer, const Growth& growth, const Weight& embedding,
           float embedding_scale, const HeadPass& head)
      : target_(target), adapter_(adapter), exit_layer_(exit_layer), growth_(growth), embedding_(embedding),
        embedding_scale_(embedding_scale), head_(head), size_(embedding.num_inputs) {}

  std::vector<Tree> trees;

  // pending: [P, D], the states the adapter has not seen, sequence by sequence.
  void start(const float* pending) {
    pending_ = pending;
    needs_logits_ = growth_.num_siblings > 1;
    for (const Tree& tree : trees) needs_logits_ |= std::get<1>(tree.draw) > 0;
    prepare_shallow();
  }

  // Have the target's other layers and its head judge the drafts.
  void verify_with(const HeadPass& chooser) { chooser_ = chooser; }

  // Room for the states of every node, written tree by tree: those entering the deep layers, and those leaving them,
  // null where these are not wanted.
  void run(float* entering, float* leaving, Team& team) {
    draft(team);
    if (team.thread == 0) finish(entering, leaving);
    if (!chooser_) return;
    team.meet();
    active_kernels->run_span(deep_, team);
    active_kernels->run_head(*chooser_, team);
  }

  std::vector<int64_t> choices;  // behind every node, tree by tree
  std::chrono::steady_clock::time_point drafted;

 private:
  void draft(Team& team) {
    for (;;) {
      active_kernels->run_span(shallow_, team);
      if (team.thread == 0) prepare_adapter();
      team.meet();
      if (growing_.empty()) return;
      active_kernels->run_span(adapter_pass_, team);
      if (team.thread == 0) gather_heads();
      team.meet();
      active_kernels->run_head(head_, team);
      team.meet();
      if (needs_logits_) {
        for (size_t row = team.thread; row < head_.num_rows; row += team.num_threads) rank(row);
        team.meet();
      }
      if (team.thread == 0) grow();
      team.meet();
      if (shallow_.num_rows == 0) return;
    }
  }

  // Hand over the states, and point the deep pass at all nodes of every tree.
  void finish(float* entering, float* leaving) {
    float* to = entering;
    for (const Tree& tree : trees) to = std::copy(tree.states.begin(), tree.states.end(), to);
    drafted = std::chrono::steady_clock::now();
    if (!chooser_) return;
    const auto& [stack, cache, tables] = target_;
    workspace().reset();
    deep_ = make_pass(stack, cache, {exit_layer_, stack.layers.size()}, tables);
    for (const Tree& tree : trees) {
      const size_t count = tree.num_nodes();
      add_rows(deep_, {tree.slot, tree.base, count, tree.parents_of(count), 0}, std::get<2>(tables));
    }
    deep_.num_rows = deep_.rows.size();
    deep_.hidden = entering;
    prepare_choosing(deep_, *chooser_, leaving, choices);
  }

  // Point the shallow pass at the newest level of every tree.
  void prepare_shallow() {
    const auto& [stack, cache, tables] = target_;
    workspace().reset();
    shallow_ = make_pass(stack, cache, {0, exit_layer_}, tables);
    level_.clear();
    for (Tree& tree : trees) {
      const size_t count = tree.num_nodes() - tree.level;
      if (count == 0 || tree.depth != depth_) continue;
      add_rows(shallow_, {tree.slot, tree.base, count, tree.parents_of(tree.num_nodes()), tree.level},
               std::get<2>(tables));
      level_.push_back(&tree);
    }
    shallow_.num_rows = shallow_.rows.size();
    if (shallow_.num_rows == 0) return;
    entering_.resize(shallow_.num_rows * size_);
    leaving_.resize(shallow_.num_rows * size_);
    std::vector<size_t> tokens;
    for (const Tree* tree : level_) tokens.insert(tokens.end(), tree->tokens.begin() + tree->level, tree->tokens.end());
    embed(embedding_, embedding_scale_, tokens, entering_.data());
    shallow_.hidden = entering_.data();
    shallow_.out = leaving_.data();
    workspace().prepare(shallow_, Pool::instance().num_threads());
  }

  // Keep the states of the level, and point the adapter's pass at the frontiers; the first one catches up.
  void prepare_adapter() {
    const auto& [stack, cache, tables] = adapter_;
    const float* row = leaving_.data();
    for (Tree* tree : level_) {
      const size_t numbers = (tree->num_nodes() - tree->level) * size_;
      tree->states.insert(tree->states.end(), row, row + numbers);
      row += numbers;
    }
    growing_.clear();
    fresh_.clear();
    workspace().reset();
    adapter_pass_ = make_pass(stack, cache, {0, 1}, tables);
    size_t num_heads = 0;
    for (Tree* tree : level_) {
      const size_t count = tree->num_growing();
      if (depth_ == 0) {
        const float* pending = pending_;
        pending_ += tree->num_pending * size_;
        if (count == 0) continue;
        add_rows(adapter_pass_, {tree->adapter_slot, tree->adapter_base, tree->num_pending + 1, std::nullopt, 0},
                 std::get<2>(tables));
        fresh_.insert(fresh_.end(), pending, pending_);
        tree->adapter_base += tree->num_pending;
      } else if (count > 0) {
        add_rows(adapter_pass_,
                 {tree->adapter_slot, tree->adapter_base, count, tree->parents_of(tree->frontier_end), tree->level},
                 std::get<2>(tables));
      }
      if (count == 0) continue;
      const float* states = tree->states.data() + tree->level * size_;
      fresh_.insert(fresh_.end(), states, states + count * size_);
      growing_.push_back(tree);
      num_heads += count;
    }
    if (growing_.empty()) return;
    adapter_pass_.num_rows = adapter_pass_.rows.size();
    adapted_.resize(adapter_pass_.num_rows * size_);
    adapter_pass_.hidden = fresh_.data();
    adapter_pass_.out = adapted_.data();
    head_.num_rows = num_heads;
    best_.resize(num_heads);
    confidences_.resize(num_heads);
    head_.argmax = best_.data();
    head_.confidence = confidences_.data();
    if (needs_logits_) {
      logits_.resize(num_heads * head_.head->num_outputs);
      head_.logits = logits_.data();
      ranked_.resize(num_heads);
    }
    head_.normed.clear();
    head_.best_values.clear();
    head_.best_ids.clear();
    const size_t num_threads = Pool::instance().num_threads();
    workspace().prepare(adapter_pass_, num_threads);
    workspace().prepare(head_, num_threads);
  }

  // The head reads what left the adapter for the frontiers: of rows that caught up, the last alone.
  void gather_heads() {
    head_.hidden = adapted_.data();
    if (depth_ > 0) return;
    float* to = adapted_.data();
    const float* from = adapted_.data();
    for (const Tree* tree : growing_) {
      from += tree->num_pending * size_;
      std::memmove(to, from, size_ * sizeof(float));
      from += size_;
      to += size_;
    }
  }

  // The best guesses behind a row with their probabilities.
  void rank(size_t row) {
    const size_t num_logits = head_.head->num_outputs;
    const float* logits = logits_.data() + row * num_logits;
    size_t node = row;
    auto tree = growing_.begin();
    for (; node >= (*tree)->num_growing(); ++tree) node -= (*tree)->num_growing();
    // The newest level stands depth_ places behind the root, whose place is the number of committed tokens.
    const Draw& draw = (*tree)->draw;
    const std::vector<int64_t> best =
        std::get<1>(draw) > 0
            ? Lottery(draw, (*tree)->base + depth_, logits, num_logits, best_[row]).draw(growth_.num_siblings)
            : find_largest(logits, num_logits);
    ranked_[row].clear();
    for (const int64_t id : best) {
      ranked_[row].emplace_back(id, confidences_[row] * std::exp(logits[id] - logits[best_[row]]));
    }
  }

  // The ids of the largest logits, the lowest first where they are equal.
  std::vector<int64_t> find_largest(const float* logits, size_t num_logits) const {
    std::vector<int64_t> found;
    for (size_t id = 0; id < num_logits; ++id) {
      if (found.size() == growth_.num_siblings && !(logits[id] > logits[found.back()])) continue;
      if (found.size() == growth_.num_siblings) found.pop_back();
      const auto place =
          std::find_if(found.begin(), found.end(), [&](int64_t other) { return logits[id] > logits[other]; });
      found.insert(place, static_cast<int64_t>(id));
    }
    return found;
  }

  // Add a level to every tree that grows.
  void grow() {
    size_t row = 0;
    ++depth_;
    for (Tree* tree : growing_) {
      std::vector<Guess> found;
      for (size_t node = tree->level; node < tree->frontier_end; ++node, ++row) {
        if (!needs_logits_) add_guess(*tree, found, {false, confidences_[row], node, best_[row], 0}, 0, row);
        for (size_t sibling = 0; needs_logits_ && sibling < ranked_[row].size(); ++sibling) {
          const auto& [token, probability] = ranked_[row][sibling];
          add_guess(*tree, found, {false, probability, node, token, 0}, sibling, row);
        }
      }
      add_level(*tree, found);
    }
    prepare_shallow();
  }

  void add_guess(Tree& tree, std::vector<Guess>& found, Guess guess, size_t sibling, size_t row) const {
    guess.confidence = sibling == 0 ? confidences_[row] : static_cast<float>(guess.chance);
    guess.on_spine = sibling == 0 && guess.node == tree.spine;
    guess.chance *= tree.chances[guess.node];
    bool pays = guess.chance >= growth_.branch_price;
    if (guess.on_spine) {
      tree.spine_chance *= confidences_[row];
      pays = guess.node == 0 || tree.spine_chance >= growth_.chain_price;
    }
    if (pays) found.push_back(guess);
  }

  void add_level(Tree& tree, std::vector<Guess>& found) const {
    std::stable_sort(found.begin(), found.end(), [](const Guess& one, const Guess& other) {
      return std::pair(one.on_spine, one.chance) > std::pair(other.on_spine, other.chance);
    });
    found.resize(std::min(found.size(), growth_.max_nodes - tree.num_nodes()));
    const auto grows = [this](const Guess& guess) { return guess.confidence >= growth_.threshold; };
    const auto end = std::stable_partition(found.begin(), found.end(), grows);
    tree.level = tree.num_nodes();
    tree.depth = depth_;
    for (const Guess& guess : found) {
      const size_t node = tree.num_nodes();
      if (guess.on_spine) tree.spine = node;
      tree.is_chain &= guess.node + 1 == node;
      tree.tokens.push_back(guess.token);
      tree.parents.push_back(static_cast<int32_t>(guess.node));
      tree.confidences.push_back(guess.confidence);
      tree.chances.push_back(guess.chance);
    }
    const bool is_full = tree.num_nodes() >= growth_.max_nodes;
    tree.frontier_end = tree.level + (is_full ? 0 : static_cast<size_t>(end - found.begin()));
  }

  const Place& target_;
  const Place& adapter_;
  size_t exit_layer_;
  Growth growth_;
  const Weight& embedding_;
  float embedding_scale_;
  HeadPass head_;
  size_t size_, depth_ = 0;
  bool needs_logits_ = false;
  const float* pending_ = nullptr;
  Pass shallow_, adapter_pass_, deep_;
  std::optional<HeadPass> chooser_;
  std::vector<Tree*> level_, growing_;
  std::vector<float> entering_, leaving_, fresh_, adapted_, logits_, confidences_;
  std::vector<int64_t> best_;
  std::vector<std::vector<std::pair<int64_t, float>>> ranked_;
};

// What stays the same from one draft to the next: the target, an adapter of one layer, and how trees may grow.
class DraftPlan {
 public:
  // bounds: exit layer, siblings, most nodes; chooser: the target's own head, which says what follows a draft's nodes.
  DraftPlan(const Stack& target, const Stack& adapter, std::tuple<size_t, size_t, size_t> bounds,
            std::pair<std::shared_ptr<Weight>, float> embedding, const HeadArgument& head, const HeadArgument& chooser)
      : target_(target), adapter_(adapter), exit_layer_(std::get<0>(bounds)), num_siblings_(std::get<1>(bounds)),
        max_nodes_(std::get<2>(bounds)), embedding_(std::move(embedding.first)), embedding_scale_(embedding.second),
        head_(head), chooser_(chooser) {
    const size_t size = target.shape.hidden_size;
    for (const HeadArgument* one : {&head, &chooser}) {
      require(make_head_pass(*one, 0, nullptr).head->num_inputs == size, kOneHiddenSize);
    }
    require(adapter.shape.hidden_size == size && embedding_ && embedding_->num_inputs == size, kOneHiddenSize);
    require(!embedding_->paired, "an embedding is no paired weight");
    require(num_rows_of(*std::get<0>(head)) <= num_rows_of(*embedding_), "every token must have an embedding");
    require(adapter.layers.size() == 1, "a draft needs an adapter of one layer");
    require(exit_layer_ > 0 && exit_layer_ < target.layers.size(), "a draft leaves the target behind an inner layer");
    require(num_siblings_ > 0 && max_nodes_ > 1, "a draft needs room for guesses");
  }

  // limits: threshold, prices of a branch and of a chain. states: address of those [P, D] the adapter has not seen, and
  // P; addresses of room for those of every node, written sequence by sequence: those entering the exit layer, and
  // those leaving the last one, 0 where these are not wanted; and how many rows that room has. Returns the nodes of
  // every sequence, and, where the drafts are to be verified, what follows each node of all of them, with the seconds
  // that took.
  std::tuple<Nodes, std::vector<int64_t>, double> draft(
      std::pair<const Cache&, Tables> target, std::pair<const Cache&, Tables> adapter, const std::vector<Start>& starts,
      std::tuple<float, double, double> limits,
      std::tuple<uintptr_t, size_t, uintptr_t, uintptr_t, size_t> states, bool verifies) const {
    const auto& [pending, num_unseen, entering, leaving, num_rows] = states;
    const Growth growth{num_siblings_, max_nodes_, std::get<0>(limits), std::get<1>(limits), std::get<2>(limits)};
    const Place place{target_, target.first, target.second}, adapter_place{adapter_, adapter.first, adapter.second};
    Drafting drafting(place, adapter_place, exit_layer_, growth, *embedding_, embedding_scale_,
                      make_head_pass(head_, 0, nullptr));
    if (verifies) drafting.verify_with(make_head_pass(chooser_, 0, nullptr));
    require(!starts.empty(), "a draft needs sequences");
    // Nothing may be refused once the threads run: the largest trees there can be are checked here.
    Pass shallow = make_pass(target_, target.first, {0, exit_layer_}, target.second);
    Pass adapted = make_pass(adapter_, adapter.first, {0, 1}, adapter.second);
    size_t most_rows = 0, pending_rows = 0;
    for (const auto& [slot, base, adapter_slot, adapter_base, root, num_pending, max_depth, draw] : starts) {
      require(root >= 0 && static_cast<size_t>(root) < num_rows_of(*embedding_),
              "every token must have an embedding");
      const size_t most = num_siblings_ == 1 ? std::min(max_nodes_, max_depth + 1) : max_nodes_;
      add_rows(shallow, {slot, base, most, std::nullopt, 0}, std::get<2>(target.second));
      add_rows(adapted, {adapter_slot, adapter_base, most, std::nullopt, num_pending}, std::get<2>(adapter.second));
      most_rows += most;
      pending_rows += num_pending;
      Tree tree{slot, base, adapter_slot, adapter_base, num_pending, max_depth, draw, {root}};
      drafting.trees.push_back(std::move(tree));
    }
    require(num_rows >= most_rows, "there must be room for every node's states");
    require(num_unseen == pending_rows, "every pending row needs a state");
    {
      nb::gil_scoped_release released;
      std::lock_guard<std::mutex> lock(pass_mutex);
      drafting.start(at<const float>(pending));
      Pool::instance().run([&](Team& team) { drafting.run(at<float>(entering), at<float>(leaving), team); });
    }
    const std::chrono::duration<double> verify_time = std::chrono::steady_clock::now() - drafting.drafted;
    Nodes nodes;
    for (Tree& tree : drafting.trees) {
      std::get<0>(nodes).push_back(std::move(tree.tokens));
      std::get<1>(nodes).push_back(std::move(tree.parents));
      std::get<2>(nodes).push_back(std::move(tree.confidences));
    }
    return {std::move(nodes), std::move(drafting.choices), verify_time.count()};
  }

 private:
  const Stack &target_, &adapter_;
  size_t exit_layer_, num_siblings_, max_nodes_;
  std::shared_ptr<Weight> embedding_;
  float embedding_scale_;
  HeadArgument head_, chooser_;
};

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
      .def("run", &run, "cache"_a, "span"_a, "segments"_a, "hidden_out"_a, "taps"_a, "tables"_a,
           "skips"_a)
      .def("decide", &decide, "cache"_a, "span"_a, "segments"_a, "entering"_a, "taps"_a, "tables"_a, "head"_a);
  module.def("run_head", &run_head, "head"_a, "states"_a);
  nb::class_<DraftPlan>(module, "DraftPlan")
      .def(nb::init<const Stack&, const Stack&, std::tuple<size_t, size_t, size_t>,
                    std::pair<std::shared_ptr<Weight>, float>, const HeadArgument&, const HeadArgument&>(),
           "target"_a, "adapter"_a, "bounds"_a, "embedding"_a, "head"_a, "chooser"_a, nb::keep_alive<1, 2>(),
           nb::keep_alive<1, 3>())
      .def("draft", &DraftPlan::draft, "target"_a, "adapter"_a, "starts"_a, "limits"_a, "states"_a, "verifies"_a);
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
