// Python module hywia_kernels._cuda: the GPU kernels. They run on the current device, on the stream that is passed.
#include <cuda_runtime_api.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings.h"

namespace py = pybind11;
using namespace hywia;
using namespace pybind11::literals;

namespace {

TaylorImportanceArgs taylor_args(const py::tuple& weight, const py::tuple& grad, const py::tuple& fisher, int64_t units,
                                 int64_t reduce, int64_t group_size, int order) {
    TaylorImportanceArgs args;
    args.weight = operand(weight), args.grad = operand(grad), args.fisher = operand(fisher);
    args.units = units, args.reduce = reduce, args.group_size = group_size;
    args.order = static_cast<Order>(order);
    return args;
}

int64_t workspace(const py::tuple& weight, const py::tuple& grad, const py::tuple& fisher, int64_t units,
                  int64_t reduce, int64_t group_size, int order) {
    return taylor_importance_workspace(taylor_args(weight, grad, fisher, units, reduce, group_size, order));
}

void taylor_importance(const py::tuple& weight, const py::tuple& grad, const py::tuple& fisher, int64_t units,
                       int64_t reduce, int64_t group_size, int order, int64_t fine, int64_t signed_sum, bool accumulate,
                       int64_t workspace, int64_t counters, int64_t stream) {
    TaylorImportanceArgs args = taylor_args(weight, grad, fisher, units, reduce, group_size, order);
    args.fine = pointer<float>(fine), args.signed_sum = pointer<float>(signed_sum);
    args.accumulate = accumulate;
    args.workspace = pointer<float>(workspace), args.counters = pointer<unsigned>(counters);
    args.stream = pointer<void>(stream);
    py::gil_scoped_release release;
    taylor_importance_cuda(args);
}

// What a call of linear_importance is but for its addresses: made once for all matrices of a shape. `strides` are from
// row to row, of grad_output, input, weight and mapped; columns follow each other.
LinearImportanceArgs linear_shape(const std::vector<int64_t>& strides, bool mapped, int dtype, int64_t tokens,
                                  int64_t rows, int64_t columns, bool ragged, int64_t samples, int axis, int order,
                                  int64_t group_size, bool per_sample, float scale, int64_t table_bytes) {
    LinearImportanceArgs args;
    args.grad_output_stride = strides.at(0), args.input_stride = strides.at(1), args.weight_stride = strides.at(2);
    args.mapped_stride = strides.at(3), args.has_mapped = mapped;
    args.dtype = static_cast<DType>(dtype), args.tokens = tokens, args.rows = rows, args.columns = columns;
    args.ragged = ragged, args.samples = samples, args.axis = axis;
    args.order = static_cast<LinearOrder>(order), args.group_size = group_size;
    args.per_sample = per_sample, args.scale = scale;
    args.table_bytes = table_bytes;
    return args;
}

py::dict linear_cut(const LinearImportanceArgs& args, int resident) {
    const LinearCut cut = linear_importance_cut(args, resident);
    return py::dict("m_tiles"_a = cut.m_tiles, "n_tiles"_a = cut.n_tiles, "across"_a = cut.across,
                    "share"_a = cut.share, "steps"_a = cut.steps, "floats"_a = cut.floats,
                    "signed_slots"_a = cut.signed_slots, "fine_rows"_a = cut.fine_rows);
}

void linear_importance(LinearImportanceArgs args, int64_t grad_output, int64_t input, int64_t weight, int64_t mapped,
                       int64_t offsets, int64_t fine, int64_t coarse, bool accumulate, int64_t workspace,
                       int64_t stream) {
    args.grad_output = pointer<const void>(grad_output), args.input = pointer<const void>(input);
    args.weight = pointer<const void>(weight), args.mapped = pointer<const void>(mapped);
    args.offsets = pointer<const int32_t>(offsets);
    args.fine = pointer<float>(fine), args.coarse = pointer<float>(coarse), args.accumulate = accumulate;
    args.workspace = pointer<float>(workspace), args.stream = pointer<void>(stream);
    py::gil_scoped_release release;
    linear_importance_cuda(args);
}

// `matrices`: (weight, grad, fisher, reduce, group_size) in the order of the results; `results`: (fine, signed_sum,
// units, matrices, accumulate). Returns the results that it did not take, because of the layout of a matrix.
py::list taylor_importance_batch(const py::list& matrices, const py::list& results, int order, int64_t stream) {
    std::vector<TaylorBatchMatrix> matrix;
    for (const auto& item : matrices) {
        const auto fields = item.cast<py::tuple>();
        matrix.push_back({operand(fields[0]), operand(fields[1]), operand(fields[2]), fields[3].cast<int64_t>(),
                          fields[4].cast<int64_t>()});
    }
    std::vector<TaylorBatchResult> taken;
    py::list left;
    int64_t first = 0;
    for (size_t i = 0; i < results.size(); ++i) {
        const auto fields = results[i].cast<py::tuple>();
        TaylorBatchResult result;
        result.fine = pointer<float>(fields[0].cast<int64_t>());
        result.signed_sum = pointer<float>(fields[1].cast<int64_t>());
        result.units = fields[2].cast<int64_t>();
        result.first_matrix = first, result.matrices = fields[3].cast<int64_t>();
        result.accumulate = fields[4].cast<bool>();
        first += result.matrices;
        if (taylor_batch_takes(matrix.data(), result))
            taken.push_back(result);
        else
            left.append(i);
    }
    {
        py::gil_scoped_release release;
        taylor_batch_cuda(matrix.data(), taken.data(), int64_t(taken.size()), static_cast<Order>(order),
                          pointer<void>(stream));
    }
    return left;
}

void compact(int64_t weight, int64_t out, int64_t keep, int64_t rows, int64_t columns, int64_t row_stride,
             int64_t column_stride, int axis, int element_size, int64_t stream) {
    CompactArgs args;
    args.weight = pointer<const void>(weight), args.out = pointer<void>(out), args.keep = pointer<const int64_t>(keep);
    args.rows = rows, args.columns = columns, args.row_stride = row_stride, args.column_stride = column_stride;
    args.axis = axis, args.element_size = element_size, args.stream = pointer<void>(stream);
    py::gil_scoped_release release;
    compact_cuda(args);
}

// Empty when the CUDA runtime finds a driver new enough and a GPU; else why not.
std::string probe() {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess) return cudaGetErrorString(status);
    return count > 0 ? "" : "no GPU is visible";
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "CUDA kernels of hywia_kernels; call them through hywia_kernels.ops.";
    m.attr("taylor_counters") = kTaylorCounters;
    m.attr("architectures") = HYWIA_CUDA_ARCHITECTURES;  // as given to CMake, separated by spaces
    m.def("probe", &probe);
    m.def("taylor_importance_workspace", &workspace, py::kw_only(), "weight"_a, "grad"_a, "fisher"_a, "units"_a,
          "reduce"_a, "group_size"_a, "order"_a);
    m.def("taylor_importance", &taylor_importance, py::kw_only(), "weight"_a, "grad"_a, "fisher"_a, "units"_a,
          "reduce"_a, "group_size"_a, "order"_a, "fine"_a, "signed_sum"_a, "accumulate"_a, "workspace"_a, "counters"_a,
          "stream"_a);
    m.def("taylor_importance_batch", &taylor_importance_batch, py::kw_only(), "matrices"_a, "results"_a, "order"_a,
          "stream"_a);
    py::class_<LinearImportanceArgs>(m, "LinearImportance")
        .def(py::init(&linear_shape), py::kw_only(), "strides"_a, "mapped"_a, "dtype"_a, "tokens"_a, "rows"_a,
             "columns"_a, "ragged"_a, "samples"_a, "axis"_a, "order"_a, "group_size"_a, "per_sample"_a, "scale"_a,
             "table_bytes"_a)
        .def("workspace", &linear_importance_workspace)
        .def("cut", &linear_cut, "resident"_a)
        .def("run", &linear_importance, "grad_output"_a, "input"_a, "weight"_a, "mapped"_a, "offsets"_a, "fine"_a,
             "coarse"_a, "accumulate"_a, "workspace"_a, "stream"_a);
    m.def("compact", &compact, py::kw_only(), "weight"_a, "out"_a, "keep"_a, "rows"_a, "columns"_a, "row_stride"_a,
          "column_stride"_a, "axis"_a, "element_size"_a, "stream"_a);
}
