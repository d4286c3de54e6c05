// Divergence of the rows that are kept, over the whole vocabulary or its top k, and its gradient.
#include "scan.h"
#include "topk.h"

namespace rmsd {
namespace {

// What the backward needs of a row: 8 floats, see ops.NUM_STATS.
struct Stats {
  Normaliser student, teacher;  // of the vocabulary, or of the support for renorm; NaN where the divergence is not finite
  float mean_slope = 0;         // c, as the backward's own fp32 arithmetic gives it, so that g - c cancels where it should
  float kth_logit = -kInf, last_tied_id = -1;  // where the support ends, among raw logits
  float rest_log_ratio = 0;                    // log P / Q of the bucket

  bool is_finite() const { return !std::isnan(student.peak); }
};
static_assert(sizeof(Stats) == 8 * sizeof(float));

// p log(p / q): 0 where p = 0, +inf where only q = 0.
double kl_term(double log_p, double log_q) {
  if (log_p == -kInf) return 0;
  if (log_q == -kInf) return kInf;
  return std::exp(log_p) * (log_p - log_q);
}

double log_mixture(double log_p, double log_q, double beta) {
  const double larger = std::max(log_p, log_q);
  return larger + std::log(beta * std::exp(log_q - larger) + (1.0 - beta) * std::exp(log_p - larger));
}

// One entry of the divergence.
double term(const Problem& p, double log_p, double log_q) {
  if (p.divergence == kReverseKL) return kl_term(log_p, log_q);
  if (p.divergence == kForwardKL) return kl_term(log_q, log_p);
  if (log_p == -kInf && log_q == -kInf) return 0;
  const double log_m = log_mixture(log_p, log_q, p.beta);
  return p.beta * kl_term(log_q, log_m) + (1.0 - p.beta) * kl_term(log_p, log_m);
}

// p g of the bucket's entry, P and Q its masses.
double bucket_slope(const Problem& p, double log_p, double log_q) {
  if (p.divergence == kForwardKL) return -std::exp(log_q);
  if (log_p == -kInf || log_q == -kInf) return 0;
  const double other = p.divergence == kReverseKL ? log_q : log_mixture(log_p, log_q, p.beta);
  return std::exp(log_p) * (p.divergence == kReverseKL ? 1.0 : 1.0 - p.beta) * (log_p - other);
}

// p g, entry by entry, in fp32.
struct Slope {
  int32_t divergence;
  float beta;
  float one;  // 1 where the reverse KL's slope log p - log q + 1 keeps its 1, i.e. where probabilities do not sum to 1
  Normaliser student_logprob, teacher_logprob;
  float shift;  // student's log-sum-exp less the teacher's

  Slope(const Problem& p, bool keeps_one, const Stats& stats)
      : divergence(p.divergence), beta(p.beta), one(keeps_one ? 1.f : 0.f), student_logprob(stats.student),
        teacher_logprob(stats.teacher),
        shift(static_cast<float>((double(stats.student.peak) - stats.teacher.peak) +
                                 (double(stats.student.log_total) - stats.teacher.log_total))) {}

  // p (g - mean_slope) from scaled logits.
  Vec operator()(Vec s, Vec t, Vec mean_slope) const {
    const Vec ls = student_logprob(s), lt = teacher_logprob(t), lowest(kLowest);
    const Vec p = exp_nonpositive(at::vec::clamp_max(ls, Vec(0.f)));
    if (divergence == kReverseKL) {
      // The logits' difference first: log p and log q are each off by half a bit of a number of size 10.
      const Vec gap = (at::vec::clamp_min(s, lowest) - at::vec::clamp_min(t, lowest)) - Vec(shift);
      return p * ((gap + Vec(one)) - mean_slope);
    }
    const Vec q = exp_nonpositive(at::vec::clamp_max(lt, Vec(0.f)));
    if (divergence == kForwardKL) return (q + p * mean_slope).neg();
    const Vec m = at::vec::fmadd(Vec(beta), q, Vec(1.f - beta) * p);
    const Vec lm = at::vec::clamp_min(m, Vec(std::numeric_limits<float>::min())).log();
    return p * (Vec(1.f - beta) * (ls - lm) - mean_slope);
  }
};

// Sum of p g over scaled logits that lie together, padded with -inf to whole vectors.
double slope_sum(const Slope& slope, const float* student, const float* teacher, int64_t count) {
  Vec total(0.f);
  blocks(count, [&](int64_t begin, int64_t end) {
    Vec part(0.f);
    for (int64_t i = begin; i < end; i += Vec::size()) {
      part = part + slope(Vec::loadu(student + i), Vec::loadu(teacher + i), Vec(0.f));
    }
    total = total + part;
  });
  return sum_lanes(total);
}

// An online log-sum-exp with its own maximum.
struct LogSumExp {
  float peak = -kInf;
  double total = 0;

  void add(const float* tile, int64_t count) {
    Vec tile_max(-kInf), sum(0.f);
    for (int64_t i = 0; i < count; i += Vec::size()) tile_max = at::vec::clamp_min(Vec::loadu(tile + i), tile_max);
    const float larger = std::max(peak, max_lanes(tile_max));
    if (larger == -kInf) return;
    if (total > 0) total *= std::exp(double(peak) - larger);
    peak = larger;
    blocks(count, [&](int64_t begin, int64_t end) {
      Vec part(0.f);
      for (int64_t i = begin; i < end; i += Vec::size()) {
        part = part + exp_nonpositive(at::vec::clamp_min(Vec::loadu(tile + i) - Vec(peak), Vec(kLowest)));
      }
      sum = sum + part;
    });
    total += sum_lanes(sum);
  }
  double value() const { return peak + std::log(total); }
};

// log-sum-exp of what is outside the support, summed directly: 1 - P would lose it where P is near 1, and the row's own
// maximum would make it underflow.
template <typename scalar_t>
std::pair<double, double> rest_lse(const Row<scalar_t>& row, const Support& support) {
  LogSumExp student_rest, teacher_rest;
  alignas(64) float student_tile[kTile], teacher_tile[kTile];
  size_t next = 0;
  row.tiles([&](const float* student, const float* teacher, int64_t start, int64_t count) {
    std::copy_n(student, count, student_tile);
    std::copy_n(teacher, count, teacher_tile);
    for (; next < support.ids.size() && support.ids[next] < start + count; ++next) {
      student_tile[support.ids[next] - start] = teacher_tile[support.ids[next] - start] = -kInf;
    }
    student_rest.add(student_tile, count);
    teacher_rest.add(teacher_tile, count);
  });
  return {student_rest.value(), teacher_rest.value()};
}

template <typename scalar_t>
double topk_row(const Problem& p, const Row<scalar_t>& row, const Scan& scan, int64_t k, int32_t tail, Stats& stats) {
  const Support support = topk_support(row.student, row.size, k);
  stats.kth_logit = support.kth_logit;
  stats.last_tied_id = static_cast<float>(support.last_tied_id);
  std::vector<float> student(padded(k), -kInf), teacher(padded(k), -kInf);
  for (int64_t i = 0; i < k; ++i) {
    student[i] = row.student_transform(static_cast<float>(row.student[support.ids[i]]));
    teacher[i] = row.teacher_transform(static_cast<float>(row.teacher[support.ids[i]]));
  }
  double student_log_total = scan.student.log_total(), teacher_log_total = scan.teacher.log_total();
  float student_peak = scan.student.peak, teacher_peak = scan.teacher.peak;
  if (tail == kRenorm) {
    LogSumExp student_inside, teacher_inside;
    student_inside.add(student.data(), student.size());
    teacher_inside.add(teacher.data(), teacher.size());
    // A teacher with no mass in the support cannot be renormalised over it; it is as far away as can be.
    if (teacher_inside.peak == -kInf) return kInf;
    student_peak = student_inside.peak, student_log_total = std::log(student_inside.total);
    teacher_peak = teacher_inside.peak, teacher_log_total = std::log(teacher_inside.total);
  }
  stats.student = Normaliser(student_peak, student_log_total);
  stats.teacher = Normaliser(teacher_peak, teacher_log_total);

  double divergence = 0;
  for (int64_t i = 0; i < k; ++i) {
    divergence += term(p, (double(student[i]) - student_peak) - student_log_total,
                       (double(teacher[i]) - teacher_peak) - teacher_log_total);
  }
  const Slope slope(p, tail == kDrop, stats);
  double mean_slope = slope_sum(slope, student.data(), teacher.data(), student.size());
  if (tail == kBucket) {
    const auto [student_rest, teacher_rest] = rest_lse(row, support);
    const double log_p = (student_rest - student_peak) - student_log_total;
    const double log_q = (teacher_rest - teacher_peak) - teacher_log_total;
    divergence += term(p, log_p, log_q);
    mean_slope += bucket_slope(p, log_p, log_q);
    if (log_p > -kInf && log_q > -kInf) stats.rest_log_ratio = static_cast<float>(log_p - log_q);
  }
  stats.mean_slope = static_cast<float>(mean_slope);
  return divergence;
}

template <typename scalar_t>
double whole_row(const Problem& p, const Row<scalar_t>& row, const Scan& scan, Stats& stats) {
  stats.student = Normaliser(scan.student);
  stats.teacher = Normaliser(scan.teacher);
  if (p.divergence == kForwardKL) {
    stats.mean_slope = -1.f;
    return scan.forward_kl();
  }
  if (p.divergence == kJSD) {
    const JSD jsd = jsd_row(row, stats.student, stats.teacher, p.beta);
    stats.mean_slope = static_cast<float>((1.0 - p.beta) * jsd.student_kl);
    return jsd.divergence;
  }
  // c is the divergence, but for roundings that must be the backward's: for a saturated row, p = 1 at one token, g - c
  // is then exactly 0. The row is in cache.
  const Slope slope(p, false, stats);
  double mean_slope = 0;
  row.tiles([&](const float* student, const float* teacher, int64_t, int64_t count) {
    mean_slope += slope_sum(slope, student, teacher, count);
  });
  stats.mean_slope = static_cast<float>(mean_slope);
  return scan.reverse_kl();
}

template <typename scalar_t>
float divergence_row(const Problem& p, int64_t index, int64_t k, int32_t tail, Stats& stats) {
  const Row<scalar_t> row(p, index);
  const Scan scan = k > 0 || p.divergence == kJSD ? scan_row<Sums::kNone>(row)
                    : p.divergence == kForwardKL  ? scan_row<Sums::kForward>(row)
                                                  : scan_row<Sums::kReverse>(row);
  if (!scan.valid) return kNaN;
  const double divergence = k > 0 ? topk_row(p, row, scan, k, tail, stats) : whole_row(p, row, scan, stats);
  if (!std::isfinite(divergence)) stats = Stats();
  return static_cast<float>(divergence);
}

template <typename scalar_t>
void backward_row(const Problem& p, int64_t index, int64_t k, int32_t tail, float grad_divergence, const Stats& stats,
                  scalar_t* grad) {
  const Row<scalar_t> row(p, index);
  const Slope slope(p, k > 0 && tail == kDrop, stats);
  const Vec mean_slope(stats.mean_slope), scale(grad_divergence);
  const Vec kth(stats.kth_logit), last_tied(stats.last_tied_id);
  // Slope outside the support, less c. The forward KL's bucket has -Q / P, which may overflow where p_j Q / P does not.
  const float ratio = stats.rest_log_ratio;
  float rest_slope = 0;
  if (p.divergence == kReverseKL) rest_slope = ratio;
  if (p.divergence == kJSD) rest_slope = static_cast<float>((1.0 - p.beta) * (ratio - log_mixture(ratio, 0, p.beta)));
  const Vec outside_slope(tail == kRenorm ? 0.f : (tail == kBucket ? rest_slope : 0.f) - stats.mean_slope);
  const bool by_ratio = k > 0 && tail == kBucket && p.divergence == kForwardKL;
  alignas(64) float raw_buffer[kTile], out[kTile];
  row.tiles([&](const float* student, const float* teacher, int64_t start, int64_t count) {
    const int64_t real = std::min(kTile, row.size - start);
    const float* raw = k > 0 ? raw_tile(row.student + start, real, raw_buffer) : nullptr;
    for (int64_t i = 0; i < count; i += Vec::size()) {
      const Vec s = Vec::loadu(student + i);
      Vec result = slope(s, Vec::loadu(teacher + i), mean_slope);
      if (k > 0) {
        const Vec ls = stats.student(s);
        const Vec r = Vec::loadu(raw + i), id = Vec::arange(static_cast<float>(start + i), 1.f);
        const Vec inside = (r > kth) | ((r == kth) & (id <= last_tied));
        Vec outside = exp_nonpositive(at::vec::clamp_max(ls, Vec(0.f))) * outside_slope;
        if (by_ratio) outside = outside - at::vec::clamp_min(ls - Vec(ratio), Vec(kLowest)).exp();
        result = Vec::blendv(outside, result, inside);
      }
      (result * scale * row.student_transform.slope(s)).store(out + i);
    }
    for (int64_t i = 0; i < real; ++i) grad[start + i] = static_cast<scalar_t>(out[i]);
  });
}

}  // namespace
}  // namespace rmsd

extern "C" {

// rows (R,) int64 or null for all, -1 for none; divergence (R,) fp32; stats (R, 8) fp32. vocab_topk 0 for all.
void rmsd_divergence(const rmsd::Problem* p, const int64_t* rows, int64_t num_rows, int64_t vocab_topk, int32_t tail,
                     float* divergence, float* stats) {
  rmsd::with_dtype(p->dtype, [&](auto zero) {
    at::parallel_for(0, num_rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = rows ? rows[i] : i;
        rmsd::Stats& own = reinterpret_cast<rmsd::Stats*>(stats)[i];
        own = rmsd::Stats();
        divergence[i] = row < 0 ? 0 : rmsd::divergence_row<decltype(zero)>(*p, row, vocab_topk, tail, own);
      }
    });
  });
}

// grad_logits (B, L, V) in the logits' dtype, contiguous and zero; written at `rows` only.
void rmsd_divergence_backward(const rmsd::Problem* p, const int64_t* rows, int64_t num_rows, int64_t vocab_topk,
                              int32_t tail, const float* grad_divergence, const float* stats, void* grad_logits) {
  rmsd::with_dtype(p->dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    at::parallel_for(0, num_rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = rows ? rows[i] : i;
        const rmsd::Stats& own = reinterpret_cast<const rmsd::Stats*>(stats)[i];
        if (row < 0 || !own.is_finite() || grad_divergence[i] == 0) continue;
        rmsd::backward_row(*p, row, vocab_topk, tail, grad_divergence[i], own,
                           static_cast<scalar_t*>(grad_logits) + row * p->width);
      }
    });
  });
}

}  // extern "C"
