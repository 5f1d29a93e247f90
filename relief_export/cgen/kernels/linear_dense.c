/* {{ title }}
   All weights, 16 outputs at a time: weight[block][input][16]. */
static void {{ name }}(const float *RESTRICT in, float *RESTRICT out{{ ", const uint32_t *RESTRICT place" if gather }},
    const float *RESTRICT weight, const float *RESTRICT bias{{ parameters }})
{
    int o, block, i;
    for (block = 0; block < {{ outputs }}; block += 16) {
        float sums[16];
        {% for k in range(16) %}
        vec_16 a{{ k }} = splat_16(0.0f), b{{ k }} = a{{ k }};
        {% endfor %}
        for (i = 0; i + 2 <= {{ inputs }}; i += 2, weight += 32) {
            const vec_16 u = splat_16(in[{{ "place[i]" if gather else "i" }}]), v = splat_16(in[{{ "place[i + 1]" if gather else "i + 1" }}]);
            {% for k in range(16) %}
            if ({{ k }} * LANES_16 < 16) {
                a{{ k }} += u * load_16(weight + {{ k }} * LANES_16);
                b{{ k }} += v * load_16(weight + 16 + {{ k }} * LANES_16);
            }
            {% endfor %}
        }
        {% if inputs % 2 %}
        {
            const vec_16 u = splat_16(in[{{ "place[i]" if gather else "i" }}]);
            {% for k in range(16) %}
            if ({{ k }} * LANES_16 < 16)
                a{{ k }} += u * load_16(weight + {{ k }} * LANES_16);
            {% endfor %}
            weight += 16;
        }
        {% endif %}
        {% for k in range(16) %}
        if ({{ k }} * LANES_16 < 16)
            store_16(sums + {{ k }} * LANES_16 % 16, a{{ k }} + b{{ k }});
        {% endfor %}
        for (o = block; o < block + 16 && o < {{ outputs }}; o++) {
            float v = sums[o - block] + bias[o];
            {% for line in channel_lines + lines %}
            {{ line | replace("ROW", "0") | replace("COLUMN", "0") }}
            {% endfor %}
            out[o * {{ out_plane }}] = v;
        }
    }
}
