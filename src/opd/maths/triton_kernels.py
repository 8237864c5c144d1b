"""The Triton kernels of `opd.maths.kernels`: one program per row of logits, in blocks of BLOCK entries, in float32.

Each of BLOCK lanes keeps its own sum, so that rounding over 150,000 tokens stays that of a short sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

NOTHING = tl.constexpr(-1e30)  # past the end of a row: below every logit, and finite, so that no lane computes 0 / 0


@triton.jit
def _log_z(row, width, BLOCK: tl.constexpr):
    """log sum exp of a row in one pass: each lane keeps its largest logit and its sum relative to that logit."""
    lane = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], NOTHING, tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        z = tl.load(row + start + lane, mask=start + lane < width, other=NOTHING)
        new = tl.maximum(largest, z)
        mass = mass * tl.exp(largest - new) + tl.exp(z - new)
        largest = new
    top = tl.max(largest, 0)
    return top + tl.log(tl.sum(mass * tl.exp(largest - top), 0))


@triton.jit
def log_normaliser(logits, out, width, stride, BLOCK: tl.constexpr):
    """out [n] <- log sum exp of logits [n, width]."""
    row = tl.program_id(0).to(tl.int64)
    tl.store(out + row, _log_z(logits + row * stride, width, BLOCK))


@triton.jit
def into_probabilities(logits, log_z, factor, width, stride, BLOCK: tl.constexpr):
    """logits [n, width] <- exp(logits - log_z) factor."""
    row = tl.program_id(0).to(tl.int64)
    own, z, times = logits + row * stride, tl.load(log_z + row), tl.load(factor + row)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        p = tl.exp(tl.load(own + at, mask=at < width, other=NOTHING) - z)
        tl.store(own + at, p * times, mask=at < width)


@triton.jit
def _terms(a, b, log_beta, log_rest, FORM: tl.constexpr):
    """A token's part of the divergence, and h: the gradient in the logits is h_j - p_j sum_v h_v.

    a = log p of the student, b = log q of the teacher. h is the part's derivative in log p, up to a multiple of p.
    """
    p, q = tl.exp(a), tl.exp(b)
    if FORM == 0:  # KL(p||q)
        part = p * (a - b)
        h = part
    elif FORM == 1:  # KL(q||p)
        part = q * (b - a)
        h = -q
    else:  # beta KL(q||m) + (1 - beta) KL(p||m); the derivative through m vanishes
        ours, theirs = a + log_rest, b + log_beta
        top = tl.maximum(ours, theirs)
        m = top + tl.log(tl.exp(ours - top) + tl.exp(theirs - top))
        h = tl.exp(log_rest) * p * (a - m)
        part = tl.exp(log_beta) * q * (b - m) + h
    return part, h


@triton.jit
def into_gradient(
    student,
    teacher,
    sampled,
    weight,
    value,
    student_logp,
    teacher_logp,
    width,
    student_stride,
    teacher_stride,
    log_beta,
    log_rest,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """student [n, width] <- weight times the gradient; value and both log-probs [n] as in `opd.maths.kernels`."""
    row = tl.program_id(0).to(tl.int64)
    ours, theirs = student + row * student_stride, teacher + row * teacher_stride
    our_z, their_z = _log_z(ours, width, BLOCK), _log_z(theirs, width, BLOCK)
    token = tl.load(sampled + row)
    tl.store(student_logp + row, tl.load(ours + token) - our_z)
    tl.store(teacher_logp + row, tl.load(theirs + token) - their_z)

    total = tl.zeros([BLOCK], tl.float32)
    slope = tl.zeros([BLOCK], tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)  # of the student: 1 up to the rounding of our_z
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        a = tl.load(ours + at, mask=at < width, other=0.0) - our_z
        b = tl.load(theirs + at, mask=at < width, other=0.0) - their_z
        part, h = _terms(a, b, log_beta, log_rest, FORM)
        total += tl.where(at < width, part, 0.0)
        slope += tl.where(at < width, h, 0.0)
        mass += tl.where(at < width, tl.exp(a), 0.0)
    tl.store(value + row, tl.sum(total, 0))

    w, all_h = tl.load(weight + row), tl.sum(slope / tl.sum(mass, 0), 0)  # makes each row of the gradient sum to 0
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        a = tl.load(ours + at, mask=at < width, other=0.0) - our_z
        b = tl.load(theirs + at, mask=at < width, other=0.0) - their_z
        _, h = _terms(a, b, log_beta, log_rest, FORM)
        tl.store(ours + at, (h - tl.exp(a) * all_h) * w, mask=at < width)
