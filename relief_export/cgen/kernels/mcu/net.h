/* {{ title }}
   {{ name }}_run computes one sample. It keeps nothing between calls and writes only to `output` and `arena`.
   Made for microcontrollers: {{ values }}. */
#ifndef {{ upper }}_H
#define {{ upper }}_H
{% if quantised %}

#include <stdint.h>
{% endif %}

#define {{ upper }}_INPUT_SIZE {{ input_size }} /* elements: {{ input_name }}, {{ input_shape }} */
#define {{ upper }}_OUTPUT_SIZE {{ output_size }} /* elements: {{ output_name }}, {{ output_shape }} */
{% if quantised %}

/* A number is SCALE * (q - ZERO). With {{ upper }}_QUANTIZED_IO the caller gives and gets the integers q,
   otherwise floats that are rounded and expanded on the way. */
#define {{ upper }}_INPUT_SCALE {{ input_scale }}
#define {{ upper }}_INPUT_ZERO {{ input_zero }}
#define {{ upper }}_OUTPUT_SCALE {{ output_scale }}
#define {{ upper }}_OUTPUT_ZERO {{ output_zero }}
{% if quantized_io %}
#ifndef {{ upper }}_QUANTIZED_IO
#define {{ upper }}_QUANTIZED_IO
#endif
{% endif %}
#ifndef {{ upper }}_QUANTIZED_IO
#define {{ upper }}_INPUT_TYPE float
#define {{ upper }}_OUTPUT_TYPE float
#define {{ upper }}_ARENA_BYTES {{ arena }} /* of memory that the caller lends */
#else
#define {{ upper }}_INPUT_TYPE {{ type }}
#define {{ upper }}_OUTPUT_TYPE {{ type }}
#define {{ upper }}_ARENA_BYTES {{ arena_quantised }} /* of memory that the caller lends */
#endif
{% else %}
#define {{ upper }}_INPUT_TYPE float
#define {{ upper }}_OUTPUT_TYPE float
#define {{ upper }}_ARENA_BYTES {{ arena }} /* of memory that the caller lends, aligned as floats are */
{% endif %}

#ifdef __cplusplus
extern "C" {
#endif

void {{ name }}_run(const {{ upper }}_INPUT_TYPE *input, {{ upper }}_OUTPUT_TYPE *output, void *arena);

#ifdef __cplusplus
}
#endif

#endif
