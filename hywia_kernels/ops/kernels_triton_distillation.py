"""The Triton kernels of the distillation ops; `triton_distillation.py` beside this launches them.

A program takes one token: it goes over the row once for the sums of exponentials and once for the gradient. In the
first round every lane keeps a largest logit of its own and rescales its sums when it meets a larger one, so that the
lanes need each other only at the end. Logits are asked for a block before they are needed.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOWEST = tl.constexpr(-3.0e38)  # where running maxima begin: differences from it are finite, unlike those from -inf


@triton.jit
def _tanh(y):
    """By exponentials; near 0, where those cancel, by a continued fraction (4e-11 off at 0.5)."""
    e = tl.exp(-2.0 * tl.abs(y))
    far = (1.0 - e) / (1.0 + e)
    z = y * y
    near = y * ((z + 105.0) * z + 945.0) / ((15.0 * z + 420.0) * z + 945.0)
    return tl.where(tl.abs(y) < 0.5, near, tl.where(y < 0.0, -far, far))


@triton.jit
def _changed(x, scale, cap, CAPPED: tl.constexpr):
    """What the family makes of a head's logits; −inf stays."""
    z = scale * x
    if CAPPED:
        z = tl.where(x == float("-inf"), x, cap * _tanh(z / cap))
    return z


@triton.jit
def _slope(z, scale, cap, CAPPED: tl.constexpr):
    """The derivative of `_changed` where it gives `z`."""
    if CAPPED:
        return scale * (1.0 - (z / cap) * (z / cap))
    else:
        return scale


@triton.jit
def _load(pointer, word, words):
    """A head's logits in their own dtype, −inf beyond the row."""
    return tl.load(pointer + word, mask=word < words, other=float("-inf"))


@triton.jit
def _factors(z, top):
    """What sums of exponentials below `top`, and their next term, are multiplied by when `z` is met; the new `top`."""
    larger = z > top
    e = tl.exp(-tl.abs(z - top))
    return tl.where(larger, e, 1.0), tl.where(larger, 1.0, e), tl.where(larger, z, top)


@triton.jit
def _fill(loss, gradient, row, words, value, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(loss + row, value)
    if GRADIENT:
        for start in range(0, words, BLOCK):
            word = start + tl.arange(0, BLOCK)
            tl.store(gradient + word, tl.full((BLOCK,), 0.0, tl.float32) + value, mask=word < words)


@triton.jit
def distillation(
    student,
    teacher,
    weight,
    labels,
    loss,
    gradient,
    words,
    student_stride,
    teacher_stride,
    gradient_stride,
    hard,
    student_scale,
    student_cap,
    teacher_scale,
    teacher_cap,
    HARD: tl.constexpr,
    GRADIENT: tl.constexpr,
    STUDENT_CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loss of one token, and its gradient, which may lie over the student's logits.

    The divergence is Σ p·((t − t₀) − (s − s₀)) less the same of the logarithms of the sums, where t₀ and s₀ are the
    largest logits of the first block: near the row's own, so that a common offset of the logits costs no digits.
    """
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    gradient += row * gradient_stride
    factor = tl.load(weight + row)
    if factor == 0.0:
        _fill(loss, gradient, row, words, 0.0, GRADIENT, BLOCK)
        return
    lanes = tl.arange(0, BLOCK)
    next_s, next_t = _load(student, lanes, words), _load(teacher, lanes, words)
    near_s = tl.max(_changed(next_s.to(tl.float32), student_scale, student_cap, STUDENT_CAPPED), axis=0)
    near_t = tl.max(_changed(next_t.to(tl.float32), teacher_scale, teacher_cap, TEACHER_CAPPED), axis=0)
    top_s, top_t = tl.full((BLOCK,), _LOWEST, tl.float32), tl.full((BLOCK,), _LOWEST, tl.float32)
    sum_s, sum_t = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    cross = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, words, BLOCK):
        word = start + lanes
        s = _changed(next_s.to(tl.float32), student_scale, student_cap, STUDENT_CAPPED)
        t = _changed(next_t.to(tl.float32), teacher_scale, teacher_cap, TEACHER_CAPPED)
        next_s, next_t = _load(student, word + BLOCK, words), _load(teacher, word + BLOCK, words)
        difference = tl.where(word < words, (t - near_t) - (s - near_s), 0.0)
        keep, add, top_s = _factors(s, top_s)
        sum_s = keep * sum_s + add
        keep, add, top_t = _factors(t, top_t)
        sum_t = keep * sum_t + add
        cross = keep * cross + add * difference
    most_s, most_t = tl.max(top_s, axis=0), tl.max(top_t, axis=0)
    below = tl.exp(top_t - most_t)
    all_s, all_t = tl.sum(sum_s * tl.exp(top_s - most_s), axis=0), tl.sum(sum_t * below, axis=0)
    log_s, log_t = tl.log(all_s), tl.log(all_t)
    value = tl.sum(cross * below, axis=0) / all_t - ((most_t - near_t) - (most_s - near_s)) - (log_t - log_s)
    label = tl.full((), -1, tl.int64)
    if HARD:
        label = tl.load(labels + row)
        there = (label >= 0) & (label < words)
        x = tl.load(student + label, mask=there, other=0.0).to(tl.float32)
        x = _changed(x, student_scale, student_cap, STUDENT_CAPPED)
        value = (1.0 - hard) * value + hard * (log_s - (x - most_s))
        value = tl.where(there, value, float("nan"))
        factor = tl.where(there, factor, float("nan"))
    tl.store(loss + row, value)
    if GRADIENT:
        mine, theirs = 1.0 / all_s, (1.0 - hard) / all_t
        next_s, next_t = _load(student, lanes, words), _load(teacher, lanes, words)
        for start in range(0, words, BLOCK):
            word = start + lanes
            s = _changed(next_s.to(tl.float32), student_scale, student_cap, STUDENT_CAPPED)
            t = _changed(next_t.to(tl.float32), teacher_scale, teacher_cap, TEACHER_CAPPED)
            next_s, next_t = _load(student, word + BLOCK, words), _load(teacher, word + BLOCK, words)
            g = mine * tl.exp(s - most_s) - theirs * tl.exp(t - most_t)
            if HARD:
                g = tl.where(word == label, g - hard, g)
            slope = _slope(s, student_scale, student_cap, STUDENT_CAPPED)
            tl.store(gradient + word, factor * slope * g, mask=word < words)


@triton.jit
def top_distillation(
    student,
    indices,
    log_probabilities,
    rest,
    saved,
    weight,
    labels,
    loss,
    gradient,
    words,
    count,
    student_stride,
    gradient_stride,
    hard,
    scale,
    cap,
    HARD: tl.constexpr,
    GRADIENT: tl.constexpr,
    IN_PLACE: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same against a teacher's likeliest words.

    Their logits are moved to `saved` `[tokens, count]` and −inf is left in their places, so that what is summed over
    the row is the others alone: as a difference of two sums, a small mass would lose its digits. In the end the places
    get their gradient, or, where the logits are not overwritten by it, the logits again.
    """
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    gradient += row * gradient_stride
    indices += row * count
    log_probabilities += row * count
    saved += row * count
    factor = tl.load(weight + row)
    if factor == 0.0:
        _fill(loss, gradient, row, words, 0.0, GRADIENT, BLOCK)
        return
    slots = tl.arange(0, BLOCK_K)
    label = tl.full((), -1, tl.int64)
    of_label = 0.0
    wrong = tl.zeros((BLOCK_K,), tl.int32)
    if HARD:
        label = tl.load(labels + row)
        there = (label >= 0) & (label < words)
        of_label = tl.load(student + label, mask=there, other=0.0).to(tl.float32)
        of_label = _changed(of_label, scale, cap, CAPPED)
        wrong += tl.where(there, 0, 1)
        tl.debug_barrier()  # the label's logit is read before any thread moves it
    top_k, sum_k = tl.full((BLOCK_K,), _LOWEST, tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, count, BLOCK_K):
        slot = start + slots
        word = tl.load(indices + slot, mask=slot < count, other=-1)
        inside = (word >= 0) & (word < words)
        wrong += ((slot < count) & (inside == 0)).to(tl.int32)
        x = tl.load(student + word, mask=inside, other=float("-inf"))
        tl.store(saved + slot, x, mask=slot < count)
        tl.store(student + word, float("-inf"), mask=inside)
        z = _changed(x.to(tl.float32), scale, cap, CAPPED)
        keep, add, top_k = _factors(z, top_k)
        sum_k = keep * sum_k + add
    tl.debug_barrier()
    lanes = tl.arange(0, BLOCK)
    top_r, sum_r = tl.full((BLOCK,), _LOWEST, tl.float32), tl.zeros((BLOCK,), tl.float32)
    x_rest = _load(student, lanes, words)
    for start in range(0, words, BLOCK):
        z = _changed(x_rest.to(tl.float32), scale, cap, CAPPED)
        x_rest = _load(student, start + BLOCK + lanes, words)
        keep_rest, add_rest, top_r = _factors(z, top_r)
        sum_r = keep_rest * sum_r + add_rest
    most_k, most_r = tl.max(top_k, axis=0), tl.max(top_r, axis=0)
    all_k = tl.sum(sum_k * tl.exp(top_k - most_k), axis=0)
    all_r = tl.sum(sum_r * tl.exp(top_r - most_r), axis=0)
    most = tl.maximum(most_k, most_r)
    # Relative to the largest logit: of all words, and of the rest.
    log_all = tl.log(all_k * tl.exp(most_k - most) + all_r * tl.exp(most_r - most))
    log_rest = (most_r - most) + tl.log(all_r) - log_all
    given = tl.load(rest + row)
    mass = tl.exp(given)
    value = tl.where(mass > 0.0, mass * (given - log_rest), 0.0)
    for start in range(0, count, BLOCK_K):
        slot = start + slots
        x = tl.load(saved + slot, mask=slot < count, other=0.0).to(tl.float32)
        z = _changed(x, scale, cap, CAPPED)
        log_p = tl.load(log_probabilities + slot, mask=slot < count, other=float("-inf")).to(tl.float32)
        p = tl.exp(log_p)
        value += tl.sum(tl.where(p > 0.0, p * (log_p - ((z - most) - log_all)), 0.0), axis=0)
        mass += tl.sum(p, axis=0)
    soft = 1.0 - hard
    mass = soft * mass
    if HARD:
        mass += hard
        value = soft * value + hard * (log_all - (of_label - most))
    bad = tl.sum(wrong, axis=0) > 0
    value = tl.where(bad, float("nan"), value)
    factor = tl.where(bad, float("nan"), factor)
    tl.store(loss + row, value)
    if GRADIENT:
        rest_mass = tl.exp(given)
        # Of the rest's exponentials: what all words get, less the teacher's mass by the student's own proportions.
        share = mass * tl.exp((most_r - most) - log_all) - tl.where(rest_mass > 0.0, soft * rest_mass / all_r, 0.0)
        x_rest = _load(student, lanes, words)
        for start in range(0, words, BLOCK):
            word = start + lanes
            z = _changed(x_rest.to(tl.float32), scale, cap, CAPPED)
            x_rest = _load(student, word + BLOCK, words)
            g = share * tl.exp(z - most_r)
            if HARD:
                g = tl.where(word == label, g - hard, g)
            tl.store(gradient + word, factor * _slope(z, scale, cap, CAPPED) * g, mask=word < words)
        tl.debug_barrier()
    for start in range(0, count, BLOCK_K):
        slot = start + slots
        word = tl.load(indices + slot, mask=slot < count, other=-1)
        inside = (word >= 0) & (word < words)
        x = tl.load(saved + slot, mask=slot < count, other=0.0)
        if GRADIENT:
            z = _changed(x.to(tl.float32), scale, cap, CAPPED)
            log_p = tl.load(log_probabilities + slot, mask=slot < count, other=float("-inf")).to(tl.float32)
            g = mass * tl.exp((z - most) - log_all) - soft * tl.exp(log_p)
            if HARD:
                g = tl.where(word == label, g - hard, g)
            tl.store(gradient + word, factor * _slope(z, scale, cap, CAPPED) * g, mask=inside)
        if not IN_PLACE:
            tl.store(student + word, x, mask=inside)
