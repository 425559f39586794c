// Vectors of the width that this translation unit is compiled for, and how the four data types enter and leave them.
// Everything is in an unnamed namespace: no function compiled for one instruction set may be linked into another's.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace normkit {
namespace {

using i64 = int64_t;

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <class A> struct Lanes;
template <> struct Lanes<float> {
  typedef float V __attribute__((vector_size(kBytes)));
  typedef int32_t I __attribute__((vector_size(kBytes)));
};
template <> struct Lanes<double> {
  typedef double V __attribute__((vector_size(kBytes)));
  typedef int64_t I __attribute__((vector_size(kBytes)));
};
template <class A> using Vec = typename Lanes<A>::V;
template <class A> constexpr int kLanes = kBytes / sizeof(A);

struct half { uint16_t bits; };
struct bfloat { uint16_t bits; };

template <class T> struct Accumulate { using type = float; };
template <> struct Accumulate<double> { using type = double; };
template <class T> using Acc = typename Accumulate<T>::type;

constexpr int kNarrow = kBytes / 4;  // lanes of a float vector
typedef float vf __attribute__((vector_size(kBytes)));
typedef uint32_t vu __attribute__((vector_size(kBytes)));
typedef int32_t vi __attribute__((vector_size(kBytes)));
typedef uint16_t vh __attribute__((vector_size(kBytes / 2)));
typedef uint64_t vq __attribute__((vector_size(2 * kBytes)));

// The same conversions serve a vector of bits and a single number: U, I and F are vu, vi, vf or uint32_t, int32_t, float.
template <class To, class From> inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
template <class U, class F> inline F widen(half, U h) {
  const U magnitude = h & 0x7fffu, sign = (h & 0x8000u) << 16;
  const F value = bit_cast<F>(magnitude << 13) * 0x1p112f;  // rebias the exponent; exact, subnormals too
  U bits = bit_cast<U>(value);
  bits = magnitude >= U{} + 0x7c00u ? (magnitude << 13) | 0x7f800000u : bits;
  return bit_cast<F>(bits | sign);
}
template <class U, class F> inline U shorten(half, F x) {
  const U bits = bit_cast<U>(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const U subnormal = bit_cast<U>(bit_cast<F>(magnitude) + 0.5f) - 0x3f000000u;  // the addition rounds to the last place
  U rounded = ((magnitude + 0xfffu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
  rounded = magnitude < U{} + 0x38800000u ? subnormal : rounded;
  rounded = magnitude >= U{} + 0x477ff000u ? U{} + 0x7c00u : rounded;
  rounded = magnitude > U{} + 0x7f800000u ? U{} + 0x7e00u : rounded;
  return rounded | sign;
}
template <class U, class F> inline F widen(bfloat, U h) { return bit_cast<F>(h << 16); }
// The upper half is the nearest bfloat16. A NaN of all ones would become a zero; none gets here, because parameters' NaNs are
// made the standard one (see param).
template <class U, class F> inline U rounded(bfloat, F x) {
  const U bits = bit_cast<U>(x);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}
template <class U, class F> inline U shorten(bfloat, F x) { return rounded<U>(bfloat{}, x) >> 16; }

// One number, from memory of any alignment.
template <class A> inline A get(const A *p) {
  A value;
  memcpy(&value, p, sizeof value);
  return value;
}
template <class H> inline float get_narrow(const H *p) {
  uint16_t bits;
  memcpy(&bits, p, 2);
  return widen<uint32_t, float>(H{}, bits);
}
inline float get(const half *p) { return get_narrow(p); }
inline float get(const bfloat *p) { return get_narrow(p); }
template <class A> inline void put(A *p, A value) { memcpy(p, &value, sizeof value); }
template <class H> inline void put_narrow(H *p, float value) {
  if (value != value) value = __builtin_nanf("");
  const uint16_t bits = uint16_t(shorten<uint32_t, float>(H{}, value));
  memcpy(p, &bits, 2);
}
inline void put(half *p, float value) { put_narrow(p, value); }
inline void put(bfloat *p, float value) { put_narrow(p, value); }

// One vector, from memory of any alignment.
template <class A> inline Vec<A> load(const A *p) {
  Vec<A> v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline vu load_bits(const void *p) {
#if defined(__AVX512F__)
  return (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__AVX2__)
  return (vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
#endif
  vh h;
  memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, vu);
}
inline vf load(const bfloat *p) { return widen<vu, vf>(bfloat{}, load_bits(p)); }
inline vf load(const half *p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
  return widen<vu, vf>(half{}, load_bits(p));
#endif
}

// Past the caches where `stream`; p must then be aligned to the stored bytes.
template <class X> inline void stream_bytes(void *p, X x) {
#if defined(__x86_64__)
  if constexpr (sizeof x == 64) {
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i *)p, bit_cast<__m512i>(x));
#endif
  } else if constexpr (sizeof x == 32) {
#if defined(__AVX2__)
    _mm256_stream_si256((__m256i *)p, bit_cast<__m256i>(x));
#endif
  } else if constexpr (sizeof x == 16) {
    _mm_stream_si128((__m128i *)p, bit_cast<__m128i>(x));
  } else {
    memcpy(p, &x, sizeof x);
  }
#else
  memcpy(p, &x, sizeof x);
#endif
}
template <bool stream, class X> inline void store_bytes(void *p, X x) {
  if constexpr (stream) stream_bytes(p, x);
  else memcpy(p, &x, sizeof x);
}
template <bool stream = false, class A> inline void store(A *p, Vec<A> v) { store_bytes<stream>(p, v); }
#if defined(__AVX512BF16__)
// Whether the processor may round these to bfloat16 by itself: subnormal numbers are zeros to it.
template <class... V> inline bool normal(V... v) {
  return __builtin_expect((_mm512_fpclass_ps_mask((__m512)v, 0x20) | ...) == 0, 1);
}
#endif
template <bool stream = false> inline void store(bfloat *p, vf v) {
#if defined(__AVX512BF16__)
  if (normal(v)) return store_bytes<stream>(p, _mm512_cvtneps_pbh((__m512)v));
#endif
  store_bytes<stream>(p, __builtin_convertvector(shorten<vu, vf>(bfloat{}, v), vh));
}
template <bool stream = false> inline void store(half *p, vf v) {
#if defined(__AVX512F__)
  store_bytes<stream>(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  store_bytes<stream>(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  store_bytes<stream>(p, __builtin_convertvector(shorten<vu, vf>(half{}, v), vh));
#endif
}
// Two vectors next to each other: narrow types are packed together.
template <bool stream = false, class T, class V> inline void store(T *p, V a, V b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) {
    if constexpr (std::is_same_v<T, bfloat>) {
      const __m256i packed = _mm256_packus_epi32((__m256i)shorten<vu, vf>(bfloat{}, a), (__m256i)shorten<vu, vf>(bfloat{}, b));
      store_bytes<stream>(p, _mm256_permute4x64_epi64(packed, 0xd8));
    } else {
      constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
      store_bytes<stream>(p, _mm256_set_m128i(_mm256_cvtps_ph((__m256)b, mode), _mm256_cvtps_ph((__m256)a, mode)));
    }
    return;
  }
#endif
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bfloat>)
    if (normal(a, b)) return store_bytes<stream>(p, _mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
#endif
  store<stream>(p, a);
  store<stream>(p + sizeof(V) / sizeof(Acc<T>), b);
}
inline void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Starts to load n elements that are read later, in whole lines: the processor does not look past the end of a page by itself.
// They wait in the second-level cache, to which more lines can be on their way at once than to the first.
template <i64 n, class T> inline void fetch(const T *p) {
  for (size_t byte = 0; byte < n * sizeof(T); byte += 64) __builtin_prefetch((const char *)p + byte, 0, 2);
}

template <class A> inline Vec<A> splat(A value) { return value - Vec<A>{}; }

// Ones that the compiler does not know: v * ones + sum is then done by the units that multiply and add, beside which others only
// add. The result is that of v + sum.
template <class A> inline Vec<A> ones() {
  Vec<A> v = splat(A(1));
#if defined(__FMA__)
  asm("" : "+v"(v));
#endif
  return v;
}

// The sum of the lanes, in a fixed order.
inline float sum(Vec<float> v) {
#if defined(__AVX512F__)
  typedef float v8 __attribute__((vector_size(32)));
  const v8 e = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
               __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#elif defined(__AVX2__)
  const auto e = v;
#endif
  typedef float v4 __attribute__((vector_size(16)));
#if defined(__AVX2__)
  v4 f = __builtin_shufflevector(e, e, 0, 1, 2, 3) + __builtin_shufflevector(e, e, 4, 5, 6, 7);
#else
  v4 f = v;
#endif
  f += __builtin_shufflevector(f, f, 2, 3, 0, 1);
  return f[0] + f[1];
}
inline double sum(Vec<double> v) {
#if defined(__AVX512F__)
  typedef double v4 __attribute__((vector_size(32)));
  const v4 e = __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
#elif defined(__AVX2__)
  const auto e = v;
#endif
  typedef double v2 __attribute__((vector_size(16)));
#if defined(__AVX2__)
  const v2 f = __builtin_shufflevector(e, e, 0, 1) + __builtin_shufflevector(e, e, 2, 3);
#else
  const v2 f = v;
#endif
  return f[0] + f[1];
}

// A sum of vectors, lane by lane, in double: float would round each of many at the height of all that came before.
template <class A> struct Long;
template <> struct Long<double> {
  Vec<double> all{};
  void operator+=(Vec<double> v) { all += v; }
};
template <> struct Long<float> {
  Vec<double> low{}, high{};
  void operator+=(Vec<float> v) {
    typedef float Half __attribute__((vector_size(kBytes / 2)));
    Half halves[2];
    memcpy(halves, &v, sizeof v);
    low += __builtin_convertvector(halves[0], Vec<double>), high += __builtin_convertvector(halves[1], Vec<double>);
  }
};
template <class A> inline void add_to(double *p, Vec<A> v) {
  Long<A> all;
  memcpy((void *)&all, p, sizeof all);
  all += v;
  memcpy(p, &all, sizeof all);
}
inline double sum(const Long<double> &v) { return sum(v.all); }
inline double sum(const Long<float> &v) { return sum(v.low + v.high); }

// The sums of the lanes of four vectors, each in the order of sum().
inline void sums(const Vec<float> *v, double *out) {
  typedef float v4 __attribute__((vector_size(16)));
  v4 f[4];
  for (int k = 0; k < 4; ++k) {
#if defined(__AVX512F__)
    typedef float v8 __attribute__((vector_size(32)));
    const v8 e = __builtin_shufflevector(v[k], v[k], 0, 1, 2, 3, 4, 5, 6, 7) +
                 __builtin_shufflevector(v[k], v[k], 8, 9, 10, 11, 12, 13, 14, 15);
#elif defined(__AVX2__)
    const auto e = v[k];
#endif
#if defined(__AVX2__)
    f[k] = __builtin_shufflevector(e, e, 0, 1, 2, 3) + __builtin_shufflevector(e, e, 4, 5, 6, 7);
#else
    f[k] = v[k];
#endif
  }
  const v4 a = __builtin_shufflevector(f[0], f[1], 0, 4, 1, 5) + __builtin_shufflevector(f[0], f[1], 2, 6, 3, 7);
  const v4 b = __builtin_shufflevector(f[2], f[3], 0, 4, 1, 5) + __builtin_shufflevector(f[2], f[3], 2, 6, 3, 7);
  const v4 total = __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
  for (int k = 0; k < 4; ++k) out[k] = total[k];
}
inline void sums(const Vec<double> *v, double *out) {
  for (int k = 0; k < 4; ++k) out[k] = sum(v[k]);
}

// Four numbers, whatever the width of vectors.
template <class A> struct FourOf { typedef A V __attribute__((vector_size(4 * sizeof(A)))); };
template <class A> using Four = typename FourOf<A>::V;
template <class A> inline Four<A> load_four(const A *p) {
  Four<A> v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class A> inline void store_four(A *p, Four<A> v) { memcpy(p, &v, sizeof v); }
template <class A, class V> inline Four<A> four(V v) { return __builtin_convertvector(v, Four<A>); }

// The sum of n numbers, in double.
template <class A> inline double sum_of(const A *p, i64 n) {
  Four<double> s{};
  i64 i = 0;
  for (; i + 4 <= n; i += 4) s += four<double>(load_four(p + i));
  double total = (s[0] + s[1]) + (s[2] + s[3]);
  for (; i < n; ++i) total += p[i];
  return total;
}

inline Four<double> root_of(Four<double> v) {
#if defined(__AVX2__)
  return (Four<double>)_mm256_sqrt_pd((__m256d)v);
#else
  for (int k = 0; k < 4; ++k) v[k] = __builtin_sqrt(v[k]);
  return v;
#endif
}

// v where the lane is one of the last `count`, zero elsewhere.
template <class A> inline Vec<A> last_lanes(Vec<A> v, i64 count) {
  using I = typename Lanes<A>::I;
  I lane;
  for (int k = 0; k < kLanes<A>; ++k) lane[k] = k;
  const I keep = lane >= I{} + decltype(lane[0] + 0)(kLanes<A> - count);
  return bit_cast<Vec<A>>(bit_cast<I>(v) & keep);
}

// The elements of two neighbouring vectors, in the order that costs least: of bfloat16 those at even places, then those at odd
// ones, which are the halves of 32 bits each.
template <class A> struct Pair {
  Vec<A> a, b;
};
#define NORMKIT_OPERATOR(op) \
  template <class A> inline Pair<A> operator op(Pair<A> x, Pair<A> y) { return {x.a op y.a, x.b op y.b}; } \
  template <class A> inline Pair<A> operator op(Pair<A> x, A y) { return {x.a op y, x.b op y}; }
NORMKIT_OPERATOR(+)
NORMKIT_OPERATOR(-)
NORMKIT_OPERATOR(*)
#undef NORMKIT_OPERATOR

template <class T> constexpr bool kOddAndEven = std::is_same_v<T, bfloat>;

template <class T> inline Pair<Acc<T>> load_pair(const T *p) {
  if constexpr (kOddAndEven<T>) {
    static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
    vu halves;
    memcpy(&halves, p, sizeof halves);
    return {bit_cast<vf>(halves << 16), bit_cast<vf>(halves & 0xffff0000u)};
  } else {
    return {load(p), load(p + kLanes<Acc<T>>)};
  }
}
template <bool stream = false, class T> inline void store_pair(T *p, Pair<Acc<T>> v) {
#if defined(__AVX512BF16__)
  if constexpr (kOddAndEven<T>)
    if (normal(v.a, v.b)) {
      typedef uint16_t Bits __attribute__((vector_size(kBytes)));
      const Bits bits = bit_cast<Bits>(_mm512_cvtne2ps_pbh((__m512)v.b, (__m512)v.a));
      return store_bytes<stream>(p, __builtin_shufflevector(bits, bits, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24,
                                                            9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
    }
#endif
  if constexpr (kOddAndEven<T>) {
    const vu even = rounded<vu>(bfloat{}, v.a) >> 16, odd = rounded<vu>(bfloat{}, v.b);
#if defined(__AVX2__) && !defined(__AVX512F__)
    store_bytes<stream>(p, _mm256_blend_epi16((__m256i)even, (__m256i)odd, 0xaa));
#else
    store_bytes<stream>(p, even | (odd & 0xffff0000u));
#endif
  } else {
    store<stream>(p, v.a, v.b);
  }
}

// Numbers along a run, as they are and in the order of its pairs; what is left after the last whole pair is the same in both.
template <class A> struct Along {
  const A *plain, *paired;
  Along operator+(i64 i) const { return {plain + i, paired + i}; }
};
// Element i of each whole pair goes to, or comes from, the place that it has in the order of pairs.
template <class T, class X> inline void reorder(X *p, i64 n, bool to_pairs) {
  constexpr int W = kLanes<Acc<T>>;
  if (!kOddAndEven<T>) return;
  for (i64 start = 0; start + 2 * W <= n; start += 2 * W) {
    X *const now = p + start;
    if constexpr (sizeof(X) == 4) {
      // Neighbours as the halves of 64 bits.
      if (to_pairs) {
        vq both;
        memcpy(&both, now, sizeof both);
        store_bytes<false>(now, __builtin_convertvector(both, vu)), store_bytes<false>(now + W, __builtin_convertvector(both >> 32, vu));
      } else {
        const vu even = bit_cast<vu>(load(now)), odd = bit_cast<vu>(load(now + W));
        store_bytes<false>(now, __builtin_convertvector(even, vq) | __builtin_convertvector(odd, vq) << 32);
      }
      continue;
    }
    X old[2 * W];
    memcpy(old, now, sizeof old);
    for (int i = 0; i < 2 * W; ++i) {
      const int place = i % 2 * W + i / 2;
      now[to_pairs ? place : i] = old[to_pairs ? i : place];
    }
  }
}

// Formulas are written once for pairs of vectors, vectors and single numbers, told apart by a tag. What is fetched is fetched
// in whole pairs.
template <class T> struct Two {
  using A = Acc<T>;
  static Pair<A> at(const T *p) { return load_pair(p); }
  static Pair<A> at(Along<A> p) { return {load(p.paired), load(p.paired + kLanes<A>)}; }
  static void fetch(const T *p) { normkit::fetch<2 * kLanes<A>>(p); }
};
struct Many {
  template <class T> static auto at(const T *p) { return load(p); }
  template <class A> static auto at(Along<A> p) { return load(p.plain); }
  template <class T> static void fetch(const T *) {}
};
struct One {
  template <class T> static auto at(const T *p) { return get(p); }
  template <class A> static auto at(Along<A> p) { return get(p.plain); }
  template <class T> static void fetch(const T *) {}
};

// y[i] = f(tag, i) for a contiguous run. The last lanes are computed twice where n is no multiple of the width.
template <class T, class F> inline void map(T *y, i64 n, bool stream, F f) {
  constexpr int W = kLanes<Acc<T>>;
  if (n < W) {
    for (i64 i = 0; i < n; ++i) put(y + i, f(One{}, i));
    return;
  }
  i64 i = 0;
  if (stream && n >= 2 * W) {
    const i64 head = i64((kBytes - uintptr_t(y) % kBytes) % kBytes / sizeof(T));
    for (; i < head; i += W) store(y + i, f(Many{}, i));
    i = head;
    for (; i + 2 * W <= n; i += 2 * W) store_pair<true>(y + i, f(Two<T>{}, i));
  }
  for (; i + 2 * W <= n; i += 2 * W) store_pair(y + i, f(Two<T>{}, i));
  for (; i + W <= n; i += W) store(y + i, f(Many{}, i));
  if (i < n) store(y + n - W, f(Many{}, n - W));
}

}  // namespace
}  // namespace normkit
