/* Nearest 24-bit number, halves to even: how a float holds it. */
static int64_t rounded(int64_t v)
{
    uint64_t size = v < 0 ? -(uint64_t)v : (uint64_t)v;
    uint8_t drop = 0;

    while (size >> drop >> 24)
        drop++;
    if (drop) {
        const uint64_t rest = size & (((uint64_t)1 << drop) - 1), half = (uint64_t)1 << (drop - 1);
        size = (size >> drop) + (rest > half || (rest == half && (size >> drop & 1)));
        size <<= drop;
    }
    return v < 0 ? -(int64_t)size : (int64_t)size;
}

/* Nearest integer to (a * p + b * q + offset) / 2^places, halves to even, from low to high. Every bit is what fused
   multiply-adds of floats give, which round after each addition; that tells only near a half. */
static int added(int b, int64_t q, int64_t offset, int a, int64_t p, int places, int low, int high)
{
    const int64_t one = (int64_t)1 << places, half = one >> 1;
    int64_t v = a * p + b * q + offset, rest = (v & (one - 1)) - half;
    int found;

    if (rest > -(one >> 6) && rest < one >> 6) {
        v = rounded(a * p + rounded(b * q + offset));
        rest = (v & (one - 1)) - half;
    }
    found = (int)((uint64_t)(v + 65536 * one) >> places) - 65536; /* the floor: v is above -65536 * one */
    found += rest > 0 || (!rest && (found & 1));
    return found < low ? low : found > high ? high : found;
}
