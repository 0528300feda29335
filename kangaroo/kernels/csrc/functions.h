// Elementary functions on lanes; polynomial coefficients are those of the Cephes library's expf and tanhf.
#pragma once

#include <cmath>

#include "simd.h"

namespace kangaroo {
namespace KANGAROO_ISA {

// Within 2 ulp; arguments are clamped to where the result is a normal number, a NaN to the lower end.
inline Lanes exponential(const Lanes& value) {
  const Lanes x = minimum(maximum(value, broadcast(-86.5f)), broadcast(88.0f));
  // Adding 1.5 * 2^23 rounds to the nearest integer, which is then in the low bits.
  const Lanes magic = broadcast(12582912.0f);
  const Lanes shifted = multiply_add(x, broadcast(1.44269504088896341f), magic);
  const Lanes power = shifted - magic;
  const Lanes high = multiply_add(power, broadcast(-0.693359375f), x);
  const Lanes rest = multiply_add(power, broadcast(2.12194440e-4f), high);
  Lanes series = broadcast(1.9875691500e-4f);
  series = multiply_add(series, rest, broadcast(1.3981999507e-3f));
  series = multiply_add(series, rest, broadcast(8.3334519073e-3f));
  series = multiply_add(series, rest, broadcast(4.1665795894e-2f));
  series = multiply_add(series, rest, broadcast(1.6666665459e-1f));
  series = multiply_add(series, rest, broadcast(5.0000001201e-1f));
  series = multiply_add(series, rest * rest, rest + broadcast(1.0f));
  Lanes out;
  KANGAROO_EACH_PART {
    const IntPart exponent = (IntPart)shifted.part[i] - (IntPart)magic.part[i];
    out.part[i] = (Part)((IntPart)series.part[i] + (exponent << 23));
  }
  return out;
}

inline Lanes hyperbolic_tangent(const Lanes& x) {
  const Lanes one = broadcast(1.0f), two = broadcast(2.0f), zero = broadcast(0.0f);
  const Lanes size = maximum(x, zero - x);
  const Lanes large = one - two / (exponential(minimum(size, broadcast(20.0f)) * two) + one);
  const Lanes signed_large = select(x > zero, large, zero - large);
  const Lanes square = x * x;
  Lanes series = broadcast(-5.70498872745e-3f);
  series = multiply_add(series, square, broadcast(2.06390887954e-2f));
  series = multiply_add(series, square, broadcast(-5.37397155531e-2f));
  series = multiply_add(series, square, broadcast(1.33314422036e-1f));
  series = multiply_add(series, square, broadcast(-3.33332819422e-1f));
  const Lanes small = multiply_add(series * square, x, x);
  return select(size > broadcast(0.625f), signed_large, small);
}

inline Lanes silu(const Lanes& x) {
  const Lanes one = broadcast(1.0f);
  return x / (one + exponential(broadcast(0.0f) - x));
}

// The tanh form of GELU (Hendrycks and Gimpel 2016).
inline Lanes gelu_tanh(const Lanes& x) {
  const Lanes cubic = multiply_add(x * x * x, broadcast(0.044715f), x);
  const Lanes gate = hyperbolic_tangent(cubic * broadcast(0.79788456080286535588f));
  return x * broadcast(0.5f) * (gate + broadcast(1.0f));
}

inline Lanes soft_cap(const Lanes& x, float cap) {
  return broadcast(cap) * hyperbolic_tangent(x / broadcast(cap));
}

// Root-mean-square norm of row [size] times weight [size] into out [size]; out may be row itself.
inline void rms_norm(const float* row, const float* weight, float eps, size_t size, float* out) {
  Lanes squares = broadcast(0.0f);
  for (size_t i = 0; i < size; i += 16) {
    const Lanes x = load_first(row + i, size - i);
    squares = multiply_add(x, x, squares);
  }
  const Lanes scale = broadcast(1.0f / std::sqrt(sum(squares) / static_cast<float>(size) + eps));
  for (size_t i = 0; i < size; i += 16) {
    const size_t count = size - i;
    store_first(out + i, load_first(row + i, count) * scale * load_first(weight + i, count), count);
  }
}

}  // namespace KANGAROO_ISA
}  // namespace kangaroo
