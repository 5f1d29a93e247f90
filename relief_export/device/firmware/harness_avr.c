/* Runs a network on an AVR over the samples that lie in its flash, and prints, in hexadecimal on the serial line, one
   value a line: R and the bytes of an output, C and clock cycles, S and the deepest stack. */
#include <avr/interrupt.h>
#include <avr/io.h>
#include <avr/pgmspace.h>
#include <avr/sleep.h>
#include <stdint.h>
#include NET_HEADER

#ifndef NET_INPUT_TYPE
#define NET_INPUT_TYPE float
#define NET_OUTPUT_TYPE float
#endif

static NET_INPUT_TYPE input[NET_INPUT_SIZE];
static NET_OUTPUT_TYPE output[NET_OUTPUT_SIZE];
static unsigned char arena[NET_ARENA_BYTES ? NET_ARENA_BYTES : 1] __attribute__((aligned(4)));

/* Samples come last in the flash: the network's tables have to lie where 16 bits reach. */
__asm__(".section .text.samples,\"ax\",@progbits\n\t.global samples\nsamples:\n\t.incbin \"samples.bin\"\n\t"
        ".balign 2\n\t.text");
extern const uint8_t samples[];

static volatile uint16_t wraps;
ISR(TIMER1_OVF_vect) { wraps++; }

static void put(char symbol)
{
    while (!(UCSR0A & (1 << UDRE0)))
        ;
    UDR0 = symbol;
}

static void print(char kind, const void *bytes, uint8_t count)
{
    put(kind);
    for (const uint8_t *at = bytes; count; count--, at++) {
        put("0123456789abcdef"[*at >> 4]);
        put("0123456789abcdef"[*at & 15]);
    }
    put('\n');
}

static uint32_t cycles(void)
{
    uint16_t low, high;
    cli();
    low = TCNT1;
    high = wraps + ((TIFR1 & (1 << TOV1)) && low < 0x8000); /* a wrap whose interrupt has not run yet */
    sei();
    return ((uint32_t)high << 16) | low;
}

static void load(uint16_t n)
{
    for (uint16_t i = 0; i < sizeof input; i++)
#ifdef RAMPZ
        ((uint8_t *)input)[i] = pgm_read_byte_far(pgm_get_far_address(samples) + (uint32_t)n * sizeof input + i);
#else
        ((uint8_t *)input)[i] = pgm_read_byte(samples + n * sizeof input + i);
#endif
}

extern uint8_t __heap_start; /* the first byte after .bss */
enum { PAINT = 0xA5 };

int main(void)
{
    uint8_t *const top = (uint8_t *)SP; /* the next byte that a call would write */
    uint16_t painted = 0;

    UCSR0B = 1 << TXEN0;
    TCCR1B = 1;
    TIMSK1 = 1 << TOIE1;
    /* The first sample runs once more for its stack alone, without interrupts. */
    load(0);
    for (uint8_t *at = &__heap_start; at <= top; at++)
        *at = PAINT;
    net_run(input, output, arena);
    while (&__heap_start + painted <= top && (&__heap_start)[painted] == PAINT)
        painted++;
    if (!painted) /* down to the variables, and perhaps into them */
        print('S', &painted, sizeof painted);
    painted = top + 1 - (&__heap_start + painted);
    print('S', &painted, sizeof painted);
    sei();
    for (uint16_t n = 0; n < SAMPLES; n++) {
        uint32_t start, taken;
        load(n);
        start = cycles();
        net_run(input, output, arena);
        taken = cycles() - start;
        for (uint16_t i = 0; i < NET_OUTPUT_SIZE; i++)
            print('R', output + i, sizeof *output);
        print('C', &taken, sizeof taken);
    }
    cli();
    sleep_enable();
    sleep_cpu(); /* with interrupts off: the emulator ends */
    for (;;)
        ;
}
