#include "layers/crossover.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <vector>

#include "layers/product.h"

namespace moespan {
namespace {

constexpr size_t kRows = 128, kCols = 1024;  // strips in the cache: where memory is what a product waits for, both wait alike
constexpr std::array<size_t, 11> kTokens{2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32};
constexpr int kTries = 5;
constexpr double kEnough = 1e6;  // nanoseconds that the tries of one number of tokens may take, but for the first

// Zeros throughout: the kernels' time does not depend on what they multiply.
class Trial {
  public:
    Trial(const KernelTable& kernels, const FormatKernels& format)
        : format_(format),
          strip_bytes_(format.tiles.strip_bytes(kCols)),
          strips_(kRows / kStripRows * strip_bytes_ + kLine),
          scratch_(ceil_div(kRows, kernels.panel_rows) * format.panel_bytes(kCols) + kLine),
          codes_(kTokens.back() * kCols),
          sums_(kTokens.back() * kCols / 16),
          out_(kTokens.back() * kRows) {}

    // The shortest of some tries, in nanoseconds.
    double gemv(size_t n) {
        return time([&] { format_.tiles.gemv(rows(), tokens(n), {out_.data(), kRows, false}); });
    }
    double gemm(size_t n) {
        return time([&] { format_.tiles.gemm(rows(), tokens(n), {out_.data(), kRows, false}, aligned(scratch_)); });
    }

  private:
    static constexpr size_t kLine = 64;

    static uint8_t* aligned(std::vector<uint8_t>& bytes) {
        return reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<uintptr_t>(bytes.data()), kLine));
    }
    Rows rows() { return {aligned(strips_), strip_bytes_, kRows, nullptr}; }
    Tokens tokens(size_t n) const { return {n, kCols, nullptr, codes_.data(), sums_.data(), sums_.data(), sums_.data(), nullptr}; }

    template <class Call>
    static double time(const Call& call) {
        double best = 1e30, spent = 0;
        for (int i = 0; i < kTries && spent < kEnough; ++i) {
            const auto begin = std::chrono::steady_clock::now();
            call();
            const double took = std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - begin).count();
            best = std::min(best, took);
            spent += took;
        }
        return best;
    }

    const FormatKernels& format_;
    const size_t strip_bytes_;
    std::vector<uint8_t> strips_, scratch_;
    std::vector<int8_t> codes_;
    std::vector<float> sums_, out_;
};

}  // namespace

void measure_crossover(Pool& pool, uint32_t type_id) {
    if (pool.knows_crossover(type_id)) return;
    const KernelTable& kernels = pool.kernels();
    const FormatKernels* format = std::find_if(kernels.formats, kernels.formats + kernels.format_count, [&](const auto& f) { return f.type_id == type_id; });
    if (format->tiles.pack == nullptr) return;
    Trial trial(kernels, *format);
    // From the last number of tokens at which gemv is the faster, the next one.
    size_t from = kTokens.front();
    for (const size_t n : kTokens) {
        if (trial.gemv(n) < trial.gemm(n)) from = n + 1;
    }
    pool.set_crossover(type_id, from);
}

}  // namespace moespan
