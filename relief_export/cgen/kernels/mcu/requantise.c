/* Nearest integer to sum * multiplier / 2^shift, plus zero, from low to high; a scale has the shift in its upper 8 bits and
   the multiplier below. Every bit is what float arithmetic gives with multiplier / 2^shift: sum and product are each rounded
   to 24 bits first, and halves go to the even neighbour. */
static {{ type }} requantise(int32_t sum, uint32_t scale, int zero, int low, int high)
{
    const uint32_t multiplier = scale & 0xFFFFFF;
    uint8_t shift = (uint8_t)(scale >> 24);
    uint32_t size = sum < 0 ? -(uint32_t)sum : (uint32_t)sum, whole = 0;

    shift -= shorten(&size); /* if that carried into bit 24, the product below still fits */
    if (shift < 25) { /* a scale of 1/2 and more */
        if (size >= 4096)
            whole = 1024; /* far outside */
        size = (size & 4095) << 12;
        shift += 12;
    }
    if (!whole && shift < 50) { /* beyond that it is less than a half */
        const uint16_t a = (uint16_t)(size >> 12), b = size & 4095, c = (uint16_t)(multiplier >> 12), d = multiplier & 4095;
        const uint32_t under = (uint32_t)b * d, middle = (uint32_t)a * d + (uint32_t)b * c + (under >> 12);
        /* The product is above * 2^24 + below. */
        const uint32_t below = (middle & 4095) << 12 | (under & 4095), above = (uint32_t)a * c + (middle >> 12);
        const uint32_t half = (uint32_t)1 << (shift - 25), part = above & (2 * half - 1);
        whole = above >> (shift - 24);
        if (part == half || part + 1 == half) { /* 24 bits may not tell it from a half */
            uint32_t near = above;
            while (near & (near - 1))
                near &= near - 1;
            if (part == half ? below <= near : ((uint32_t)1 << 24) - below <= near)
                whole += whole & 1;
            else if (part == half)
                whole++;
        } else if (part > half)
            whole++;
        if (whole > 1024)
            whole = 1024;
    }
    {
        const int found = (sum < 0 ? -(int)whole : (int)whole) + zero;
        return ({{ type }})(found < low ? low : found > high ? high : found);
    }
}
