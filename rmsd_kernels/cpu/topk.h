// The support of vocabulary top-k: the k largest raw student logits of a row, ties to the lower id, without a sort.
#pragma once

#include <algorithm>
#include <vector>

#include "common.h"

namespace rmsd {

struct Support {
  std::vector<int64_t> ids;  // ascending
  float kth_logit = -kInf;
  int64_t last_tied_id = -1;

  bool holds(float raw, int64_t id) const { return raw > kth_logit || (raw == kth_logit && id <= last_tied_id); }
};

// Each of at least k blocks whose maximum reaches the k-th largest block maximum holds an element that does, so nothing
// below that bound can be in the support: one visit finds the maxima, and only blocks that reach the bound are read
// again. Rows must hold no NaN. O(V), and the second visit is of about k blocks.
template <typename scalar_t>
Support topk_support(const scalar_t* row, int64_t size, int64_t k) {
  // Blocks of whole vectors; narrower where there would be fewer than twice k of them.
  int64_t block = 8 * Vec::size();
  while (block > Vec::size() && size / block < 2 * k) block /= 2;
  std::vector<float> maxima;
  maxima.reserve(size / block + 1);
  for (int64_t start = 0; start < size; start += block) {
    const int64_t end = std::min(start + block, size);
    Vec peak(-kInf);
    int64_t i = start;
    for (; i + Vec::size() <= end; i += Vec::size()) peak = at::vec::clamp_min(load(row + i), peak);
    float best = max_lanes(peak);
    for (; i < end; ++i) best = std::max(best, static_cast<float>(row[i]));
    maxima.push_back(best);
  }
  float bound = -kInf;
  if (int64_t(maxima.size()) >= k) {
    std::vector<float> ranked = maxima;
    std::nth_element(ranked.begin(), ranked.begin() + (k - 1), ranked.end(), std::greater<float>());
    bound = ranked[k - 1];
  }

  constexpr int none = static_cast<int>((int64_t(1) << Vec::size()) - 1);  // zero_mask() where no lane is set
  std::vector<int64_t> ids;
  std::vector<float> values;
  for (size_t b = 0; b < maxima.size(); ++b) {
    if (maxima[b] < bound) continue;
    const int64_t end = std::min(int64_t(b + 1) * block, size);
    for (int64_t i = b * block; i < end; i += Vec::size()) {
      const int64_t stop = std::min(i + Vec::size(), end);
      if (stop - i == Vec::size() && (load(row + i) >= Vec(bound)).zero_mask() == none) continue;
      for (int64_t j = i; j < stop; ++j) {
        const float value = static_cast<float>(row[j]);
        if (value >= bound) {
          ids.push_back(j);
          values.push_back(value);
        }
      }
    }
  }
  std::vector<float> ranked = values;
  std::nth_element(ranked.begin(), ranked.begin() + (k - 1), ranked.end(), std::greater<float>());

  Support support;
  support.kth_logit = ranked[k - 1];
  int64_t room = k - std::count_if(values.begin(), values.end(), [&](float v) { return v > support.kth_logit; });
  for (size_t i = 0; i < ids.size(); ++i) {
    const bool tied = values[i] == support.kth_logit;
    if (values[i] < support.kth_logit || (tied && room == 0)) continue;
    if (tied) {
      --room;
      support.last_tied_id = ids[i];
    }
    support.ids.push_back(ids[i]);
  }
  return support;
}

}  // namespace rmsd
