// Attention fusion on the CPU, in double: the formula of hywia_kernels/ops/reference.py, term by term.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <vector>

#include "common.h"

namespace hywia {
namespace {

// z = (log x - mean) / std. Sums run in index order on one thread; only the logarithms are worth several.
std::vector<double> standardised_log(const float* x, int64_t units, int threads) {
    std::vector<double> z(units);
    float largest = x[0];
    for (int64_t i = 0; i < units; ++i) {
        if (std::isnan(x[i])) {  // NaN in, NaN out, for the whole vector: its mean is not a number either
            std::fill(z.begin(), z.end(), std::numeric_limits<double>::quiet_NaN());
            return z;
        }
        largest = std::max(largest, x[i]);
    }
    const double floor = std::max(double(largest) * 1e-12, double(FLT_MIN));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < units; ++i) z[i] = std::log(std::max(double(x[i]), floor));
    double mean = 0, variance = 0;
    for (const double v : z) mean += v;
    mean /= double(units);
    for (double& v : z) {
        v -= mean;
        variance += v * v;
    }
    const double std_dev = std::sqrt(variance / double(units));
    // A spread below the float32 rounding of the logarithms is no spread. NaN (an infinite x) must stay NaN.
    for (double& v : z) v = std_dev <= 1e-6 ? 0.0 : std_dev > 1e-6 ? v / std_dev : std_dev;
    return z;
}

}  // namespace

void attention_fusion_cpu(const AttentionFusionArgs& a) {
    if (a.units == 0) return;
    const int threads = useful_threads(a.threads, a.units * 8);  // a logarithm is worth some eight plain operations
    const std::vector<double> fine = standardised_log(a.fine, a.units, threads);
    const std::vector<double> coarse = standardised_log(a.coarse, a.units, threads);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < a.units; ++i) {
        const double query = 0.5 * (fine[i] + coarse[i]);
        const double weight = 1.0 / (1.0 + std::exp(-query * (fine[i] - coarse[i]) / a.temperature));
        a.score[i] = float(weight * fine[i] + (1.0 - weight) * coarse[i]);
        a.weight[i] = float(weight);
    }
}

}  // namespace hywia
