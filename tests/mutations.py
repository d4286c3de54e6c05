"""Breaks the code on purpose, one line at a time, and looks whether a test fails.

    python tests/mutations.py [--list] [--only SUBSTRING] [--limit N] [--write FILE]

Each mutation is made in a temporary copy of the tree; the C++ kernels are built there without optimisation, for any
processor. Not collected by pytest.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
KERNEL_TESTS = [f"tests/test_{stem}.py" for stem in ("topk", "fuzz", "selection", "scores", "divergence")]

# Tests that must catch a mutation, cheapest first, and pytest's -k.
SUITES = {
    "reference.py": (["tests/test_reference.py"], ""),
    "checks.py": (["tests/test_contract.py", "tests/test_loss.py"], "not triton"),
    "backends.py": (["tests/test_contract.py"], "not triton"),
    "options.py": (["tests/test_contract.py", "tests/test_linear.py", *KERNEL_TESTS], "not triton"),
    "ops.py": (["tests/test_divergence.py"], "not triton"),
    "dispatch.py": (
        ["tests/test_contract.py", "tests/test_compile.py", "tests/test_linear.py", "tests/test_divergence.py"],
        "not triton",
    ),
    "projection.py": (["tests/test_linear.py", "tests/test_linear_faults.py", "tests/test_contract.py"], "not triton"),
    "linear.py": (
        ["tests/test_linear.py", "tests/test_linear_faults.py", "tests/test_contract.py", "tests/test_compile.py"],
        "not triton",
    ),
    "merge.py": (["tests/test_linear.py", "tests/test_distributed.py"], "not triton"),
    "hidden.py": (["tests/test_hidden.py", "tests/test_trainer.py"], ""),
    "split.py": (["tests/test_split.py"], ""),
    "triton": ([*KERNEL_TESTS, "tests/test_split.py"], "triton or split"),
    "cpu": (KERNEL_TESTS, "cpu"),
}

# file: (what stands there, what is put in its place), each exactly once; and why, where no test is to fail.
MUTATIONS = {
    "rmsd_kernels/reference.py": [
        ("softcap * torch.tanh(logits / softcap)", "torch.tanh(logits / softcap)"),
        ("logits if temperature == 1.0 else logits / temperature", "logits"),
        ("logits = logits * logit_scale", "logits = logits / logit_scale"),
        ("student - row_peaks(student), teacher - row_peaks(teacher)", "student, teacher"),
        ("student_peaks, teacher_peaks = row_peaks(student), row_peaks(teacher)",
         "student_peaks = teacher_peaks = row_peaks(0 * student)"),
        ("(logits < _INF).all(-1)", "(logits <= _INF).all(-1)"),
        (".masked_fill(in_p & ~in_q, _INF)", ""),
        ("teacher_logprobs + math.log(beta)", "teacher_logprobs + math.log(1 - beta)"),
        ("beta * kl_terms(teacher_logprobs, mixture)", "kl_terms(teacher_logprobs, mixture)"),
        ("(tied.cumsum(-1) <= room)", "(tied.cumsum(-1) < room)"),
        ("support = topk_support(student_logits.detach()[..., :vocab_size]", "support = topk_support(student.detach()"),
        ("valid = valid_rows(student) & valid_rows(teacher) & in_vocab", "valid = valid_rows(student) & in_vocab"),
        ("result = torch.where(unreachable, _INF, result)", "pass"),
        ("torch.where(result.isfinite(), result, result.detach())", "result"),
        ("qualifies = mask & (score > threshold)", "qualifies = mask & (score >= threshold)"),
        ("descending=True, stable=True", "descending=False, stable=True"),
    ],
    "rmsd_kernels/checks.py": [
        ("outside = (sampled_ids < 0) | (sampled_ids >= limit)", "outside = sampled_ids > limit"),
        ("outside &= mask", "pass"),
        ("outside = (rows < -1) | (rows >= num_rows)", "outside = rows < -1"),
        ('if divergence == "jsd" and not 0.0 < beta < 1.0:', 'if not 0.0 < beta < 1.0:'),
        ("if tensor.device != first.device:", "if False:"),
        ("if num_tokens < 1:", "if num_tokens < 0:"),
        ("if vocab_topk is not None and vocab_topk < 1:", "if False:"),
        ("if not 0.0 < logit_scale < math.inf:", "if False:"),
        ("softcap is not None and not 0.0 < softcap < math.inf", "False"),
        ("if teacher_weight.ndim == 2 and teacher_weight.shape[0] != student_weight.shape[0]:", "if False:"),
    ],
    "rmsd_kernels/backends.py": [
        ('{"cuda": "triton", "cpu": "cpu"}', '{"cuda": "triton", "cpu": "torch"}'),
        ("@functools.cache\ndef _log_fallback", "def _log_fallback"),
    ],
    "rmsd_kernels/options.py": [
        ("teacher_temperature=teacher_temperature or temperature", "teacher_temperature=temperature"),
        ("vocab_size = vocab_size or width", "vocab_size = width"),
        ("None if vocab_topk is None or vocab_topk >= vocab_size else vocab_topk", "vocab_topk"),
    ],
    "rmsd_kernels/dispatch.py": [
        ("logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()", "logits.contiguous()"),
        ("return result if rows is None else torch.where(rows >= 0, result, 0.0)", "return result"),
        ("@torch.no_grad()\ndef scores_of_rows", "def scores_of_rows"),
    ],
    "rmsd_kernels/ops.py": [
        ("return sums[slots]", "return grad_divergence"),
        ("accumulate=True", "accumulate=False"),
    ],
    "rmsd_kernels/heads/linear.py": [
        ("grad_divergence = grad_divergence.masked_fill(~live, 0.0)", "pass"),
        (".masked_fill(~live, 0.0)\n\n", "\n\n"),
        ("needs_hidden, needs_weight, needs_bias = ctx", "needs_hidden, needs_weight, needs_bias = 3 * (True,) or ctx"),
        ("grad_bias.add_(grad_logits.sum(0))", "grad_bias"),
        ("logits if keeps else (), torch.cat", "(), torch.cat"),
        ("live & result.isfinite()", "live"),
        ("torch.autocast(weight.device.type, enabled=False)", "torch.no_grad()"),
        ("scores.student_logprob, scores.student_lse", "scores.student_lse, scores.student_lse"),
        ("(flat_ids >= start) & (flat_ids < tile.stop)", "flat_ids < tile.stop"),
        ("(flat_ids - start).clamp(", "flat_ids.clamp("),
        ('width if options.divergence == "jsd" else column_tile', "column_tile"),
    ],
    "rmsd_kernels/heads/projection.py": [
        ("max(1, int(workspace_mb", "max(10**9, int(workspace_mb"),
        ("logits if bias is None else logits.add_(bias)", "logits"),
        ("hidden = hidden.float()", "return (hidden @ weight.T).float()"),
        ("return logits[:rows], logits[rows:]", "return logits[:rows], logits[:rows]"),
        ("None if workspace is None else workspace[rows:]", "workspace"),
        ("kept.numel() < rows * width", "False"),
        ("min(num_rows, _TILE_ROWS)", "num_rows"),
        ("grad_weight.addmm_(grad_logits.T, hidden)", "grad_weight"),
        ("torch.where(live.unsqueeze(-1), hidden, 0.0)", "hidden"),
        ("with torch.inference_mode(False):", "if True:"),
        ("parameter[:0].sum() for parameter in parameters", "parameter[:0].sum() for parameter in parameters[:1]"),
        ("None if tensor is None else tensor[part]", "None if tensor is None else tensor[: part.stop - part.start]"),
        ("teacher_weight=self.teacher_weight.detach()", "teacher_weight=self.teacher_weight"),
    ],
    "rmsd_kernels/heads/merge.py": [
        (".masked_fill(denominator, _INF).masked_fill(numerator, 0.0)", ".masked_fill(numerator, 0.0)"),
        ("_mean_over_shards(divergences + first - second, first)", "_mean_over_shards(divergences, first)"),
        ("(shards.student_entropy - student_shift, student_shift)", "(shards.student_entropy, student_shift)"),
        ("if looks and scores.student_lse.isfinite().all():", "if looks:"),
        (".masked_fill((divergences == _INF).any(0), _INF)", ""),
    ],
    "rmsd/models/hidden.py": [
        ("(end - begin) * (prompt + length) + each", "(end - begin) * (prompt + length)"),
        ("prompt = max(prompt, prompt_lengths[order[begin]])", "prompt = prompt_lengths[order[begin]]"),
        ("length = max(lengths[i] for i in group)", "length = lengths[group[0]]"),
    ],
    "rmsd_kernels/triton/visits.py": [
        ("first_z = tl.fma(first_z, first_rescale, ", "first_z = tl.fma(first_z, 1.0, "),
        ("cross = tl.fma(cross, first_rescale, ", "cross = tl.fma(cross, second_rescale, "),
        ("second_z = tl.fma(second_z, second_rescale, ", "second_z = tl.fma(second_z, first_rescale, "),
        ("tl.fma(first_shift, first_z, first_e), first_rescale", "first_e, first_rescale"),
        ("gap = tl.maximum(gap, difference)", "gap = gap"),
        ("first_max, second_max = tl.maximum(first_max, s), tl.maximum(second_max, t)", "pass"),
        ("crosses = tl.fma(first_weight, difference, crosses)", "crosses = first_weight * difference"),
        ("first_ptr += LOGITS // 2 if TILE.PAIRED else LOGITS", "first_ptr += LOGITS"),
        ("(second_scale * centre - lse_gap) * mass", "(second_scale * centre + lse_gap) * mass"),
        ("tl.fma(weight, difference - centre, totals)", "tl.fma(weight, difference, totals)"),
        ("tl.div_rn(first_z, second_z)", "tl.div_rn(second_z, first_z)"),
        ("tl.sum((cross * first_rescale).to", "tl.sum(cross.to"),
        ("student_leads = difference > 0.0", "student_leads = difference < 0.0"),
        ("d = tl.minimum(tl.abs(difference), -FLOOR)", "d = tl.abs(difference)"),
        ("larger = tl.exp2(tl.maximum(log_p, log_q))", "larger = tl.exp2(log_p)"),
        ("tl.where(student_leads, beta, 1.0 - beta) * ratio", "tl.where(student_leads, 1.0 - beta, beta) * ratio"),
        ("m = tl.where(student_leads, 1.0 - beta, beta)", "m = tl.where(student_leads, beta, 1.0 - beta)"),
        ("tl.fma(d, smaller_share, m * log_m)", "m * log_m"),
        ("p = larger * tl.where(student_leads, 1.0, ratio)", "p = larger"),
        ("-log_m - tl.where(student_leads, 0.0, d)", "-log_m"),
        ("-student.m) - log_z_gap", "-student.m)"),
        ("place = end - LOGITS - done", "place = end - LOGITS"),
        ("tl.div_rn(total, z), tl.div_rn(slope, z)", "total, tl.div_rn(slope, z)"),
        ("tl.div_rn(total, z), tl.div_rn(slope, z)", "tl.div_rn(total, z), slope"),
        ("tl.maximum(first, tl.div_rn(FLOOR, ratio), propagate_nan=tl.PropagateNan.ALL)",
         "tl.maximum(first, tl.div_rn(FLOOR, ratio))"),
        ("tl.maximum(second, 2 * FLOOR,", "tl.maximum(second, FLOOR,"),
        ("slope *= 1.0 - beta", "slope *= beta"),
        ("(first_max if STUDENT_FIRST else second_max)", "second_max"),
        ("(first_max if STUDENT_FIRST else second_max)", "first_max"),
    ],
    "rmsd_kernels/triton/scores.py": [
        ("valid = in_vocab & (student_z > 0.0) & (teacher_z > 0.0)", "valid = (student_z > 0.0) & (teacher_z > 0.0)"),
        ("sampled_id >= 0) & (sampled_id < size)", "sampled_id >= 0) & (sampled_id <= size)"),
        ("tl.log(student_z) - tl.div_rn(student_e", "tl.log(student_z) + tl.div_rn(student_e"),
        ("if finished == length - 1:", "if finished == 0:"),
        ("tl.where(valid, divergence, nan)", "divergence"),
        ("kl_from_cross(sums.cross, 1.0, 0.0, scale", "kl_from_cross(sums.cross, 0.0, 0.0, scale"),
        ("divergence = tl.where(sums.gap > -1.5 * FLOOR, INF,", "divergence = tl.where(False, INF,"),
        ("divergence = total * LN2", "divergence = total"),
        ("student_lse = log_sum_exp(student_m, student_z,", "student_lse = log_sum_exp(student_m, teacher_z,"),
        ("sampled_logprob(teacher, sampled_id, in_vocab, teacher_m",
         "sampled_logprob(teacher, sampled_id, in_vocab, student_m"),
    ],
    "rmsd_kernels/triton/candidates.py": [
        ("(0x7FFFFFFF - positions).to(tl.int64)", "positions.to(tl.int64)"),
        ("wanted = wanted & (score > threshold)", "wanted = wanted & (score >= threshold)"),
        ("tl.where(score == 0.0, 0.0, score)", "score"),
        ("wanted = wanted & (tl.abs(divergence) < INF)", "wanted = wanted"),
        ("tl.abs(teacher - student)", "teacher - student"),
        ("tl.where(keys < key, keys, _NONE)", "keys"),
        ("ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)", "ordered = bits"),
        ("(STUDENT_LOGPROB_PLANE if BY_LOGPROB else STUDENT_ENTROPY_PLANE)", "STUDENT_LOGPROB_PLANE"),
        ("wanted = wanted & (tl.load(mask_ptr", "wanted = wanted | (tl.load(mask_ptr"),
        ("tl.where(key == _NONE, -1, position)", "position"),
    ],
    "rmsd_kernels/triton/radix.py": [
        ("(bits >> SHIFT) ^ (prefix << BITS)", "(bits >> SHIFT) ^ prefix"),
        ("positive - upto + counts, upto)", "upto, upto)"),
        ("reach = tl.where(negative, upto, ", "reach = tl.where(False, upto, "),
        ("reach += above", "pass"),
        ("(reach >= k) & (reach - counts < k)", "(reach > k) & (reach - counts <= k)"),
        ("if whole < size:\n        counts +=", "if False:\n        counts +="),
        ("return prefix << 16, above, tied", "return prefix << 16, above, above"),
        ("return prefix << 13, above, tied", "return prefix << 12, above, tied"),
        ("room = vocab_topk - above", "room = vocab_topk"),
        ("if (tied != room) | (value == 0.0):", "if tied != room:"),
        ("if (tied != room) | (value == 0.0):", "if value == 0.0:"),
        ("if (bits >> 31) != 0:", "if False:"),
        ("(upto >= room) & (upto - counts < room)", "(upto > room) & (upto - counts <= room)"),
        ("before = tl.sum(tl.where(home, upto - counts, 0), axis=0)", "before = room * 0"),
        ("tl.where(order >= room, ids, size - 1)", "tl.where(order > room, ids, size - 1)"),
        ("mask=flat(tied) == value", "mask=flat(tied) >= value"),
    ],
    "rmsd_kernels/triton/groups.py": [
        ("(maxima >= least).to(tl.int32)", "(maxima > least).to(tl.int32)"),
        ("(listed <= capacity), listed, 0)", "(listed >= 0), listed, 0)"),
        ("start = tl.where(place < groups.count, start, NO_GROUP)[:, None]", "start = start[:, None]"),
        ("(group % TILE.LANES - lane) * TILE.VEC", "(group % TILE.LANES) * TILE.VEC"),
        ("group // TILE.LANES * LOGITS", "group // TILE.LANES * TILE.LANES"),
        ("order - 1, group,", "order - 1, group + 1,"),
        ("order = listed + tl.cumsum", "order = tl.cumsum"),
        ("size // LOGITS * TILE.LANES", "(size // LOGITS - 1) * TILE.LANES"),
        ("tl.where(listed > 0, listed, every.count)", "every.count"),
        ("tl.where(listed > 0, listed, every.count)", "listed"),
    ],
    "rmsd_kernels/triton/support.py": [
        ("if vocab_topk <= num_groups:", "if vocab_topk >= 0:"),
        ("every, vocab_topk, LOGIT, TILE)\n            least", "every, 1, LOGIT, TILE)\n            least"),
        ("every, vocab_topk, LOGIT, TILE)[0]", "every, 1, LOGIT, TILE)[0]"),
    ],
    "rmsd_kernels/triton/tiles.py": [
        ("mask=has_group, other=TWO_BANS", "mask=has_group, other=0"),
        ("mask=wanted, other=-INF", "mask=wanted, other=0.0"),
        ("halves += halved(tile[block])", "halves += halved(tile[0])"),
    ],
    "rmsd_kernels/triton/topk.py": [
        ("(tile[block] == value) & (ids <= last_id)", "(tile[block] == value)"),
        ("left = nth - before - tied", "left = nth - before"),
        ("if third_count >= vocab_topk:", "if third_count > vocab_topk:"),
        ("vocab_topk - above, TILE", "vocab_topk, TILE"),
        ("(bits ^ ((bits >> 31) & 0x7FFFFFFF)).to", "bits.to"),
        ("if is_kth:", "if False:"),
        ("elif first_count >= vocab_topk:", "elif first_count >= 0:"),
        ("low, high, above, reached = second, third, third_count, second_count",
         "low, high, above, reached = second, third, second_count, second_count"),
        ("if before + tied >= nth:", "if before + tied > nth:"),
        ("home, middle, RAGGED) >= left:", "home, middle, RAGGED) > left:"),
        ("(tile[block] >= low)", "(tile[block] > low)"),
    ],
    "rmsd_kernels/triton/divergence.py": [
        ("mean_slope += mass", "mean_slope += 0.0"),
        ("mean_slope = -mass", "mean_slope = mass"),
        ("divergence += rest_term", "divergence += 0.0"),
        ("mean_slope += rest_weighted", "mean_slope += 0.0"),
        ("tl.where(row == -1, 0.0, float(\"nan\"))", "float(\"nan\")"),
        ("divergence = tl.where(valid, divergence, float(\"nan\"))", "divergence = divergence"),
        ("divergence = tl.where(teacher_z == 0.0, INF, divergence)", "pass"),
        ("tl.store(stats_ptr + LAST_TIED_ID_SLOT, support.last_tied_id.to(tl.float32))", "pass"),
        ("tl.store(stats_ptr + IS_FINITE_SLOT, is_finite.to(tl.float32))", "tl.store(stats_ptr + IS_FINITE_SLOT, 1.0)"),
        ("tl.store(stats_ptr + REST_LSE_SLOT, rest_lse)", "pass"),
        ("tl.store(stats_ptr + OFFSET_LOW_SLOT, offset_low)", "pass",
         "matters where the two models' rows are thousands apart, and their logits' difference is rounded as much"),
        ("mean_slope - (1.0 if", "mean_slope - (0.0 if"),
        ("part_maxima_ptr = maxima_ptr + part * LANES", "part_maxima_ptr = maxima_ptr"),
        ("seen, seen_student, seen_teacher = size, student, teacher\n    if FORWARD:", "pass\n    if FORWARD:"),
    ],
    "rmsd_kernels/triton/split.py": [
        ("tl.where(sums.first_z > 0.0, sums.cross * sums.first_z, 0.0)", "sums.cross * sums.first_z"),
        ("sums.cross * sums.first_z, 0.0)", "sums.cross, 0.0)"),
        ("tl.store(part_ptr + 1, sums.second_m)", "tl.store(part_ptr + 1, sums.first_m)"),
        ("tl.store(part_ptr + 3, sums.second_z)", "tl.store(part_ptr + 3, sums.first_z)"),
        ("gap=load_slot(parts_ptr, 5, num_parts, 2 * FLOOR)", "gap=load_slot(parts_ptr, 5, 1, 2 * FLOOR)"),
        ("tl.store(part_ptr + 7, sums.second_e)", "tl.store(part_ptr + 7, sums.first_e)"),
        ("first_e=load_slot(parts_ptr, 6, num_parts, 0.0)", "first_e=load_slot(parts_ptr, 6, 1, 0.0)"),
        ("mask=part < num_parts, other=other", "mask=part < num_parts - 1, other=other"),
        ("first_m=load_slot(parts_ptr, 0, num_parts, EMPTY)", "first_m=load_slot(parts_ptr, 0, num_parts, 1e20)"),
        ("tl.store(part_ptr + _TERMS + 1, terms.slope)", "tl.store(part_ptr + _TERMS + 1, terms.total)"),
        ("slope = load_slot(parts_ptr, _TERMS + 1, num_parts,", "slope = load_slot(parts_ptr, _TERMS + 1, 1,"),
        ("== num_parts - 1", "== num_parts - 2"),
        ("parts if num_rows <= FEW_ROWS and parts", "parts if parts"),
        ("and parts <= MAX_PARTS.value", "and True"),
        ("size = tl.minimum(size - begin, UNROLL * LANES * VEC)", "size = size - begin"),
        ("student_stride_b, student_stride_l, ALIGNED) + begin", "student_stride_b, student_stride_l, ALIGNED)"),
    ],
    "rmsd_kernels/triton/divergence_backward.py": [
        ("grad = p * ((difference - stats.offset) - stats.offset_low)", "grad = p * (difference - stats.offset_low)"),
        ("student_scale, -stats.student_lse) - stats.student_lse_low", "student_scale, -stats.student_lse)"),
        ("grad = -tl.exp2(log_q * LOG2E) - p * stats", "grad = -tl.exp2(log_q * LOG2E) + p * stats"),
        ("grad = p * ((1.0 - beta) * to_p", "grad = p * (beta * to_p"),
        ("outside = tl.zeros(p.shape, tl.float32)", "outside = grad"),
        ("else:\n            outside = p * stats.outside_slope", "else:\n            outside = p * 0.0"),
        ("grad *= factors.upstream * factors.raw_scale", "grad *= factors.raw_scale"),
        ("raw_scale=options.logit_scale / options.temperature", "raw_scale=options.logit_scale"),
        ("1.0 - student * student, 0.0", "1.0, 0.0"),
        ("if end > whole:", "if end > size:"),
        ("| (stats.is_finite == 0.0)", ""),
        ("tl.where(stats.is_finite != 0.0, grad, 0.0)", "grad"),
    ],
    "rmsd_kernels/cpu/scan.h": [
        ("s.total *= student_factor;", ""),
        ("t.total *= teacher_factor;", "t.total *= student_factor;"),
        ("scan.student_cross + s.total * (student_moved - teacher_moved);", "scan.student_cross;"),
        ("student_factor > 0 ? student_factor * student_cross : 0", "student_factor * student_cross"),
        ("s.weighted = student_factor * (s.weighted + s.total * student_shift);", ""),
        ("student_cross / student.total - student.log_total() + teacher.log_total()", "student_cross / student.total"),
        ("scan.teacher_misses |= student[i] > -kInf && teacher[i] == -kInf;", ""),
        ("scan.valid &= scan.student.total > 0 && scan.teacher.total > 0;", "scan.valid &= scan.student.total > 0;"),
        ("cross = at::vec::fmadd(es, ds - dt, cross);", "cross = at::vec::fmadd(es, ds, cross);"),
        ("at::vec::clamp_min(Vec::loadu(teacher + i) - t_peak, lowest)", "(Vec::loadu(teacher + i) - t_peak)"),
        ("sums.divergence = beta * teacher_kl + (1.0 - beta) * sums.student_kl;",
         "sums.divergence = (1.0 - beta) * teacher_kl + beta * sums.student_kl;"),
        ("Vec m = at::vec::fmadd(Vec(beta), q, Vec(1.f - beta) * p)",
         "Vec m = at::vec::fmadd(Vec(beta), p, Vec(1.f - beta) * q)"),
    ],
    "rmsd_kernels/cpu/scores.cpp": [
        ("|| id < 0 || id >= p.vocab_size", "|| id < 0 || id > p.vocab_size"),
        ("put(kTeacherLse, scan.teacher.lse());", "put(kTeacherLse, scan.student.lse());"),
        ("mask[i] && score[i] > threshold", "mask[i] && score[i] >= threshold"),
        ("mask[i] && score[i] > threshold", "score[i] > threshold"),
        ("(score[a] == score[b] && a < b)", "(score[a] == score[b] && a > b)"),
        ("std::fill(index + kept, index + num_tokens, int64_t(-1));", ""),
        ("!std::isfinite(divergence) ", "std::isnan(divergence) "),
        ("of(rmsd::kTeacherEntropy) - of(rmsd::kStudentEntropy)", "of(rmsd::kTeacherEntropy)"),
        ("put(kStudentEntropy, scan.student.entropy());", "put(kStudentEntropy, scan.teacher.entropy());"),
        ("row.teacher_transform(static_cast<float>(row.teacher[id]))",
         "row.student_transform(static_cast<float>(row.teacher[id]))"),
    ],
    "rmsd_kernels/cpu/topk.h": [
        ("if (values[i] < support.kth_logit || (tied && room == 0)) continue;",
         "if (values[i] < support.kth_logit) continue;"),
        ("support.last_tied_id = ids[i];", ""),
        ("if (maxima[b] < bound) continue;", "if (maxima[b] <= bound) continue;"),
        ("bound = ranked[k - 1];", "bound = ranked[0];"),
        ("if (value >= bound) {", "if (value > bound) {"),
        ("for (; i < end; ++i) best = std::max(best, static_cast<float>(row[i]));", ""),
        ("return v > support.kth_logit;", "return v >= support.kth_logit;"),
        ("(load(row + i) >= Vec(bound)).zero_mask()", "(load(row + i) > Vec(bound)).zero_mask()"),
        ("support.kth_logit = ranked[k - 1];", "support.kth_logit = bound;"),
        ("      --room;", ""),
        ("int64_t room = k - std::count_if", "int64_t room = k + 0 * std::count_if"),
    ],
    "rmsd_kernels/cpu/divergence.cpp": [
        ("p.divergence == kReverseKL && tail == kDrop ? 1 : 0", "0"),
        ("divergence += term(p, log_p, log_q);\n    if", "if"),
        ("mean_slope += std::exp(log_p) * rest_slope;", ""),
        ("if (teacher_all.peak == -kInf) return kInf;", ""),
        ("teacher_log_total - one + mean_slope", "teacher_log_total - one"),
        ("scan.teacher.log_total() + divergence)", "scan.teacher.log_total())"),
        ("stats.student.distance(s) - stats.teacher.distance(t)", "s - t"),
        ("at::vec::clamp_min(slope, Vec(kLowest))", "slope"),
        ("Normaliser(student_rest.peak, std::log(student_rest.total) - log_q)",
         "Normaliser(student_rest.peak, std::log(student_rest.total))"),
        ("stats.mean_slope = -1.f;", "stats.mean_slope = 1.f;"),
        ("if (!std::isfinite(divergence)) stats = Stats();", ""),
        ("row < 0 ? 0 : rmsd", "row < -1 ? 0 : rmsd"),
        ("if (by_ratio) outside", "if (false) outside"),
        ("tail == kRenorm ? 0.f : static_cast", "false ? 0.f : static_cast"),
        ("(result * scale * row.student_transform.slope(s))", "(result * row.student_transform.slope(s))"),
        ("if (total > 0) total *= std::exp(double(peak) - larger);", ""),
        ("(r == kth) & (id <= last_tied)", "(r == kth)"),
    ],
}  # fmt: skip


def build_cpu(tree: Path) -> None:
    """One library for any processor, quickly, in place of the three that setup.py builds."""
    from torch.utils.cpp_extension import include_paths, library_paths

    cpu = tree / "rmsd_kernels/cpu"
    includes = [f"-I{path}" for path in (*include_paths(), sysconfig.get_paths()["include"])]
    subprocess.run(
        [
            "g++",
            "-O1",
            "-w",
            "-std=c++20",
            "-fPIC",
            "-shared",
            "-fopenmp",
            "-DCPU_CAPABILITY=DEFAULT",
            "-DCPU_CAPABILITY_DEFAULT",
            *includes,
            cpu / "scores.cpp",
            cpu / "divergence.cpp",
            *(f"-L{path}" for path in library_paths()),
            "-ltorch_cpu",
            "-lc10",
            "-o",
            cpu / f"_default{sysconfig.get_config_var('EXT_SUFFIX')}",
        ],
        check=True,
        stderr=subprocess.DEVNULL,
    )


def suite_of(file: str) -> tuple[list[str], str]:
    """By the file's name, or by that of its folder."""
    path = Path(file)
    return SUITES.get(path.name) or SUITES[path.parent.name]


def killed_by(file: str, old: str, new: str) -> str | None:
    """The test that failed, None where none did."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("rmsd_kernels", "rmsd", "tests", "pyproject.toml", "docs"):
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, tree / name)
        text = (tree / file).read_text()
        if text.count(old) != 1:
            raise SystemExit(f"{file} holds {text.count(old)} times, not once: {old}")
        (tree / file).write_text(text.replace(old, new))
        environment = dict(os.environ, PYTHONPATH=folder, HYPOTHESIS_PROFILE="mutations", OMP_NUM_THREADS="1")
        if "/cpu/" in file:
            build_cpu(tree)
            environment["RMSD_CPU_CAPABILITY"] = "default"
        tests, keyword = suite_of(file)
        result = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-x",
                "-o",
                "addopts=",
                "-p",
                "no:cacheprovider",
                "--tb=no",
                "-rf",
                *tests,
                *(["-k", keyword] if keyword else []),
            ],
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
        )
    if result.returncode < 0:
        return f"the process died of signal {-result.returncode}"
    if result.returncode not in (0, 1):
        raise SystemExit(f"pytest ended with {result.returncode}:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    if result.returncode == 0 and " passed" not in result.stdout.splitlines()[-1]:
        raise SystemExit(f"every test was skipped:\n{result.stdout[-2000:]}")
    failed = [line.split(" ")[1] for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].removeprefix("tests/") if failed else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="count the mutations of each file, and run none")
    parser.add_argument("--only", default="", help="files whose name holds this")
    parser.add_argument("--limit", type=int, default=100, help="mutations a file")
    parser.add_argument("--write", type=Path, help="append the table to this file")
    chosen = parser.parse_args()
    wanted = {file: m[: chosen.limit] for file, m in MUTATIONS.items() if chosen.only in file}
    if chosen.list:
        for file, mutations in wanted.items():
            print(f"{len(mutations):4d}  {file}")
            for old, why in ((old, why) for old, _, *reason in mutations for why in reason):
                print(f"      no test fails without {old!r}: {why}")
        print(f"{sum(map(len, wanted.values())):4d}  in all")
        return 0
    survived = 0
    for file, mutations in wanted.items():
        for old, new, *reason in mutations:
            test = killed_by(file, old, new)
            survived += test is None and not reason
            cells = file.removeprefix("rmsd_kernels/"), code(old), code(new), test or "**survived**"
            line = f"| {' | '.join(cells)} |"
            print(line, flush=True)
            if chosen.write:
                with chosen.write.open("a") as out:
                    out.write(line + "\n")
    return survived


def code(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return f"`{text}`" if text else "nothing"


if __name__ == "__main__":
    sys.exit(main())
