/* Vectors of floats, as long as the compiler's target has them: AVX-512, AVX, SSE2, NEON, none. NET_LANES says
   another length, 4, 8 or 16, which compilers make of what there is. */
#if defined(__AVX512F__)
#define NATIVE_LANES 16
#elif defined(__AVX__)
#define NATIVE_LANES 8
#elif defined(__SSE2__) || defined(__ARM_NEON) || defined(__wasm_simd128__) || defined(__ALTIVEC__)
#define NATIVE_LANES 4
#else
#define NATIVE_LANES 1
#endif
#if defined(NET_PLAIN_C) || !defined(__GNUC__)
#define LANES 1
#elif defined(NET_LANES)
#define LANES NET_LANES
#else
#define LANES NATIVE_LANES
#endif

#if defined(__GNUC__)
#define ALIGNED __attribute__((aligned(64)))
#define INLINE static inline __attribute__((always_inline, unused))
#else
#define ALIGNED
#define INLINE static inline
#endif
#if defined(__GNUC__) || defined(__cplusplus)
#define RESTRICT __restrict
#else
#define RESTRICT restrict
#endif

/* GCC folds a load into each multiply-add that uses it, and so loads again and again: hold the value in a register. */
#if LANES > 1 && LANES <= NATIVE_LANES && defined(__x86_64__) && !defined(__clang__)
#define KEEP(v) __asm__("" : "+v"(v))
#else
#define KEEP(v) (void)0
#endif

/* A product and a sum may be one instruction, even where the compiler is told to follow C99 to the letter. */
#if LANES > 1 && defined(__clang__)
#pragma STDC FP_CONTRACT ON
#elif LANES > 1
#pragma GCC optimize("fp-contract=fast")
#endif
{% for cap in caps %}

/* At most {{ cap }} at a time, for rows that are no longer. */
#define LANES_{{ cap }} (LANES < {{ cap }} ? LANES : {{ cap }})
#if LANES > 1 && {{ cap }} > 1
typedef float vec_{{ cap }} __attribute__((vector_size(4 * LANES_{{ cap }})));
typedef int32_t ivec_{{ cap }} __attribute__((vector_size(4 * LANES_{{ cap }})));
typedef float loose_{{ cap }} __attribute__((vector_size(4 * LANES_{{ cap }}), aligned(4), may_alias));
INLINE vec_{{ cap }} load_{{ cap }}(const float *p) { return (vec_{{ cap }})*(const loose_{{ cap }} *)p; }
INLINE void store_{{ cap }}(float *p, vec_{{ cap }} v) { *(loose_{{ cap }} *)p = (loose_{{ cap }})v; }
INLINE vec_{{ cap }} splat_{{ cap }}(float x) { const vec_{{ cap }} zero = {0}; return x - zero; }
INLINE ivec_{{ cap }} bits_{{ cap }}(vec_{{ cap }} v) { return (ivec_{{ cap }})v; }
INLINE vec_{{ cap }} floats_{{ cap }}(ivec_{{ cap }} v) { return (vec_{{ cap }})v; }
INLINE ivec_{{ cap }} less_{{ cap }}(vec_{{ cap }} a, vec_{{ cap }} b) { return (ivec_{{ cap }})(a < b); }
#else
typedef float vec_{{ cap }};
typedef int32_t ivec_{{ cap }};
INLINE vec_{{ cap }} load_{{ cap }}(const float *p) { return *p; }
INLINE void store_{{ cap }}(float *p, vec_{{ cap }} v) { *p = v; }
INLINE vec_{{ cap }} splat_{{ cap }}(float x) { return x; }
INLINE ivec_{{ cap }} bits_{{ cap }}(vec_{{ cap }} v) { ivec_{{ cap }} i; memcpy(&i, &v, sizeof i); return i; }
INLINE vec_{{ cap }} floats_{{ cap }}(ivec_{{ cap }} i) { vec_{{ cap }} v; memcpy(&v, &i, sizeof v); return v; }
INLINE ivec_{{ cap }} less_{{ cap }}(vec_{{ cap }} a, vec_{{ cap }} b) { return -(a < b); }
#endif
/* a where the mask is set, b elsewhere */
INLINE vec_{{ cap }} choose_{{ cap }}(ivec_{{ cap }} mask, vec_{{ cap }} a, vec_{{ cap }} b)
{
    return floats_{{ cap }}((mask & bits_{{ cap }}(a)) | (~mask & bits_{{ cap }}(b)));
}
INLINE vec_{{ cap }} min_{{ cap }}(vec_{{ cap }} a, vec_{{ cap }} b) { return choose_{{ cap }}(less_{{ cap }}(a, b), a, b); }
INLINE vec_{{ cap }} max_{{ cap }}(vec_{{ cap }} a, vec_{{ cap }} b) { return choose_{{ cap }}(less_{{ cap }}(b, a), a, b); }
{% endfor %}
