// Python module hywia_kernels._native: the CPU kernels.
#include <pybind11/stl.h>

#include <vector>

#include "bindings.h"

namespace py = pybind11;
using namespace hywia;
using namespace pybind11::literals;

namespace {

// `matrices`: (weight, grad, fisher, units, reduce, group_size, fine, signed_sum, accumulate), done in this order.
void taylor_importance(const std::vector<py::tuple>& matrices, int order, int threads) {
    std::vector<TaylorImportanceArgs> all;
    for (const py::tuple& fields : matrices) {
        TaylorImportanceArgs args;
        args.weight = operand(fields[0]), args.grad = operand(fields[1]), args.fisher = operand(fields[2]);
        args.units = fields[3].cast<int64_t>(), args.reduce = fields[4].cast<int64_t>();
        args.group_size = fields[5].cast<int64_t>(), args.order = static_cast<Order>(order);
        args.fine = pointer<float>(fields[6].cast<int64_t>());
        args.signed_sum = pointer<float>(fields[7].cast<int64_t>());
        args.accumulate = fields[8].cast<bool>();
        all.push_back(args);
    }
    py::gil_scoped_release release;
    taylor_importance_cpu(all.data(), int64_t(all.size()), threads);
}

void sample_importance(int64_t gradients, const py::tuple& weight, int64_t samples, int64_t rows, int64_t columns,
                       int axis, bool squares, double share, bool first, bool last, int64_t mean, int64_t square,
                       int64_t fine, int64_t coarse, int64_t pitch, int threads) {
    SampleImportanceArgs args;
    args.gradients = pointer<const float>(gradients), args.weight = operand(weight);
    args.samples = samples, args.rows = rows, args.columns = columns, args.axis = axis;
    args.squares = squares, args.share = float(share), args.first = first, args.last = last;
    args.mean = pointer<float>(mean), args.square = pointer<float>(square);
    args.fine = pointer<double>(fine), args.coarse = pointer<double>(coarse), args.pitch = pitch;
    args.threads = threads;
    py::gil_scoped_release release;
    sample_importance_cpu(args);
}

void compact(int64_t weight, int64_t out, int64_t keep, int64_t rows, int64_t columns, int64_t row_stride,
             int64_t column_stride, int axis, int element_size, int threads) {
    CompactArgs args;
    args.weight = pointer<const void>(weight), args.out = pointer<void>(out), args.keep = pointer<const int64_t>(keep);
    args.rows = rows, args.columns = columns, args.row_stride = row_stride, args.column_stride = column_stride;
    args.axis = axis, args.element_size = element_size, args.threads = threads;
    py::gil_scoped_release release;
    compact_cpu(args);
}

void attention_fusion(int64_t fine, int64_t coarse, int64_t units, double temperature, int64_t score, int64_t weight,
                      int threads) {
    AttentionFusionArgs args;
    args.fine = pointer<const float>(fine), args.coarse = pointer<const float>(coarse), args.units = units;
    args.temperature = temperature, args.threads = threads;
    args.score = pointer<float>(score), args.weight = pointer<float>(weight);
    py::gil_scoped_release release;
    attention_fusion_cpu(args);
}

// (address, stride from row to row, dtype code, scale, cap); an address of 0 is none.
Logits logits(const py::tuple& fields) {
    return {pointer<const void>(fields[0].cast<int64_t>()), fields[1].cast<int64_t>(),
            static_cast<DType>(fields[2].cast<int>()), fields[3].cast<float>(), fields[4].cast<float>()};
}

void distillation(const py::tuple& student, const py::tuple& teacher, int64_t indices, int64_t log_probabilities,
                  int log_probabilities_dtype, int64_t rest, int64_t count, int64_t weight, int64_t labels, double hard,
                  int64_t tokens, int64_t words, int64_t loss, int64_t gradient, int gradient_dtype,
                  int64_t gradient_stride, int threads) {
    DistillationArgs args;
    args.student = logits(student), args.teacher = logits(teacher);
    args.top = {pointer<const int32_t>(indices), pointer<const void>(log_probabilities),
                static_cast<DType>(log_probabilities_dtype), pointer<const float>(rest), count};
    args.weight = pointer<const float>(weight), args.labels = pointer<const int64_t>(labels), args.hard = hard;
    args.tokens = tokens, args.words = words, args.threads = threads;
    args.loss = pointer<float>(loss), args.gradient = pointer<void>(gradient);
    args.gradient_dtype = static_cast<DType>(gradient_dtype), args.gradient_stride = gradient_stride;
    py::gil_scoped_release release;
    distillation_cpu(args);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "CPU kernels of hywia_kernels; call them through hywia_kernels.ops.";
    m.def("taylor_importance", &taylor_importance, py::kw_only(), "matrices"_a, "order"_a, "threads"_a);
    m.def("sample_importance", &sample_importance, py::kw_only(), "gradients"_a, "weight"_a, "samples"_a, "rows"_a,
          "columns"_a, "axis"_a, "squares"_a, "share"_a, "first"_a, "last"_a, "mean"_a, "square"_a, "fine"_a,
          "coarse"_a, "pitch"_a, "threads"_a);
    m.def("compact", &compact, py::kw_only(), "weight"_a, "out"_a, "keep"_a, "rows"_a, "columns"_a, "row_stride"_a,
          "column_stride"_a, "axis"_a, "element_size"_a, "threads"_a);
    m.def("attention_fusion", &attention_fusion, py::kw_only(), "fine"_a, "coarse"_a, "units"_a, "temperature"_a,
          "score"_a, "weight"_a, "threads"_a);
    m.def("distillation", &distillation, py::kw_only(), "student"_a, "teacher"_a, "indices"_a, "log_probabilities"_a,
          "log_probabilities_dtype"_a, "rest"_a, "count"_a, "weight"_a, "labels"_a, "hard"_a, "tokens"_a, "words"_a,
          "loss"_a, "gradient"_a, "gradient_dtype"_a, "gradient_stride"_a, "threads"_a);
#ifdef _OPENMP
    m.attr("openmp") = true;
#else
    m.attr("openmp") = false;
#endif
#ifdef HYWIA_TARGET_CLONES
    m.attr("target_clones") = true;
#else
    m.attr("target_clones") = false;
#endif
}
