/* Comparisons of floats by their bits: smaller and faster than the library's. As there, what is no number is neither above
   nor below anything. */
#define BELOW_ZERO(v) (bits_of(v) - 0x80000001u < 0x7F800000u)
static inline uint32_t bits_of(float v)
{
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    return bits;
}
{% if above %}

#ifdef __AVR__ /* whose library is smaller still */
#define ABOVE(a, b) ((a) > (b))
#else
#define ABOVE(a, b) above(a, b)
static int32_t ordered(float v)
{
    const uint32_t bits = bits_of(v);
    return bits >> 31 ? -(int32_t)(bits & 0x7FFFFFFF) : (int32_t)bits;
}

static int above(float a, float b)
{
    const int32_t first = ordered(a), second = ordered(b);
    return first > second && first <= 0x7F800000 && second >= -0x7F800000;
}
#endif
{% endif %}
