// Every op of csrc: one argument struct and one launcher per op, CPU and CUDA alike.
//
// Nothing here knows torch. Pointers, sizes, strides (in elements, 64-bit) and dtype codes come in; the Python side
// (hywia_kernels/ops/native.py and cuda.py) has checked them. Launchers report failure by std::runtime_error.
#pragma once

#include <cstdint>

namespace hywia {

enum class DType : int32_t { Float32 = 0, BFloat16 = 1, Float16 = 2 };
enum class Order : int32_t { First = 0, Second = 1, Mixed = 2 };

// One operand seen as [units, reduce]: the caller has already swapped the strides when the units are columns.
struct Operand {
    const void* data = nullptr;  // null: this order does not read it
    int64_t unit_stride = 0;
    int64_t reduce_stride = 0;
    DType dtype = DType::Float32;
};

// fine[k] = sum |t|, signed_sum[k] = sum t over the `group_size` rows of unit k.
struct TaylorImportanceArgs {
    Operand weight, grad, fisher;
    int64_t units = 0;  // rows of the [units, reduce] view, before folding; a multiple of group_size
    int64_t reduce = 0;
    int64_t group_size = 1;
    Order order = Order::First;
    float* fine = nullptr;         // [units / group_size]
    float* signed_sum = nullptr;   // [units / group_size]
    bool accumulate = false;       // add to the outputs instead of overwriting them
    float* workspace = nullptr;    // CUDA only: taylor_importance_workspace() floats
    unsigned* counters = nullptr;  // CUDA only: kTaylorCounters zeros that no other stream uses; zeros again afterwards
    void* stream = nullptr;        // CUDA only: cudaStream_t
};
constexpr int64_t kTaylorCounters = 4096;

// Several matrices, whose sums are written or added in their order.
void taylor_importance_cpu(const TaylorImportanceArgs* matrices, int64_t count, int threads);
void taylor_importance_cuda(const TaylorImportanceArgs& args);
int64_t taylor_importance_workspace(const TaylorImportanceArgs& args);  // floats; of the current CUDA device

enum class LinearOrder : int32_t { First = 0, Second = 1, Mixed = 2, All = 3 };

// Scores of a linear layer's units from its backward: G_s = scale · grad_outputᵀ·input over the tokens of sample s.
struct LinearImportanceArgs {
    const void* grad_output = nullptr;  // [tokens, rows]
    const void* input = nullptr;        // [tokens, columns]
    const void* weight = nullptr;       // [rows, columns]
    // input·weightᵀ [tokens, rows] for axis 0, grad_output·weight [tokens, columns] for axis 1, or null: with it the
    // signed sums of a sample are sums of products of activations, and the weight gradient is not asked for them.
    const void* mapped = nullptr;
    bool has_mapped = false;
    int64_t grad_output_stride = 0, input_stride = 0, weight_stride = 0;  // from row to row; columns follow each other
    int64_t mapped_stride = 0;
    DType dtype = DType::BFloat16;  // of all three
    int64_t tokens = 0, rows = 0, columns = 0;
    bool ragged = false;               // else the samples are equally long
    const int32_t* offsets = nullptr;  // ragged: [samples + 1] on the device
    int64_t samples = 1;
    int axis = 0;  // 0: units are rows, 1: columns
    LinearOrder order = LinearOrder::First;
    int64_t group_size = 1;
    bool per_sample = true;
    float scale = 1.0f;
    float* fine = nullptr;    // [units], or [3, units] for All
    float* coarse = nullptr;  // [samples, units], or [1, units] without per_sample
    bool accumulate = false;
    float* workspace = nullptr;  // linear_importance_workspace() floats
    void* stream = nullptr;
    int64_t table_bytes = 512 << 20;  // the most that the clusters' partial sums may take
};

void linear_importance_cuda(const LinearImportanceArgs& args);          // compute capability 9.0 only
int64_t linear_importance_workspace(const LinearImportanceArgs& args);  // floats; of the current CUDA device
// How a call is cut on a device that holds `resident` clusters, without asking a device.
struct LinearCut {
    int64_t m_tiles, n_tiles, across, share, steps, floats, signed_slots, fine_rows;
};
LinearCut linear_importance_cut(const LinearImportanceArgs& args, int resident);

// Many matrices at once, CUDA only. `results[r].first_matrix` on, `matrices` of them count towards result r.
struct TaylorBatchMatrix {
    Operand weight, grad, fisher;
    int64_t reduce = 0;
    int64_t group_size = 1;
};
struct TaylorBatchResult {
    float* fine = nullptr;        // [units]
    float* signed_sum = nullptr;  // [units]
    int64_t units = 0;
    int64_t first_matrix = 0, matrices = 0;
    bool accumulate = false;
};

// Whether one launch can take the result: its matrices must be readable in 16-byte words along rows or columns.
bool taylor_batch_takes(const TaylorBatchMatrix* matrices, const TaylorBatchResult& result);
// As many launches as the matrices need at kBatchMembers (taylor_batch.cuh) each.
void taylor_batch_cuda(const TaylorBatchMatrix* matrices, const TaylorBatchResult* results, int64_t count, Order order,
                       void* stream);

// One block of linear_importance on the CPU: what its per-sample gradients [samples, rows, columns] add to the sums.
// Blocks, and chunks of samples of one block, come one after another; a block's chunks share `mean` and `square`.
struct SampleImportanceArgs {
    const float* gradients = nullptr;  // dense
    Operand weight;                    // this block's, as [rows, columns]: unit_stride between rows
    int64_t samples = 0, rows = 0, columns = 0;
    int axis = 0;              // 0: a sum per row, 1: per column
    bool squares = false;      // second and mixed sums as well as first
    float share = 1.0f;        // one over the number of samples
    bool first = true;         // this chunk begins the block's samples,
    bool last = true;          // and this one ends them
    float* mean = nullptr;     // [rows, columns], between chunks: sums of gradients
    float* square = nullptr;   // and of their squares
    double* fine = nullptr;    // [3, ...] added to: first, second, mixed; this block's units at the front
    double* coarse = nullptr;  // [samples, ...] added to
    int64_t pitch = 0;         // between rows of `fine`, and of `coarse`
    int threads = 1;
};

void sample_importance_cpu(const SampleImportanceArgs& args);

// out = weight.index_select(axis, keep), contiguous. A vector is a matrix of one row with axis 1.
struct CompactArgs {
    const void* weight = nullptr;
    void* out = nullptr;
    const int64_t* keep = nullptr;              // where the weight lies
    int64_t rows = 0, columns = 0;              // of `out`
    int64_t row_stride = 0, column_stride = 0;  // of `weight`
    int axis = 0;
    int element_size = 4;  // 2 or 4
    int threads = 1;
    void* stream = nullptr;
};

void compact_cpu(const CompactArgs& args);
void compact_cuda(const CompactArgs& args);

// Logits as a head gives them, and what the family makes of them: scale·x, then cap·tanh(scale·x / cap) where cap > 0.
struct Logits {
    const void* data = nullptr;
    int64_t stride = 0;  // from row to row; words follow each other
    DType dtype = DType::Float32;
    float scale = 1.0f;
    float cap = 0.0f;
};

// A teacher's likeliest words, [tokens, count] both, and the logarithm of what the others have, [tokens].
struct TopWords {
    const int32_t* indices = nullptr;
    const void* log_probabilities = nullptr;
    DType dtype = DType::Float32;  // or Float16
    const float* rest = nullptr;
    int64_t count = 0;
};

// Distillation loss of every token and its gradient at the student's logits, which may be written over them.
struct DistillationArgs {
    Logits student, teacher;  // `teacher` without data: `top` instead
    TopWords top;
    const float* weight = nullptr;    // [tokens]; 0: the token is not read
    const int64_t* labels = nullptr;  // [tokens]; null where hard is 0
    double hard = 0.0;
    int64_t tokens = 0, words = 0;
    float* loss = nullptr;     // [tokens]
    void* gradient = nullptr;  // [tokens, words], or null: the losses alone
    DType gradient_dtype = DType::Float32;
    int64_t gradient_stride = 0;
    int threads = 1;
};

void distillation_cpu(const DistillationArgs& args);

struct AttentionFusionArgs {
    const float* fine = nullptr;
    const float* coarse = nullptr;
    int64_t units = 0;
    double temperature = 1.0;
    float* score = nullptr;
    float* weight = nullptr;
    int threads = 1;
};

void attention_fusion_cpu(const AttentionFusionArgs& args);

}  // namespace hywia
