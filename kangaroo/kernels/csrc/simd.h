// Sixteen float32 lanes on whatever vectors the instruction set has. Each operation is the same on every lane, so a
// value never depends on which lane it is in; multiply-add is fused wherever the instruction set can.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace kangaroo {
namespace KANGAROO_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kParts = 16 / kWidth;

typedef float Part __attribute__((vector_size(4 * kWidth)));
typedef int32_t IntPart __attribute__((vector_size(4 * kWidth)));
typedef uint32_t BitPart __attribute__((vector_size(4 * kWidth)));
typedef Part PartAnywhere __attribute__((aligned(4)));
typedef BitPart BitPartAnywhere __attribute__((aligned(4)));
typedef uint16_t HalfPart __attribute__((vector_size(2 * kWidth), aligned(2)));
typedef int8_t BytePart __attribute__((vector_size(kWidth), aligned(1)));

// The 16-bit formats by name, so that load() can tell them apart.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

struct Lanes {
  Part part[kParts];
};

#define KANGAROO_EACH_PART _Pragma("GCC unroll 4") for (int i = 0; i < kParts; ++i)

inline Part broadcast_part(float value) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(value);
#elif defined(__AVX2__)
  return _mm256_set1_ps(value);
#else
  return Part{value, value, value, value};
#endif
}

inline Lanes broadcast(float value) {
  Lanes out;
  KANGAROO_EACH_PART out.part[i] = broadcast_part(value);
  return out;
}

inline Lanes load(const float* from) {
  Lanes out;
  KANGAROO_EACH_PART out.part[i] = *reinterpret_cast<const PartAnywhere*>(from + i * kWidth);
  return out;
}

// Two inputs' weights at once: each lane holds that of input k in its low half and of input k + 1 in its high half.
inline void load_pair(const BFloat16* from, Lanes& first, Lanes& second) {
  KANGAROO_EACH_PART {
    const BitPart bits = *reinterpret_cast<const BitPartAnywhere*>(from + 2 * i * kWidth);
    first.part[i] = (Part)(bits << 16);
    second.part[i] = (Part)(bits & 0xffff0000u);
  }
}

inline Part widen_float16(const Float16* from) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__aarch64__)
  return vcvt_f32_f16(vld1_f16(reinterpret_cast<const __fp16*>(from)));
#else
  const HalfPart half = *reinterpret_cast<const HalfPart*>(from);
  const BitPart bits = __builtin_convertvector(half, BitPart);
  const BitPart magnitude = (bits & 0x7fff) << 13;
  // Scaling by 2^112 rebiases the exponent, subnormals included; infinities and NaNs get theirs set.
  const BitPart finite = (BitPart)((Part)magnitude * 0x1p112f);
  const BitPart special = (BitPart)(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
  return (Part)(finite | special | (bits & 0x8000) << 16);
#endif
}

inline Lanes load(const Float16* from) {
  Lanes out;
  KANGAROO_EACH_PART out.part[i] = widen_float16(from + i * kWidth);
  return out;
}

inline Part widen_int8(const int8_t* from) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const BytePart*>(from), IntPart), Part);
#endif
}

inline Lanes load(const int8_t* from) {
  Lanes out;
  KANGAROO_EACH_PART out.part[i] = widen_int8(from + i * kWidth);
  return out;
}

inline void store(float* to, const Lanes& value) {
  KANGAROO_EACH_PART *reinterpret_cast<PartAnywhere*>(to + i * kWidth) = value.part[i];
}

// The first count (at most 16) lanes from memory, the others zero; nothing beyond them is read.
inline Lanes load_first(const float* from, size_t count) {
  if (count >= 16) return load(from);
  float buffer[16] = {};
  std::memcpy(buffer, from, count * sizeof(float));
  return load(buffer);
}

inline void store_first(float* to, const Lanes& value, size_t count) {
  if (count >= 16) return store(to, value);
  float buffer[16];
  store(buffer, value);
  std::memcpy(to, buffer, count * sizeof(float));
}

inline Part multiply_add(Part a, Part b, Part c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;  // two roundings, on every path alike: contraction is off
#endif
}

// a * b + c
inline Lanes multiply_add(const Lanes& a, const Lanes& b, const Lanes& c) {
  Lanes out;
  KANGAROO_EACH_PART out.part[i] = multiply_add(a.part[i], b.part[i], c.part[i]);
  return out;
}

#define KANGAROO_OPERATOR(op)                                        \
  inline Lanes operator op(const Lanes& a, const Lanes& b) {         \
    Lanes out;                                                       \
    KANGAROO_EACH_PART out.part[i] = a.part[i] op b.part[i];         \
    return out;                                                      \
  }
KANGAROO_OPERATOR(+)
KANGAROO_OPERATOR(-)
KANGAROO_OPERATOR(*)
KANGAROO_OPERATOR(/)
#undef KANGAROO_OPERATOR

// Lanes of integers, as masks (all bits or none) and as indices.
struct IntLanes {
  IntPart part[kParts];
};

inline IntLanes broadcast_int(int32_t value) {
  IntLanes out;
  KANGAROO_EACH_PART out.part[i] = IntPart{} + value;
  return out;
}

inline IntLanes lane_ids() {
  IntLanes out;
  KANGAROO_EACH_PART for (int lane = 0; lane < kWidth; ++lane) out.part[i][lane] = i * kWidth + lane;
  return out;
}

inline IntLanes operator+(const IntLanes& a, const IntLanes& b) {
  IntLanes out;
  KANGAROO_EACH_PART out.part[i] = a.part[i] + b.part[i];
  return out;
}

inline IntLanes operator>(const Lanes& a, const Lanes& b) {
  IntLanes out;
  KANGAROO_EACH_PART out.part[i] = a.part[i] > b.part[i];
  return out;
}

// Lanes first..last-1.
inline IntLanes lanes_between(int32_t first, int32_t last) {
  const IntLanes ids = lane_ids();
  IntLanes out;
  KANGAROO_EACH_PART out.part[i] = (ids.part[i] >= first) & (ids.part[i] < last);
  return out;
}

inline Lanes select(const IntLanes& mask, const Lanes& yes, const Lanes& no) {
  Lanes out;
  KANGAROO_EACH_PART out.part[i] = mask.part[i] ? yes.part[i] : no.part[i];
  return out;
}

inline IntLanes select(const IntLanes& mask, const IntLanes& yes, const IntLanes& no) {
  IntLanes out;
  KANGAROO_EACH_PART out.part[i] = mask.part[i] ? yes.part[i] : no.part[i];
  return out;
}

inline Lanes maximum(const Lanes& a, const Lanes& b) { return select(a > b, a, b); }
inline Lanes minimum(const Lanes& a, const Lanes& b) { return select(a > b, b, a); }

// The sum and the largest of all lanes, always by the same tree.
inline float sum(const Lanes& value) {
  float lanes[16];
  store(lanes, value);
  for (int half = 8; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

inline float largest(const Lanes& value) {
  float lanes[16];
  store(lanes, value);
  float out = lanes[0];
  for (int lane = 1; lane < 16; ++lane) out = lanes[lane] > out ? lanes[lane] : out;
  return out;
}

}  // namespace KANGAROO_ISA
}  // namespace kangaroo
