{% set step = "LANES_%d" % cap %}
{% if pool %}
{% set step = "(LANES_%d < 2 ? 2 : LANES_%d)" % (cap, cap) %}
{% endif %}
/* {{ title }}
   A tile of {{ rows }} rows by one vector stays in registers while the loop goes over what is kept of an output channel. */
static void {{ name }}(const float *RESTRICT in, float *RESTRICT out, const uint32_t *RESTRICT first,
    const {{ index }} *RESTRICT place, const float *RESTRICT weight, const float *RESTRICT bias{{ parameters }})
{
    int top, left, o;
    for (top = 0; top < {{ height }}; top += {{ rows }}) {
        /* The last tiles overlap those before them, where the size is no multiple. */
        const int y = top < {{ height - rows }} ? top : {{ height - rows }};
        for (left = 0; left < {{ width }}; left += {{ step }}) {
            const int x = left < {{ width }} - {{ step }} ? left : {{ width }} - {{ step }};
            for (o = 0; o < {{ outputs }}; o++) {
                float *const to = out + o * {{ out_plane }};
                {% for line in channel %}
                {{ line }}
                {% endfor %}
                {% if pool %}
                float tile[{{ rows }} * {{ step }}];
                int column;
                for (column = x; column < x + {{ step }}; column += LANES_{{ cap }}) {
                {% else %}
                const int column = x;
                {
                {% endif %}
                    const float *const from = in + y * {{ pitch }} + column;
                    uint32_t j;
                    {% if pairs %}
#if PAIRS
                    /* Each sum is of two rows, {{ half }} apart, and there are two of each: one for every other column of the kernel. */
                    {% for r in range(half) %}
                    pair a{{ r }}_0 = splat_pair(bias[o]), a{{ r }}_1 = splat_pair(0.0f);
                    {% endfor %}
                    for (j = first[o]; j < first[o + 1]; j++) {
                        const float *const p = from + place[j], *const q = p + {{ half * pitch }};
                        const float *const w = weight + {{ kh * kw }} * (size_t)j;
                        pair v;
                        {% for dx in range(kw) %}
                        {
                            const pair {% for dy in range(kh) %}w{{ dy }} = splat_pair(w[{{ dy * kw + dx }}]){{ ", " if not loop.last else ";" }}{% endfor %}

                            {% for part in columns[dx] %}
                            {% for row in range(half + part.reach) %}
                            v = pair_of(load_8(p + {{ row * pitch + part.base }}), load_8(q + {{ row * pitch + part.base }}));
                            KEEP(v);
                            {% for dy, down in part.taps if 0 <= row - down < half %}
                            a{{ row - down }}_{{ dx % 2 }} += w{{ dy }} * v;
                            {% endfor %}
                            {% endfor %}
                            {% endfor %}
                        }
                        {% endfor %}
                    }
                    {% for r in range(half) %}
                    const vec_8 a{{ r }} = lower(a{{ r }}_0 + a{{ r }}_1), a{{ r + half }} = upper(a{{ r }}_0 + a{{ r }}_1);
                    {% endfor %}
#else
                    {% endif %}
                    {% for r in range(rows) %}
                    vec_{{ cap }} a{{ r }} = splat_{{ cap }}(bias[o]);
                    {% endfor %}
                    for (j = first[o]; j < first[o + 1]; j++) {
                        const float *const p = from + place[j];
                        const float *const w = weight + {{ kh * kw }} * (size_t)j;
                        vec_{{ cap }} v;
                        {% for dx in range(kw) %}
                        {
                            const vec_{{ cap }} {% for dy in range(kh) %}w{{ dy }} = splat_{{ cap }}(w[{{ dy * kw + dx }}]){{ ", " if not loop.last else ";" }}{% endfor %}

                            {% for part in columns[dx] %}
                            {% for row in range(rows + part.reach) %}
                            v = load_{{ cap }}(p + {{ row * pitch + part.base }});
                            {% if kh > 1 %}
                            KEEP(v);
                            {% endif %}
                            {% for dy, down in part.taps if 0 <= row - down < rows %}
                            a{{ row - down }} += w{{ dy }} * v;
                            {% endfor %}
                            {% endfor %}
                            {% endfor %}
                        }
                        {% endfor %}
                    }
                    {% if pairs %}
#endif
                    {% endif %}
                    {% for r in range(rows) %}
                    {
                        vec_{{ cap }} v = a{{ r }};
                        {% for line in lines %}
                        {{ line | replace("ROW", "(y + %d)" % r) | replace("COLUMN", "column") }}
                        {% endfor %}
                        {% if pool %}
                        store_{{ cap }}(tile + {{ r }} * {{ step }} + column - x, v);
                        {% else %}
                        store_{{ cap }}(to + (y + {{ r }}) * {{ out_pitch }} + column, v);
                        {% endif %}
                    }
                    {% endfor %}
                }
                {% if pool %}
                pool_rows(tile, to + y / 2 * {{ out_pitch }} + x / 2, {{ rows // 2 }}, {{ step }} / 2, {{ step }}, {{ out_pitch }});
                {% endif %}
            }
        }
    }
}
