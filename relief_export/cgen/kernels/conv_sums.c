/* {{ title }}
   Not what is read is shifted by a column, but what is summed: for each column of the kernel all rows of the plane are
   summed as they lie, {{ count }} elements in a row, {{ pitch }} apart from one row to the next, and the {{ kw }} sums are put together at the
   end. So one load serves {{ kw }} products, and rows that are shorter than a vector leave none of it idle. */
static void {{ name }}(const float *RESTRICT in, float *RESTRICT out, float *RESTRICT scratch, const uint32_t *RESTRICT first,
    const {{ index }} *RESTRICT place, const float *RESTRICT weight, const float *RESTRICT bias{{ parameters }})
{
    /* A single vector would wait for its own sums: there each row of the kernel has some. */
    enum { SPLIT = {{ count }} <= LANES_16 };
    {% if edges %}
    static const float column[{{ width }}] = { {% for x in range(width) %}{{ x }}{{ ", " if not loop.last }}{% endfor %} };
    {% endif %}
    int o, t, y, x;
    for (o = 0; o < {{ outputs }}; o++) {
        float *const to = out + o * {{ out_plane }};
        {% for line in channel %}
        {{ line }}
        {% endfor %}
        for (t = 0; t < {{ count }}; t += {{ tile }} * LANES_16) {
            const float *const from = in + t;
            float *const s = scratch + {{ margin }} + t;
            uint32_t j;
            {% for dx in range(kw) %}
            vec_16 {% for k in range(tile) %}a{{ k }}_{{ dx }} = splat_16(0.0f){{ ", " if not loop.last }}{% endfor %}{% for dy in range(1, kh) %}, b{{ dy }}_{{ dx }} = splat_16(0.0f){% endfor %};
            {% endfor %}
            for (j = first[o]; j < first[o + 1]; j++) {
                const float *const p = from + place[j];
                const float *const w = weight + {{ kh * kw }} * (size_t)j;
                vec_16 v;
                {% for dy in range(kh) %}
                {
                    const vec_16 {% for dx in range(kw) %}w{{ dx }} = splat_16(w[{{ dy * kw + dx }}]){{ ", " if not loop.last else ";" }}{% endfor %}

                    v = load_16(p + {{ dy * pitch }});
                    KEEP(v);
                    {% if dy %}
                    if (SPLIT) {
                        {% for dx in range(kw) %}
                        b{{ dy }}_{{ dx }} += w{{ dx }} * v;
                        {% endfor %}
                    } else {
                        {% for dx in range(kw) %}
                        a0_{{ dx }} += w{{ dx }} * v;
                        {% endfor %}
                    }
                    {% else %}
                    {% for dx in range(kw) %}
                    a0_{{ dx }} += w{{ dx }} * v;
                    {% endfor %}
                    {% endif %}
                    {% for k in range(1, tile) %}
                    if ({{ k }} * LANES_16 < {{ count }}) {
                        v = load_16(p + {{ dy * pitch }} + {{ k }} * LANES_16);
                        KEEP(v);
                        {% for dx in range(kw) %}
                        a{{ k }}_{{ dx }} += w{{ dx }} * v;
                        {% endfor %}
                    }
                    {% endfor %}
                }
                {% endfor %}
            }
            {% for dx in range(kw) %}
            store_16(s + {{ dx * part }}, SPLIT ? a0_{{ dx }}{% for dy in range(1, kh) %} + b{{ dy }}_{{ dx }}{% endfor %} : a0_{{ dx }});
            {% for k in range(1, tile) %}
            if ({{ k }} * LANES_16 < {{ count }})
                store_16(s + {{ dx * part }} + {{ k }} * LANES_16, a{{ k }}_{{ dx }});
            {% endfor %}
            {% endfor %}
        }
        for (y = 0; y < {{ height }}; y++)
            for (x = 0; x < {{ width }}; x += LANES_{{ cap }}) {
                const int left = x < {{ width }} - LANES_{{ cap }} ? x : {{ width }} - LANES_{{ cap }};
                const float *const p = scratch + {{ margin }} + y * {{ pitch }} + left;
                {% if pool %}
                float *const s = scratch + {{ kw * part }} + y * {{ width }} + left;
                {% else %}
                float *const s = to + y * {{ out_pitch }} + left;
                {% endif %}
                {% if edges %}
                const vec_{{ cap }} at = load_{{ cap }}(column + left);
                {% endif %}
                vec_{{ cap }} v = splat_{{ cap }}(bias[o]);
                {% for dx in range(kw) %}
                {% set shift = dx - before %}
                {% set sum = "load_%d(p + %d)" % (cap, dx * part + shift) %}
                {% if shift < 0 %}
                /* A column before the first is not the last one of the row above. */
                v += floats_{{ cap }}(bits_{{ cap }}({{ sum }}) & less_{{ cap }}(splat_{{ cap }}({{ -shift }} - 0.5f), at));
                {% elif shift > in_width - width %}
                v += floats_{{ cap }}(bits_{{ cap }}({{ sum }}) & less_{{ cap }}(at, splat_{{ cap }}({{ in_width - shift }} - 0.5f)));
                {% else %}
                v += {{ sum }};
                {% endif %}
                {% endfor %}
                {% for line in lines %}
                {{ line | replace("ROW", "y") | replace("COLUMN", "left") }}
                {% endfor %}
                store_{{ cap }}(s, v);
            }
        {% if pool %}
        pool_rows(scratch + {{ kw * part }}, to, {{ height // 2 }}, {{ width // 2 }}, {{ width }}, {{ out_pitch }});
        {% endif %}
    }
}
