/* pixels (1 x 1 x 28 x 28) -> scores (1 x 10)
   digits_run computes one sample. It keeps nothing between calls and writes only to `output` and `arena`.
   Made for microcontrollers: weights of 4 bits that choose among sixteen values a layer, float arithmetic. */
#ifndef DIGITS_H
#define DIGITS_H

#define DIGITS_INPUT_SIZE 784 /* elements: pixels, 1 x 1 x 28 x 28 */
#define DIGITS_OUTPUT_SIZE 10 /* elements: scores, 1 x 10 */
#define DIGITS_INPUT_TYPE float
#define DIGITS_OUTPUT_TYPE float
#define DIGITS_ARENA_BYTES 4352 /* of memory that the caller lends, aligned as floats are */

#ifdef __cplusplus
extern "C" {
#endif

void digits_run(const DIGITS_INPUT_TYPE *input, DIGITS_OUTPUT_TYPE *output, void *arena);

#ifdef __cplusplus
}
#endif

#endif
