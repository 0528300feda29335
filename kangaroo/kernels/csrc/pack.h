// Packing of weight matrices into panels, and reading single rows back out of them.
#pragma once

#include <cmath>
#include <cstring>

#include "plan.h"

namespace kangaroo {

// Where output n of a weight [num_outputs or, paired, 2 * num_outputs rows] stands: its panel and its lane.
inline std::pair<size_t, size_t> place_of(const Weight& weight, size_t output) {
  if (!weight.paired) return {output / kLanes, output % kLanes};
  const size_t half = output / weight.num_outputs, within = output % weight.num_outputs;
  return {within / kLanes * 2 + half, within % kLanes};
}

inline size_t num_rows_of(const Weight& weight) { return weight.num_outputs * (weight.paired ? 2 : 1); }

template <class T>
void pack_rows(Weight& weight, const T* rows) {
  T* panels = weight.panels->as<T>();
  for (size_t row = 0; row < num_rows_of(weight); ++row) {
    const auto [panel, lane] = place_of(weight, row);
    T* to = panels + panel * weight.panel_size();
    for (size_t k = 0; k < weight.num_inputs; ++k) {
      to[weight.place_in_panel(k, lane)] = rows[row * weight.num_inputs + k];
    }
  }
}

inline void pack(Weight& weight, const void* rows) {
  weight.panels = std::make_shared<Block>(weight.num_panels() * weight.panel_size() * bytes_of(weight.storage));
  switch (bytes_of(weight.storage)) {
    case 4: return pack_rows(weight, static_cast<const uint32_t*>(rows));
    case 2: return pack_rows(weight, static_cast<const uint16_t*>(rows));
    case 1: return pack_rows(weight, static_cast<const uint8_t*>(rows));
  }
}

// Per-output numbers [rows] in panel order, zero where a panel has no such output.
inline std::vector<float> pack_column(const Weight& weight, const float* values) {
  std::vector<float> out(weight.num_panels() * kLanes, 0.0f);
  for (size_t row = 0; row < num_rows_of(weight); ++row) {
    const auto [panel, lane] = place_of(weight, row);
    out[panel * kLanes + lane] = values[row];
  }
  return out;
}

inline float widen(uint16_t bits, Storage storage) {
  float out;
  if (storage == Storage::bfloat16) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    std::memcpy(&out, &wide, sizeof(out));
    return out;
  }
  const int exponent = bits >> 10 & 31;
  const float fraction = static_cast<float>(bits & 0x3ff);
  const float size = exponent == 31 ? (fraction != 0 ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(fraction, -24)
                                     : std::ldexp(fraction + 1024.0f, exponent - 25);
  return bits >> 15 ? -size : size;
}

// One row [num_inputs] of the matrix in float32.
inline void unpack_row(const Weight& weight, size_t row, float* out) {
  const auto [panel, lane] = place_of(weight, row);
  const size_t start = panel * weight.panel_size();
  const Block& panels = *weight.panels;
  for (size_t k = 0; k < weight.num_inputs; ++k) {
    const size_t at = start + weight.place_in_panel(k, lane);
    switch (weight.storage) {
      case Storage::float32: out[k] = panels.as<float>()[at]; break;
      case Storage::int8: out[k] = panels.as<int8_t>()[at] * weight.scales[panel * kLanes + lane]; break;
      default: out[k] = widen(panels.as<uint16_t>()[at], weight.storage);
    }
  }
}

}  // namespace kangaroo
