#pragma once
// recorded: a function of arrays whose graph is built once and played again.
//
// A round builds some thousand nodes that differ from the last round's in
// nothing but their inputs. The function runs once, on placeholders; what it
// built is kept as a list of primitives, and every later call makes the same
// nodes over other arrays. The graph is the one the function would have built:
// nothing is fused or reordered, so no bit can differ (mx.compile fuses, on
// Linux with a C++ compiler at run time).
//
// On a processor the graph is one node to MLX (Played), which would hand a
// second task per node to the stream's thread and walk the graph several times;
// and where it is mostly ours, its tasks are kept and run again (program.h).

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "mlx/mlx.h"
#include "mlx/primitives.h"
#include "program.h"

namespace pyengine {

namespace mx = mlx::core;

using ArrayFunction =
    std::function<std::vector<mx::array>(const std::vector<mx::array>&)>;

// Nodes and what they read. Values are numbered: inputs, then constants, then
// what nodes give in turn.
struct Graph {
  struct Node {
    std::shared_ptr<mx::Primitive> primitive;
    std::vector<int> inputs;
    std::vector<mx::Shape> shapes; // of its outputs
    std::vector<mx::Dtype> dtypes;
    std::vector<int> ending; // what nodes made that none reads after this one
  };

  std::vector<mx::array> inputs; // placeholders
  std::vector<mx::array> constants; // all that depends on no input
  std::vector<Node> nodes;
  std::vector<int> outputs;
  int count = 0; // of values
};

// The program of a graph, once it was played; none where it has none.
struct Kept {
  std::mutex mutex;
  bool tries = true;
  int made = 0;
  std::shared_ptr<Program> program;
};

// The graph of one call, for inputs of its shapes and dtypes, on its stream:
// nodes belong to the thread that records them.
class Tape {
 public:
  // Throws where the function reads one of `inputs` other than as its argument.
  Tape(const ArrayFunction& function, const std::vector<mx::array>& inputs);

  bool fits(const std::vector<mx::array>& inputs) const;
  std::vector<mx::array> play(const std::vector<mx::array>& inputs) const;
  std::vector<std::string> nodes() const; // names of their primitives
  int programs() const {
    return kept_->made;
  }

 private:
  std::vector<mx::array> play_nodes(std::vector<mx::array> values) const;
  std::vector<mx::array> play_as_one(
      const std::vector<mx::array>& inputs) const;

  mx::Stream stream_;
  std::shared_ptr<Graph> graph_ = std::make_shared<Graph>();
  // Of the results that nodes make
  std::vector<mx::Shape> shapes_;
  std::vector<mx::Dtype> dtypes_;
  bool as_one_; // one node to MLX
  std::shared_ptr<Kept> kept_ = std::make_shared<Kept>();
};

// A function with tapes for the streams and shapes it was called with lately.
class Recorded {
 public:
  explicit Recorded(ArrayFunction function) : function_(std::move(function)) {}

  std::vector<mx::array> operator()(const std::vector<mx::array>& inputs);
  int tapes() const {
    return int(tapes_.size());
  }
  // Of the graph played last; none before the first.
  std::vector<std::string> nodes() const {
    return tapes_.empty() ? std::vector<std::string>() : tapes_.back().nodes();
  }
  // How often a program was made for that graph.
  int programs() const {
    return tapes_.empty() ? 0 : tapes_.back().programs();
  }

 private:
  // Shapes that change mostly grow, and do not come back.
  static constexpr size_t most_tapes = 4;

  ArrayFunction function_;
  std::vector<Tape> tapes_; // by last use, the latest at the end
};

} // namespace pyengine
