/* Matrix times vector. {% if dense %}Every weight is there.{% else %}Output o has counts[o] connections, each at a gap from the one before it; 255 skips on.{% endif %} */
LAYER NAME({{ parameters }})
{
    {% if code == "codebook16" %}
    size_t n = 0;
    {% endif %}
    for (int o = 0; o < outputs; o++) {
        const {{ element }} *at = in;
        {{ sum }} v = 0;
        {% if dense %}
        for (int k = inputs; k > 0; k--) {
            const {{ factor }} w = {{ fetch }};
            v += w * *at++;
        }
        {% else %}
        for (int k = {{ count }}(counts + o); k > 0; k--) {
            uint8_t skip;
            while ((skip = ROM_UINT8(gaps++)) == 255)
                at += 255;
            at += skip;
            {
                const {{ factor }} w = {{ fetch }};
                v += w * *at;
            }
        }
        {% endif %}
        {% for line in channel %}
        {{ line }}
        {% endfor %}
        {% for line in lines %}
        {{ line }}
        {% endfor %}
    }
}
