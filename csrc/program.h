#pragma once
// program: a graph with memory of its own, as a list of tasks.
//
// Node by node, a round of a small model spends as much on arrays, malloc and
// MLX's queue as on its kernels. A program is made while the graph is played
// once: every value gets a place that it keeps, and the tasks of our ops, which
// hold addresses, are kept. To play it again is to run these tasks over the
// same places, one after the other, in one task of MLX's. Views cost nothing;
// other nodes of MLX's are evaluated again, and copied to their places.
//
// Small inputs and results are copied in and out. What ops write to in place,
// and what is large, is pinned instead: a program is good for inputs that lie
// where those lay that it was made with.

#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "mlx/backend/cpu/encoder.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace pyengine {

namespace mx = mlx::core;

struct Graph;

class Program : public std::enable_shared_from_this<Program> {
 public:
  // Whether a graph is mostly ours: only then is there much to gain.
  static bool pays(const Graph& graph);

  // Plays a graph for the first time; `inputs` are its inputs and constants,
  // `outputs` those of its results that nodes make. Null where it asks for more
  // than a program does: then nothing has run.
  static std::shared_ptr<Program> make(
      const Graph& graph,
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs,
      const mx::Stream& stream);

  // Whether it can be played with these.
  bool fits(const std::vector<mx::array>& inputs) const;

  void play(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs,
      const mx::Stream& stream);

 private:
  using Encoder = mx::cpu::CommandEncoder;
  using Task = std::function<void()>;

  // Tasks of ours, or a node of MLX's with the places of its results.
  struct Part {
    std::vector<Task> tasks;
    std::shared_ptr<mx::Primitive> primitive;
    std::vector<mx::array> from;
    std::vector<mx::array> to;
  };

  // Where an input is copied to, or has to lie.
  struct Input {
    char* place;
    const void* pinned;
  };

  // Where a result lies, or the pinned input that it is the memory of.
  struct Output {
    const char* place;
    int input;
  };

  class Maker;

  void place(mx::array& a);
  void take_inputs(const std::vector<mx::array>& inputs, Encoder& encoder);
  void run(const Part& part, Encoder& encoder);
  void give_outputs(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs,
      Encoder& encoder);

  bool can_repeat_ = true;
  std::vector<mx::array> blocks_; // bytes; free where nobody else holds them
  std::vector<Input> inputs_;
  std::vector<Output> outputs_;
  std::deque<Part> parts_; // which stay where they are while more are added
};

} // namespace pyengine
