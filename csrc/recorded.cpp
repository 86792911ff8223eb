// recorded: records the graph of a function and plays it.

#include "recorded.h"

#include <nanobind/stl/function.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>
#include <unordered_map>
#include <unordered_set>

#include "bindings.h"

namespace pyengine {

namespace {

// Arrays that the results are made of, inputs before users. Siblings come from
// one primitive: the first that is met stands for all.
class Order {
 public:
  explicit Order(const std::vector<mx::array>& results) {
    // A stack of its own: a graph is deeper than the thread's may be
    std::vector<std::pair<mx::array, size_t>> stack;
    for (const auto& result : results) {
      stack.emplace_back(result, 0);
      while (!stack.empty()) {
        auto& [a, next] = stack.back();
        if (next == 0 && !seen_.insert(a.id()).second) {
          stack.pop_back();
        } else if (next < a.inputs().size()) {
          mx::array input = a.inputs()[next++];
          stack.emplace_back(std::move(input), 0);
        } else {
          for (const auto& sibling : a.siblings()) {
            seen_.insert(sibling.id());
          }
          arrays.push_back(a);
          stack.pop_back();
        }
      }
    }
  }

  std::vector<mx::array> arrays;

 private:
  std::unordered_set<std::uintptr_t> seen_;
};

} // namespace

Tape::Tape(const ArrayFunction& function, const std::vector<mx::array>& inputs)
    : stream_(mx::default_stream(mx::default_device())) {
  std::unordered_map<std::uintptr_t, int> number; // of an array
  std::unordered_set<std::uintptr_t> forbidden;
  for (const auto& input : inputs) {
    inputs_.emplace_back(
        input.shape(), input.dtype(), nullptr, std::vector<mx::array>{});
    number[inputs_.back().id()] = count_++;
    forbidden.insert(input.id());
  }
  auto results = function(inputs_);
  Order order(results);

  // What depends on no input stays as it is, and is computed once
  std::unordered_set<std::uintptr_t> varies;
  for (const auto& input : inputs_) {
    varies.insert(input.id());
  }
  std::vector<mx::array> made;
  for (const auto& a : order.arrays) {
    if (forbidden.count(a.id())) {
      throw std::invalid_argument(
          "[recorded] function must read its arguments but got hold of an "
          "array that is one of them.");
    }
    bool depends = std::any_of(
        a.inputs().begin(), a.inputs().end(), [&](const mx::array& input) {
          return varies.count(input.id());
        });
    if (depends) {
      for (const auto& output : a.outputs()) {
        varies.insert(output.id());
      }
      made.push_back(a);
    }
  }
  auto keep = [&](const mx::array& a) {
    if (!varies.count(a.id()) && number.emplace(a.id(), count_).second) {
      constants_.push_back(a);
      ++count_;
    }
  };
  for (const auto& a : made) {
    std::for_each(a.inputs().begin(), a.inputs().end(), keep);
  }
  std::for_each(results.begin(), results.end(), keep);

  for (const auto& a : made) {
    Node node = {a.primitive_ptr(), {}, {}, {}};
    for (const auto& input : a.inputs()) {
      node.inputs.push_back(number.at(input.id()));
    }
    for (const auto& output : a.outputs()) {
      node.shapes.push_back(output.shape());
      node.dtypes.push_back(output.dtype());
      number[output.id()] = count_++;
    }
    nodes_.push_back(std::move(node));
  }
  for (const auto& result : results) {
    outputs_.push_back(number.at(result.id()));
  }
}

bool Tape::fits(const std::vector<mx::array>& inputs) const {
  auto alike = [](const mx::array& a, const mx::array& b) {
    return a.dtype() == b.dtype() && a.shape() == b.shape();
  };
  return stream_ == mx::default_stream(mx::default_device()) &&
      std::equal(
             inputs.begin(),
             inputs.end(),
             inputs_.begin(),
             inputs_.end(),
             alike);
}

std::vector<mx::array> Tape::play(const std::vector<mx::array>& inputs) const {
  std::vector<mx::array> values;
  values.reserve(count_);
  values.insert(values.end(), inputs.begin(), inputs.end());
  values.insert(values.end(), constants_.begin(), constants_.end());
  for (const auto& node : nodes_) {
    std::vector<mx::array> from;
    from.reserve(node.inputs.size());
    for (int input : node.inputs) {
      from.push_back(values[input]);
    }
    if (node.shapes.size() == 1) {
      values.emplace_back(
          node.shapes[0], node.dtypes[0], node.primitive, std::move(from));
    } else {
      auto outputs = mx::array::make_arrays(
          node.shapes, node.dtypes, node.primitive, from);
      values.insert(values.end(), outputs.begin(), outputs.end());
    }
  }
  std::vector<mx::array> results;
  results.reserve(outputs_.size());
  for (int output : outputs_) {
    results.push_back(values[output]);
  }
  return results;
}

std::vector<std::string> Tape::nodes() const {
  std::vector<std::string> names;
  for (const auto& node : nodes_) {
    names.push_back(node.primitive->name());
  }
  return names;
}

std::vector<mx::array> Recorded::operator()(
    const std::vector<mx::array>& inputs) {
  auto found =
      std::find_if(tapes_.rbegin(), tapes_.rend(), [&](const Tape& tape) {
        return tape.fits(inputs);
      });
  if (found == tapes_.rend()) {
    tapes_.emplace_back(function_, inputs);
    if (tapes_.size() > most_tapes) {
      tapes_.erase(tapes_.begin());
    }
  } else {
    std::rotate(found.base() - 1, found.base(), tapes_.end());
  }
  return tapes_.back().play(inputs);
}

void bind_recorded(nb::module_& m) {
  nb::class_<Recorded>(m, "Recorded")
      .def(nb::init<ArrayFunction>(), nb::arg("function"))
      .def("__call__", &Recorded::operator(), nb::arg("inputs"))
      .def_prop_ro("tapes", &Recorded::tapes)
      .def_prop_ro("nodes", &Recorded::nodes);
}

} // namespace pyengine
