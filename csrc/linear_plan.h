// linear_importance on Hopper: how one call falls into tiles and tables. It depends on the sizes and the number of
// clusters that the device holds alone, and needs no CUDA: tests ask for plans where there is no GPU.
#pragma once

#include <algorithm>

#include "kernels.h"

namespace hywia {

constexpr int kLinearTileM = 128;      // units of a block's tile
constexpr int kLinearCluster = 2;      // blocks of a cluster: neighbours along the units, which share the other operand
constexpr int kLinearStepTokens = 64;  // tokens of one stage
constexpr int kLinearFineRows = 3;     // first, second, mixed
constexpr int kProductColumns = 128;   // units of a block of linear_products: 16 lanes of 8

// Which kernel.
//   Merged   the mean gradient in one product, no sample told from the next.
//   Samples  a product per sample: the sum over samples, and signed sums of each.
//   Squares  that and the sum of squares.
//   Sums     both sums over samples without signed sums, which come from elsewhere.
//   Second   second order alone: squares and signed sums are reduced inside the sample.
enum class LinearMode : int { Merged = 0, Samples = 1, Squares = 2, Sums = 3, Second = 4 };
constexpr int kLinearModes = 5;

constexpr int linear_tile_n(LinearMode mode) {
    return mode == LinearMode::Merged || mode == LinearMode::Second ? 256 : 128;
}
// Rows of a table of fine sums. Merged keeps its signed sums, which are the mean's, in the second one.
constexpr int linear_fine_rows(LinearMode mode) {
    if (mode == LinearMode::Squares || mode == LinearMode::Sums) return kLinearFineRows;
    return mode == LinearMode::Merged ? 2 : 1;
}

inline int64_t outer_size(const LinearImportanceArgs& a) { return a.axis == 0 ? a.rows : a.columns; }
inline int64_t inner_size(const LinearImportanceArgs& a) { return a.axis == 0 ? a.columns : a.rows; }
constexpr int64_t divide_round_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline LinearMode mode_of(const LinearImportanceArgs& a) {
    const bool first = a.order == LinearOrder::First;
    if (!a.per_sample || (a.has_mapped && first)) return LinearMode::Merged;
    if (a.order == LinearOrder::Second) return LinearMode::Second;
    return a.has_mapped ? LinearMode::Sums : first ? LinearMode::Samples : LinearMode::Squares;
}
// Whether linear_products makes the samples' signed sums.
inline bool signed_from_mapped(const LinearImportanceArgs& a) {
    return a.per_sample && a.has_mapped && mode_of(a) != LinearMode::Second;
}

// `across` clusters side by side have an m tile each and stay with it; `share` clusters divide the n tiles of one m
// tile and keep separate sums. When a group of `across` m tiles is done, all go on to the next. What is being worked on
// at one time is therefore a compact block of the weight, and its operands stay in L2.
//
// Each of the `share` clusters has a table of fine sums. Signed sums follow in tables of their own: one for each of
// these clusters, or as many as linear_products cuts a sample into.
struct LinearPlan {
    int m_tiles = 0, n_tiles = 0;  // of a whole cluster
    int across = 1, share = 1;     // clusters
    int groups = 0;                // of m tiles
    int fine_rows = 1, signed_rows = 1;
    int signed_slots = 1;
    int64_t row_stride = 0;                    // units, padded to whole tiles
    int64_t fine_table = 0, signed_table = 0;  // floats of one table
    int64_t signed_at = 0;                     // floats before the first table of signed sums
    int64_t floats = 0;                        // of the workspace

    int64_t steps() const { return divide_round_up(int64_t(groups) * n_tiles, share); }
};

// The plan for a device that holds `resident` clusters at once.
inline LinearPlan make_plan(const LinearImportanceArgs& a, int resident) {
    constexpr int64_t kProductBlocks = 1056;  // eight on each of 132 multiprocessors
    const LinearMode mode = mode_of(a);
    const bool merged = mode == LinearMode::Merged, products = signed_from_mapped(a);
    const int64_t m = kLinearTileM * kLinearCluster, n = linear_tile_n(mode);
    LinearPlan plan;
    plan.m_tiles = int(divide_round_up(outer_size(a), m)), plan.n_tiles = int(divide_round_up(inner_size(a), n));
    plan.row_stride = plan.m_tiles * m;
    plan.fine_rows = linear_fine_rows(mode);
    plan.fine_table = plan.fine_rows * plan.row_stride;
    plan.signed_rows = a.per_sample ? int(a.samples) : 1;
    // What grows with `share` is what its clusters write. Among the cuts that finish in the fewest steps, take the one
    // that moves the least: operands of every step, and the tables, read and written.
    const int64_t written = merged || products ? 0 : plan.signed_rows * plan.row_stride;
    const int64_t table = (plan.fine_table + written) * int64_t(sizeof(float));
    const int64_t most =
        std::min<int64_t>(std::min(plan.n_tiles, resident), std::max<int64_t>(1, a.table_bytes / table));
    int64_t best_steps = 0, best_bytes = 0;
    for (int share = 1; share <= most; ++share) {
        const int across = std::min(resident / share, plan.m_tiles);
        const int groups = int(divide_round_up(plan.m_tiles, across));
        const int64_t steps = divide_round_up(int64_t(groups) * plan.n_tiles, share);
        const int64_t bytes = 2 * a.tokens * (across * m + share * n) * steps + 2 * share * table;
        if (share > 1 && (steps > best_steps || (steps == best_steps && bytes >= best_bytes))) continue;
        best_steps = steps, best_bytes = bytes;
        plan.share = share, plan.across = across, plan.groups = groups;
    }
    const int64_t fine = plan.share * plan.fine_table;
    if (products) {  // enough blocks to fill the GPU, and no parts of much fewer than 128 tokens
        const int64_t blocks = divide_round_up(outer_size(a), kProductColumns) * a.samples;
        const int64_t wanted =
            std::min(divide_round_up(kProductBlocks, blocks), divide_round_up(a.tokens, a.samples * 128));
        plan.signed_slots = int(std::clamp<int64_t>(wanted, 1, 16));
    } else {
        plan.signed_slots = plan.share;
    }
    const bool inside_fine = merged && !products;
    plan.signed_at = inside_fine ? plan.row_stride : fine;
    plan.signed_table = inside_fine ? plan.fine_table : plan.signed_rows * plan.row_stride;
    plan.floats = fine + (inside_fine ? 0 : plan.signed_slots * plan.signed_table);
    return plan;
}

}  // namespace hywia
