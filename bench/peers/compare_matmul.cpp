// llama.cpp's own product of a Q8_0 matrix with rows of float32, for
// compare_matmul.py, which builds this and says what it is asked.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "ggml-cpu.h"
#include "ggml.h"

namespace {

// On a page, as the weights of a mapped file are.
char* allocate(size_t size) {
  void* memory = aligned_alloc(4096, (size + 4095) / 4096 * 4096);
  if (memory == nullptr) {
    fprintf(stderr, "no memory for %zu bytes\n", size);
    exit(1);
  }
  return static_cast<char*>(memory);
}

void read_all(char* to, size_t size) {
  if (fread(to, 1, size, stdin) != size) {
    fprintf(stderr, "the input ended\n");
    exit(1);
  }
}

// One product by a matrix. Tensors are described in a context of their own;
// their data lies outside.
class Product {
 public:
  Product(int N, int K, int M, int threads, char* w, char* x, char* out) {
    context_ = ggml_init({1 << 20, nullptr, true});
    auto* matrix = ggml_new_tensor_2d(context_, GGML_TYPE_Q8_0, K, N);
    auto* rows = ggml_new_tensor_2d(context_, GGML_TYPE_F32, K, M);
    auto* result = ggml_mul_mat(context_, matrix, rows);
    matrix->data = w;
    rows->data = x;
    result->data = out;
    graph_ = ggml_new_graph(context_);
    ggml_build_forward_expand(graph_, result);
    plan_ = ggml_graph_plan(graph_, threads, nullptr);
    work_.resize(plan_.work_size);
    plan_.work_data = work_.data();
  }

  ~Product() {
    ggml_free(context_);
  }

  double seconds() {
    auto start = std::chrono::steady_clock::now();
    ggml_graph_compute(graph_, &plan_);
    auto taken = std::chrono::steady_clock::now() - start;
    return std::chrono::duration<double>(taken).count();
  }

 private:
  ggml_context* context_;
  ggml_cgraph* graph_;
  ggml_cplan plan_;
  std::vector<uint8_t> work_;
};

} // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    fprintf(stderr, "compare_matmul N K threads copies\n");
    return 2;
  }
  int N = atoi(argv[1]), K = atoi(argv[2]), threads = atoi(argv[3]),
      copies = atoi(argv[4]);
  ggml_cpu_init();
  size_t size = ggml_row_size(GGML_TYPE_Q8_0, K) * N;
  std::vector<char*> matrices;
  for (int i = 0; i < copies; ++i) {
    matrices.push_back(allocate(size));
    i == 0 ? read_all(matrices[0], size)
           : (void)memcpy(matrices[i], matrices[0], size);
  }
  // "M some": so many rows follow, then a line of the seconds that the product
  // with each of some copies took, then the last result.
  for (int M, some; scanf("%d %d", &M, &some) == 2;) {
    getchar(); // the end of the line
    size_t result = size_t(M) * N * sizeof(float);
    char *x = allocate(size_t(M) * K * sizeof(float)), *out = allocate(result);
    read_all(x, size_t(M) * K * sizeof(float));
    for (int i = 0; i < std::min(some, copies); ++i) {
      Product product(N, K, M, threads, matrices[i], x, out);
      printf("%.9f ", product.seconds());
    }
    // Its threads look for more work for tens of milliseconds, which the other
    // side would pay for: with 20 here a call of one row took 2.8 ms, not 2.2.
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    printf("\n");
    fwrite(out, 1, result, stdout);
    fflush(stdout);
    free(x);
    free(out);
  }
}
