// program: makes programs, and plays them.

#include "program.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>

#include "cpu/contiguous.h"
#include "op.h"
#include "recorded.h"

namespace pyengine {

namespace {

// Bytes of an input that is pinned rather than copied.
constexpr size_t most_copied = 1 << 16;

const AnyOp* as_ours(const Graph::Node& node) {
  return dynamic_cast<const AnyOp*>(node.primitive.get());
}

// Of MLX's, those that mostly hand on memory.
bool is_view(const Graph::Node& node) {
  static const std::set<std::string> names = {
      "Depends", "ExpandDims", "Reshape", "Slice", "Split", "Squeeze"};
  return names.count(node.primitive->name());
}

bool same_memory(const mx::array& a, const mx::array& b) {
  return a.data_shared_ptr() && a.data_shared_ptr() == b.data_shared_ptr();
}

mx::array without_memory(
    const mx::Shape& shape,
    mx::Dtype dtype,
    const std::shared_ptr<mx::Primitive>& primitive = nullptr) {
  return mx::array(shape, dtype, primitive, std::vector<mx::array>{});
}

// With its primitive, which some of MLX's ask of their result.
std::vector<mx::array> results_of(const Graph::Node& node) {
  std::vector<mx::array> made;
  for (size_t i = 0; i < node.shapes.size(); ++i) {
    made.push_back(
        without_memory(node.shapes[i], node.dtypes[i], node.primitive));
  }
  return made;
}

// Copies arrays to places, which stay until that is done.
void copy(
    std::vector<mx::array> from,
    std::vector<char*> places,
    std::shared_ptr<Program> owner,
    mx::cpu::CommandEncoder& encoder) {
  encoder.dispatch([from = std::move(from), places = std::move(places), owner] {
    for (size_t i = 0; i < from.size(); ++i) {
      Contiguous whole(from[i]);
      std::memcpy(places[i], whole.get(), from[i].nbytes());
    }
  });
}

} // namespace

// Plays a graph, and notes what it does.
class Program::Maker {
 public:
  Maker(
      const Graph& graph,
      const std::vector<mx::array>& inputs,
      Encoder& encoder)
      : graph_(graph),
        encoder_(encoder),
        given_(inputs),
        values_(inputs),
        program_(std::make_shared<Program>()) {
    values_.reserve(graph.count);
  }

  // The inputs that are written to in place, and the values that are their
  // memory. False where the graph asks more of them than a program does.
  bool find_pinned() {
    std::vector<mx::array> known; // with memory that tells them apart
    auto add = [&](const mx::array& a) {
      known.push_back(without_memory(a.shape(), a.dtype()));
      known.back().set_data(mx::allocator::malloc(1));
    };
    std::for_each(given_.begin(), given_.end(), add);
    std::vector<bool> foreign(known.size()); // made by MLX's
    for (const auto& node : graph_.nodes) {
      auto* op = as_ours(node);
      auto made = results_of(node);
      std::vector<mx::array> from;
      for (int input : node.inputs) {
        from.push_back(known[input]);
      }
      if (op) {
        op->share(from, made);
      }
      for (size_t i = 0; i < made.size(); ++i) {
        int value = int(known.size());
        for (int input : node.inputs) {
          if (!same_memory(made[i], known[input])) {
            continue;
          }
          if (foreign[input]) {
            return false; // perhaps a view of an input
          }
          if (root_of(input) < num_inputs()) {
            roots_[value] = root_of(input);
            pinned_.insert(root_of(input));
          }
        }
        add(made[i]);
        foreign.push_back(!op);
      }
    }
    for (int i = 0; i < num_inputs(); ++i) {
      if (given_[i].nbytes() > most_copied) {
        pinned_.insert(i);
      }
    }
    auto reads_pinned = [&](const Graph::Node& node) {
      return std::any_of(
          node.inputs.begin(), node.inputs.end(), [&](int value) {
            return pinned_.count(root_of(value));
          });
    };
    auto is_plain = [&](int input) {
      return given_[input].flags().row_contiguous;
    };
    return std::all_of(pinned_.begin(), pinned_.end(), is_plain) &&
        std::none_of(
               graph_.nodes.begin(), graph_.nodes.end(), [&](const auto& node) {
                 return !as_ours(node) && reads_pinned(node);
               });
  }

  std::shared_ptr<Program> make(std::vector<mx::array>& outputs) {
    place_inputs();
    for (const auto& node : graph_.nodes) {
      if (auto* op = as_ours(node)) {
        add_ours(*op, node);
      } else {
        add_foreign(node);
      }
      for (int value : node.ending) {
        values_[value] = nothing_;
      }
    }
    run_tasks();
    for (int output : graph_.outputs) {
      if (output >= int(given_.size())) {
        note_output(output);
      }
    }
    program_->give_outputs(given_, outputs, encoder_);
    return program_;
  }

 private:
  int num_inputs() const {
    return int(graph_.inputs.size());
  }

  // The input whose memory a value is, if it is one's; else the value.
  int root_of(int value) const {
    auto found = roots_.find(value);
    return found == roots_.end() ? value : found->second;
  }

  std::vector<mx::array> inputs_of(const Graph::Node& node) const {
    std::vector<mx::array> from;
    for (int input : node.inputs) {
      from.push_back(values_[input]);
    }
    return from;
  }

  void add_values(const std::vector<mx::array>& made) {
    values_.insert(values_.end(), made.begin(), made.end());
  }

  void place_inputs() {
    for (int i = 0; i < num_inputs(); ++i) {
      auto& a = values_[i];
      if (pinned_.count(i)) {
        program_->inputs_.push_back({nullptr, a.data<void>()});
      } else {
        a = without_memory(a.shape(), a.dtype());
        program_->place(a);
        program_->inputs_.push_back({a.data<char>(), nullptr});
      }
    }
    program_->take_inputs(given_, encoder_);
  }

  void add_ours(const AnyOp& op, const Graph::Node& node) {
    auto from = inputs_of(node), made = results_of(node);
    op.share(from, made);
    for (auto& a : made) {
      if (!a.data_shared_ptr()) {
        program_->place(a);
      }
    }
    if (!op.empty(from, made)) {
      tasks_.push_back(op.repeatable(from, made));
    }
    add_values(made);
  }

  void add_foreign(const Graph::Node& node) {
    auto from = inputs_of(node), made = results_of(node);
    if (is_view(node)) {
      node.primitive->eval_cpu(from, made);
      auto is_shared = [&](const mx::array& a) {
        return std::any_of(from.begin(), from.end(), [&](const mx::array& b) {
          return same_memory(a, b);
        });
      };
      if (std::all_of(made.begin(), made.end(), is_shared)) {
        return add_values(made);
      }
      made = results_of(node); // copied what is not there yet
    }
    run_tasks();
    node.primitive->eval_cpu(from, made);
    Part part = {{}, node.primitive, from, results_of(node)};
    std::vector<char*> places;
    for (size_t i = 0; i < made.size(); ++i) {
      program_->can_repeat_ &= made[i].flags().row_contiguous;
      program_->place(part.to[i]);
      places.push_back(part.to[i].data<char>());
    }
    add_values(part.to);
    copy(std::move(made), std::move(places), program_, encoder_);
    program_->parts_.push_back(std::move(part));
  }

  // Runs the tasks since the last node of MLX's.
  void run_tasks() {
    if (!tasks_.empty()) {
      program_->parts_.push_back({std::exchange(tasks_, {}), nullptr, {}, {}});
      program_->run(program_->parts_.back(), encoder_);
    }
  }

  void note_output(int value) {
    const auto& a = values_[value];
    int root = root_of(value);
    if (root < num_inputs()) {
      program_->outputs_.push_back({nullptr, root});
    } else {
      program_->can_repeat_ &= a.flags().row_contiguous;
      program_->outputs_.push_back({a.data<char>(), -1});
    }
  }

  const Graph& graph_;
  Encoder& encoder_;
  const std::vector<mx::array>& given_; // inputs and constants
  std::vector<mx::array> values_;
  std::shared_ptr<Program> program_;
  std::vector<Task> tasks_;
  std::set<int> pinned_;
  std::unordered_map<int, int> roots_;
  mx::array nothing_ = without_memory({}, mx::bool_);
};

bool Program::pays(const Graph& graph) {
  auto is_dear = [](const Graph::Node& node) {
    return !as_ours(node) && !is_view(node);
  };
  auto dear = std::count_if(graph.nodes.begin(), graph.nodes.end(), is_dear);
  return 4 * size_t(dear) <= graph.nodes.size();
}

std::shared_ptr<Program> Program::make(
    const Graph& graph,
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs,
    const mx::Stream& stream) {
  Maker maker(graph, inputs, mx::cpu::get_command_encoder(stream));
  return maker.find_pinned() ? maker.make(outputs) : nullptr;
}

bool Program::fits(const std::vector<mx::array>& inputs) const {
  for (size_t i = 0; i < inputs_.size(); ++i) {
    if (inputs_[i].pinned &&
        (inputs[i].data<void>() != inputs_[i].pinned ||
         !inputs[i].flags().row_contiguous)) {
      return false;
    }
  }
  return can_repeat_;
}

void Program::play(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs,
    const mx::Stream& stream) {
  auto& encoder = mx::cpu::get_command_encoder(stream);
  take_inputs(inputs, encoder);
  for (const auto& part : parts_) {
    run(part, encoder);
  }
  give_outputs(inputs, outputs, encoder);
}

// Gives an array the memory of a block that nobody uses any more.
void Program::place(mx::array& a) {
  auto is_free = [&](const mx::array& block) {
    return block.data_shared_ptr().use_count() == 1 &&
        block.nbytes() >= a.nbytes() && block.nbytes() <= 2 * a.nbytes() + 256;
  };
  auto found = std::find_if(blocks_.begin(), blocks_.end(), is_free);
  if (found == blocks_.end()) {
    blocks_.push_back(without_memory({int(a.nbytes())}, mx::uint8));
    allocate(blocks_.back());
    found = blocks_.end() - 1;
  }
  mx::array::Flags flags = {true, true, a.size() <= 1};
  a.copy_shared_buffer(*found, a.strides(), flags, a.size());
}

void Program::take_inputs(
    const std::vector<mx::array>& inputs,
    Encoder& encoder) {
  std::vector<mx::array> from;
  std::vector<char*> places;
  for (size_t i = 0; i < inputs_.size(); ++i) {
    if (!inputs_[i].pinned) {
      from.push_back(inputs[i]);
      places.push_back(inputs_[i].place);
    }
  }
  copy(std::move(from), std::move(places), shared_from_this(), encoder);
}

void Program::run(const Part& part, Encoder& encoder) {
  auto self = shared_from_this();
  if (!part.primitive) {
    return encoder.dispatch([self, &part] {
      for (const auto& task : part.tasks) {
        task();
      }
    });
  }
  std::vector<mx::array> made;
  std::vector<char*> places;
  for (const auto& a : part.to) {
    made.push_back(without_memory(a.shape(), a.dtype(), part.primitive));
    places.push_back(const_cast<char*>(a.data<char>()));
  }
  part.primitive->eval_cpu(part.from, made);
  copy(std::move(made), std::move(places), self, encoder);
}

void Program::give_outputs(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs,
    Encoder& encoder) {
  std::vector<std::pair<const char*, mx::array>> copied;
  for (size_t i = 0; i < outputs_.size(); ++i) {
    if (outputs_[i].place) {
      allocate(outputs[i]);
      copied.emplace_back(outputs_[i].place, outputs[i]);
    } else {
      outputs[i].copy_shared_buffer(inputs[outputs_[i].input]);
    }
  }
  encoder.dispatch([self = shared_from_this(), copied = std::move(copied)] {
    for (const auto& [place, a] : copied) {
      std::memcpy(const_cast<char*>(a.data<char>()), place, a.nbytes());
    }
  });
}

} // namespace pyengine
