#include "layers/heads.h"

namespace moespan {
namespace {

constexpr size_t kPiecesPerThread = 4;

Chunks cut(const Product& product, size_t n, size_t threads) {
    const Matrix& matrix = product.matrix();
    if (matrix.count >= kPiecesPerThread * threads) return {matrix.rows, product.fitting_rows(n)};
    return product.cut(n, ceil_div(threads, matrix.count));
}

}  // namespace

HeadPieces::HeadPieces(Pool& pool, const Matrix& matrix, size_t n)
    : product_(pool.kernels(), matrix), n_(n), threads_(static_cast<size_t>(pool.threads())), chunks_(cut(product_, n, threads_)) {}

void HeadPieces::compute(size_t piece, const Tokens& x, const HeadRows<float>& out, uint8_t* scratch) const {
    const size_t i = piece % chunks_.count(), first = chunks_.begin(i), later = piece + threads_;
    // While threads keep step, this is the thread's next piece.
    const uint8_t* next = later < count() ? product_.address(head(later), chunks_.begin(later % chunks_.count())) : nullptr;
    product_.compute(head(piece), first, chunks_.end(i), x, {out.row(0, head(piece)) + first, out.token_stride, false}, scratch, next);
}

}  // namespace moespan
