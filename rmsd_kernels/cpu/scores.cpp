// Seven numbers a token from one visit of both rows (two for the jsd), and the best positions of each sequence.
#include "kernels.h"
#include "visits.h"

namespace rmsd {
namespace {

template <typename scalar_t>
void score_row(const Logits<scalar_t>& student_logits, const Logits<scalar_t>& teacher_logits, int64_t row,
               int64_t sampled_id, const Options& options, float* scores, int64_t num_rows) {
  const scalar_t* student_row = student_logits.row(row);
  const scalar_t* teacher_row = teacher_logits.row(row);
  const Softcap cap = options.cap();
  // The online visit weighs by its first row: the KL's own distribution.
  const bool forward = options.divergence == FORWARD_KL;
  const float student_scale = options.student_scale(), teacher_scale = options.teacher_scale();
  Online online(forward ? teacher_scale : student_scale, forward ? student_scale : teacher_scale);
  visit_online(
      RowPair<scalar_t>{forward ? teacher_row : student_row, forward ? student_row : teacher_row, options.vocab_size, cap},
      online);
  const Pair pair(online);
  const Distribution& student = forward ? pair.second : pair.first;
  const Distribution& teacher = forward ? pair.first : pair.second;

  if (!pair.valid() || sampled_id < 0 || sampled_id >= options.vocab_size) {
    for (int64_t i = 0; i < 7; ++i) scores[i * num_rows + row] = std::numeric_limits<float>::quiet_NaN();
    return;
  }
  double divergence = pair.kl();
  if (options.divergence == JSD) {
    // The rows were just read: at V = 152k both are 1.2 MB in fp32, which an L2 holds.
    const RowPair<scalar_t> rows{student_row, teacher_row, options.vocab_size, cap};
    divergence = visit_jsd(rows, student, teacher, options.beta).divergence;
  }
  const double values[7] = {
      student.logprob(cap(static_cast<float>(student_row[sampled_id]))),
      teacher.logprob(cap(static_cast<float>(teacher_row[sampled_id]))),
      divergence,
      student.lse(),
      teacher.lse(),
      student.entropy(),
      teacher.entropy(),
  };
  for (int64_t i = 0; i < 7; ++i) scores[i * num_rows + row] = static_cast<float>(values[i]);
}

float criterion_score(const float* scores, int64_t row, int64_t num_rows, Criterion criterion) {
  const auto score = [&](int64_t i) { return scores[i * num_rows + row]; };
  if (!std::isfinite(score(2))) return std::numeric_limits<float>::quiet_NaN();
  if (criterion == DIVERGENCE) return score(2);
  return criterion == LOGPROB_GAP ? std::abs(score(1) - score(0)) : std::abs(score(6) - score(5));
}

// The best `num_tokens` positions of one sequence by insertion: a position enters only where it beats the worst kept,
// so a position that ties with an earlier one stays behind it.
template <typename ScoreAt>
void select_sequence(const ScoreAt& score_at, const bool* mask, int64_t length, int64_t num_tokens, float threshold,
                     int64_t* index) {
  const auto worse = [](const std::pair<float, int64_t>& a, const std::pair<float, int64_t>& b) {
    return a.first > b.first || (a.first == b.first && a.second < b.second);
  };
  std::vector<std::pair<float, int64_t>> best;  // a heap with the worst kept on top
  best.reserve(std::min(num_tokens, length) + 1);
  for (int64_t position = 0; position < length; ++position) {
    if (!mask[position]) continue;
    const std::pair<float, int64_t> entry(score_at(position), position);
    if (!(entry.first > threshold)) continue;
    if (int64_t(best.size()) == num_tokens) {
      if (!worse(entry, best.front())) continue;
      std::pop_heap(best.begin(), best.end(), worse);
      best.pop_back();
    }
    best.push_back(entry);
    std::push_heap(best.begin(), best.end(), worse);
  }
  std::sort(best.begin(), best.end(), worse);
  for (int64_t i = 0; i < num_tokens; ++i) index[i] = i < int64_t(best.size()) ? best[i].second : -1;
}

}  // namespace

void scores(const LogitsPair& logits, const int64_t* sampled_ids, const Options& options, float* scores) {
  logits.dispatch([&](const auto& student_logits, const auto& teacher_logits) {
    for_each_row(logits.num_rows, options.vocab_size, [&](int64_t row) {
      score_row(student_logits, teacher_logits, row, sampled_ids[row], options, scores, logits.num_rows);
    });
  });
}

void select(const float* score, const bool* mask, int64_t num_sequences, int64_t length, int64_t num_tokens,
            float threshold, int64_t* index) {
  for_each_row(num_sequences, length, [&](int64_t b) {
    const auto score_at = [&](int64_t position) { return score[b * length + position]; };
    select_sequence(score_at, mask + b * length, length, num_tokens, threshold, index + b * num_tokens);
  });
}

void candidates(const float* scores, const bool* mask, int64_t num_sequences, int64_t length, int64_t num_candidates,
                Criterion criterion, float threshold, int64_t* index) {
  const int64_t num_rows = num_sequences * length;
  for_each_row(num_sequences, length, [&](int64_t b) {
    const auto score_at = [&](int64_t position) {
      return criterion_score(scores, b * length + position, num_rows, criterion);
    };
    select_sequence(score_at, mask + b * length, length, num_candidates, threshold, index + b * num_candidates);
  });
}

}  // namespace rmsd
