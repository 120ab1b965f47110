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

template <typename T, int axis>
void gather(const CompactArgs& a, int threads) {
    // Follow the memory of the source. Rows are read from end to end, which the prefetchers like; a transposed source
    // is taken in blocks small enough for its lines to stay in cache while the slow dimension is walked.
    const bool transposed = a.row_stride < a.column_stride;
    const int64_t block_rows = transposed ? 32 : 1, block_columns = transposed ? 1024 : 1 << 16;
    const T* source = static_cast<const T*>(a.weight);
    T* __restrict out = static_cast<T*>(a.out);
    const int64_t row_stride = a.row_stride, column_stride = a.column_stride, columns = a.columns;
    const int64_t* keep = a.keep;
    const int64_t across = (columns + block_columns - 1) / block_columns;
    const int64_t blocks = (a.rows + block_rows - 1) / block_rows * across;
    const auto source_row = [=](int64_t row) { return source + (axis == 0 ? keep[row] : row) * row_stride; };
    const auto source_column = [=](int64_t column) { return (axis == 1 ? keep[column] : column) * column_stride; };
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t at = 0; at < blocks; ++at) {
        const int64_t row = at / across * block_rows, row_end = std::min(a.rows, row + block_rows);
        const int64_t column = at % across * block_columns, column_end = std::min(columns, column + block_columns);
        if (transposed) {
            for (int64_t c = column; c < column_end; ++c)
                for (int64_t r = row; r < row_end; ++r) out[r * columns + c] = source_row(r)[source_column(c)];
        } else {
            for (int64_t r = row; r < row_end; ++r) {
                const T* from = source_row(r);
                for (int64_t c = column; c < column_end; ++c) out[r * columns + c] = from[source_column(c)];
            }
        }
    }
}

template <typename T>
void gather(const CompactArgs& a, int threads) {
    a.axis == 0 ? gather<T, 0>(a, threads) : gather<T, 1>(a, threads);
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
