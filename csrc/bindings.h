// What both Python modules share. Addresses arrive as integers (Tensor.data_ptr()), operands as (address, unit stride,
// reduce stride, dtype code); an address of 0 is an operand that is absent.
#pragma once

#include <pybind11/pybind11.h>

#include "kernels.h"

namespace hywia {

template <typename T>
T* pointer(int64_t address) {
    return reinterpret_cast<T*>(static_cast<intptr_t>(address));
}

inline Operand operand(const pybind11::tuple& fields) {
    const auto field = [&](size_t i) { return fields[i].cast<int64_t>(); };
    return {pointer<const void>(field(0)), field(1), field(2), static_cast<DType>(field(3))};
}

}  // namespace hywia
