// Divergence of the rows that are kept, over the whole vocabulary or its top k, and its gradient.
#include "scan.h"
#include "topk.h"

namespace rmsd {
namespace {

// What the backward needs of a row: ops.NUM_STATS floats, g and c as in triton/divergence_backward.py.
struct Stats {
  Normaliser student, teacher;  // of the vocabulary, or of the support for renorm; NaN where the divergence is not finite
  float mean_slope = 0;         // c
  float offset = 0;  // reverse KL: g - c is the logits' distances from their maxima, subtracted, less this
  float kth_logit = -kInf, last_tied_id = -1;  // where the support ends, among raw logits
  float outside_slope = 0;                     // g - c outside the support, but for the forward KL's bucket
  Normaliser rest{0, 0};                       // forward KL's bucket: log(p_j Q / P) of its scaled logit
  float unused[5] = {};

  bool is_finite() const { return !std::isnan(student.peak); }
};
static_assert(sizeof(Stats) == 16 * sizeof(float));

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

// g of an entry of a reverse KL, less its 1, or of a JSD; 0 where p is, and where the divergence is infinite.
double slope_of(const Problem& p, double log_p, double log_q) {
  if (log_p == -kInf || (p.divergence == kReverseKL && log_q == -kInf)) return 0;
  const double other = p.divergence == kReverseKL ? log_q : log_mixture(log_p, log_q, p.beta);
  return (p.divergence == kReverseKL ? 1.0 : 1.0 - p.beta) * (log_p - other);
}

// p (g - c), entry by entry, in fp32.
struct Slope {
  int32_t divergence;
  float beta;
  Stats stats;

  Slope(const Problem& p, const Stats& stats) : divergence(p.divergence), beta(p.beta), stats(stats) {}

  // From scaled logits.
  Vec operator()(Vec s, Vec t) const {
    const Vec ls = stats.student(s), lt = stats.teacher(t), mean_slope(stats.mean_slope);
    const Vec p = exp_nonpositive(at::vec::clamp_max(ls, Vec(0.f)));
    if (divergence == kReverseKL) {
      // All that is the row's at once: log-sum-exps and c are numbers of size 10, and rounding each to fp32 cost 2e-6 of
      // a gradient that plain torch had to 2e-7. A token far below its maximum is rounded more and weighs less.
      // Kept above -inf, which a p of 0 would make NaN: a teacher's ban may be as low as a float can be.
      const Vec slope = (stats.student.distance(s) - stats.teacher.distance(t)) - Vec(stats.offset);
      return p * at::vec::clamp_min(slope, Vec(kLowest));
    }
    const Vec q = exp_nonpositive(at::vec::clamp_max(lt, Vec(0.f)));
    if (divergence == kForwardKL) return (q + p * mean_slope).neg();
    const Vec m = at::vec::fmadd(Vec(beta), q, Vec(1.f - beta) * p);
    const Vec lm = at::vec::clamp_min(m, Vec(std::numeric_limits<float>::min())).log();
    return p * (Vec(1.f - beta) * (ls - lm) - mean_slope);
  }
};

// An online log-sum-exp with its own maximum.
struct LogSumExp {
  float peak = -kInf;
  double total = 0;

  LogSumExp() = default;
  LogSumExp(float peak, double total) : peak(peak), total(total) {}

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
  // log of the share that this has of `all`.
  double log_mass(const LogSumExp& all) const {
    return (double(peak) - all.peak) + (std::log(total) - std::log(all.total));
  }
};

// log-sum-exps of what is outside the support, summed directly: 1 - P would lose it where P is near 1, and the row's own
// maximum would make it underflow.
template <typename scalar_t>
std::pair<LogSumExp, LogSumExp> rest_of(const Row<scalar_t>& row, const Support& support) {
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
  return {student_rest, teacher_rest};
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
  LogSumExp student_all(scan.student.peak, scan.student.total), teacher_all(scan.teacher.peak, scan.teacher.total);
  if (tail == kRenorm) {
    student_all = teacher_all = LogSumExp();
    student_all.add(student.data(), student.size());
    teacher_all.add(teacher.data(), teacher.size());
    // A teacher with no mass in the support cannot be renormalised over it; it is as far away as can be.
    if (teacher_all.peak == -kInf) return kInf;
  }
  const double student_log_total = std::log(student_all.total), teacher_log_total = std::log(teacher_all.total);
  stats.student = Normaliser(student_all.peak, student_log_total);
  stats.teacher = Normaliser(teacher_all.peak, teacher_log_total);

  // g = log(p / q) + 1. The 1 drops out of g - c only where the masses summed are all of them.
  const double one = p.divergence == kReverseKL && tail == kDrop ? 1 : 0;
  double divergence = 0, mean_slope = 0, rest_slope = 0;
  for (int64_t i = 0; i < k; ++i) {
    const double log_p = (double(student[i]) - student_all.peak) - student_log_total;
    const double log_q = (double(teacher[i]) - teacher_all.peak) - teacher_log_total;
    const double prob = std::exp(log_p);
    divergence += term(p, log_p, log_q);
    mean_slope += p.divergence == kForwardKL ? -std::exp(log_q) : prob * (slope_of(p, log_p, log_q) + one);
  }
  if (tail == kBucket) {
    const auto [student_rest, teacher_rest] = rest_of(row, support);
    const double log_p = student_rest.log_mass(student_all), log_q = teacher_rest.log_mass(teacher_all);
    divergence += term(p, log_p, log_q);
    if (p.divergence == kForwardKL) {
      mean_slope -= std::exp(log_q);
      if (log_p > -kInf) stats.rest = Normaliser(student_rest.peak, std::log(student_rest.total) - log_q);
    } else {
      rest_slope = slope_of(p, log_p, log_q);
      mean_slope += std::exp(log_p) * rest_slope;
    }
  }
  if (!std::isfinite(divergence)) return divergence;
  stats.offset = static_cast<float>(student_log_total - teacher_log_total - one + mean_slope);
  stats.mean_slope = static_cast<float>(mean_slope);
  stats.outside_slope = tail == kRenorm ? 0.f : static_cast<float>(rest_slope - mean_slope);
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
  const double divergence = scan.reverse_kl();
  if (!std::isfinite(divergence)) return divergence;
  stats.offset = static_cast<float>(scan.student.log_total() - scan.teacher.log_total() + divergence);  // c = divergence
  return divergence;
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
  const Slope slope(p, stats);
  const Vec scale(grad_divergence), kth(stats.kth_logit), last_tied(stats.last_tied_id);
  const Vec outside_slope(stats.outside_slope);
  // The slope of the forward KL's bucket, -Q / P, may overflow where p_j Q / P does not.
  const bool by_ratio = k > 0 && tail == kBucket && p.divergence == kForwardKL;
  alignas(64) float raw_buffer[kTile], out[kTile];
  row.tiles([&](const float* student, const float* teacher, int64_t start, int64_t count) {
    const int64_t real = std::min(kTile, row.size - start);
    const float* raw = k > 0 ? raw_tile(row.student + start, real, raw_buffer) : nullptr;
    for (int64_t i = 0; i < count; i += Vec::size()) {
      const Vec s = Vec::loadu(student + i);
      Vec result = slope(s, Vec::loadu(teacher + i));
      if (k > 0) {
        const Vec r = Vec::loadu(raw + i), id = Vec::arange(static_cast<float>(start + i), 1.f);
        const Vec inside = (r > kth) | ((r == kth) & (id <= last_tied));
        Vec outside = exp_nonpositive(at::vec::clamp_max(stats.student(s), Vec(0.f))) * outside_slope;
        if (by_ratio) outside = outside - exp_nonpositive(at::vec::clamp_max(stats.rest(s), Vec(0.f)));
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

// rows (R,) int64 or null for all, -1 for none; divergence (R,) fp32; stats (R, 16) fp32. vocab_topk 0 for all.
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
