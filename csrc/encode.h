#pragma once
// encode.h: how launches reach a GPU, against as little of MLX's command
// encoder as they need.
//
// On a Mac that is MLX's own; on every machine there is one that only notes
// what it is told. Tests read its notes, and a round that is encoded so shows
// what the host does for it: the code is the same.

#include <string>
#include <vector>

#include "launch.h"

namespace pyengine {

// A compiled kernel, and what the device grants it.
struct Pipeline {
  void* state; // MTL::ComputePipelineState
  int max_threads; // of a threadgroup
  int threadgroup_memory; // bytes that it takes beside its arguments
};

class Encoder {
 public:
  virtual ~Encoder() = default;

  // Compiled where it is not yet; throws with the compiler's log.
  virtual Pipeline pipeline(const Launch& launch) = 0;
  // Bytes that the device has for a threadgroup.
  virtual int threadgroup_memory() = 0;

  // In the order in which they are called, for one launch after the other
  virtual void set_pipeline(const Pipeline& pipeline) = 0;
  virtual void set_bytes(const std::string& data, int index) = 0;
  virtual void set_input(const mx::array& a, int index) = 0;
  virtual void set_output(mx::array& a, int index) = 0;
  // Whoever writes this array later waits for the launch, as for one that
  // wrote.
  virtual void register_output(const mx::array& a) = 0;
  virtual void set_threadgroup_memory(int bytes, int index) = 0;
  virtual void dispatch(const Launch& launch) = 0;
  // Keeps an array until the device is done with it.
  virtual void add_temporary(const mx::array& a) = 0;
  // The same numbers side by side, copied on the device.
  virtual mx::array contiguous(const mx::array& a) = 0;
};

// Launches and all that need not be worked out again while an op's inputs stay
// as they are: which array each buffer is, and the pipelines.
class Prepared {
 public:
  Prepared() = default;
  Prepared(
      const char* op,
      std::vector<Launch> launches,
      const Arrays& inputs,
      size_t outputs);

  // Whether the launches are those for these inputs, of an op whose inputs keep
  // their shapes: alignment may have changed.
  bool fits(const Arrays& inputs) const;

 private:
  friend void encode(Prepared&, Encoder&, const Arrays&, Arrays&);

  struct One {
    Launch launch;
    std::vector<int> arrays; // of each buffer: inputs, outputs, temporaries
    Pipeline pipeline = {}; // once compiled
  };

  const char* op_ = nullptr;
  std::vector<One> launches_;
  std::vector<Buffer> temporaries_;
  std::vector<std::pair<size_t, int64_t>> inputs_; // size, bytes past 16
};

// Why a device would not start a launch; empty if it would. Metal says nothing:
// it drops the launch, and what it was to write stays as it was.
std::string refusal(
    const std::string& op,
    const Launch& launch,
    const Pipeline& pipeline,
    int threadgroup_memory);

// Encodes launches in order; `inputs` and `outputs` stand for their arguments,
// and outputs have memory. A strided input is copied, unless it is state.
// Throws where the device would refuse a launch.
void encode(
    Prepared& prepared,
    Encoder& encoder,
    const Arrays& inputs,
    Arrays& outputs);

// The same on a GPU stream; throws on a machine that has none.
void run_on_gpu(
    Prepared& prepared,
    const mx::Stream& stream,
    const Arrays& inputs,
    Arrays& outputs);

// Whether ops on a processor's stream are to be encoded for no device, which
// computes nothing, and the encoder for that.
bool rehearsing();
Encoder& rehearsal();

// Memory of an op's result, filled with 0xAA bytes if that is asked for: a
// result that nothing computed shows.
void allocate(mx::array& a);

} // namespace pyengine
