#pragma once
// simdgroup_matrix: 8 x 8 matrices spread over the 32 lanes, two neighbours of
// a row each, in the layout that Apple's GPUs show and MLX's kernels rely on.

namespace metal {

MSL_INLINE constexpr uint msl_row(uint lane) {
  return (lane / 4 & 4) + lane / 2 % 4;
}
MSL_INLINE constexpr uint msl_column(uint lane) {
  return (lane / 4 & 2) * 2 + lane % 2 * 2;
}

template <class T, int Rows = 8, int Columns = 8>
struct simdgroup_matrix {
  static_assert(Rows == 8 && Columns == 8, "simdgroup matrices are 8 x 8");
  vec<T, 2> elements;
  simdgroup_matrix() = default;
  // A diagonal matrix.
  MSL_INLINE explicit simdgroup_matrix(T value) {
    uint lane = workbench_lane();
    elements[0] = msl_row(lane) == msl_column(lane) ? value : T(0);
    elements[1] = msl_row(lane) == msl_column(lane) + 1 ? value : T(0);
  }
  MSL_INLINE thread vec<T, 2>& thread_elements() {
    return elements;
  }
  MSL_INLINE const thread vec<T, 2>& thread_elements() const {
    return elements;
  }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int Rows = 8, int Columns = 8>
MSL_INLINE simdgroup_matrix<T, Rows, Columns> make_filled_simdgroup_matrix(
    T value) {
  simdgroup_matrix<T, Rows, Columns> result;
  result.elements = vec<T, 2>{value, value};
  return result;
}

MSL_INLINE ulong
msl_matrix_index(uint k, ulong stride, ulong2 origin, bool transposed) {
  uint row = msl_row(workbench_lane()),
       column = msl_column(workbench_lane()) + k;
  return transposed ? (origin.y + column) * stride + origin.x + row
                    : (origin.y + row) * stride + origin.x + column;
}
#define MSL_MATRIX_MEMORY(space)                                          \
  template <class T, class U>                                             \
  MSL_INLINE void simdgroup_load(                                         \
      thread simdgroup_matrix<T, 8, 8>& m,                                \
      const space U* p,                                                   \
      ulong stride = 8,                                                   \
      ulong2 origin = ulong2{0, 0},                                       \
      bool transposed = false) {                                          \
    for (uint k = 0; k < 2; ++k) {                                        \
      m.elements[k] = p[msl_matrix_index(k, stride, origin, transposed)]; \
    }                                                                     \
  }                                                                       \
  template <class T, class U>                                             \
  MSL_INLINE void simdgroup_store(                                        \
      const thread simdgroup_matrix<T, 8, 8>& m,                          \
      space U* p,                                                         \
      ulong stride = 8,                                                   \
      ulong2 origin = ulong2{0, 0},                                       \
      bool transposed = false) {                                          \
    for (uint k = 0; k < 2; ++k) {                                        \
      p[msl_matrix_index(k, stride, origin, transposed)] = m.elements[k]; \
    }                                                                     \
  }
MSL_MATRIX_MEMORY(device)
MSL_MATRIX_MEMORY(threadgroup)
#undef MSL_MATRIX_MEMORY

// d = a @ b + c in float, summed over ascending k. Apple does not say how a GPU
// sums.
template <class D, class A, class B, class C>
struct msl_product {
  vec<A, 2> a;
  vec<B, 2> b;
  vec<C, 2> c;
  vec<D, 2> d;
  MSL_UNCHECKED static void function(msl_meeting* meeting) {
    if (meeting->mask != 0xffffffffu) {
      workbench_inactive(meeting, 0, __builtin_ctz(~meeting->mask));
    }
    float a[8][8] = {}, b[8][8] = {}, c[8][8] = {};
    MSL_FOR_LANES(meeting) {
      auto* data = (msl_product*)meeting->lane[l];
      uint row = msl_row(l), column = msl_column(l);
      for (uint k = 0; k < 2; ++k) {
        a[row][column + k] = (float)data->a[k];
        b[row][column + k] = (float)data->b[k];
        c[row][column + k] = (float)data->c[k];
      }
    }
    for (int i = 0; i < 8; ++i) {
      for (int k = 0; k < 8; ++k) {
        for (int j = 0; j < 8; ++j) {
          c[i][j] = __builtin_fmaf(a[i][k], b[k][j], c[i][j]);
        }
      }
    }
    MSL_FOR_LANES(meeting) {
      auto* data = (msl_product*)meeting->lane[l];
      for (uint k = 0; k < 2; ++k) {
        data->d[k] = (D)c[msl_row(l)][msl_column(l) + k];
      }
    }
  }
};
template <class D, class A, class B, class C>
MSL_INLINE void simdgroup_multiply_accumulate(
    thread simdgroup_matrix<D, 8, 8>& d,
    thread const simdgroup_matrix<A, 8, 8>& a,
    thread const simdgroup_matrix<B, 8, 8>& b,
    thread const simdgroup_matrix<C, 8, 8>& c) {
  msl_product<D, A, B, C> data{a.elements, b.elements, c.elements, {}};
  workbench_simd(&data, &msl_product<D, A, B, C>::function, 32);
  d.elements = data.d;
}
template <class D, class A, class B>
MSL_INLINE void simdgroup_multiply(
    thread simdgroup_matrix<D, 8, 8>& d,
    thread const simdgroup_matrix<A, 8, 8>& a,
    thread const simdgroup_matrix<B, 8, 8>& b) {
  auto zero = make_filled_simdgroup_matrix<D>(D(0));
  simdgroup_multiply_accumulate(d, a, b, zero);
}

} // namespace metal
