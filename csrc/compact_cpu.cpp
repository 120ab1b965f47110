// compact on the CPU: kept rows by memcpy, everything else by a gather in blocks that follow the memory of the source.
#include <algorithm>

#include "common.h"

namespace hywia {
namespace {

void copy_rows(const CompactArgs& a, int threads) {
    const char* source = static_cast<const char*>(a.weight);
    char* out = static_cast<char*>(a.out);
    const int64_t bytes = a.columns * a.element_size, pitch = a.row_stride * a.element_size;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < a.rows; ++row) std::memcpy(out + row * bytes, source + a.keep[row] * pitch, bytes);
}

template <typename T>
void gather(const CompactArgs& a, int threads) {
    // A block of the output small enough for its source lines to stay in cache while the slow dimension is walked.
    constexpr int64_t block_rows = 32, block_columns = 1024;
    const T* source = static_cast<const T*>(a.weight);
    T* out = static_cast<T*>(a.out);
    const int64_t across = (a.columns + block_columns - 1) / block_columns;
    const int64_t blocks = (a.rows + block_rows - 1) / block_rows * across;
    const auto element = [&](int64_t row, int64_t column) {
        const int64_t r = a.axis == 0 ? a.keep[row] : row, c = a.axis == 1 ? a.keep[column] : column;
        return source[r * a.row_stride + c * a.column_stride];
    };
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t at = 0; at < blocks; ++at) {
        const int64_t row = at / across * block_rows, row_end = std::min(a.rows, row + block_rows);
        const int64_t column = at % across * block_columns, column_end = std::min(a.columns, column + block_columns);
        if (a.row_stride < a.column_stride) {
            for (int64_t c = column; c < column_end; ++c)
                for (int64_t r = row; r < row_end; ++r) out[r * a.columns + c] = element(r, c);
        } else {
            for (int64_t r = row; r < row_end; ++r)
                for (int64_t c = column; c < column_end; ++c) out[r * a.columns + c] = element(r, c);
        }
    }
}

}  // namespace

void compact_cpu(const CompactArgs& a) {
    if (a.rows == 0 || a.columns == 0) return;
    const int threads = useful_threads(a.threads, a.rows * a.columns);
    if (a.axis == 0 && (a.column_stride == 1 || a.columns == 1))
        copy_rows(a, threads);
    else if (a.element_size == 2)
        gather<uint16_t>(a, threads);
    else
        gather<uint32_t>(a, threads);
}

}  // namespace hywia
