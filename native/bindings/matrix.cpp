#include "bindings/matrix.h"

#include "layers/crossover.h"

namespace moespan {
namespace {

const FormatKernels* find_format(uint32_t type_id) {
    for (size_t i = 0; i < kScalarKernels.format_count; ++i) {
        if (kScalarKernels.formats[i].type_id == type_id) return &kScalarKernels.formats[i];
    }
    return nullptr;
}

}  // namespace

PyMatrix::PyMatrix(uint32_t type_id, int64_t rows, int64_t cols, const py::object& data, int64_t count) : format_(find_format(type_id)) {
    require(format_ != nullptr, "GGUF type id ", type_id, " is not supported");
    matrix_ = {type_id, positive(rows, "rows"), positive(cols, "cols"), 0, nullptr, positive(count, "count")};
    require(matrix_.cols % format_->block_values == 0, "cols is ", cols, ", but type ", type_id, " has blocks of ", format_->block_values, " values");
    matrix_.row_bytes = matrix_.cols / format_->block_values * format_->block_bytes;
    require(matrix_.cols <= SIZE_MAX / 64 && matrix_.rows <= SIZE_MAX / 2 / matrix_.row_bytes / matrix_.count, words(), " is too large");

    if (PyObject_GetBuffer(data.ptr(), &buffer_, PyBUF_SIMPLE) != 0) throw py::error_already_set();
    matrix_.data = static_cast<const uint8_t*>(buffer_.buf);
    const auto given = static_cast<size_t>(buffer_.len);
    const size_t needed = matrix_.count * matrix_.rows * matrix_.row_bytes;
    if (given != needed) {
        PyBuffer_Release(&buffer_);
        require(false, words(), " of type ", type_id, matrix_.count == 1 ? " has " : " have ", needed, " bytes, not ", given);
    }
}

const Matrix& PyMatrix::get() const {
    require(!in_parts(), "a matrix that is spread over nodes serves experts alone");
    return matrix_;
}

size_t PyMatrix::bytes() const {
    if (!in_parts()) return matrix_.count * matrix_.bytes();
    size_t sum = 0;
    for (const Part& part : parts_) sum += part.bytes();
    return sum;
}

size_t PyMatrix::strips_left() const {
    const bool stays = !spread_ && format_->tiles.pack == nullptr;
    return stays ? 0 : matrix_.count * strips_each() - packed_;
}

void PyMatrix::pack(PyPool& pool, int64_t strips) {
    const size_t last = packed_ + positive(strips, "strips");
    require(last <= packed_ + strips_left(), strips, " strips to pack, but ", strips_left(), " are left");
    Pool& native = pool.get();
    if (pages_.empty()) allocate(native.kernels());
    {
        py::gil_scoped_release release;
        pack_parts(native, matrix_, parts_, packed_, last);
        if (last == packed_ + strips_left()) measure_crossover(native, matrix_.type_id);
    }
    packed_ = last;
    if (strips_left() == 0) finish();
}

void PyMatrix::spread(const KernelTable& kernels, Cut cut, const std::vector<Columns>& slices, const std::vector<int>& memory) {
    require(packed_ == 0 && parts_.empty(), "a matrix can be spread once, before it is packed");
    for (const Columns& slice : slices) parts_.push_back(part_of(kernels, matrix_, cut, slice));
    memory_ = memory;
    spread_ = true;
}

// Whether a container lets us bind pages is asked once, elsewhere; where it does not, they lie where they are first written, by threads of their node.
void PyMatrix::allocate(const KernelTable& kernels) {
    if (!spread_) parts_.push_back(part_of(kernels, matrix_, Cut::kNone, {}));
    for (size_t i = 0; i < parts_.size(); ++i) {
        Pages& pages = pages_.emplace_back(parts_[i].bytes() == 0 ? Pages() : Pages(parts_[i].bytes()));
        if (spread_ && pages.data() != nullptr) pages.bind(memory_[i]);
        parts_[i].memory = pages.data();
    }
}

void PyMatrix::finish() {
    for (Part& part : parts_) part.matrix.data = part.memory;
    packed_all_ = true;
    matrix_.data = nullptr;
    if (!spread_) matrix_ = parts_[0].matrix;
    PyBuffer_Release(&buffer_);
}

std::string PyMatrix::words() const {
    const std::string size = "[" + std::to_string(matrix_.rows) + ", " + std::to_string(matrix_.cols) + "] matri";
    return matrix_.count == 1 ? "a " + size + "x" : std::to_string(matrix_.count) + " " + size + "ces";
}

}  // namespace moespan
