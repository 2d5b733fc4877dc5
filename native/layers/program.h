// A step that is recorded once and run again for each token: the operations of a model in their order, with all that they need but the place.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "pool/pool.h"

namespace moespan {

// Where a step's tokens stand in their sequence: positions from `start` on, in these pages of the KV cache. It outlives the step.
struct Place {
    size_t start;
    const int32_t* pages;
    size_t page_count;
};

// One call of a layer, with everything bound but the place. What it throws, it throws before it changes anything.
using Operation = std::function<void(Pool&, const Place&)>;

class Program {
  public:
    void add(Operation operation) { operations_.push_back(std::move(operation)); }
    size_t size() const { return operations_.size(); }

    void run(Pool& pool, const Place& place) const {
        for (const Operation& operation : operations_) operation(pool, place);
    }
    // The i-th alone.
    void run(size_t i, Pool& pool, const Place& place) const { operations_[i](pool, place); }

  private:
    std::vector<Operation> operations_;
};

}  // namespace moespan
