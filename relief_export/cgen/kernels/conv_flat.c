/* {{ title }}
   A plane of the result is computed as {{ count }} elements in a row, {{ pitch }} apart from one row to the next: those
   between the rows are of no use and are left behind when `scratch` is read. */
static void {{ name }}(const float *RESTRICT in, float *RESTRICT out, float *RESTRICT scratch, const uint32_t *RESTRICT first,
    const {{ index }} *RESTRICT place, const float *RESTRICT weight, const float *RESTRICT bias{{ parameters }})
{
    int o, t, y, x;
    for (o = 0; o < {{ outputs }}; o++) {
        float *const to = out + o * {{ out_plane }};
        {% for line in channel %}
        {{ line }}
        {% endfor %}
        for (t = 0; t < {{ count }}; t += {{ tile }} * LANES_16) {
            const float *const from = in + t;
            uint32_t j;
            {% for c in range(chains) %}
            vec_16 {% for k in range(tile) %}a{{ k }}_{{ c }} = splat_16({{ "bias[o]" if c == 0 else "0.0f" }}){{ ", " if not loop.last else ";" }}{% endfor %}

            {% endfor %}
            for (j = first[o]; j < first[o + 1]; j++) {
                const float *const p = from + place[j];
                const float *const w = weight + {{ taps | length }} * (size_t)j;
                vec_16 v;
                {% for tap in taps %}
                {% set c = loop.index0 % chains %}
                v = splat_16(w[{{ loop.index0 }}]);
                {% for k in range(tile) %}
                {% if k %}
                if ({{ k }} * LANES_16 < {{ count }})
                    a{{ k }}_{{ c }} += v * load_16(p + {{ tap }} + {{ k }} * LANES_16);
                {% else %}
                a0_{{ c }} += v * load_16(p + {{ tap }});
                {% endif %}
                {% endfor %}
                {% endfor %}
            }
            {% for k in range(tile) %}
            {% if k %}
            if ({{ k }} * LANES_16 < {{ count }})
                store_16(scratch + t + {{ k }} * LANES_16, {% for c in range(chains) %}a{{ k }}_{{ c }}{{ " + " if not loop.last }}{% endfor %});
            {% else %}
            store_16(scratch + t, {% for c in range(chains) %}a0_{{ c }}{{ " + " if not loop.last }}{% endfor %});
            {% endif %}
            {% endfor %}
        }
        for (y = 0; y < {{ height }}; y++)
            for (x = 0; x < {{ width }}; x += LANES_{{ cap }}) {
                const int left = x < {{ width }} - LANES_{{ cap }} ? x : {{ width }} - LANES_{{ cap }};
                {% if pool %}
                float *const s = scratch + {{ count_padded }} + y * {{ width }} + left;
                {% else %}
                float *const s = to + y * {{ out_pitch }} + left;
                {% endif %}
                vec_{{ cap }} v = load_{{ cap }}(scratch + y * {{ pitch }} + left);
                {% for line in lines %}
                {{ line | replace("ROW", "y") | replace("COLUMN", "left") }}
                {% endfor %}
                store_{{ cap }}(s, v);
            }
        {% if pool %}
        pool_rows(scratch + {{ count_padded }}, to, {{ height // 2 }}, {{ width // 2 }}, {{ width }}, {{ out_pitch }});
        {% endif %}
    }
}
