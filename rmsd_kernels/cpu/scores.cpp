// Scores of every token, and the selection of the largest.
#include <algorithm>
#include <vector>

#include "scan.h"

namespace rmsd {
namespace {

enum Score { kStudentLogprob, kTeacherLogprob, kDivergence, kStudentLse, kTeacherLse, kStudentEntropy, kTeacherEntropy };
enum Criterion : int32_t { kLogprobGap = 0, kByDivergence = 1, kEntropyGap = 2 };

template <typename scalar_t>
void score_row(const Problem& p, int64_t index, int64_t id, float* scores, int64_t num_rows) {
  const auto put = [&](Score which, double value) { scores[which * num_rows + index] = static_cast<float>(value); };
  const Row<scalar_t> row(p, index);
  const bool forward = p.divergence == kForwardKL;
  const Scan scan = forward ? scan_row<Sums::kForward>(row) : scan_row<Sums::kReverse>(row);
  if (!scan.valid || id < 0 || id >= p.vocab_size) {
    for (int which = kStudentLogprob; which <= kTeacherEntropy; ++which) put(Score(which), kNaN);
    return;
  }
  const float s = row.student_transform(static_cast<float>(row.student[id]));
  const float t = row.teacher_transform(static_cast<float>(row.teacher[id]));
  put(kStudentLogprob, (double(s) - scan.student.peak) - scan.student.log_total());
  put(kTeacherLogprob, (double(t) - scan.teacher.peak) - scan.teacher.log_total());
  put(kStudentLse, scan.student.lse());
  put(kTeacherLse, scan.teacher.lse());
  put(kStudentEntropy, scan.student.entropy());
  put(kTeacherEntropy, scan.teacher.entropy());
  put(kDivergence, p.divergence == kJSD ? jsd_row(row, Normaliser(scan.student), Normaliser(scan.teacher), p.beta).divergence
                                        : (forward ? scan.forward_kl() : scan.reverse_kl()));
}

// Best first, ties to the earlier position; NaN exceeds no threshold.
void select_row(const float* score, const bool* mask, int64_t length, int64_t num_tokens, float threshold,
                int64_t* index) {
  std::vector<int64_t> found;
  for (int64_t i = 0; i < length; ++i) {
    if (mask[i] && score[i] > threshold) found.push_back(i);
  }
  const int64_t kept = std::min<int64_t>(num_tokens, found.size());
  std::partial_sort(found.begin(), found.begin() + kept, found.end(), [&](int64_t a, int64_t b) {
    return score[a] > score[b] || (score[a] == score[b] && a < b);
  });
  std::copy_n(found.begin(), kept, index);
  std::fill(index + kept, index + num_tokens, int64_t(-1));
}

}  // namespace
}  // namespace rmsd

extern "C" {

// sampled_ids (B, L) int64, scores (7, B, L) fp32 in the order of TokenScores.
void rmsd_scores(const rmsd::Problem* p, const int64_t* sampled_ids, float* scores) {
  const int64_t num_rows = p->num_sequences * p->length;
  rmsd::with_dtype(p->dtype, [&](auto zero) {
    at::parallel_for(0, num_rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        rmsd::score_row<decltype(zero)>(*p, row, sampled_ids[row], scores, num_rows);
      }
    });
  });
}

// score (B, L) fp32, mask (B, L) bool, index (B, num_tokens) int64.
void rmsd_select(const float* score, const bool* mask, int64_t num_sequences, int64_t length, int64_t num_tokens,
                 float threshold, int64_t* index) {
  at::parallel_for(0, num_sequences, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      rmsd::select_row(score + b * length, mask + b * length, length, num_tokens, threshold, index + b * num_tokens);
    }
  });
}

// scores (7, B, L) of rmsd_scores; a row whose divergence is not finite is never selected.
void rmsd_candidates(const float* scores, const bool* mask, int64_t num_sequences, int64_t length, int64_t num_tokens,
                     int32_t criterion, float threshold, int64_t* index) {
  const int64_t num_rows = num_sequences * length;
  at::parallel_for(0, num_sequences, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> score(length);
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t i = 0; i < length; ++i) {
        const float* row = scores + b * length + i;
        const auto of = [&](rmsd::Score which) { return row[which * num_rows]; };
        const float divergence = of(rmsd::kDivergence);
        score[i] = !std::isfinite(divergence)                ? rmsd::kNaN
                   : criterion == rmsd::kByDivergence        ? divergence
                   : criterion == rmsd::kEntropyGap
                       ? std::abs(of(rmsd::kTeacherEntropy) - of(rmsd::kStudentEntropy))
                       : std::abs(of(rmsd::kTeacherLogprob) - of(rmsd::kStudentLogprob));
      }
      rmsd::select_row(score.data(), mask + b * length, length, num_tokens, threshold, index + b * num_tokens);
    }
  });
}

}  // extern "C"
