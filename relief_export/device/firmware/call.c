/* Calls a network, so that the linker keeps it; what is not known here cannot be optimised away. */
#include NET_HEADER

#ifndef NET_INPUT_TYPE
#define NET_INPUT_TYPE float
#define NET_OUTPUT_TYPE float
#endif

void entry(const NET_INPUT_TYPE *input, NET_OUTPUT_TYPE *output, void *arena) { net_run(input, output, arena); }
