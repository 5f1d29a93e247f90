#ifndef NET_H
#define NET_H
#define NET_INPUT_SIZE 6
#define NET_OUTPUT_SIZE 3
#define NET_ARENA_BYTES 16
void net_run(const float *input, float *output, void *arena);
#endif
