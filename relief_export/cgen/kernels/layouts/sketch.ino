// {{ title }}
// Runs the network once a second, on zeros: put a sample where the comment says.
#include <{{ name }}.h>

static {{ upper }}_INPUT_TYPE input[{{ upper }}_INPUT_SIZE];
static {{ upper }}_OUTPUT_TYPE output[{{ upper }}_OUTPUT_SIZE];
static uint8_t arena[{{ upper }}_ARENA_BYTES + 1] __attribute__((aligned(4)));

void setup() {
  Serial.begin(9600);
}

void loop() {
  // Fill input here.
  const unsigned long start = micros();
  {{ name }}_run(input, output, arena);
  const unsigned long taken = micros() - start;
  int best = 0;
  for (int i = 1; i < {{ upper }}_OUTPUT_SIZE; i++)
    if (output[i] > output[best])
      best = i;
  Serial.print(best);
  Serial.print(F(" after "));
  Serial.print(taken);
  Serial.println(F(" us"));
  delay(1000);
}
