/* {{ title }}
   {{ name }}_run computes one sample. It keeps nothing between calls and writes only to `output` and `arena`, so that
   several threads may call it at once, each with an arena of its own. */
#ifndef {{ upper }}_H
#define {{ upper }}_H

#define {{ upper }}_INPUT_SIZE {{ input_size }} /* floats: {{ input_name }}, {{ input_shape }} */
#define {{ upper }}_OUTPUT_SIZE {{ output_size }} /* floats: {{ output_name }}, {{ output_shape }} */
#define {{ upper }}_ARENA_BYTES {{ arena }} /* of memory that the caller lends, aligned to 64 bytes */

#ifdef __cplusplus
extern "C" {
#endif

void {{ name }}_run(const float *input, float *output, void *arena);

#ifdef __cplusplus
}
#endif

#endif
