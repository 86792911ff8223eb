// recorded: records the graph of a function and plays it.

#include "recorded.h"

#include <nanobind/stl/function.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "bindings.h"
#include "encode.h"
#include "mlx/backend/cpu/encoder.h"

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

// A graph as one node. It pays on a processor only, where a round takes 0.64 to
// 0.74 of the time that it takes node by node (bench/NOTES.md). Each primitive
// does what it would do by itself; its task stands in the stream's queue behind
// those before it.
class Played : public mx::Primitive {
 public:
  Played(
      mx::Stream stream,
      std::shared_ptr<const Graph> graph,
      std::shared_ptr<Kept> kept)
      : mx::Primitive(stream),
        graph_(std::move(graph)),
        kept_(std::move(kept)) {}

  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override {
    auto& encoder = mx::cpu::get_command_encoder(stream());
    try {
      if (!play_program(inputs, outputs)) {
        play_nodes(with_constants(inputs), outputs);
      }
    } catch (...) {
      // Tasks under way still read these
      encoder.dispatch([inputs, graph = graph_] {});
      throw;
    }
    encoder.dispatch([graph = graph_] {}); // whose constants they read
  }

  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&)
      override {
    throw std::logic_error("[recorded] a GPU plays nodes one by one.");
  }

  const char* name() const override {
    return "Played";
  }

 private:
  static constexpr size_t release = 32; // arrays freed together
  static constexpr int most_active_tasks = 10; // of ten dispatches each

  std::vector<mx::array> with_constants(std::vector<mx::array> inputs) {
    const auto& constants = graph_->constants;
    inputs.insert(inputs.end(), constants.begin(), constants.end());
    return inputs;
  }

  bool play_program(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) {
    std::lock_guard<std::mutex> lock(kept_->mutex);
    auto& program = kept_->program;
    if (program && program->fits(inputs)) {
      program->play(inputs, outputs, stream());
      return true;
    }
    kept_->tries &= Program::pays(*graph_);
    if (kept_->tries) {
      program =
          Program::make(*graph_, with_constants(inputs), outputs, stream());
      kept_->tries = program != nullptr;
      kept_->made += kept_->tries;
    }
    return kept_->tries;
  }

  void play_nodes(
      std::vector<mx::array> values,
      std::vector<mx::array>& outputs) {
    auto& encoder = mx::cpu::get_command_encoder(stream());
    int given = int(values.size());
    std::vector<mx::array> unused;
    values.reserve(graph_->count);
    try {
      for (const auto& node : graph_->nodes) {
        run(node, values, unused);
        if (unused.size() >= release) {
          // Freed when the tasks before this one have run
          encoder.dispatch([unused = std::move(unused)] {});
          unused.clear();
        }
        // As MLX between its nodes, so that memory stays level
        if (mx::scheduler::n_active_tasks() > most_active_tasks) {
          mx::scheduler::wait_for_one();
        }
      }
    } catch (...) {
      // Tasks under way still read these
      encoder.add_temporaries(std::move(unused));
      encoder.dispatch([values = std::move(values)] {});
      throw;
    }
    encoder.add_temporaries(std::move(unused));
    size_t next = 0;
    for (int output : graph_->outputs) {
      if (output >= given) {
        outputs[next++].copy_shared_buffer(values[output]);
      }
    }
  }

  static void run(
      const Graph::Node& node,
      std::vector<mx::array>& values,
      std::vector<mx::array>& unused) {
    static const mx::array nothing({}, mx::bool_, nullptr, {});
    std::vector<mx::array> from, made;
    from.reserve(node.inputs.size());
    for (int input : node.inputs) {
      from.push_back(values[input]);
    }
    // With a primitive, which some of MLX's ask of their result
    for (size_t i = 0; i < node.shapes.size(); ++i) {
      made.emplace_back(
          node.shapes[i],
          node.dtypes[i],
          node.primitive,
          std::vector<mx::array>{});
    }
    node.primitive->eval_cpu(from, made);
    values.insert(values.end(), made.begin(), made.end());
    for (int value : node.ending) {
      unused.push_back(std::exchange(values[value], nothing));
    }
  }

  std::shared_ptr<const Graph> graph_;
  std::shared_ptr<Kept> kept_;
};

} // namespace

Tape::Tape(const ArrayFunction& function, const std::vector<mx::array>& inputs)
    : stream_(mx::default_stream(mx::default_device())) {
  Graph& graph = *graph_;
  auto& placeholders = graph.inputs;
  auto& nodes = graph.nodes;
  std::unordered_map<std::uintptr_t, int> number; // of an array
  std::unordered_set<std::uintptr_t> forbidden;
  for (const auto& input : inputs) {
    placeholders.emplace_back(
        input.shape(), input.dtype(), nullptr, std::vector<mx::array>{});
    number[placeholders.back().id()] = graph.count++;
    forbidden.insert(input.id());
  }
  auto results = function(placeholders);
  Order order(results);

  // What depends on no input stays as it is, and is computed once
  std::unordered_set<std::uintptr_t> varies;
  for (const auto& input : placeholders) {
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
    if (!varies.count(a.id()) && number.emplace(a.id(), graph.count).second) {
      graph.constants.push_back(a);
      ++graph.count;
    }
  };
  for (const auto& a : made) {
    std::for_each(a.inputs().begin(), a.inputs().end(), keep);
  }
  std::for_each(results.begin(), results.end(), keep);

  int given = graph.count; // values that no node makes
  as_one_ = stream_.device == mx::Device::cpu && !rehearsing();
  for (const auto& a : made) {
    Graph::Node node = {a.primitive_ptr(), {}, {}, {}, {}};
    for (const auto& input : a.inputs()) {
      node.inputs.push_back(number.at(input.id()));
    }
    for (const auto& output : a.outputs()) {
      node.shapes.push_back(output.shape());
      node.dtypes.push_back(output.dtype());
      number[output.id()] = graph.count++;
    }
    as_one_ &= a.primitive().stream() == stream_;
    nodes.push_back(std::move(node));
  }
  if (as_one_) {
    mx::eval(graph.constants); // which MLX does not know it reads
  }
  for (const auto& result : results) {
    graph.outputs.push_back(number.at(result.id()));
    if (graph.outputs.back() >= given) {
      shapes_.push_back(result.shape());
      dtypes_.push_back(result.dtype());
    }
  }

  // Walk backwards: the first reader met is a value's last use. An unread value
  // dies where it is made; outputs do not die.
  std::vector<bool> read(graph.count);
  for (int output : graph.outputs) {
    read[output] = true;
  }
  int next = graph.count;
  for (auto node = nodes.rbegin(); node != nodes.rend(); ++node) {
    next -= int(node->shapes.size());
    std::vector<int> touched = node->inputs;
    for (size_t i = 0; i < node->shapes.size(); ++i) {
      touched.push_back(next + int(i));
    }
    for (int value : touched) {
      if (value >= given && !read[value]) {
        read[value] = true;
        node->ending.push_back(value);
      }
    }
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
             graph_->inputs.begin(),
             graph_->inputs.end(),
             alike);
}

std::vector<mx::array> Tape::play(const std::vector<mx::array>& inputs) const {
  if (as_one_) {
    return play_as_one(inputs);
  }
  std::vector<mx::array> values = inputs;
  values.insert(
      values.end(), graph_->constants.begin(), graph_->constants.end());
  return play_nodes(std::move(values));
}

std::vector<mx::array> Tape::play_nodes(std::vector<mx::array> values) const {
  values.reserve(graph_->count);
  for (const auto& node : graph_->nodes) {
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
  results.reserve(graph_->outputs.size());
  for (int output : graph_->outputs) {
    results.push_back(values[output]);
  }
  return results;
}

std::vector<mx::array> Tape::play_as_one(
    const std::vector<mx::array>& inputs) const {
  std::vector<mx::array> made;
  if (!shapes_.empty()) {
    // Constants are the graph's: MLX would note some hundred weights, and hold
    // their memory, for every result of every round
    auto played = std::make_shared<Played>(stream_, graph_, kept_);
    made = mx::array::make_arrays(shapes_, dtypes_, played, inputs);
  }
  std::vector<mx::array> results;
  int count = int(inputs.size());
  int given = count + int(graph_->constants.size());
  size_t next = 0;
  for (int output : graph_->outputs) {
    results.push_back(
        output < count       ? inputs[output]
            : output < given ? graph_->constants[output - count]
                             : made[next++]);
  }
  return results;
}

std::vector<std::string> Tape::nodes() const {
  std::vector<std::string> names;
  for (const auto& node : graph_->nodes) {
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
      .def(nb::init<ArrayFunction>(), "function"_a)
      .def("__call__", &Recorded::operator(), "inputs"_a)
      .def_prop_ro("programs", &Recorded::programs)
      .def_prop_ro("tapes", &Recorded::tapes)
      .def_prop_ro("nodes", &Recorded::nodes);
}

} // namespace pyengine
