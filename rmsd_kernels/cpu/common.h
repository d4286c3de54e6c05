// What every kernel here shares: the problem as Python hands it over, rows read tile by tile, exp, and row statistics.
//
// A tile is small enough to stay in L1 while it is visited several times (maximum, then sums), so that each logit is
// read from memory once. Sums are fp32 within a tile and fp64 across tiles, so that a row's length costs no accuracy.
// A row belongs to one thread: results do not depend on how many there are.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cmath>
#include <cstdint>
#include <limits>

namespace rmsd {

using Vec = at::vec::Vectorized<float>;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr int64_t kTile = 2048;  // two fp32 tiles take 16 KB of a 32 KB L1

enum Divergence : int32_t { kReverseKL = 0, kForwardKL = 1, kJSD = 2 };
enum Tail : int32_t { kDrop = 0, kBucket = 1, kRenorm = 2 };
enum Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Mirrors `_Problem` in __init__.py, field by field.
struct Problem {
  const void* student_logits;  // (B, L, V), unit stride along V
  const void* teacher_logits;  // (B, L, V), same dtype
  int64_t student_stride[2];   // along B and L, in elements
  int64_t teacher_stride[2];
  int64_t num_sequences;  // B
  int64_t length;         // L
  int64_t width;          // V
  int64_t vocab_size;     // columns that count
  int32_t dtype;
  int32_t divergence;
  float beta;
  float temperature;
  float teacher_temperature;
  float logit_scale;
  float softcap;  // 0 for none
};

// softcap * tanh(logit_scale * x / softcap) / temperature; -inf stays -inf.
struct Transform {
  float logit_scale, softcap, temperature;

  bool is_identity() const { return logit_scale == 1.f && softcap == 0.f && temperature == 1.f; }

  float operator()(float x) const {
    x *= logit_scale;
    if (softcap != 0.f && x != -kInf) x = softcap * std::tanh(x / softcap);
    return x / temperature;
  }

  Vec operator()(Vec x) const {
    x = x * Vec(logit_scale);
    if (softcap != 0.f) {
      x = Vec::blendv(Vec(softcap) * (x / Vec(softcap)).tanh(), x, x == Vec(-kInf));
    }
    return x / Vec(temperature);
  }

  // d(scaled logit) / d(raw logit), from the scaled logit; 0 where that is -inf.
  Vec slope(Vec scaled) const {
    const float constant = logit_scale / temperature;
    if (softcap == 0.f) return Vec(constant);
    const Vec ratio = at::vec::clamp_min(scaled * Vec(temperature / softcap), Vec(-1.f));
    return Vec(constant) * (Vec(1.f) - ratio * ratio);
  }
};

// e^x for x <= 0, to 9e-8 of its value; exactly 1 at 0, and exactly 0 below the smallest normal number, since a denormal
// would cost a microcode assist; NaN stays. x = n log 2 + r, e^r by a minimax polynomial of degree 5. at::vec's exp_u20 is the same
// behind two clamps and six operations more.
inline Vec exp_nonpositive(Vec x) {
  const Vec smallest(-87.33654f), magic(12582912.f);  // adding 1.5 * 2^23 rounds to an integer
#if !defined(CPU_CAPABILITY_AVX512)
  const Vec clamped = at::vec::clamp_min(x, smallest);
#else
  const Vec& clamped = x;
#endif
  const Vec shifted = at::vec::fmadd(clamped, Vec(1.44269504f), magic);
  const Vec n = shifted - magic;
  const Vec r = at::vec::fmadd(n, Vec(-0.693147181f), clamped);
  Vec p = at::vec::fmadd(r, Vec(0.00829030573f), Vec(0.041897975f));
  p = at::vec::fmadd(r, p, Vec(0.166676372f));
  p = at::vec::fmadd(r, p, Vec(0.499991506f));
  p = at::vec::fmadd(r, p, Vec(0.999999702f));
  p = at::vec::fmadd(r, p, Vec(1.f));
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, smallest, _CMP_NLT_UQ), p, n);
#else
  // n sits in the low bits of `shifted`: moved to the exponent of 1 it makes 2^n.
  const auto exponent = at::vec::cast<int32_t>(shifted) << at::vec::Vectorized<int32_t>(23);
  const Vec power = at::vec::cast<float>(exponent + at::vec::cast<int32_t>(Vec(1.f)));
  return Vec::blendv(p * power, Vec(0.f), x < smallest);
#endif
}

// Sums are taken over 16 vectors and then over blocks: one chain of 256 additions of like numbers rounds the same way
// every time, which cost 2e-6 in a log-sum-exp.
template <typename F>
void blocks(int64_t count, const F& visit) {
  constexpr int64_t block = 16 * Vec::size();
  for (int64_t begin = 0; begin < count; begin += block) visit(begin, std::min(begin + block, count));
}

inline double sum_lanes(Vec v) {
  alignas(64) float lanes[Vec::size()];
  v.store(lanes);
  double total = 0;
  for (float lane : lanes) total += lane;
  return total;
}

inline float max_lanes(Vec v) {
#if defined(CPU_CAPABILITY_AVX512)
  // A store and 16 compares cost as much as the four vectors of a top-k block.
  return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q) ? kNaN : _mm512_reduce_max_ps(v);
#endif
  alignas(64) float lanes[Vec::size()];
  v.store(lanes);
  float peak = lanes[0];
  for (float lane : lanes) peak = (lane > peak || std::isnan(lane)) ? lane : peak;
  return peak;
}

inline Vec load(const float* source) { return Vec::loadu(source); }
inline Vec load(const c10::BFloat16* source) {
  Vec out;
  at::vec::load_fp32_from_bf16(source, out);
  return out;
}
inline Vec load(const c10::Half* source) {
  Vec out;
  at::vec::load_fp32_from_fp16(source, out);
  return out;
}

inline int64_t padded(int64_t count) { return (count + Vec::size() - 1) / Vec::size() * Vec::size(); }

// Raw logits as fp32, padded with -inf to whole vectors; fp32 tiles of whole vectors are used where they lie.
template <typename scalar_t>
const float* raw_tile(const scalar_t* source, int64_t count, float* buffer) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    if (count % Vec::size() == 0) return source;
  }
  int64_t i = 0;
  for (; i + Vec::size() <= count; i += Vec::size()) load(source + i).store(buffer + i);
  for (; i < count; ++i) buffer[i] = static_cast<float>(source[i]);
  for (; i < padded(count); ++i) buffer[i] = -kInf;
  return buffer;
}

// The same after softcap and temperature. `buffer` may hold the raw tile already.
template <typename scalar_t>
const float* scaled_tile(const scalar_t* source, int64_t count, const Transform& transform, float* buffer) {
  const float* raw = raw_tile(source, count, buffer);
  if (transform.is_identity()) return raw;
  for (int64_t i = 0; i < padded(count); i += Vec::size()) transform(Vec::loadu(raw + i)).store(buffer + i);
  return buffer;
}

// A row of both models.
template <typename scalar_t>
struct Row {
  const scalar_t* student;
  const scalar_t* teacher;
  Transform student_transform, teacher_transform;
  int64_t size;

  Row(const Problem& p, int64_t row)
      : student(static_cast<const scalar_t*>(p.student_logits) + (row / p.length) * p.student_stride[0] +
                (row % p.length) * p.student_stride[1]),
        teacher(static_cast<const scalar_t*>(p.teacher_logits) + (row / p.length) * p.teacher_stride[0] +
                (row % p.length) * p.teacher_stride[1]),
        student_transform{p.logit_scale, p.softcap, p.temperature},
        teacher_transform{p.logit_scale, p.softcap, p.teacher_temperature},
        size(p.vocab_size) {}

  // visit(student tile, teacher tile, first id, padded count), both scaled.
  template <typename F>
  void tiles(const F& visit) const {
    alignas(64) float student_buffer[kTile], teacher_buffer[kTile];
    for (int64_t start = 0; start < size; start += kTile) {
      const int64_t count = std::min(kTile, size - start);
      visit(scaled_tile(student + start, count, student_transform, student_buffer),
            scaled_tile(teacher + start, count, teacher_transform, teacher_buffer), start, padded(count));
    }
  }
};

// Calls f with the logits' C++ type as a value of it.
template <typename F>
void with_dtype(int32_t dtype, const F& f) {
  if (dtype == kBFloat16) return f(c10::BFloat16());
  if (dtype == kFloat16) return f(c10::Half());
  f(float());
}

}  // namespace rmsd
