#include "layers/heads.h"

namespace moespan {
namespace {

constexpr size_t kPiecesPerThread = 4;

Chunks cut(const Product& product, size_t n, size_t threads) {
    const Matrix& matrix = product.matrix();
    const bool whole = matrix.count >= kPiecesPerThread * threads;
    return Chunks::even(matrix.rows, whole ? product.fitting_rows(n) : product.cut(n, ceil_div(threads, matrix.count)).chunk_rows);
}

}  // namespace

HeadPieces::HeadPieces(Pool& pool, const Matrix& matrix, size_t n)
    : product_(pool.kernels(), matrix), n_(n), chunks_(cut(product_, n, static_cast<size_t>(pool.threads()))) {}

void HeadPieces::compute(size_t piece, const Tokens& x, const HeadRows<float>& out, const Seat& seat) const {
    const size_t i = piece % chunks_.count(), first = chunks_.begin(i);
    const uint8_t* next = seat.next < count() ? product_.address(head(seat.next), chunks_.begin(seat.next % chunks_.count())) : nullptr;
    product_.compute(head(piece), first, chunks_.end(i), x, {out.row(0, head(piece)) + first, out.token_stride, false}, seat.scratch, next);
}

}  // namespace moespan
