/* {{ title }}
   All weights, 16 outputs at a time: weight[block][input][16]. */
static void {{ name }}(const float *RESTRICT in, float *RESTRICT out{{ ", const uint32_t *RESTRICT place" if gather }},
    const float *RESTRICT weight, const float *RESTRICT bias{{ parameters }})
{
    /* Four sums of each output, so that an addition need not wait for the last one; two where registers are few. */
    enum { FOUR = LANES_16 >= 8 };
    int o, block, i;
    for (block = 0; block < {{ outputs }}; block += 16) {
        float sums[16];
        {% for k in range(16) %}
        vec_16 a{{ k }} = splat_16(0.0f), b{{ k }} = a{{ k }}, c{{ k }} = a{{ k }}, d{{ k }} = a{{ k }};
        {% endfor %}
        for (i = 0; i + 4 <= {{ inputs }}; i += 4, weight += 64) {
            {% for n in range(4) %}
            const vec_16 v{{ n }} = splat_16(in[{{ "place[i + %d]" % n if gather else "i + %d" % n }}]);
            {% endfor %}
            {% for k in range(16) %}
            if ({{ k }} * LANES_16 < 16) {
                a{{ k }} += v0 * load_16(weight + {{ k }} * LANES_16);
                b{{ k }} += v1 * load_16(weight + 16 + {{ k }} * LANES_16);
                if (FOUR) {
                    c{{ k }} += v2 * load_16(weight + 32 + {{ k }} * LANES_16);
                    d{{ k }} += v3 * load_16(weight + 48 + {{ k }} * LANES_16);
                } else {
                    a{{ k }} += v2 * load_16(weight + 32 + {{ k }} * LANES_16);
                    b{{ k }} += v3 * load_16(weight + 48 + {{ k }} * LANES_16);
                }
            }
            {% endfor %}
        }
        for (; i < {{ inputs }}; i++, weight += 16) {
            const vec_16 v = splat_16(in[{{ "place[i]" if gather else "i" }}]);
            {% for k in range(16) %}
            if ({{ k }} * LANES_16 < 16)
                a{{ k }} += v * load_16(weight + {{ k }} * LANES_16);
            {% endfor %}
        }
        {% for k in range(16) %}
        if ({{ k }} * LANES_16 < 16)
            store_16(sums + {{ k }} * LANES_16 % 16, FOUR ? (a{{ k }} + b{{ k }}) + (c{{ k }} + d{{ k }}) : a{{ k }} + b{{ k }});
        {% endfor %}
        for (o = block; o < block + 16 && o < {{ outputs }}; o++) {
            float v = sums[o - block] + bias[o];
            {% for line in channel + lines %}
            {{ line | replace("ROW", "0") | replace("COLUMN", "0") }}
            {% endfor %}
            out[o * {{ out_plane }}] = v;
        }
    }
}
