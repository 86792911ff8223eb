#pragma once
// op.h: an op of ours as MLX sees it.
//
// An op is a plain struct of its settings:
//
//   struct Softcap {
//     static constexpr const char* op = "softcap"; // its name everywhere
//     float cap;
//     bool operator==(const Softcap&) const = default;
//     // What a GPU runs; none where no kernel takes these arguments.
//     std::vector<Launch> launches(const Arrays& in, const Arrays& out) const;
//     // What the processor runs: a closure, given to the stream's queue, and
//     // run again where a recorded round is played again.
//     auto task(const Arrays& in, Arrays& out) const;
//   };
//
// Neither is called where there is nothing to compute. `launches` knows shapes
// and dtypes alone: its arrays may be lazy. Inputs stand in the order in which
// the launches first name what they read, outputs in that of what they write.
//
// An op that writes into the memory of its inputs has two more:
//
//     void share(const Arrays& in, Arrays& out) const; // copy_shared_buffer
//     // Whether there is nothing to write.
//     bool empty(const Arrays& in, const Arrays& out) const;

#include <algorithm>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "encode.h"
#include "launch.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace pyengine {

namespace mx = mlx::core;

// Any op, for whoever asks what a lazy array would run (launches_of).
class AnyOp : public mx::Primitive {
 public:
  using mx::Primitive::Primitive;

  virtual bool empty(const Arrays& in, const Arrays& out) const = 0;
  virtual std::vector<Launch> launches(const Arrays& in, const Arrays& out)
      const = 0;
  // Gives results the memory of the inputs that are written to in place.
  virtual void share(const Arrays& in, Arrays& out) const = 0;
  // What the processor runs, for results that have memory; it may run again.
  virtual std::function<void()> repeatable(const Arrays& in, Arrays& out)
      const = 0;
};

template <typename T>
class OpOf final : public AnyOp {
 public:
  OpOf(
      mx::Stream stream,
      T op,
      std::vector<mx::Shape> shapes,
      std::vector<mx::Dtype> dtypes)
      : AnyOp(stream),
        op_(std::move(op)),
        shapes_(std::move(shapes)),
        dtypes_(std::move(dtypes)) {}

  bool empty(const Arrays& in, const Arrays& out) const override {
    if constexpr (in_place) {
      return op_.empty(in, out);
    } else {
      auto none = [](const mx::array& a) { return a.size() == 0; };
      return std::all_of(out.begin(), out.end(), none);
    }
  }

  std::vector<Launch> launches(const Arrays& in, const Arrays& out)
      const override {
    return op_.launches(in, out);
  }

  void share(const Arrays& in, Arrays& out) const override {
    if constexpr (in_place) {
      op_.share(in, out);
    }
  }

  std::function<void()> repeatable(const Arrays& in, Arrays& out)
      const override {
    return op_.task(in, out);
  }

  void eval_cpu(const Arrays& in, Arrays& out) override {
    allocate(in, out);
    if (empty(in, out)) {
      return;
    }
    if (rehearsing()) {
      return encode(prepared(in, out), rehearsal(), in, out);
    }
    auto& encoder = mx::cpu::get_command_encoder(stream());
    for (const auto& a : in) {
      encoder.set_input_array(a);
    }
    for (auto& a : out) {
      encoder.set_output_array(a);
    }
    encoder.dispatch(op_.task(in, out));
  }

  void eval_gpu(const Arrays& in, Arrays& out) override {
    allocate(in, out);
    if (empty(in, out)) {
      return;
    }
    run_on_gpu(prepared(in, out), stream(), in, out);
  }

  // mx.compile makes one node of two that are equivalent and have the same
  // inputs, which two writes never are. It does not compare their results.
  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const OpOf&>(other);
    return !in_place && op_ == o.op_ && shapes_ == o.shapes_ &&
        dtypes_ == o.dtypes_;
  }

  const char* name() const override {
    return T::op;
  }

 private:
  static constexpr bool in_place =
      requires(const T& op, const Arrays& in, Arrays& out) {
        op.share(in, out);
      };

  // A recorded round evaluates this node again and again, on one thread.
  Prepared& prepared(const Arrays& in, const Arrays& out) {
    if (prepared_.fits(in)) {
      return prepared_;
    }
    auto launches = op_.launches(in, out);
    if (launches.empty()) {
      throw std::runtime_error(
          std::string("[") + T::op +
          "] has no Metal kernel for these arguments; pyengine.ops." + T::op +
          " runs plain MLX there.");
    }
    return prepared_ = Prepared(T::op, std::move(launches), in, out.size());
  }

  void allocate(const Arrays& in, Arrays& out) const {
    share(in, out);
    for (auto& a : out) {
      if (!a.data_shared_ptr()) {
        pyengine::allocate(a);
      }
    }
  }

  T op_;
  std::vector<mx::Shape> shapes_; // of its results
  std::vector<mx::Dtype> dtypes_;
  Prepared prepared_;
};

// The result of an op on the default stream, lazy.
template <typename T>
mx::array lazy_result(T op, mx::Shape shape, mx::Dtype dtype, Arrays inputs) {
  auto node = std::make_shared<OpOf<T>>(
      mx::to_stream({}),
      std::move(op),
      std::vector<mx::Shape>{shape},
      std::vector<mx::Dtype>{dtype});
  return mx::array(std::move(shape), dtype, std::move(node), std::move(inputs));
}

// The results of an op that has several.
template <typename T>
Arrays lazy_results(
    T op,
    std::vector<mx::Shape> shapes,
    const std::vector<mx::Dtype>& dtypes,
    const Arrays& inputs) {
  auto node = std::make_shared<OpOf<T>>(
      mx::to_stream({}), std::move(op), shapes, dtypes);
  return mx::array::make_arrays(
      std::move(shapes), dtypes, std::move(node), inputs);
}

} // namespace pyengine
