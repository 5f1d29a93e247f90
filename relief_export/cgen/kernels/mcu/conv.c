/* Convolution {{ kernel[0] }} x {{ kernel[1] }}{{ note }}. {% if form == "dense" %}Every kernel is there.{% elif form == "pairs" %}An output channel has counts[o] weights. A byte is a gap from the one before and,
   times 16, the number of a centre; with a gap of 15 that number plus 1 says how often, and another byte follows.{% else %}An output channel has counts[o] {{ form }}, each at a gap from
   the one before it; 255 skips on.{% endif %} {% if pool %}The greatest of each 2 x 2 outputs is kept.{% else %}{{ rows * columns }} outputs are summed at once.{% endif %} */
LAYER NAME({{ parameters }})
{
    {% if nibbles %}
    size_t first = 0;
    {% endif %}
    {% if groups %}
    int member = 0;
    {% endif %}
    for (int o = 0; o < outputs; o++) {
        {% if form != "dense" %}
        const int kept = {{ count }}(counts + o);
        {% endif %}
        {% if form == "kernels" or form == "elements" %}
        const uint8_t *gap = gaps;
        {% endif %}
        {% if nibbles %}
        size_t n = first;
        {% else %}
        const {{ stored }} *value = values;
        {% endif %}
        {% for line in channel %}
        {{ line }}
        {% endfor %}
        for (int y = 0; y < height; y += {{ rows }}) {
            {% if rows > 1 and not pool %}
            const int top = y < height - {{ rows }} ? y : height - {{ rows }}; /* the last ones overlap */
            {% else %}
            const int top = y;
            {% endif %}
            for (int x = 0; x < width; x += {{ columns }}) {
                {% if columns > (2 if pool else 1) %}
                const int left = x < width - {{ columns }} ? x : width - {{ columns }};
                {% else %}
                const int left = x;
                {% endif %}
                const {{ element }} *at = in + (ptrdiff_t)top * {{ strides[0] }} * pitch + left * {{ strides[1] }};
                {{ sum }} {% for name in names %}{{ name }} = 0{{ ", " if not loop.last }}{% endfor %};
                {% if nibbles %}
                n = first;
                {% else %}
                value = values;
                {% endif %}
                {% if form == "dense" %}
                for (int k = inputs; k > 0; k--, at += plane) {
                {% elif form == "pairs" %}
                for (int k = kept; k > 0; k--) {
                    uint8_t pair;
                    while (((pair = ROM_UINT8(value++)) & 15) == 15)
                        at += 15 * ((pair >> 4) + 1);
                    at += pair & 15;
                {% else %}
                gap = gaps;
                for (int k = kept; k > 0; k--) {
                    uint8_t skip;
                    while ((skip = ROM_UINT8(gap++)) == 255)
                        at += (ptrdiff_t)255{{ times_plane }};
                    at += (ptrdiff_t)skip{{ times_plane }};
                {% endif %}
                    const {{ element }} *q = at;
                    {% if sliding %}
#ifdef UNROLL
                    {% if kernel[0] > 1 %}
                    for (int i = 0; i < {{ kernel[0] }}; i++, q += {{ next_row }})
                    {% endif %}
                    {
                        {% for r in range(rows) %}
                        const {{ element }} *q{{ r }} = {{ "q + " ~ below if r else "q" }};
                        {% for c in range(columns - 1) %}
                        {{ factor }} x{{ r }}{{ c }} = *q{{ r }}++;
                        {% endfor %}
                        {% endfor %}
                        UNROLL({{ kernel[1] }})
                        for (int j = 0; j < {{ kernel[1] }}; j++) {
                            const {{ factor }} w = {{ fetch }};
                            {% for r in range(rows) %}
                            const {{ factor }} x{{ r }}{{ columns - 1 }} = *q{{ r }}++;
                            {% for c in range(columns) %}
                            {{ names[r * columns + c] }} += w * x{{ r }}{{ c }};
                            {% endfor %}
                            {% for c in range(columns - 1) %}
                            x{{ r }}{{ c }} = x{{ r }}{{ c + 1 }};
                            {% endfor %}
                            {% endfor %}
                        }
                    }
#else
                    {% endif %}
                    {% if kernel[0] > 1 %}
                    for (int i = 0; i < {{ kernel[0] }}; i++, q += {{ next_row }}{% if kernel[1] > 1 %} - {{ kernel[1] * dilations[1] }}{% endif %})
                    {% endif %}
                    {% if kernel[1] > 1 %}
                    for (int j = 0; j < {{ kernel[1] }}; j++, q += {{ dilations[1] }})
                    {% endif %}
                    {
                        const {{ factor }} w = {{ fetch }};
                        {% for name, place in places %}
                        {{ name }} += w * {{ place }};
                        {% endfor %}
                    }
                    {% if sliding %}
#endif
                    {% endif %}
                }
                {
                    {% if pool %}
                    {% set results = columns // 2 %}
                    {% for t in range(results) %}
                    {% set four = [names[2 * t], names[2 * t + 1], names[columns + 2 * t], names[columns + 2 * t + 1]] %}
                    {% for one, other in [(0, 1), (2, 3), (0, 2)] %}
                    if (ABOVE({{ four[other] }}, {{ four[one] }}))
                        {{ four[one] }} = {{ four[other] }};
                    {% endfor %}
                    {% endfor %}
                    {% else %}
                    {% set results = rows * columns %}
                    {% endif %}
                    {% if results > 1 %}
                    const {{ sum }} found[{{ results }}] = { {% for t in range(results) %}{{ names[2 * t if pool else t] }}{{ ", " if not loop.last }}{% endfor %} };
                    for (int t = 0; t < {{ results }}; t++) {
                        {% if pool %}
                        const int row = top / 2, column = left / 2 + t;
                        {% else %}
                        const int row = top + t / {{ columns }}, column = left + t % {{ columns }};
                        {% endif %}
                        {{ sum }} v = found[t];
                        {% for line in lines %}
                        {{ line }}
                        {% endfor %}
                    }
                    {% else %}
                    const int row = top{{ " / 2" if pool }}, column = left{{ " / 2" if pool }};
                    {{ sum }} v = a;
                    {% for line in lines %}
                    {{ line }}
                    {% endfor %}
                    {% endif %}
                }
            }
        }
        {% if form == "kernels" or form == "elements" %}
        gaps = gap;
        {% endif %}
        {% if nibbles %}
        first = n;
        {% else %}
        values = value;
        {% endif %}
        {% if groups %}
        if (++member == members) {
            member = 0;
            in += group;
        }
        {% endif %}
    }
}
