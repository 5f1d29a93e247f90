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

/* GCC 12 copies a constant array by storing its numbers, and with AVX-512 stores one into all 16 lanes of a vector of
   which it fills only the first 8: let it not see what the pointer points to. */
#if defined(__GNUC__) && !defined(__clang__)
#define HIDE(p) __asm__("" : "+r"(p))
#else
#define HIDE(p) (void)0
#endif

/* A product and a sum may be one instruction, even where the compiler is told to follow C99 to the letter. */
#if LANES > 1 && defined(__clang__)
#pragma STDC FP_CONTRACT ON
#elif LANES > 1
#pragma GCC optimize("fp-contract=fast")
#endif
{% if evens %}
#if defined(__clang__)
#define SHUFFLE(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(type, a, b, ...) __builtin_shuffle(a, b, (type){ __VA_ARGS__ })
#endif
{% endif %}
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
{% if evens %}
/* Of the floats from p on those with even numbers, and those with odd ones. */
INLINE vec_{{ cap }} evens_{{ cap }}(const float *p)
{
    const vec_{{ cap }} a = load_{{ cap }}(p), b = load_{{ cap }}(p + LANES_{{ cap }});
#if LANES_{{ cap }} == 16
    return SHUFFLE(ivec_{{ cap }}, a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#elif LANES_{{ cap }} == 8
    return SHUFFLE(ivec_{{ cap }}, a, b, 0, 2, 4, 6, 8, 10, 12, 14);
#else
    return SHUFFLE(ivec_{{ cap }}, a, b, 0, 2, 4, 6);
#endif
}
INLINE vec_{{ cap }} odds_{{ cap }}(const float *p)
{
    const vec_{{ cap }} a = load_{{ cap }}(p), b = load_{{ cap }}(p + LANES_{{ cap }});
#if LANES_{{ cap }} == 16
    return SHUFFLE(ivec_{{ cap }}, a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif LANES_{{ cap }} == 8
    return SHUFFLE(ivec_{{ cap }}, a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
    return SHUFFLE(ivec_{{ cap }}, a, b, 1, 3, 5, 7);
#endif
}
{% endif %}
INLINE ivec_{{ cap }} bits_{{ cap }}(vec_{{ cap }} v) { return (ivec_{{ cap }})v; }
INLINE vec_{{ cap }} floats_{{ cap }}(ivec_{{ cap }} v) { return (vec_{{ cap }})v; }
INLINE ivec_{{ cap }} less_{{ cap }}(vec_{{ cap }} a, vec_{{ cap }} b) { return (ivec_{{ cap }})(a < b); }
#else
typedef float vec_{{ cap }};
typedef int32_t ivec_{{ cap }};
INLINE vec_{{ cap }} load_{{ cap }}(const float *p) { return *p; }
INLINE void store_{{ cap }}(float *p, vec_{{ cap }} v) { *p = v; }
INLINE vec_{{ cap }} splat_{{ cap }}(float x) { return x; }
{% if evens %}
INLINE vec_{{ cap }} evens_{{ cap }}(const float *p) { return p[0]; }
INLINE vec_{{ cap }} odds_{{ cap }}(const float *p) { return p[1]; }
{% endif %}
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
{% if pairs %}

/* Two vectors of 8 as one of 16, where there are such: an instruction for two short rows. */
#if LANES == 16 && (defined(__clang__) || __GNUC__ >= 12)
#define PAIRS 1
typedef float pair __attribute__((vector_size(64)));
INLINE pair splat_pair(float x) { const pair zero = {0}; return x - zero; }
INLINE pair pair_of(vec_8 a, vec_8 b)
{
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
INLINE vec_8 lower(pair v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7); }
INLINE vec_8 upper(pair v) { return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15); }
#else
#define PAIRS 0
#endif
{% endif %}
