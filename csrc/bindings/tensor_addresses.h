// Addresses of tensors through DLPack's exchange table for C (github.com/dmlc/dlpack, version 1.3): a library's own
// functions, found at run time, so that nothing of it is linked.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>

namespace fastagg::bindings {

namespace py = pybind11;

/// What the table's function tells of a tensor, without a reference to it.
struct DLTensor {
  void* data;
  struct { int32_t type, number; } device;
  int32_t dimensions;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  const int64_t* shape;
  const int64_t* strides;  // in elements
  uint64_t byte_offset;
};

/// The table, of which one entry is used.
struct DLPackExchange {
  struct { uint32_t major, minor; } version;
  void *older, *allocate, *from_object, *to_object;
  int (*view)(void* object, DLTensor* out);
  void* current_stream;
};

inline bool is_contiguous(const DLTensor& tensor) {
  int64_t expected = 1;
  for (int32_t d = tensor.dimensions - 1; d >= 0; --d) {
    if (tensor.shape[d] == 0) return true;
    if (tensor.shape[d] != 1 && tensor.strides[d] != expected) return false;
    expected *= tensor.shape[d];
  }
  return true;
}

/// Whether there is memory for its elements: torch has tensors of zeros without any.
inline bool has_memory(const DLTensor& tensor) {
  const int64_t* const end = tensor.shape + tensor.dimensions;
  return tensor.data != nullptr || std::find(tensor.shape, end, 0) != end;
}

inline bool look_alike(const DLTensor& one, const DLTensor& other) {
  return one.dtype.code == other.dtype.code && one.dtype.bits == other.dtype.bits &&
         one.device.type == other.device.type && one.device.number == other.device.number &&
         std::equal(one.shape, one.shape + one.dimensions, other.shape, other.shape + other.dimensions);
}

/// Whether a tensor's values are the negatives of those in its memory, of which the table tells nothing.
inline bool is_negated(py::handle is_negative, py::handle tensor) {
  PyObject* const answer = PyObject_CallOneArg(is_negative.ptr(), tensor.ptr());
  if (answer == nullptr) throw py::error_already_set();
  Py_DECREF(answer);  // True and False stay
  return answer != Py_False;
}

/// The addresses of the leading tensors that are of one of these types and share the first one's dtype, device and
/// shape, contiguous, with memory of their own values: `is_negative` is their type's method that tells.
inline py::list tensor_addresses(const py::capsule& exchange, const py::tuple& types, py::handle is_negative,
                                 const py::list& tensors) {
  const auto* table = static_cast<const DLPackExchange*>(PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"));
  if (table == nullptr) throw py::error_already_set();
  py::list addresses;
  if (table->version.major != 1) return addresses;
  DLTensor first{}, tensor{};
  for (py::handle item : tensors) {
    const auto is_its_type = [&](py::handle type) {
      return reinterpret_cast<PyObject*>(Py_TYPE(item.ptr())) == type.ptr();
    };
    if (std::none_of(types.begin(), types.end(), is_its_type)) break;  // a subclass may mean more
    if (table->view(item.ptr(), &tensor) != 0) {
      PyErr_Clear();  // sparse, or without memory: whoever looks at it one by one says so
      break;
    }
    if (addresses.empty()) first = tensor;
    if (!look_alike(first, tensor) || !is_contiguous(tensor) || !has_memory(tensor)) break;
    if (is_negated(is_negative, item)) break;
    addresses.append(reinterpret_cast<uintptr_t>(tensor.data) + tensor.byte_offset);
  }
  return addresses;
}

}  // namespace fastagg::bindings
