/* {{ title }} */
static void {{ name }}(const float *RESTRICT in, float *RESTRICT out, const int32_t *RESTRICT place{{ parameters }})
{
    int o, x;
    for (o = 0; o < {{ outputs }}; o++) {
        float *const to = out + o * {{ out_plane }};
        float greatest = -3.402823466e38f, sum = 0.0f;
        {% for line in channel %}
        {{ line }}
        {% endfor %}
        for (x = 0; x < {{ width }}; x++) {
            const int32_t at = place[o * {{ width }} + x];
            to[x] = at < 0 ? 0.0f : in[at];
            greatest = to[x] > greatest ? to[x] : greatest;
        }
        for (x = 0; x < {{ width }}; x++) {
            {% if logarithm %}
            to[x] -= greatest;
            sum += exp_1(to[x]);
            {% else %}
            to[x] = exp_1(to[x] - greatest);
            sum += to[x];
            {% endif %}
        }
        for (x = 0; x < {{ width }}; x++) {
            float v = {{ "to[x] - log_1(sum)" if logarithm else "to[x] / sum" }};
            {% for line in lines %}
            {{ line | replace("ROW", "0") | replace("COLUMN", "x") }}
            {% endfor %}
            to[x] = v;
        }
    }
}
