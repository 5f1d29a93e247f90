{% set columns = "LANES_%d" % cap %}
{% if pool %}
{% set columns = "(LANES_%d < 2 ? 2 : LANES_%d)" % (cap, cap) %}
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
        for (left = 0; left < {{ width }}; left += {{ columns }}) {
            const int x = left < {{ width }} - {{ columns }} ? left : {{ width }} - {{ columns }};
            for (o = 0; o < {{ outputs }}; o++) {
                float *const to = out + o * {{ out_plane }};
                {% for line in channel_lines %}
                {{ line }}
                {% endfor %}
                {% if pool %}
                float tile[{{ rows }} * {{ columns }}];
                int column;
                for (column = x; column < x + {{ columns }}; column += LANES_{{ cap }}) {
                {% else %}
                const int column = x;
                {
                {% endif %}
                    const float *const from = in + y * {{ pitch }} + column;
                    {% for r in range(rows) %}
                    vec_{{ cap }} a{{ r }} = splat_{{ cap }}(bias[o]);
                    {% endfor %}
                    uint32_t j;
                    for (j = first[o]; j < first[o + 1]; j++) {
                        const float *const p = from + place[j];
                        const float *const w = weight + {{ kh * kw }} * (size_t)j;
                        vec_{{ cap }} v;
                        {% for dx in range(kw) %}
                        {
                            const vec_{{ cap }} {% for dy in range(kh) %}w{{ dy }} = splat_{{ cap }}(w[{{ dy * kw + dx }}]){{ ", " if not loop.last else ";" }}{% endfor %}

                            {% for row in range(rows + kh - 1) %}
                            v = load_{{ cap }}(p + {{ row * pitch + dx }});
                            {% if kh > 1 %}
                            KEEP(v);
                            {% endif %}
                            {% for dy in range(kh) if 0 <= row - dy < rows %}
                            a{{ row - dy }} += w{{ dy }} * v;
                            {% endfor %}
                            {% endfor %}
                        }
                        {% endfor %}
                    }
                    {% for r in range(rows) %}
                    {
                        vec_{{ cap }} v = a{{ r }};
                        {% for line in lines %}
                        {{ line | replace("ROW", "(y + %d)" % r) | replace("COLUMN", "column") }}
                        {% endfor %}
                        {% if pool %}
                        store_{{ cap }}(tile + {{ r }} * {{ columns }} + column - x, v);
                        {% else %}
                        store_{{ cap }}(to + (y + {{ r }}) * {{ out_pitch }} + column, v);
                        {% endif %}
                    }
                    {% endfor %}
                }
                {% if pool %}
                pool_rows(tile, to + y / 2 * {{ out_pitch }} + x / 2, {{ rows // 2 }}, {{ columns }} / 2, {{ columns }}, {{ out_pitch }});
                {% endif %}
            }
        }
    }
}
