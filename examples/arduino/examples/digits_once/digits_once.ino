// pixels (1 x 1 x 28 x 28) -> scores (1 x 10)
// Runs the network once a second, on zeros: put a sample where the comment says.
#include <digits.h>

static DIGITS_INPUT_TYPE input[DIGITS_INPUT_SIZE];
static DIGITS_OUTPUT_TYPE output[DIGITS_OUTPUT_SIZE];
static uint8_t arena[DIGITS_ARENA_BYTES + 1] __attribute__((aligned(4)));

void setup() {
  Serial.begin(9600);
}

void loop() {
  // Fill input here.
  const unsigned long start = micros();
  digits_run(input, output, arena);
  const unsigned long taken = micros() - start;
  int best = 0;
  for (int i = 1; i < DIGITS_OUTPUT_SIZE; i++)
    if (output[i] > output[best])
      best = i;
  Serial.print(best);
  Serial.print(F(" after "));
  Serial.print(taken);
  Serial.println(F(" us"));
  delay(1000);
}
