#ifdef WITHOUT_FPU
/* As float arithmetic does it, bit for bit, in integers: what libraries need for floats takes 1 to 5 kB. A float is
   size * 2^(exponent - 150) with a size of 24 bits. The scales are {{ input.multiplier }} / 2^{{ input.shift }} in and {{ output.multiplier }} / 2^{{ output.shift }} out. */
static {{ type }} quantised(uint32_t bits)
{
    int places = (int)(bits >> 23 & 255) - {{ 150 - input.shift }}, found = 0;
    uint32_t rest = (bits & 0x7FFFFF) | 0x800000;

    if (places > 8)
        found = 512; /* out of range */
    else if (places >= -1) { /* below that it is less than a half */
        uint32_t near;
        int digits = 24;
        for (places += 2; places > 0; places--) { /* twice the quotient, a binary digit at a time */
            found *= 2;
            if (rest >= {{ input.multiplier }}u) {
                rest -= {{ input.multiplier }}u;
                found++;
            }
            rest *= 2;
        }
        for (int part = found; part; part /= 2)
            digits--;
        near = {{ input.multiplier }}u >> digits; /* twice the remainder that rounding to 24 bits loses */
        if (rest + near >= 2 * {{ input.multiplier }}u) {
            found++;
            rest = 0;
        }
        /* A half goes to the even neighbour. */
        found = found / 2 + ((found & 1) && (rest > near || (found & 2)));
    }
    found = (bits >> 31 ? -found : found) + {{ input.zero }};
    return ({{ type }})(found < {{ low }} ? {{ low }} : found > {{ high }} ? {{ high }} : found);
}

static uint32_t expanded(int number)
{
    uint32_t size = (uint32_t)(number < 0 ? -number : number) * {{ output.multiplier }}u;
    const uint8_t drop = shorten(&size);

    if (!number)
        return 0;
    /* The highest bit of the size, and what rounding carries into the next one, add to the exponent. */
    return ((uint32_t)({{ 149 - output.shift }} + drop) << 23) + size + (number < 0 ? 0x80000000u : 0);
}
#endif

/* Floats to integers, halves to even. */
static void quantise(const float *in, {{ type }} *out, int outputs, int height, int width, int out_plane, int out_pitch)
{
    for (int o = 0; o < outputs; o++)
        for (int y = 0; y < height; y++)
            for (int x = 0; x < width; x++) {
                {{ type }} *const at = out + (ptrdiff_t)o * out_plane + (ptrdiff_t)y * out_pitch + x;
#ifdef WITHOUT_FPU
                uint32_t bits;
                memcpy(&bits, in++, sizeof bits);
                *at = quantised(bits);
#else
                volatile float v = *in++ / {{ input.scale }};
                v = v > {{ low - input.zero }} ? v < {{ high - input.zero }} ? v : {{ high - input.zero }} : {{ low - input.zero }}; /* what is no number becomes the least */
                v = v + 12582912.0f; /* 1.5 * 2^23 rounds what it is added to */
                *at = ({{ type }})((int)(v - 12582912.0f) + {{ input.zero }});
#endif
            }
}

/* Integers to floats. */
static void expand(const {{ type }} *in, float *out, int size)
{
    for (; size > 0; size--, in++, out++) {
        const int number = *in - {{ output.parenthesised }};
#ifdef WITHOUT_FPU
        const uint32_t bits = expanded(number);
        memcpy(out, &bits, sizeof bits);
#else
        *out = (float)number * {{ output.scale }};
#endif
    }
}
