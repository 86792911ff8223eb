#pragma once
// simdgroup: simd_* and quad_* functions. Each lane leaves its argument on its
// own stack; the last lane to come computes for all.

namespace metal {

#define MSL_FOR_LANES(meeting)  \
  for (uint l = 0; l < 32; ++l) \
    if ((meeting)->mask >> l & 1)

template <class T>
struct msl_value {
  T value;
};
template <class T>
MSL_INLINE T& msl_of(msl_meeting* meeting, uint lane) {
  return ((msl_value<T>*)meeting->lane[lane])->value;
}
template <class T>
MSL_INLINE T msl_meet(T x, void (*function)(msl_meeting*), uint width) {
  msl_value<T> data{x};
  workbench_simd(&data, function, width);
  return data.value;
}

struct msl_add {
  template <class T>
  MSL_UNCHECKED static T of(T a, T b) {
    return a + b;
  }
};
struct msl_multiply {
  template <class T>
  MSL_UNCHECKED static T of(T a, T b) {
    return a * b;
  }
};
struct msl_min {
  template <class T>
  MSL_UNCHECKED static T of(T a, T b) {
    return min(a, b);
  }
};
struct msl_max {
  template <class T>
  MSL_UNCHECKED static T of(T a, T b) {
    return max(a, b);
  }
};
struct msl_and {
  template <class T>
  MSL_UNCHECKED static T of(T a, T b) {
    return a & b;
  }
};
struct msl_or {
  template <class T>
  MSL_UNCHECKED static T of(T a, T b) {
    return a | b;
  }
};
struct msl_xor {
  template <class T>
  MSL_UNCHECKED static T of(T a, T b) {
    return a ^ b;
  }
};

// Sums lanes i and i + width / 2, then the halves of that, and so on: Apple
// does not say in which order a GPU does it, so kernels that need their bits
// spell it out.
template <class T, class Op>
struct msl_reduce {
  MSL_UNCHECKED static void function(msl_meeting* meeting) {
    uint width = meeting->width;
    T x[32];
    bool has[32];
    for (uint l = 0; l < 32; ++l) {
      has[l] = meeting->mask >> l & 1;
      if (has[l]) {
        x[l] = msl_of<T>(meeting, l);
      }
    }
    for (uint step = width / 2; step > 0; step /= 2) {
      for (uint l = 0; l < 32; ++l) {
        if (l % width < step && has[l + step]) {
          x[l] = has[l] ? Op::of(x[l], x[l + step]) : x[l + step];
          has[l] = true;
        }
      }
    }
    MSL_FOR_LANES(meeting) {
      msl_of<T>(meeting, l) = x[l / width * width];
    }
  }
};
#define MSL_REDUCTION(name, Op)                              \
  template <class T>                                         \
  MSL_INLINE T simd_##name(T x) {                            \
    return msl_meet<T>(x, &msl_reduce<T, Op>::function, 32); \
  }                                                          \
  template <class T>                                         \
  MSL_INLINE T quad_##name(T x) {                            \
    return msl_meet<T>(x, &msl_reduce<T, Op>::function, 4);  \
  }
MSL_REDUCTION(sum, msl_add)
MSL_REDUCTION(product, msl_multiply)
MSL_REDUCTION(min, msl_min)
MSL_REDUCTION(max, msl_max)
MSL_REDUCTION(and, msl_and)
MSL_REDUCTION(or, msl_or)
MSL_REDUCTION(xor, msl_xor)
#undef MSL_REDUCTION

template <class T, class Op, bool Inclusive>
struct msl_scan {
  MSL_UNCHECKED static void function(msl_meeting* meeting) {
    T total{};
    bool any = false;
    for (uint l = 0; l < 32; ++l) {
      if (l % meeting->width == 0) {
        any = false;
      }
      if (!(meeting->mask >> l & 1)) {
        continue;
      }
      T x = msl_of<T>(meeting, l);
      T before = any ? total : T(is_same_v<Op, msl_multiply>);
      total = any ? Op::of(total, x) : x;
      any = true;
      msl_of<T>(meeting, l) = Inclusive ? total : before;
    }
  }
};
#define MSL_SCANS(name, Op)                                       \
  template <class T>                                              \
  MSL_INLINE T simd_prefix_inclusive_##name(T x) {                \
    return msl_meet<T>(x, &msl_scan<T, Op, true>::function, 32);  \
  }                                                               \
  template <class T>                                              \
  MSL_INLINE T simd_prefix_exclusive_##name(T x) {                \
    return msl_meet<T>(x, &msl_scan<T, Op, false>::function, 32); \
  }
MSL_SCANS(sum, msl_add)
MSL_SCANS(product, msl_multiply)
#undef MSL_SCANS

// Where a shuffle reads from: a lane of the group of `width`, or -1 for none.
struct msl_absolute {
  MSL_UNCHECKED static int source(int, int by, int) {
    return by;
  }
};
struct msl_exclusive_or {
  MSL_UNCHECKED static int source(int lane, int by, int) {
    return lane ^ by;
  }
};
// Past the edge these two leave a lane its own value.
struct msl_down {
  MSL_UNCHECKED static int source(int lane, int by, int width) {
    return lane + by < width ? lane + by : lane;
  }
};
struct msl_up {
  MSL_UNCHECKED static int source(int lane, int by, int) {
    return lane - by >= 0 ? lane - by : lane;
  }
};
struct msl_rotate_down {
  MSL_UNCHECKED static int source(int lane, int by, int width) {
    return (lane + by) % width;
  }
};
struct msl_rotate_up {
  MSL_UNCHECKED static int source(int lane, int by, int width) {
    return (lane + width - by % width) % width;
  }
};

template <class T>
struct msl_shuffled {
  T value, fill, result;
  ushort by, modulo;
};

// The value of lane `source` of the group that starts at `base`. A lane that
// takes no part has none: the result is all ones (a NaN), and a finding.
template <class T>
MSL_UNCHECKED void msl_take(
    msl_meeting* meeting,
    msl_shuffled<T>* to,
    uint lane,
    int base,
    int source) {
  bool inside = source >= 0 && source < (int)meeting->width;
  if (inside && meeting->mask >> (base + source) & 1) {
    to->result = ((msl_shuffled<T>*)meeting->lane[base + source])->value;
  } else {
    workbench_inactive(meeting, lane, base + source);
    __builtin_memset(&to->result, 0xff, sizeof(T));
  }
}

template <class T, class From>
struct msl_shuffle {
  MSL_UNCHECKED static void function(msl_meeting* meeting) {
    int width = meeting->width;
    MSL_FOR_LANES(meeting) {
      auto* data = (msl_shuffled<T>*)meeting->lane[l];
      int lane = l % width;
      msl_take(meeting, data, l, l - lane, From::source(lane, data->by, width));
    }
  }
};
#define MSL_SHUFFLE(name, From)                                 \
  template <class T>                                            \
  MSL_INLINE T simd_##name(T x, ushort by) {                    \
    msl_shuffled<T> data{x, x, x, by, 32};                      \
    workbench_simd(&data, &msl_shuffle<T, From>::function, 32); \
    return data.result;                                         \
  }                                                             \
  template <class T>                                            \
  MSL_INLINE T quad_##name(T x, ushort by) {                    \
    msl_shuffled<T> data{x, x, x, by, 4};                       \
    workbench_simd(&data, &msl_shuffle<T, From>::function, 4);  \
    return data.result;                                         \
  }
MSL_SHUFFLE(shuffle, msl_absolute)
MSL_SHUFFLE(broadcast, msl_absolute)
MSL_SHUFFLE(shuffle_xor, msl_exclusive_or)
MSL_SHUFFLE(shuffle_down, msl_down)
MSL_SHUFFLE(shuffle_up, msl_up)
MSL_SHUFFLE(shuffle_rotate_down, msl_rotate_down)
MSL_SHUFFLE(shuffle_rotate_up, msl_rotate_up)
#undef MSL_SHUFFLE

// Lanes that would read past their group of `modulo` lanes take it from `fill`:
// the low lanes' when shifting down, the high lanes' when shifting up.
template <class T, int Direction>
struct msl_fill_shuffle {
  MSL_UNCHECKED static void function(msl_meeting* meeting) {
    MSL_FOR_LANES(meeting) {
      auto* data = (msl_shuffled<T>*)meeting->lane[l];
      int modulo = data->modulo;
      int base = l / modulo * modulo;
      int source = (int)l - base + Direction * data->by;
      if (source >= 0 && source < modulo) {
        msl_take(meeting, data, l, 0, base + source);
      } else {
        int from = base + source - Direction * modulo;
        data->result = ((msl_shuffled<T>*)meeting->lane[from])->fill;
      }
    }
  }
};
template <class T>
MSL_INLINE T
simd_shuffle_and_fill_down(T x, T fill, ushort by, ushort modulo = 32) {
  msl_shuffled<T> data{x, fill, x, by, modulo};
  workbench_simd(&data, &msl_fill_shuffle<T, 1>::function, 32);
  return data.result;
}
template <class T>
MSL_INLINE T
simd_shuffle_and_fill_up(T x, T fill, ushort by, ushort modulo = 32) {
  msl_shuffled<T> data{x, fill, x, by, modulo};
  workbench_simd(&data, &msl_fill_shuffle<T, -1>::function, 32);
  return data.result;
}

template <class T>
struct msl_first {
  MSL_UNCHECKED static void function(msl_meeting* meeting) {
    T x = msl_of<T>(meeting, __builtin_ctz(meeting->mask));
    MSL_FOR_LANES(meeting) {
      msl_of<T>(meeting, l) = x;
    }
  }
};
template <class T>
MSL_INLINE T simd_broadcast_first(T x) {
  return msl_meet<T>(x, &msl_first<T>::function, 32);
}

// Votes: the argument is 0 or 1, the result the mask of lanes that gave 1.
struct msl_vote {
  MSL_UNCHECKED static void function(msl_meeting* meeting) {
    ulong votes = 0;
    MSL_FOR_LANES(meeting) {
      votes |= msl_of<ulong>(meeting, l) << l;
    }
    MSL_FOR_LANES(meeting) {
      msl_of<ulong>(meeting, l) = votes;
    }
  }
};
MSL_INLINE ulong msl_votes(bool vote) {
  return msl_meet<ulong>((ulong)vote, &msl_vote::function, 32);
}
struct simd_vote {
  using vote_t = ulong;
  ulong votes;
  simd_vote() = default;
  MSL_INLINE constexpr explicit simd_vote(ulong votes) : votes(votes) {}
  MSL_INLINE constexpr explicit operator ulong() const {
    return votes;
  }
  MSL_INLINE bool all() const {
    return votes == 0xffffffffu;
  }
  MSL_INLINE bool any() const {
    return votes != 0;
  }
};
MSL_INLINE simd_vote simd_ballot(bool vote) {
  return simd_vote(msl_votes(vote));
}
MSL_INLINE simd_vote simd_active_threads_mask() {
  return simd_vote(msl_votes(true));
}
MSL_INLINE bool simd_any(bool vote) {
  return msl_votes(vote) != 0;
}
MSL_INLINE bool simd_all(bool vote) {
  return msl_votes(!vote) == 0;
}
MSL_INLINE bool simd_is_first() {
  return __builtin_ctzl(msl_votes(true)) == (int)workbench_lane();
}

} // namespace metal
