/* Round to 24 bits, halves to even; returns how many bits were dropped. */
static inline uint8_t shorten(uint32_t *size)
{
    uint8_t drop = 0, last = 0, more = 0;

    for (; *size >> 24; *size >>= 1, drop++) {
        more |= last;
        last = *size & 1;
    }
    *size += last && (more || (*size & 1));
    return drop;
}
