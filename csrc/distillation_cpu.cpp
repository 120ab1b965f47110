// Distillation loss and gradient on the CPU: a row of each model's logits at a time, in buffers that stay in the L2
// cache.
//
// A row is read from memory once: converted into a float32 buffer, where its largest logit is found, every logit is
// replaced by its exponential (the only one that is computed for it), and the gradient is made of these. Sums are
// float32 over kFlush additions and then double; a row is one thread's, so that the bits do not depend on the threads.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common.h"

namespace hywia {
namespace {

constexpr int64_t kLanes = 32;  // independent float32 sums of a row
constexpr int64_t kFlush = 32;  // float32 additions per sum before it is added in double
constexpr float kNone = -std::numeric_limits<float>::infinity();

// e^x for x <= 0, within 1e-7 of itself, and 0 below -87. x = k·ln 2 + r, with ln 2 in two parts of which the first has
// few enough digits that k times it is exact, and Taylor's polynomial for |r| <= ln 2 / 2, where r^8 / 8! is 5e-9.
HYWIA_INLINE float exponential(float x) {
    constexpr float round = 12582912.0f;  // 1.5·2^23: what is added to it becomes an integer in the low bits
    constexpr float smallest = -87.0f;
    const float clipped = x < smallest ? smallest : x;  // NaN stays
    const float shifted = clipped * 1.44269504f + round, k = shifted - round;
    const float r = (clipped - k * 0.693359375f) + k * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const float power = bits_to_float((float_to_bits(shifted) - float_to_bits(round) + 127) << 23);
    return x < smallest ? 0.0f : p * power;
}

// By exponentials, and near 0, where those cancel, by a continued fraction (Lambert's to y^5: 4e-11 off at 0.5).
HYWIA_INLINE float hyperbolic_tangent(float y) {
    const float e = exponential(-2.0f * std::fabs(y)), far = std::copysign((1.0f - e) / (1.0f + e), y);
    const float z = y * y, near = y * ((z + 105.0f) * z + 945.0f) / ((15.0f * z + 420.0f) * z + 945.0f);
    return std::fabs(y) < 0.5f ? near : far;
}

// Calls `body(at, n)` for every vector of a row; n is kLanes at compile time but for the last.
template <typename Body>
HYWIA_INLINE void by_lanes(int64_t begin, int64_t end, Body body) {
    int64_t at = begin;
    for (; at + kLanes <= end; at += kLanes) body(at, kLanes);
    if (at < end) body(at, end - at);
}

HYWIA_CLONES void scaled(const Logits& logits, int64_t row, int64_t words, float* z) {
    const float scale = logits.scale;
    const float* single = static_cast<const float*>(logits.data) + row * logits.stride;
    const uint16_t* half = static_cast<const uint16_t*>(logits.data) + row * logits.stride;
    if (logits.dtype == DType::Float32)
        for (int64_t i = 0; i < words; ++i) z[i] = scale * single[i];
    else if (logits.dtype == DType::BFloat16)
        for (int64_t i = 0; i < words; ++i) z[i] = scale * bfloat16_to_float(half[i]);
    else
        for (int64_t i = 0; i < words; ++i) z[i] = scale * float16_to_float(half[i]);
}

// Soft-caps a row; `slope`, unless null, gets the derivative with respect to the head's logits.
HYWIA_CLONES void capped(float* z, float* slope, int64_t words, float scale, float cap) {
    if (slope == nullptr)
        for (int64_t i = 0; i < words; ++i) z[i] = cap * hyperbolic_tangent(z[i] / cap);
    else
        for (int64_t i = 0; i < words; ++i) {
            const float bent = hyperbolic_tangent(z[i] / cap);
            z[i] = cap * bent;
            slope[i] = scale * (1.0f - bent * bent);
        }
}

HYWIA_CLONES float largest(const float* z, int64_t words) {
    float most[kLanes];
    std::fill(most, most + kLanes, kNone);
    by_lanes(0, words, [&](int64_t at, int64_t n) __attribute__((always_inline)) {
        for (int64_t j = 0; j < n; ++j) most[j] = z[at + j] > most[j] ? z[at + j] : most[j];
    });
    return *std::max_element(most, most + kLanes);
}

double total(const float* lanes) {
    double sum = 0;
    for (int64_t j = 0; j < kLanes; ++j) sum += lanes[j];
    return sum;
}

struct Sums {
    double student = 0, teacher = 0, cross = 0;  // cross: of teacher·(log teacher - log student), not normalised
};

// Replaces both rows by exponentials of what they are below their largest.
HYWIA_CLONES Sums exponentials(float* student, float* teacher, float student_top, float teacher_top, int64_t words) {
    Sums sums;
    for (int64_t begin = 0; begin < words; begin += kLanes * kFlush) {
        float s[kLanes] = {}, t[kLanes] = {}, cross[kLanes] = {};
        by_lanes(begin, std::min(words, begin + kLanes * kFlush),
                 [&](int64_t at, int64_t n) __attribute__((always_inline)) {
                     for (int64_t j = 0; j < n; ++j) {
                         const float u = student[at + j] - student_top, v = teacher[at + j] - teacher_top;
                         const float eu = exponential(u), ev = exponential(v);
                         s[j] += eu;
                         t[j] += ev;
                         cross[j] += ev * (v - u);
                         student[at + j] = eu;
                         teacher[at + j] = ev;
                     }
                 });
        sums.student += total(s), sums.teacher += total(t), sums.cross += total(cross);
    }
    return sums;
}

// The same of one row; returns its sum.
HYWIA_CLONES double exponentials_of_one(float* z, float top, int64_t words) {
    double sum = 0;
    for (int64_t begin = 0; begin < words; begin += kLanes * kFlush) {
        float s[kLanes] = {};
        by_lanes(begin, std::min(words, begin + kLanes * kFlush),
                 [&](int64_t at, int64_t n) __attribute__((always_inline)) {
                     for (int64_t j = 0; j < n; ++j) {
                         z[at + j] = exponential(z[at + j] - top);
                         s[j] += z[at + j];
                     }
                 });
        sum += total(s);
    }
    return sum;
}

// The student's row of exponentials becomes its gradient, weight·slope·(mine·student - theirs·teacher).
HYWIA_CLONES void combined(float* student, const float* teacher, const float* slope, float mine, float theirs,
                           int64_t words) {
    if (teacher != nullptr)
        for (int64_t i = 0; i < words; ++i) student[i] = mine * student[i] - theirs * teacher[i];
    else
        for (int64_t i = 0; i < words; ++i) student[i] *= mine;
    if (slope != nullptr)
        for (int64_t i = 0; i < words; ++i) student[i] *= slope[i];
}

HYWIA_CLONES void stored(const float* row, int64_t words, DType dtype, void* out, int64_t offset) {
    float* single = static_cast<float*>(out) + offset;
    uint16_t* half = static_cast<uint16_t*>(out) + offset;
    if (dtype == DType::Float32)
        std::copy(row, row + words, single);
    else if (dtype == DType::BFloat16)
        for (int64_t i = 0; i < words; ++i) half[i] = float_to_bfloat16(row[i]);
    else
        for (int64_t i = 0; i < words; ++i) half[i] = float_to_float16(row[i]);
}

// One token's rows; of the teacher's likeliest words the student's logits, and the exponentials of both.
struct Scratch {
    explicit Scratch(const DistillationArgs& a)
        : student(a.words),
          teacher(a.teacher.data == nullptr ? 0 : a.words),
          slope(a.student.cap > 0 && a.gradient != nullptr ? a.words : 0),
          words(a.teacher.data == nullptr ? a.top.count : 0) {}
    std::vector<float> student, teacher, slope, words;
    float* slopes() { return slope.empty() ? nullptr : slope.data(); }
};

void fill(const DistillationArgs& a, int64_t row, float value, Scratch& x) {
    a.loss[row] = value;
    if (a.gradient == nullptr) return;
    std::fill(x.student.begin(), x.student.end(), value);
    stored(x.student.data(), a.words, a.gradient_dtype, a.gradient, row * a.gradient_stride);
}

// What a token's weight and, without a cap, the logits' scale multiply.
struct Token {
    int64_t row, label;  // label: -1 where there is none
    double label_logit, weight;
};

// Leaves the gradient, still without the label's share, in the student's row; returns the loss.
double against_logits(const DistillationArgs& a, const Token& token, Scratch& x) {
    scaled(a.teacher, token.row, a.words, x.teacher.data());
    if (a.teacher.cap > 0) capped(x.teacher.data(), nullptr, a.words, a.teacher.scale, a.teacher.cap);
    const float student_top = largest(x.student.data(), a.words), teacher_top = largest(x.teacher.data(), a.words);
    const Sums sums = exponentials(x.student.data(), x.teacher.data(), student_top, teacher_top, a.words);
    const double soft = 1.0 - a.hard, log_sum = std::log(sums.student);
    const double divergence = sums.cross / sums.teacher - std::log(sums.teacher) + log_sum;
    if (a.gradient != nullptr)
        combined(x.student.data(), x.teacher.data(), x.slopes(), float(token.weight / sums.student),
                 float(token.weight * soft / sums.teacher), a.words);
    return soft * divergence + (token.label < 0 ? 0.0 : a.hard * (log_sum - (token.label_logit - student_top)));
}

double log_probability(const TopWords& top, int64_t at) {
    return top.dtype == DType::Float32 ? static_cast<const float*>(top.log_probabilities)[at]
                                       : float16_to_float(static_cast<const uint16_t*>(top.log_probabilities)[at]);
}

// The same against a teacher's likeliest words. The others are summed by themselves: as what the likeliest leave of 1
// their mass would lose its digits where it is small.
double against_top(const DistillationArgs& a, const Token& token, Scratch& x) {
    const int64_t count = a.top.count, at = token.row * count;
    const int32_t* indices = a.top.indices + at;
    float* z = x.student.data();
    double top = kNone, known = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (indices[i] < 0 || indices[i] >= a.words) return std::numeric_limits<double>::quiet_NaN();
        x.words[i] = z[indices[i]];
        top = std::max(top, double(x.words[i]));
    }
    for (int64_t i = 0; i < count; ++i) {
        z[indices[i]] = kNone;
        known += std::exp(x.words[i] - top);
    }
    const bool others = count < a.words;
    const float rest_top = others ? largest(z, a.words) : 0.0f;
    const double rest_sum = exponentials_of_one(z, rest_top, a.words);
    const double most = others ? std::max(top, double(rest_top)) : top;
    const double log_sum = most + std::log(known * std::exp(top - most) + rest_sum * std::exp(rest_top - most));
    const double soft = 1.0 - a.hard, log_rest = a.top.rest[token.row], rest = std::exp(log_rest);
    double divergence = rest > 0 ? rest * (log_rest - (rest_top + std::log(rest_sum) - log_sum)) : 0.0, mass = rest;
    for (int64_t i = 0; i < count; ++i) {
        const double log_p = log_probability(a.top, at + i), p = std::exp(log_p);
        mass += p;
        if (p > 0) divergence += p * (log_p - (x.words[i] - log_sum));
    }
    if (a.gradient != nullptr) {
        mass = soft * mass + (token.label < 0 ? 0.0 : a.hard);
        const double of_rest = rest > 0 ? soft * rest / rest_sum : 0.0;
        combined(z, nullptr, x.slopes(), float(token.weight * (mass * std::exp(rest_top - log_sum) - of_rest)), 0.0f,
                 a.words);
        for (int64_t i = 0; i < count; ++i) {
            const double q = std::exp(x.words[i] - log_sum), p = std::exp(log_probability(a.top, at + i));
            const float slope = x.slope.empty() ? 1.0f : x.slope[indices[i]];
            z[indices[i]] = float(token.weight * (mass * q - soft * p)) * slope;
        }
    }
    return soft * divergence + (token.label < 0 ? 0.0 : a.hard * (log_sum - token.label_logit));
}

void one_token(const DistillationArgs& a, int64_t row, Scratch& x) {
    if (a.weight[row] == 0.0f) return fill(a, row, 0.0f, x);
    Token token = {row, a.labels == nullptr ? -1 : a.labels[row], 0.0, a.weight[row]};
    if (a.labels != nullptr && (token.label < 0 || token.label >= a.words))
        return fill(a, row, std::numeric_limits<float>::quiet_NaN(), x);
    scaled(a.student, row, a.words, x.student.data());
    if (a.student.cap > 0)
        capped(x.student.data(), x.slopes(), a.words, a.student.scale, a.student.cap);
    else
        token.weight *= a.student.scale;
    if (token.label >= 0) token.label_logit = x.student[token.label];
    const double loss = a.teacher.data == nullptr ? against_top(a, token, x) : against_logits(a, token, x);
    if (std::isnan(loss)) return fill(a, row, float(loss), x);
    a.loss[row] = float(loss);
    if (a.gradient == nullptr) return;
    if (token.label >= 0)
        x.student[token.label] -= float(token.weight * a.hard) * (x.slope.empty() ? 1.0f : x.slope[token.label]);
    stored(x.student.data(), a.words, a.gradient_dtype, a.gradient, row * a.gradient_stride);
}

}  // namespace

void distillation_cpu(const DistillationArgs& a) {
    const int threads =
        int(std::min<int64_t>(useful_threads(a.threads, 8 * a.tokens * a.words), std::max<int64_t>(a.tokens, 1)));
#pragma omp parallel num_threads(threads)
    {
        Scratch scratch(a);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < a.tokens; ++row) one_token(a, row, scratch);
    }
}

}  // namespace hywia
