// The quantised matmul of two trees, in turns. matmul_kernels.py compiles and
// runs it, and says what is printed.

#include <time.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#define PYENGINE_ISA before
#include "cpu/rows_cpu.h"
#include "ops/quantized_matmul_cpu.h"
#undef PYENGINE_ISA

namespace pyengine::after {

decltype(before::load_row) load_row;
decltype(before::quantized_matmul_columns) quantized_matmul_columns;

} // namespace pyengine::after

using namespace pyengine;

namespace {

// Of this thread alone: other programs take turns on the processor.
double processor_time() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

// On a page, as MLX's buffers are.
template <typename T>
std::unique_ptr<T[], decltype(&free)> allocate(size_t count) {
  void* memory = aligned_alloc(4096, (count * sizeof(T) + 4095) / 4096 * 4096);
  return {static_cast<T*>(memory), free};
}

uint16_t bfloat(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return uint16_t(bits >> 16);
}

struct Kernels {
  decltype(&before::load_row) load;
  decltype(&before::quantized_matmul_columns) columns;
};

// What the weights of a piece take to read, and nothing else.
void read(const uint8_t* from, size_t count) {
  using Vector = uint64_t __attribute__((vector_size(64), aligned(1)));
  Vector sums[4] = {};
  for (size_t i = 0; i + 256 <= count; i += 256) {
    for (int j = 0; j < 4; ++j) {
      __builtin_prefetch(from + i + 64 * j + 4096, 0, 2);
      sums[j] += *reinterpret_cast<const Vector*>(from + i + 64 * j);
    }
  }
  __asm__ volatile("" : : "m"(sums));
}

// Calls work(piece) for all pieces, on some threads.
template <typename Work>
void share(int threads, int pieces, const Work& work) {
  std::atomic<int> next{0};
  auto take = [&] {
    for (int piece; (piece = next++) < pieces;) {
      work(piece);
    }
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) {
    others.emplace_back(take);
  }
  take();
  for (auto& other : others) {
    other.join();
  }
}

} // namespace

int main(int argc, char** argv) {
  int numbers[8];
  for (int i = 0; i < 8; ++i) {
    numbers[i] = atoi(argv[1 + i]);
  }
  auto [N, K, bits, group_size, rows, repeats, threads, matrices] = numbers;
  size_t nbytes = size_t(N) * K * bits / 8,
         factors = size_t(N) * K / group_size;
  std::mt19937 random(1);
  // Copies of one matrix: enough of them and no turn finds it in a cache.
  // They begin 16 bytes into a cache line, as MLX allocates them and as many
  // files have them.
  auto memory = allocate<uint32_t>(nbytes / 4 * matrices + 4);
  uint32_t* w = memory.get() + 4;
  std::generate_n(w, nbytes / 4, std::ref(random));
  for (int i = 1; i < matrices; ++i) {
    memcpy(w + nbytes / 4 * i, w, nbytes);
  }
  auto scales = allocate<uint16_t>(factors),
       biases = allocate<uint16_t>(factors);
  std::generate_n(scales.get(), factors, [&] {
    return bfloat(1e-5f * (1 + random() % 1000));
  });
  std::generate_n(biases.get(), factors, [&] {
    return bfloat(1e-3f * (int(random() % 1000) - 500));
  });
  std::vector<uint16_t> x(size_t(rows) * K);
  std::generate(x.begin(), x.end(), [&] {
    return bfloat(1e-3f * (int(random() % 2001) - 1000));
  });

  // As matmul_plan() in csrc/matmul.h cuts the columns
  int64_t row_bytes = int64_t(K) * bits / 8;
  int64_t group_bytes =
      std::clamp<int64_t>(N * row_bytes / 16, 1 << 14, 1 << 18);
  int columns = std::max<int>(32, group_bytes / row_bytes / 32 * 32);
  int groups = (N + columns - 1) / columns;
  int slices = (rows + max_rows - 1) / max_rows;
  auto staged = allocate<float>(max_rows * padded_width(K));
  Order order = bits == 8 ? Order::bytes
      : bits == 6         ? Order::quads
                          : Order::pairs;
  Kernels kernels[] = {
      {before::load_row, before::quantized_matmul_columns},
      {after::load_row, after::quantized_matmul_columns}};
  std::vector<float> out[2];
  std::vector<std::vector<float>> times[3];
  for (auto& result : out) {
    result.resize(size_t(rows) * N);
  }
  for (auto& pieces : times) {
    pieces.resize(size_t(slices) * groups);
  }
  for (int turn = 0; turn < 3 * repeats; ++turn) {
    int kind = turn % 3; // before, after, read
    auto kernel = kernels[kind % 2];
    auto* matrix = reinterpret_cast<uint8_t*>(w) + turn % matrices * nbytes;
    for (int slice = 0; slice < slices; ++slice) {
      int first = slice * max_rows, M = std::min(rows - first, max_rows);
      for (int m = 0; m < M; ++m) {
        auto* row = &x[size_t(first + m) * K];
        kernel.load(row, Storage::bfloat16, 1, K, order, M, m, staged.get());
      }
      QuantizedMatmulArgs args = {};
      args.w = matrix;
      args.scales = scales.get();
      args.biases = biases.get();
      args.x = staged.get();
      args.out = &out[kind % 2][size_t(first) * N];
      args.storage = Storage::bfloat16;
      args.out_storage = Storage::float32;
      args.M = M;
      args.N = N;
      args.K = K;
      args.group_size = group_size;
      args.bits = bits;
      share(threads, groups, [&](int group) {
        static thread_local auto scratch = allocate<float>(
            columns * max_rows + factors_of(columns, K, group_size) + 16);
        int begin = group * columns, end = std::min(N, begin + columns);
        double start = processor_time();
        if (kind == 2) {
          read(matrix + begin * row_bytes, (end - begin) * row_bytes);
        } else {
          kernel.columns(args, begin, end, scratch.get());
        }
        times[kind][slice * groups + group].push_back(processor_time() - start);
      });
    }
  }
  double seconds[3] = {};
  for (int kind = 0; kind < 3; ++kind) {
    for (auto& piece : times[kind]) {
      auto middle = piece.begin() + piece.size() / 4;
      std::nth_element(piece.begin(), middle, piece.end());
      seconds[kind] += *middle / threads;
    }
  }
  double most = 0, squares = 0;
  for (size_t i = 0; i < out[0].size(); ++i) {
    most = std::max<double>(most, fabs(out[0][i] - out[1][i]));
    squares += double(out[0][i]) * out[0][i];
  }
  double differ = most / sqrt(squares / out[0].size());
  printf("%g %g %g %g\n", seconds[0], seconds[1], seconds[2], differ);
}
